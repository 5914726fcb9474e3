"""Find models, tokenizers and datasets by name, in local directories or on the Hub; upload models to the Hub."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from tinygpt2.errors import ModelError, UnreadableError, one_line
from tinygpt2.utils.progress import ProgressStage, detail, track

_OTHER_WAYS = "or give a local directory or file (HF_ENDPOINT: a mirror, SSL_CERT_FILE: a proxy's certificate)"
_LOG_IN = "run `hf auth login` with a token that may write, or set HF_TOKEN to one"
DESCRIPTION_FILES = ["config.json", "generation_config.json"]
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json",
]  # fmt: skip
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".safetensors")


def local_directory(name: str, role: str, *, allow_pickle: bool = False, weights: bool = False) -> Path:
    """Return the directory with the files of `name`. Files of a Hub id are downloaded if they are not in the cache.

    Args:
        name: a directory, or a Hub id such as `gpt2` or `owner/name`. `ID@REVISION` means a branch, tag or commit.
        role: a word for the error message: `model`, `teacher` or `tokenizer`.
        allow_pickle: with `weights`, download pickled weights if there are no safetensors.
        weights: download weights, not only configuration and tokenizer.

    Raises:
        ModelError: there is no such directory, and the files are neither in the cache nor available from the Hub.
    """
    if (path := local_path(name, role)) is not None:
        detail(f"{role} {name}: a local directory")
        return path
    repository, revision = _repository(name)
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        with _download_reports(f"download {role} {name}") as reports:
            found = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],  # a pattern's * also matches /
                tqdm_class=reports,
            )
        return Path(found)

    try:
        directory = fetch(DESCRIPTION_FILES + TOKENIZER_FILES + _SAFETENSORS * weights)
        if weights and allow_pickle and not any(directory.glob("model*.safetensors")):
            directory = fetch(DESCRIPTION_FILES + TOKENIZER_FILES + _PICKLES)
    except Exception as error:  # network failures raise many kinds of exceptions
        problem, hint = _explanation(error, name, "model")
        raise ModelError(f"{role} {name!r} is not a local directory, and {problem}", hint) from error
    detail(f"{role} {name}: from the Hub's cache, {directory} (commit {hub_revision(name, directory)})")
    return directory


def local_path(name: str, role: str) -> Path | None:
    """Return the directory that a name means, or None if it may be a Hub id.

    Raises:
        ModelError: it is a file, or the path of a directory that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{role} {name} is a file", "give the directory that holds config.json and model.safetensors")
    if not is_hub_id(name):
        raise ModelError(f"no such directory: {role} {name}", "give a local directory or a Hub id such as gpt2")
    return None


@contextmanager
def _download_reports(description: str) -> Iterator[type]:
    """Yield a class that `snapshot_download` uses for its bars; it reports the bytes of all files as one stage.

    The library makes several bars: for files, for bytes that are received, and for bytes that are stored. The last one
    is the first to be refreshed, when the size of a file is known.
    """
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    lock = threading.Lock()
    with ExitStack() as stack:

        class Reports(tqdm):  # type: ignore[misc]
            stored: Reports | None = None

            def __init__(self, *items: Any, **options: Any) -> None:
                self._in_bytes, self._stage = options.get("unit") == "B", ProgressStage()
                options.pop("name", None)
                super().__init__(*items, **{**options, "disable": True})

            def refresh(self, *_: Any, **__: Any) -> None:
                with lock:
                    if self._in_bytes and self.total and Reports.stored is None:
                        Reports.stored, self._stage = self, stack.enter_context(track(description, None, "bytes"))
                    if self.total:
                        self._stage.expect(int(self.total))

            def update(self, n: float | None = 1) -> None:
                self._stage.advance(int(n or 0))

        yield Reports


def download_size(name: str, otherwise: int) -> int:
    """Return the bytes of a Hub model's safetensors that still have to be downloaded: 0 if the cache holds them.

    Args:
        otherwise: returned if the Hub does not answer.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    repository, revision = _repository(name)
    if constants.HF_HUB_OFFLINE or isinstance(
        try_to_load_from_cache(repository, "model.safetensors", revision=revision), str
    ):
        return 0
    try:
        files = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=5).siblings or []
    except Exception:  # it only improves a note
        return otherwise
    weights = [file for file in files if any(fnmatch(file.rfilename, pattern) for pattern in _SAFETENSORS)]
    return sum(file.size or 0 for file in weights) or otherwise


def is_hub_id(name: str) -> bool:
    """Return whether a name that is no local path may be a Hub id: NAME or OWNER/NAME, perhaps with @REVISION."""
    repository, _ = _repository(name)
    return not repository.startswith((".", "/", "~")) and repository.count("/") <= 1


def _repository(name: str) -> tuple[str, str | None]:
    """Return the id and the revision of ID@REVISION."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def at_commit(name: str, commit: str) -> str:
    """Return ID@COMMIT for a Hub id, with or without a revision."""
    return f"{_repository(name)[0]}@{commit}"


def hub_revision(name: str | None, directory: Path | None) -> str | None:
    """Return the commit of the model in a directory of the Hub's cache; None if its name is that of a directory."""
    if name is None or directory is None or Path(name).expanduser().is_dir():
        return None
    return directory.name if directory.parent.name == "snapshots" else None


def other_weights(name: str) -> list[str]:
    """Return the files on the Hub that look like weights; none for a local directory, or if the Hub does not answer."""
    if Path(name).expanduser().exists() or not is_hub_id(name):
        return []
    from huggingface_hub import HfApi

    repository, revision = _repository(name)
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
    except Exception:  # it only improves an error message
        return []
    return sorted(file for file in files if "/" not in file and file.endswith(OTHER_WEIGHTS))


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error, its cause, the cause of that, and so on."""
    found: BaseException | None = error
    causes: list[BaseException] = []
    while found is not None and found not in causes:
        causes.append(found)
        found = found.__cause__ or found.__context__
    return causes


def _status(causes: list[BaseException]) -> int | None:
    """Return the status of the Hub's answer, if it answered."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)), None)


def _explanation(error: BaseException, name: str, kind: Literal["model", "dataset"]) -> tuple[str, str]:
    """Return why something could not be had from the Hub, as the rest of a sentence, and what helps."""
    why, helps = _reason(error, name, kind)
    return why, f"{helps}; {_OTHER_WAYS}"


def _reason(error: BaseException, name: str, kind: Literal["model", "dataset"]) -> tuple[str, str]:
    """Return why something could not be had from the Hub, and what helps against that."""
    from huggingface_hub import errors

    repository, revision = _repository(name)
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    download = f"`hf download {repository}{' --repo-type dataset' if kind == 'dataset' else ''}` on another machine"
    causes = _causes(error)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    status = _status(causes)
    why = one_line(causes[-1], 200) or type(causes[-1]).__name__
    if caused_by(errors.GatedRepoError):
        return (
            f"the Hub gives it only to people who accepted its licence: {why}",
            f"accept the licence at {page} and run `hf auth login`",
        )
    if caused_by(errors.RevisionNotFoundError):
        return f"it has no revision {revision!r} on the Hub", f"choose a branch, tag or commit: {page}/commits/main"
    if caused_by(errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            f"there is no public {kind} of that name on the Hub: {why}",
            f"check the spelling; for a private {kind}, run `hf auth login`",
        )
    if caused_by(errors.HFValidationError):
        return f"no {kind} on the Hub can have this name: {why}", "a Hub id looks like gpt2 or user/name"
    if caused_by(errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, but the cache of the Hub does not hold it",
            f"unset HF_HUB_OFFLINE, or run {download} and copy its cache",
        )
    number = next((cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno), None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return f"its files cannot be stored in the Hub's cache: {why}", "set HF_HOME to a folder with space for them"
    return (
        f"it could not be downloaded from the Hub: {why}",
        f"check the network; {download} makes a cache that you can copy",
    )


def stream_dataset(name: str, configuration: str | None) -> tuple[Any, str]:
    """Return a Hub dataset's splits by name, read as a stream, and its revision.

    Raises:
        UnreadableError: the dataset is not available from the Hub.
    """
    import datasets
    from huggingface_hub import HfApi

    try:
        # fails at once if the Hub does not answer; `datasets` would retry for a long time
        revision = str(HfApi().dataset_info(name, timeout=20).sha)
        return datasets.load_dataset(name, configuration, streaming=True, revision=revision), revision
    except Exception as error:  # network failures raise many kinds of exceptions
        problem, hint = _explanation(error, name, "dataset")
        what = f"no such file or directory: {name}, and no dataset of that name could be read from the Hub: {problem}"
        raise UnreadableError(what, hint) from error


def dataset_rows(name: str, configuration: str | None, split: str, *, parquet: bool = False) -> list[dict[str, Any]]:
    """Return all rows of a dataset's split, from the Hub or from the cache of earlier downloads.

    Args:
        name: the dataset's Hub id.
        configuration: one of its configurations, if it has several.
        split: one of its splits.
        parquet: read the Hub's own conversion of the dataset to Parquet.

    Raises:
        UnreadableError: the dataset is neither on the Hub nor in the cache.
    """
    import datasets
    from huggingface_hub import HfApi

    where: dict[str, Any] = {"name": configuration}
    if parquet:
        where = {"revision": "refs/convert/parquet", "data_files": {split: f"{configuration}/{split}/*.parquet"}}
    unreachable: Exception | None = None
    try:
        HfApi().dataset_info(name, revision=where.get("revision"), timeout=20)
    except Exception as error:  # network failures raise many kinds of exceptions
        unreachable = error
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # if the Hub does not answer, `datasets` would retry for a long time before it uses its cache
        datasets.config.HF_HUB_OFFLINE = offline or unreachable is not None
        return list(datasets.load_dataset(name, split=split, **where))
    except Exception as error:
        problem, hint = _explanation(unreachable or error, name, "dataset")
        raise UnreadableError(f"the dataset {name} is not in the cache, and {problem}", hint) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def hub_page(repository: str) -> str:
    """Return the address of a model's page on the Hub, or on the mirror that HF_ENDPOINT names."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def upload(
    directory: Path, files: list[str], repository: str, *, private: bool, revision: str | None, message: str
) -> str:
    """Upload files of a directory to a model on the Hub in one commit, and return the model's page.

    Args:
        files: their names in the directory. Files on the Hub that have other names stay.
        repository: USER/NAME; it is made if it does not exist.
        private: whether a new repository is private.
        revision: a branch, which is made if it does not exist; None is the main branch.
        message: of the commit.

    Raises:
        ModelError: there is no token, the Hub refuses it or the card, or the Hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise ModelError("there is no token for the Hub", _LOG_IN)
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, str(directory / name)) for name in files]
        api.create_commit(repository, operations, commit_message=message, revision=revision)
    except Exception as error:  # network failures raise many kinds of exceptions
        problem, hint = _refusal(error, repository)
        raise ModelError(f"{repository} could not be uploaded: {problem}", hint) from error
    return str(url)


def _refusal(error: BaseException, repository: str) -> tuple[str, str]:
    """Return why the Hub did not take an upload, and what helps."""
    from huggingface_hub import errors

    causes = _causes(error)
    status, why = _status(causes), one_line(causes[-1], 200) or type(causes[-1]).__name__
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    if status == 401:
        return "the Hub does not know the token", _LOG_IN
    if status in (403, 404):
        return f"the token may not write to {repository}", f"{_LOG_IN}; {repository.split('/')[0]} has to be its owner"
    if isinstance(error, ValueError) or (status == 400 and "metadata" in str(error)):  # its check of a model card
        return f"the Hub refuses README.md: {one_line(error, 300)}", "correct the lines between --- in README.md"
    if status is not None:
        return f"the Hub answered {status}: {one_line(error, 200)}", "try again later"
    return why, "check the network, HF_ENDPOINT (a mirror) and SSL_CERT_FILE (a proxy's certificate)"
