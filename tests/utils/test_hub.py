"""The Hub's answers: each failure names its cause and the step that helps."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from tinygpt2.errors import ModelError
from tinygpt2.models.loading import load_model
from tinygpt2.utils import hub, progress


class _Answer(BaseHTTPRequestHandler):
    """Answers as the Hub does for models that are gated, gone, private, or whose revision does not exist."""

    def do_GET(self) -> None:
        codes = {"/gated/": (403, "GatedRepo"), "/gone/": (401, "RepoNotFound"), "/broken/": (500, ""),
                 "/rev/": (404, "RevisionNotFound")}  # fmt: skip
        code, kind = next((answer for part, answer in codes.items() if part in self.path), (404, "RepoNotFound"))
        self.send_response(code)
        self.send_header("X-Error-Code", kind)
        self.send_header("X-Error-Message", "said by the server")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Give a function that sets the Hub's address; the variables of this machine's network do not count."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.utils.close_session()
    yield lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)
    huggingface_hub.utils.close_session()


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "cause", "help_"),
    [
        ("someone/gated", "accepted its licence", "accept the licence at https://huggingface.co/someone/gated and run `hf auth"),
        ("someone/gone", "no public model of that name", "check the spelling; for a private model, run `hf auth login`"),
        ("someone/gone", "no public model of that name", "or give a local directory or file (HF_ENDPOINT"),
        ("no-such-model", "no public model of that name", "check the spelling"),
        ("someone/rev@v9", "it has no revision 'v9'", "https://huggingface.co/someone/rev/commits/main"),
        ("someone/broken", "500", "HF_ENDPOINT"),
        ("no_such--model..", "no model on the Hub can have this name", "give a local directory"),
    ],
)  # fmt: skip
def test_each_answer_has_its_own_message(
    online: Callable[[str], None], server: str, name: str, cause: str, help_: str
) -> None:
    online(server)
    with pytest.raises(ModelError) as caught:
        load_model(name, "teacher")
    assert cause in caught.value.message
    assert name in caught.value.message
    assert help_ in (caught.value.hint or "")
    assert "\n" not in caught.value.message


def test_a_hub_that_cannot_be_reached(online: Callable[[str], None]) -> None:
    online("http://127.0.0.1:9")
    with pytest.raises(ModelError) as caught:
        load_model("someone/model")
    assert "refused" in caught.value.message
    assert "HF_ENDPOINT" in (caught.value.hint or "")
    assert "SSL_CERT_FILE" in (caught.value.hint or "")


def test_only_what_is_needed_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path) -> None:
    files = [
        "config.json", "generation_config.json", "model.safetensors", "model.fp16.safetensors", "vocab.txt", "spiece.model",
        "tokenizer.json", "merges.txt", "vocab.json", "pytorch_model.bin", "tf_model.h5", "README.md", "training_args.bin",
        "onnx/config.json", "checkpoint-500/model.safetensors", "sub/spiece.model", "trainer_state.json",
    ]  # fmt: skip
    fetched: list[set[str]] = []

    def download(
        name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str], tqdm_class: type
    ) -> str:
        assert (name, revision) == ("someone/model", "v2")
        fetched.append(
            set(huggingface_hub.utils.filter_repo_objects(
                files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            ))
        )  # fmt: skip
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    described = {"config.json", "generation_config.json"}
    tokenizer = {"vocab.txt", "spiece.model", "tokenizer.json", "merges.txt", "vocab.json"}
    hub.local_directory("someone/model@v2", "model")
    hub.local_directory("someone/model@v2", "model", weights=True)
    hub.local_directory("someone/model@v2", "model", weights=True, allow_pickle=True)
    (tmp_path / "model.safetensors").touch()
    hub.local_directory("someone/model@v2", "model", weights=True, allow_pickle=True)
    safe = {*described, *tokenizer, "model.safetensors"}
    assert fetched == [described | tokenizer, safe, safe, described | tokenizer | {"pytorch_model.bin"}, safe]


def test_a_model_that_has_only_pickles_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path
) -> None:
    model = Path(shutil.copytree(teacher, tmp_path / "snapshots" / ("a" * 40)))
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()

    def download(name: str, allow_patterns: list[str], **_: Any) -> str:
        if "pytorch_model.bin" in allow_patterns:
            torch.save(weights, model / "pytorch_model.bin")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    on_the_hub = ["config.json", "pytorch_model.bin", "old/pytorch_model.bin"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: on_the_hub)
    with pytest.raises(
        ModelError, match=r"someone/model has pickled weights only \(pytorch_model.bin\)\n.*--allow-pickle"
    ):
        load_model("someone/model")
    loaded, directory = load_model("someone/model", allow_pickle=True)
    assert torch.equal(loaded.transformer.ln_f.weight, weights["transformer.ln_f.weight"])
    assert hub.hub_revision("someone/model", directory) == "a" * 40
    assert hub.hub_revision(str(directory), directory) is None
    assert hub.hub_revision(str(teacher), teacher) is None


def test_debugging_shows_the_cause(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "Traceback" not in cli("verify", "someone/model").err
    monkeypatch.setenv("TINYGPT2_DEBUG", "1")
    outcome = cli("verify", "someone/model")
    assert outcome.code == 4
    assert "OfflineModeIsEnabled" in outcome.err


def test_a_download_is_one_stage_with_the_bytes_of_all_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library makes three bars, and refreshes the one of stored bytes first, as its own code does."""
    monkeypatch.setattr(progress, "_mode", "plain")
    monkeypatch.setattr(progress, "_level", "normal")
    told: list[str] = []

    def download(*_: Any, tqdm_class: type, **__: Any) -> str:
        received, stored = (tqdm_class(total=0, initial=0, unit="B", desc=name) for name in ("received", "stored"))
        for size in (2_000_000, 6_000_000):
            stored.total += size
            received.total += size
            stored.refresh()
            received.update(size)
            stored.update(size // 2)
        assert list(tqdm_class(["a", "b"], desc="files")) == ["a", "b"]
        (task,) = progress._bars.tasks
        told.append(f"{task.description} {task.total}")
        received.set_description_str("complete")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.local_directory("someone/model", "teacher", weights=True)
    assert told == ["download teacher someone/model 8000000"]
    assert capsys.readouterr().err == "download teacher someone/model\n"
