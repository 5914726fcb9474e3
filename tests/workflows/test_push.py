"""`push` against a server on this machine that speaks the calls of the Hub that it needs."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from tinygpt2 import FinetuneConfig, PushConfig, finetune, push
from tinygpt2.errors import ModelError

# huggingface_hub 2.4 calls its HTTP library in a way that is deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass
class Hub:
    """What the server received, and how it answers."""

    status: int = 200  # of the call that makes a repository
    refused_card: str | None = None
    created: list[dict] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    commits: list[tuple[str, list[dict]]] = field(default_factory=list)

    def files(self) -> dict[str, bytes]:
        """The content of every file of the last commit."""
        found = {}
        for line in self.commits[-1][1]:
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.large[value["oid"]]
        return found


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Keep the terminal quiet."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, value: object) -> None:
        raw = json.dumps(value).encode() if not isinstance(value, str) else value.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})

    def do_POST(self) -> None:
        raw, hub, here = self.body(), self.hub, f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(raw))
            page = {"url": f"{here}/me/small", "name": "me/small", "id": "1"}
            self.answer(hub.status, page if hub.status == 200 else {"error": "no"})
        elif self.path == "/api/validate-yaml":
            hub.cards.append(json.loads(raw)["content"])
            errors = [{"message": hub.refused_card}] if hub.refused_card else []
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        elif "/branch/" in self.path:
            hub.branches.append(self.path.split("/branch/")[1])
            self.answer(200, {})
        elif "/preupload/" in self.path:
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(("tensors", "png")) else "regular",
                 "shouldIgnore": False} for one in json.loads(raw)["files"]
            ]  # fmt: skip
            self.answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": one["oid"], "size": one["size"],
                 "actions": {"upload": {"href": f"{here}/put/{one['oid']}", "header": {}}}}
                for one in json.loads(raw)["objects"]
            ]  # fmt: skip
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in raw.splitlines()]
            hub.commits.append((self.path.split("/commit/")[1], lines))
            self.answer(200, {"commitUrl": f"{here}/me/small/commit/abc", "commitOid": "abc", "hookOutput": ""})
        else:
            self.answer(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go through plain HTTP
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def trained(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a text, with checkpoints, a packed text and everything else that stays."""
    out = tmp_path_factory.mktemp("a folder") / "run"
    finetune(FinetuneConfig(model=str(teacher), data=str(corpus), out=str(out), max_steps=2, license="mit"))
    return out


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "small"))


EXPECTED = {
    "model.safetensors", "SHA256SUMS", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "README.md", "curves.png",
}  # fmt: skip


def test_what_belongs_on_the_hub_is_uploaded_and_nothing_else(model: Path, hub: Hub, cli: Callable) -> None:
    assert {"checkpoints", "data", "config.yaml", "metrics.jsonl"} <= {path.name for path in model.iterdir()}
    outcome = cli("push", model, "--repo", "me/small", "--private", "--message", "hello", "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.json["repo"] == "me/small"
    assert outcome.json["url"] == f"{constants.ENDPOINT}/me/small"
    assert not outcome.json["dry_run"]
    files = hub.files()
    assert files.keys() - {"report.html"} == EXPECTED
    assert {one["path"]: one["bytes"] for one in outcome.json["files"]} == {n: len(c) for n, c in files.items()}
    for name, content in files.items():
        assert content == (model / name).read_bytes()
        assert str(model.parent).encode() not in content
    (created,) = hub.created
    assert created["name"] == "small"
    assert created["organization"] == "me"
    assert created.get("private") or created.get("visibility") == "private"
    revision, lines = hub.commits[0]
    assert revision == "main"
    assert lines[0]["value"]["summary"] == "hello"
    assert hub.cards == [(model / "README.md").read_text()]


def test_the_graph_of_an_onnx_export_is_uploaded(teacher: Path, corpus: Path, tmp_path: Path, cli: Callable) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "small-onnx"
    made = cli("export", teacher, "--to", "onnx", "--out", out, "--data", corpus / "00.txt", "--license", "mit")
    assert made.code == 0, made.err
    outcome = cli("push", out, "--repo", "me/small", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert {"onnx/model.onnx", "config.json", "tokenizer.json"} <= {one["path"] for one in outcome.json["files"]}


def test_a_dry_run_needs_no_network_and_no_token(model: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    outcome = cli("push", model, "--repo", "me/small", "--dry-run", "--json")
    assert outcome.code == 0
    assert outcome.json["dry_run"]
    assert {one["path"] for one in outcome.json["files"]} - {"report.html"} == EXPECTED
    shown = cli("push", model, "--repo", "me/small", "--dry-run")
    assert "would be uploaded to http://127.0.0.1:9/me/small" in shown.out


def test_a_branch_is_made(model: Path, hub: Hub) -> None:
    push(PushConfig(out=str(model), repo="me/small", revision="second"))
    assert hub.branches == ["second"]
    assert hub.commits[0][0] == "second"


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [(401, "does not know the token", "hf auth login"), (403, "may not write to me/small", "HF_TOKEN"),
     (500, "the Hub answered 500", "again later")],
)  # fmt: skip
def test_a_refusal_is_explained(status: int, message: str, hint: str, model: Path, hub: Hub, cli: Callable) -> None:
    hub.status = status
    outcome = cli("push", model, "--repo", "me/small")
    assert outcome.code == 4
    assert message in outcome.err
    assert hint in outcome.err
    assert not hub.commits


def test_a_card_that_the_hub_refuses_is_explained(model: Path, hub: Hub) -> None:
    hub.refused_card = '"license" must be one of [...]'
    with pytest.raises(ModelError, match=r"refuses README\.md"):
        push(PushConfig(out=str(model), repo="me/small"))
    assert not hub.commits


def test_without_a_token_or_a_network(model: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    outcome = cli("push", model, "--repo", "me/small")
    assert outcome.code == 4
    assert "there is no token for the Hub" in outcome.err
    assert "hf auth login" in outcome.err
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_test")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    outcome = cli("push", model, "--repo", "me/small")
    assert outcome.code == 4
    assert "HF_ENDPOINT" in outcome.err


def test_faulty_and_unfinished_models_are_refused(model: Path, hub: Hub, cli: Callable) -> None:
    arguments = ("push", model, "--repo", "me/small")
    card = (model / "README.md").read_text()
    (model / "README.md").write_text(card + f"\nMade in {model}/there.\n")
    outcome = cli(*arguments)
    assert outcome.code == 4
    assert "names folders of this machine" in outcome.err
    (model / "README.md").write_text("---\n: [\n---\n")
    assert cli(*arguments).code == 4
    (model / "README.md").write_text(card)
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (model / "model.safetensors").write_bytes(raw)
    outcome = cli(*arguments)
    assert outcome.code == 4
    assert "is faulty, so it is not uploaded" in outcome.err
    (model / "model.safetensors").unlink()
    (model / "config.json").unlink()
    record = json.loads((model / "run.json").read_text())
    (model / "run.json").write_text(json.dumps({key: value for key, value in record.items() if key != "result"}))
    outcome = cli(*arguments)
    assert outcome.code == 4
    assert "is not finished" in outcome.err
    assert cli("push", model / "data", "--repo", "me/small").code == 3
    assert cli("push", model / "nothing", "--repo", "me/small").code == 3
    assert not hub.created


@pytest.mark.parametrize("repo", ["small", "a/b/c", "me/sm all", "me/a..b", "/me/small", "me/"])
def test_names_that_no_repository_can_have(repo: str, cli: Callable) -> None:
    outcome = cli("push", "out", "--repo", repo)
    assert outcome.code == 2
    assert "expected USER/NAME" in outcome.err


def test_a_report_with_folders_and_a_missing_license_are_said(model: Path, cli: Callable) -> None:
    (model / "report.html").write_text(f"<p>{model}/x</p>")
    (model / "README.md").write_text((model / "README.md").read_text().replace("license: mit\n", ""))
    outcome = cli("push", model, "--repo", "me/small", "--dry-run")
    assert outcome.code == 0
    assert "report.html stays here" in outcome.err
    assert "names no license" in outcome.err
    assert "report.html" not in outcome.out


def test_the_card_of_a_run_is_one_for_the_hub(trained: Path) -> None:
    card = ModelCard.load(trained / "README.md")
    assert card.data.license == "mit"
    assert card.data.get("base_model") is None  # the teacher is a local folder
    (result,) = card.data.eval_results
    assert result.metric_type == "perplexity"
    assert result.dataset_name == "held-out text"
    assert result.metric_value > 1
    assert str(trained.parent) not in card.content
