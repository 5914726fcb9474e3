"""Small real things that the tests share: a corpus, a tokenizer, a dataset, a teacher."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import install_import_hook

# Shapes in annotations are checked under the tests.
CHECKED = [
    "tinygpt2.objectives",
    "tinygpt2.models.activations",
    "tinygpt2.evaluation.scoring",
    "tinygpt2.evaluation.conventions",
]
install_import_hook(CHECKED, "beartype.beartype")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

# torch is imported where a model is made, because some tests also run without it
import pytest  # noqa: E402

from tinygpt2 import PregenerateConfig, TrainTokenizerConfig, pregenerate, train_tokenizer  # noqa: E402
from tinygpt2.cli import app  # noqa: E402
from tinygpt2.data.tokenizer import load_tokenizer  # noqa: E402
from tinygpt2.errors import InterruptedRunError  # noqa: E402

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "log",
    "and",
    "then",
    "it",
    "was",
    "very",
    "happy",
    "sad",
    "big",
    "small",
    "red",
    "blue",
    "日本",
    "naïve",
]
LENGTH = 32


def sentences(count: int, seed: int) -> str:
    """Return text with enough structure to be learned and enough variety to be held out."""
    pick = random.Random(seed)
    return " ".join(" ".join(pick.choices(WORDS, k=pick.randint(4, 12))) + "." for _ in range(count))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty text files in a directory."""
    root = tmp_path_factory.mktemp("corpus")
    for index in range(40):
        (root / f"{index:02}.txt").write_text(sentences(30, index), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def tokenizer_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 320 tokens."""
    out = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(TrainTokenizerConfig(source=[str(corpus)], vocab_size=320, out=str(out)))
    return out


@pytest.fixture(scope="session")
def data(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in blocks of 32 tokens."""
    out = tmp_path_factory.mktemp("data") / "d"
    config = PregenerateConfig(
        source=[str(corpus)], tokenizer=str(tokenizer_dir), out=str(out), sequence_length=LENGTH, test_fraction=0.1
    )
    pregenerate(config)
    return out


@pytest.fixture(scope="session")
def few(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tenth of the corpus in such blocks, for tests that read all of them several times."""
    out = tmp_path_factory.mktemp("few") / "d"
    source = [str(corpus / f"{number:02}.txt") for number in range(4)]
    how = {"tokenizer": str(tokenizer_dir), "sequence_length": LENGTH, "test_fraction": 0.25}
    pregenerate(PregenerateConfig(source=source, out=str(out), **how))
    return out


def make_model(path: Path, tokenizer_dir: Path | None, seed: int = 0, **shape: int) -> Path:
    """Save a random GPT-2 with lively weights (GPT-2's own start is nearly uniform)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from tinygpt2.models.saving import save_model

    tokenizer = load_tokenizer(str(tokenizer_dir)) if tokenizer_dir else None
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    base = {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": LENGTH, "vocab_size": 320}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**base, **shape}, **ids, initializer_range=0.2))
    save_model(model, path, tokenizer, "# test\n")
    return path


@pytest.fixture(scope="session")
def teacher(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 4 layers of 32."""
    return make_model(tmp_path_factory.mktemp("teacher") / "m", tokenizer_dir)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts and models that TINYGPT2_TEST_DATA names; skips without it."""
    name = os.environ.get("TINYGPT2_TEST_DATA")
    if not name or not Path(name).is_dir():
        pytest.skip("TINYGPT2_TEST_DATA names no folder")
    return Path(name)


def full_disk(*_: object) -> None:
    """Stand for a function that writes: there is no space left."""
    raise OSError(28, "No space left on device")


class Outcome:
    """Exit code and streams of one command line."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        """Standard output, which must be exactly one JSON object."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            app.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Outcome(exit_.value.code, out, err)

    return run


_LONG = ("runtime/test_launch", "fake_gpu", "test_benchmarks", "cuts", "training/test_", "cli/test_cli", "exporting")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: next((rank for rank, part in enumerate(_LONG) if part in str(item.path)), len(_LONG)))


@pytest.fixture(scope="session", autouse=True)
def processes_that_fork() -> Iterator[None]:
    """Start the processes of `num_processes` as forks of one that has imported torch, which takes seconds.

    The command line starts them as everywhere else.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        yield
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tinygpt2.workflows.train", "tinygpt2.evaluation.perplexity"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tinygpt2.runtime.launch.get_context", lambda _: context)
        yield


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Stop the training run within after a step, as a signal would, and expect that it says so."""
    from tinygpt2.training import loop

    original = loop._Run.step

    def stopped(self: loop._Run, *, stop: bool) -> object:
        return original(self, stop=stop or self.state.step == step)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop._Run, "step", stopped)
        with pytest.raises(InterruptedRunError):
            yield
