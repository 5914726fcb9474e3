"""`push`: upload a model to the Hub, after it has been checked. What belongs to its training stays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinygpt2.config.workflows import PushConfig, VerifyConfig
from tinygpt2.errors import DataError, ModelError, listed, one_line
from tinygpt2.models.directory import weight_files
from tinygpt2.models.weights import CHECKSUMS
from tinygpt2.utils.files import folders_named, read_text
from tinygpt2.utils.html_report import REPORT
from tinygpt2.utils.hub import DESCRIPTION_FILES, TOKENIZER_FILES, hub_page, upload
from tinygpt2.utils.progress import say, warn
from tinygpt2.workflows.runs import is_run, run_status
from tinygpt2.workflows.verification import verify

CARD, PICTURES = "README.md", ("curves.png", "importance.png", "front.png")
_TEXTS = (CARD, *DESCRIPTION_FILES, "tokenizer_config.json")  # the files that may name a folder of this machine
_MESSAGE = "Upload a GPT-2 with tinygpt2"


@dataclass(frozen=True)
class PushedFile:
    """A file that `push` uploads, and its size."""

    path: str
    bytes: int


@dataclass(frozen=True)
class PushResult:
    """The result of `push`.

    Attributes:
        repo: the id on the Hub.
        url: its page.
        files: what was uploaded, or with `dry_run` what would be.
        dry_run: whether nothing was uploaded.
    """

    repo: str
    url: str
    files: list[PushedFile]
    dry_run: bool


def push(config: PushConfig) -> PushResult:
    """Upload a model to the Hub: weights, configurations, tokenizer, card, pictures and report.

    Checkpoints, packed texts, options, metrics and everything else in the directory stay. The model is checked first,
    as `verify` does.

    Raises:
        DataError: there is no model in the directory.
        ModelError: the run is not finished, the model or its card is faulty or names a folder of this machine, there
            is no token, or the Hub cannot be reached or refuses the upload.
    """
    out = Path(config.out)
    _check_finished(out)
    checked = verify(VerifyConfig(path=config.out))
    if checked.kind != "model":
        raise DataError(f"{out} is a dataset", "push uploads models")
    if not checked.ok:
        raise ModelError(
            f"{out} is faulty, so it is not uploaded: {listed(checked.problems)}", f"tinygpt2 verify {out}"
        )
    _check_card(out)
    files = [PushedFile(name, (out / name).stat().st_size) for name in _names(out)]
    url = hub_page(config.repo)
    if not config.dry_run:
        say(f"upload {len(files)} files, {sum(file.bytes for file in files) / 1e6:,.1f} MB, to {url}")
        url = upload(
            out,
            [file.path for file in files],
            config.repo,
            private=config.private,
            revision=config.revision,
            message=config.message or _MESSAGE,
        )
    return PushResult(config.repo, url, files, config.dry_run)


def _check_finished(out: Path) -> None:
    """Check that there is a model, and that no run still works on it.

    Raises:
        DataError: there is no such directory.
        ModelError: a run has not finished it.
    """
    if not out.is_dir():
        raise DataError(f"no such directory: {out}", "push uploads the directory of a model")
    if is_run(out) and (state := run_status(out).state) != "done":
        raise ModelError(f"the run in {out} is not finished: {state}", "wait until it ends, or finish it with --resume")


def _check_card(out: Path) -> None:
    """Check that the card is one for the Hub, and that the texts name no folder of this machine.

    Raises:
        ModelError: the card is missing or cannot be read, or a text names a folder.
    """
    from huggingface_hub import ModelCard

    if not (out / CARD).is_file():
        raise ModelError(f"{out} has no {CARD}", "write one: it is the model's page on the Hub")
    try:
        card = ModelCard(read_text(out / CARD))
    except Exception as error:  # YAML and the checks of huggingface_hub raise many kinds
        raise ModelError(f"{out / CARD} is not a model card: {one_line(error, 300)}") from error
    if card.data.get("license") is None:
        warn(f"{CARD} names no license, without which nobody else may use the model; add a line such as `license: mit`")
    for name in _TEXTS:
        if (out / name).is_file() and (folders := folders_named(read_text(out / name))):
            raise ModelError(
                f"{out / name} names folders of this machine: {listed(folders)}", "edit it, and push again"
            )


def _names(out: Path) -> list[str]:
    """Return the names of the files that belong on the Hub.

    Raises:
        ModelError: there are no weights.
    """
    weights = weight_files(out)
    index = [f"{weights[0].name.split('-')[0]}.safetensors.index.json"] if len(weights) > 1 else []
    graphs = [f"onnx/{file.name}" for file in sorted((out / "onnx").glob("*")) if file.is_file()]
    if not (weights or graphs):
        raise ModelError(f"{out} holds neither safetensors nor an ONNX graph", "push uploads the directory of a model")
    patterns = (*DESCRIPTION_FILES, *TOKENIZER_FILES, CARD, CHECKSUMS, *PICTURES)
    others = {file.name for pattern in patterns for file in out.glob(pattern) if file.is_file()}
    if (out / REPORT).is_file():
        if folders := folders_named(read_text(out / REPORT)):
            say(f"{REPORT} stays here, because it names folders of this machine: {listed(folders)}")
        else:
            others.add(REPORT)
    return [*(file.name for file in weights), *index, *graphs, *sorted(others)]
