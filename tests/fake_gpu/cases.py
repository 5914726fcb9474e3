"""What runs on the fake GPU: the training loop and everything else that computes, for each way to train."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel

from tests.fake_gpu.device import fake_gpu
from tests.fake_gpu.recorder import Counts, Recorder
from tinygpt2.compression.calibration import calibration_batches, mean_loss
from tinygpt2.compression.cut import KeptParts, cut_model
from tinygpt2.compression.importance import active_dimensions, depth_importance, important_dimensions
from tinygpt2.compression.least_squares import refit
from tinygpt2.compression.rotation import stream_moments
from tinygpt2.compression.selection import projection_moments
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.data.dataset import Blocks, PackedDataset
from tinygpt2.evaluation.scoring import Scorer, windows
from tinygpt2.models.loading import random_model
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.objectives import logits
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.planning.batch_size import fit_batch
from tinygpt2.training import job as jobs
from tinygpt2.training import loop
from tinygpt2.training.job import Job
from tinygpt2.training.step import Step
from tinygpt2.training.teacher_cache import TeacherCache

RECIPES = ("default", "distilgpt2", "tinygpt2", "truncation")
STEPS = 3  # the optimizer has its state, and everything that is made once is made, before the last one


@dataclass(frozen=True)
class Case:
    """One way to train."""

    recipe: str = "default"
    precision: str = "fp32"
    optimizer: str = "muon"
    padded: bool = False
    accumulation: int = 1
    quantize: Literal["q8_0", "q4_0"] | None = None

    @property
    def name(self) -> str:
        """The case in one word."""
        padded = "padded" if self.padded else "full"
        return f"{self.recipe}-{self.precision}-{self.optimizer}-{padded}-{self.accumulation}"


def every_case() -> list[Case]:
    """Return all cases."""
    ways = (RECIPES, ("fp32", "bf16", "fp16"), ("adamw", "muon"), (False, True), (1, 4))
    return [Case(*choice) for choice in itertools.product(*ways)]


def pairwise_cases() -> list[Case]:
    """Return a few cases in which every two choices meet: greedily, the one with the most new pairs next."""

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations(asdict(case).items(), 2))

    found, left = [], set[Any]().union(*map(pairs, every_case()))
    while left:
        best = max(every_case(), key=lambda case: len(pairs(case) & left))
        found.append(best)
        left -= pairs(best)
    return found


@dataclass(frozen=True)
class Sizes:
    """The shapes of models and blocks. Those of the tests are small; no two axes have the same length.

    Attributes:
        student, teacher: layers, hidden size and heads.
        vocabulary: odd, as GPT-2's is.
        length: of a block.
        batch: blocks in a micro-batch.
    """

    student: tuple[int, int, int] = (1, 48, 4)
    teacher: tuple[int, int, int] = (2, 64, 4)
    vocabulary: int = 501
    length: int = 160
    batch: int = 2

    def model(self, kind: str, device: torch.device, positions: int | None = None) -> GPT2LMHeadModel:
        """Make the student or the teacher."""
        layers, width, heads = self.student if kind == "student" else self.teacher
        shape = GPT2Config(
            n_layer=layers, n_embd=width, n_head=heads, n_positions=positions or self.length,
            vocab_size=self.vocabulary, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        with device:
            return random_model(shape, 0)


class Part:
    """Blocks of zeros. If they are padded, a tenth of each even one and a fifth of each odd one is padding."""

    marked = divided = False

    def __init__(self, count: int, length: int, padded: bool) -> None:
        self._count, self._length, self.padded = count, length, padded

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> tuple[Any, Any]:
        """Return tokens and mask."""
        real = self.lengths()[start:stop]
        mask = (np.arange(self._length) >= real[:, None]).astype(np.int64)
        return np.zeros((stop - start, self._length), np.int64), mask if self.padded else None

    def lengths(self) -> Any:
        """Return the number of real tokens in each block."""
        tenths = 1 + np.arange(self._count) % 2 if self.padded else np.zeros(self._count, np.int64)
        return (self._length - self._length // 10 * tenths).astype(np.int32)


def dataset(sizes: Sizes, padded: bool) -> PackedDataset:
    """Make a dataset of such blocks."""
    train, test = (Blocks([Part(count, sizes.length, padded)], sizes.length) for count in (64, 4))
    manifest = {"content": "fake", "vocab_size": sizes.vocabulary, "sources": ["fake"]}
    return PackedDataset("fake", train, test, manifest, None)


def make_accelerator(precision: str, device: torch.device) -> Accelerator:
    """Make the real one, for one process and this device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["device"] = device
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    assert accelerator.device == device
    return accelerator


class NoCheckpoints:
    """Stands for `Checkpoints`: fake tensors have no numbers to save."""

    def __init__(self, *_: Any) -> None: ...

    def may_fail(self, _: str) -> Any:
        """Return a block in which nothing fails."""
        return nullcontext()

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


@dataclass
class Bench:
    """Everything that a case needs: a job on the fake GPU."""

    case: Case
    sizes: Sizes
    recorder: Recorder
    device: torch.device
    job: Job
    accelerator: Accelerator
    step: Step


@contextmanager
def bench(case: Case, sizes: Sizes | None = None, *, cached: bool = False, compiled: bool = True) -> Iterator[Bench]:
    """Set up a case on the fake GPU.

    Args:
        cached: with a teacher's cache.
        compiled: count the losses of a chunk as one compiled pass where the package compiles them.
    """
    sizes = sizes or Sizes()
    if case.recipe == "distilgpt2" and sizes.student[1] != sizes.teacher[1]:  # its cosine needs equal widths
        sizes = replace(sizes, student=(sizes.student[0], *sizes.teacher[1:]))
    recorder = Recorder(sizes.vocabulary, sizes.length)
    with (
        tempfile.TemporaryDirectory() as folder,
        fake_gpu(recorder) as device,
        _compiling(recorder if compiled else None),
    ):
        config = DistillConfig(
            data="fake", teacher="fake", student="gpt2", out=f"{folder}/run", recipe=case.recipe,
            optimizer=case.optimizer, precision=case.precision, max_steps=STEPS, micro_batch_size=sizes.batch,
            gradient_accumulation_steps=case.accumulation, log_every=1000, learning_rate=1e-3,
            quantize=case.quantize,
        )  # fmt: skip
        Path(config.out).mkdir()
        data = dataset(sizes, case.padded)
        student = sizes.model("student", device)
        teacher = None
        if config.needs_teacher:
            teacher = as_teacher(sizes.model("teacher", device).eval().requires_grad_(False))
        job = Job("distill", config, "", student, data, data.test, LossWeights.of(config), teacher)
        accelerator = make_accelerator(case.precision, device)
        accelerator.gradient_accumulation_steps = case.accumulation
        cache = TeacherCache(Path(folder) / "cache", teacher, data, config.precision) if cached and teacher else None
        with device:
            step = Step(student, teacher, job.weights, config, cache)
        yield Bench(case, sizes, recorder, device, job, accelerator, step)


@contextmanager
def _compiling(recorder: Recorder | None) -> Iterator[None]:
    with ExitStack() as stack:
        if recorder is not None and hasattr(logits, "compiled_or_eager"):
            stack.enter_context(patch.object(logits, "FakeTensor", ()))  # no tensor is one of these types
            compiled = lambda function, *arguments: recorder.compiled(function)(*arguments)  # noqa: E731
            stack.enter_context(patch.object(logits, "compiled_or_eager", compiled))
        yield


def train(one: Bench) -> None:
    """Run the training loop; the parts `step 1` and so on count its steps, `optimizer` and
    `evaluation` the last ones."""
    recorder, steps = one.recorder, itertools.count(1)

    def seed(*_: Any) -> None:
        recorder.begin(f"step {next(steps)}", float64=False)

    def optimizer_of(*arguments: Any) -> Any:
        optimizer = make(*arguments)
        own = optimizer.step

        def step(*arguments: Any) -> Any:
            recorder.parts.pop("optimizer", None)  # counts the last one
            with recorder.apart("optimizer"):
                found = own(*arguments)
            recorder.now.add(recorder.parts["optimizer"])
            for row in optimizer.state.values():
                for name, value in row.items():
                    if isinstance(value, torch.Tensor):
                        recorder.check(f"optimizer state {name}", value)
            return found

        optimizer.step = step
        return optimizer

    def clipped(accelerator: Any, optimizer: Any, parameters: Any, limit: float) -> Any:
        for parameter in parameters:
            recorder.check("a gradient", parameter.grad)
        return clip(accelerator, optimizer, parameters, limit)

    def evaluated(*arguments: Any) -> Any:
        recorder.parts.pop("evaluation", None)  # counts the last one
        with recorder.apart("evaluation"):
            return evaluate(*arguments)

    def returned(_: Any, __: Any, output: Any) -> None:
        if one.step.training:
            loss, terms = output
            recorder.check("the loss", loss)
            for name, term in terms.items():
                recorder.check(f"the loss's part {name}", term)

    make, clip, evaluate = loop.make_optimizer, loop.clip_gradients, loop.evaluate
    handle = one.step.register_forward_hook(returned)
    with (
        patch.object(loop, "Checkpoints", NoCheckpoints),
        patch.object(loop, "seed_step", seed),
        patch.object(loop, "make_optimizer", optimizer_of),
        patch.object(loop, "clip_gradients", clipped),
        patch.object(loop, "evaluate", evaluated),
        patch.object(jobs, "evaluate", evaluated),
        patch.object(PackedDataset, "tokenizer", lambda _: None),
    ):
        recorder.begin("start")
        state, _ = loop.run_loop(one.job, one.accelerator, one.step)
        recorder.begin("end")
    handle.remove()
    assert state.step == STEPS
    assert state.eval is not None


def score(one: Bench) -> None:
    """Score a text, as perplexity does."""
    one.recorder.begin("perplexity")
    tokens = np.zeros(3 * one.sizes.length, np.int64)
    spans = list(windows(len(tokens), one.sizes.length, one.sizes.length))
    ruled_out = torch.zeros(one.sizes.vocabulary, dtype=torch.bool, device=one.device)
    with one.device:
        scorer = Scorer(one.job.model, one.job.config.precision, one.device)
    assert len(scorer(tokens, spans, 2 * one.sizes.length, ruled_out=ruled_out).sums) == len(spans)


def cut(one: Bench) -> None:
    """Measure what matters in a teacher, cut a student out of it and refit it."""
    one.recorder.begin("cut")
    layers, width, heads = one.sizes.teacher
    teacher = one.sizes.model("teacher", one.device).eval()
    batches = calibration_batches(one.job.data.train, 4, one.device)
    mean_loss(teacher, batches)
    depth_importance(teacher, batches, layers - 1)
    stream_moments(teacher, batches, tied=True)
    list(projection_moments(teacher, batches, list(range(layers))))
    important_dimensions(teacher, batches, width // 2)
    active_dimensions(teacher, batches, width // 2)
    kept = KeptParts(
        [0, layers - 1], torch.arange(width // 2), [torch.arange(heads // 2)] * 2, [torch.arange(width)] * 2,
        (one.sizes.length, "first"),
    )  # fmt: skip
    student = cut_model(teacher.cpu(), kept)
    for model in (student, teacher):
        model.to(one.device)
    refit(student, teacher, kept, batches)
    for parameter in student.parameters():
        one.recorder.check("a refitted weight", parameter)


def find_batch(one: Bench) -> None:
    """Find a micro-batch, as --auto-batch-size does."""
    one.recorder.begin("auto-batch-size")
    one.recorder.integer = one.sizes.batch * one.case.accumulation  # on which the processes agree
    fit_batch(one.job, one.accelerator, one.step)
    assert one.job.config.micro_batch_size == one.sizes.batch * one.case.accumulation


WORK: dict[str, Callable[[Bench], None]] = {
    "train": train, "cached train": train, "quantized train": train, "perplexity": score, "cut": cut, "auto-batch-size": find_batch
}  # fmt: skip


def run(
    case: Case,
    work: str = "train",
    *,
    sizes: Sizes | None = None,
    compiled: bool = True,
    planted: Callable[[Bench], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Counts]:
    """Do one kind of work for a case; return what was counted, by the part of the work.

    Args:
        sizes, compiled: as for `bench`.
        planted: puts a fault into the package while the work is done.
    """
    with bench(case, sizes, cached=work == "cached train", compiled=compiled) as one, planted(one):
        WORK[work](one)
    return one.recorder.parts
