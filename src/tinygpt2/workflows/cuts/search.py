"""Cut a student to a target: look through shapes, cut and score them, train the best ones a little, keep the best.

Ranking costs more the better it is, so fewer and fewer shapes are ranked by: the loss after a fit on a quarter of the
calibration texts, the loss after the whole fit, and the loss after a short distillation, which can turn the order.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import GPT2LMHeadModel

from tinygpt2.compression.calibration import Batches, calibration_batches, calibration_count, mean_loss, tokens_of
from tinygpt2.compression.cut import cut_model
from tinygpt2.compression.least_squares import refit
from tinygpt2.compression.measurements import Measurements
from tinygpt2.compression.sizes import Shape, Space
from tinygpt2.compression.truncate import (
    Subject,
    choose_parts,
    held_out_perplexity,
    load_subject,
    save_student,
)
from tinygpt2.config.common import FINALISTS, ROUND_RUNS, STEP_TOKENS, STEPS
from tinygpt2.config.compression import Target, TruncateStudentConfig
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.errors import ConfigError, InterruptedRunError
from tinygpt2.models.loading import load_model
from tinygpt2.models.parameters import count_parameters
from tinygpt2.models.saving import save_model
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.devices import computes_on_device, current_device
from tinygpt2.utils.locks import writes_out
from tinygpt2.utils.progress import follow, say, without_notes
from tinygpt2.utils.units import duration
from tinygpt2.workflows.cuts.report import described, search_card, write_pictures
from tinygpt2.workflows.cuts.results import CutCandidate, CutRounds, CutSearchResult, best_of_each_vocabulary
from tinygpt2.workflows.cuts.scoring import BITS, NATS
from tinygpt2.workflows.cuts.timing import token_milliseconds
from tinygpt2.workflows.cuts.vocabularies import (
    Vocabulary,
    held_out_bits,
    none_is_fast_enough,
    seen,
    shapes_to_try,
    vocabularies_of,
)
from tinygpt2.workflows.train import distill

SHAPES = 48
_SEED = 42  # of the order of the blocks
_QUICK = 4  # the first ranking uses every fourth batch of the texts


@dataclass(frozen=True)
class Student:
    """A student in memory, and the teacher's blocks that it consists of."""

    model: GPT2LMHeadModel
    layers: list[int]


@computes_on_device
@writes_out
@fast_products()
def cut_to_target(config: TruncateStudentConfig) -> CutSearchResult:
    """Find the best student of a given size, and save it as a plain GPT-2 with its tokenizer.

    Args:
        config: with a target: `target_params`, `target_mb` or `target_ms`.

    Raises:
        ConfigError: there is no target, no student meets it, or the data's blocks are longer than students can read.
        InterruptedRunError: a signal stopped the search; nothing was written.
        DataError, ModelError: as `truncate_student`.
    """
    began = time.perf_counter()
    target = config.target
    if target is None:
        raise ConfigError("no target was given", "give target_params, target_mb or target_ms")
    subject = load_subject(config)
    data = subject.data
    assert data is not None  # a configuration with a target requires it
    if subject.positions[0] < data.sequence_length:
        raise ConfigError(
            f"--n-positions {subject.positions[0]}: the search distils on blocks of {data.sequence_length} tokens",
            "make a dataset with shorter blocks, with pregenerate --sequence-length",
        )
    out = Path(config.out).resolve()
    place = out.parent if os.access(out.parent, os.W_OK) or not out.is_dir() else out  # a mounted volume
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=place) as scratch:
        search = Search(config, target, subject, Path(scratch))
        try:
            found = search.run()
        except InterruptedRunError:
            raise InterruptedRunError("the search was stopped; nothing was written", "run it again") from None
    student, vocabulary = search.best.model, search.best_vocabulary
    bits = held_out_bits(config, subject, vocabulary, student)
    perplexity = None if config.vocabularies else held_out_perplexity(config, subject, student)
    seconds = time.perf_counter() - began
    result = replace(found, perplexity=perplexity, bits_per_byte=bits, seconds=seconds)
    card, student = search_card(config, result, subject.commit), subject.finished(student)
    save_student(config, replace(subject, vocabulary=vocabulary.cut or subject.vocabulary), student, card)
    write_pictures(config, result)
    return result


class Search:
    """The search for a target.

    Args:
        scratch: a directory for the models that are trained.
    """

    best: Student
    best_vocabulary: Vocabulary

    def __init__(self, config: TruncateStudentConfig, target: Target, subject: Subject, scratch: Path) -> None:
        self._config, self._target, self._subject, self._scratch = config, target, subject, scratch
        self._teacher = subject.loaded.model
        self._fit, judged = _halves(config, subject)
        self._teacher_milliseconds = token_milliseconds(self._teacher)
        self._vocabularies = vocabularies_of(config, subject, judged, self._teacher_milliseconds)
        self._measured = Measurements(self._teacher, self._fit)

    def run(self) -> CutSearchResult:
        """Find the best student, keep it in `best`, and return the result without what is measured afterwards."""
        ranked = self._quickly(shapes_to_try(self._target, self._vocabularies, SHAPES))
        within = [one for one in ranked if not self._too_slow(one)]
        if not within:
            raise none_is_fast_enough(self._target)
        finalists = best_of_each_vocabulary(within, FINALISTS)
        trained: list[tuple[CutCandidate, Student, Student]] = []  # the best so far: as it was cut, and trained
        done = []
        for candidate in follow(finalists, "fit and train the best shapes", "students"):
            scored, start, end = self._thoroughly(candidate)
            done.append(scored)
            if not trained or self._order(scored) < self._order(trained[0][0]):
                trained = [(scored, start, end)]
        ((winner, start, self.best),) = trained
        rounds, steps = None, STEPS
        self.best_vocabulary = vocabulary = self._vocabulary(winner)
        if 2 * winner.parameters < vocabulary.space.parameters(vocabulary.space.teacher):
            rounds, steps = self._in_rounds(winner, start)
        score = min((rounds.one, rounds.several), key=lambda one: one.rank) if rounds else winner.trained
        assert score is not None
        shown = {(one.vocab_size, one.shape): one for one in [*ranked, *done]}.values()
        return CutSearchResult(
            str(Path(self._config.out).resolve()), self.best.layers, winner.parameters,
            self._subject.loaded.parameters, winner.n_embd, winner.n_head, winner.n_inner, winner.vocab_size,
            self._target.option, winner.bytes, winner.milliseconds, self._teacher_milliseconds, score, steps,
            steps * self._step_blocks * self._length, sorted(shown, key=self._order), 0.0, rounds,
            unit=self._unit, vocabularies=seen(self._vocabularies),
        )  # fmt: skip

    @property
    def _unit(self) -> str:
        return BITS if self._config.vocabularies else NATS

    def _vocabulary(self, one: CutCandidate) -> Vocabulary:
        return next(vocabulary for vocabulary in self._vocabularies if vocabulary.size == one.vocab_size)

    def _order(self, one: CutCandidate) -> tuple[bool, int, float]:
        """Return what sorts candidates: those that are fast enough first, and the ones with later scores before."""
        last = one.trained or one.fitted or one.quick
        return self._too_slow(one), 0 if one.trained else 1, last.rank

    def _too_slow(self, one: CutCandidate) -> bool:
        return self._target.measure == "milliseconds" and one.milliseconds > self._target.limit

    def _quickly(self, shapes: Sequence[tuple[Vocabulary, Shape]]) -> list[CutCandidate]:
        """Cut, fit, time and score every shape, with a quarter of the texts; return them, the best first."""
        self._measured.projections(range(self._teacher.config.n_layer))  # of all blocks in one pass
        found: list[CutCandidate] = []
        for number, (vocabulary, shape) in enumerate(follow(shapes, "cut, fit and score shapes", "shapes")):
            started = time.perf_counter()
            student = vocabulary.own(self._cut(shape, self._measured, quick=True).model)
            finished = self._subject.finished(student)
            milliseconds = vocabulary.milliseconds(finished)
            if self._target.measure == "milliseconds" and milliseconds > self._target.limit:
                milliseconds = min(milliseconds, vocabulary.milliseconds(finished))  # other programs may have run
            score = vocabulary.judge.score(student, milliseconds, _QUICK)
            parameters = count_parameters(finished)
            found.append(
                CutCandidate(
                    shape.n_layer, shape.n_embd, shape.n_head, shape.n_inner, vocabulary.size, parameters,
                    vocabulary.space.bytes(shape), milliseconds, score,
                )
            )  # fmt: skip
            if number == min(1, len(shapes) - 1):  # the first one also measured the stream
                self._say_time(len(shapes), time.perf_counter() - started, parameters)
        return sorted(found, key=self._order)

    def _say_time(self, shapes: int, each: float, parameters: int) -> None:
        """Say about how long the search will take.

        Args:
            each: seconds for each of the shapes.
            parameters: of a student.
        """
        tokens = tokens_of(self._fit[::_QUICK])
        started = time.perf_counter()
        mean_loss(self._teacher, self._fit[::_QUICK])
        forward = (time.perf_counter() - started) / tokens  # of the teacher, for a token
        share = parameters / count_parameters(self._teacher)
        step = STEPS * self._step_blocks * self._length * forward * (1 + 3 * share)
        finalists = min(FINALISTS, shapes)
        runs = finalists + (ROUND_RUNS if 2 * share < 1 else 0)
        say(
            f"{shapes} shapes, then {finalists} of them distilled for {STEPS} steps each: about "
            f"{duration((shapes + finalists * _QUICK) * each + runs * step)}"
        )

    def _thoroughly(self, candidate: CutCandidate) -> tuple[CutCandidate, Student, Student]:
        """Cut again with all texts, score, distil for some steps, and score again."""
        vocabulary = self._vocabulary(candidate)
        cut = self._cut(candidate.shape, self._measured)
        start = Student(vocabulary.own(cut.model), cut.layers)
        fitted = vocabulary.judge.score(start.model, candidate.milliseconds)
        end = self._distilled(start, STEPS, vocabulary)
        trained = vocabulary.judge.score(end.model, candidate.milliseconds)
        tokens = f", {vocabulary.size:,} tokens" if self._config.vocabularies else ""
        say(
            f"{described(candidate.shape)}{tokens}: {fitted.loss:.4f} {self._unit} above the teacher after the fit, "
            f"{trained.loss:.4f} after {STEPS} steps"
        )
        return replace(candidate, fitted=fitted, trained=trained), start, end

    def _cut(self, shape: Shape, measured: Measurements, *, quick: bool = False) -> Student:
        """Cut a student out of a model and refit it."""
        sizes = {"num_layers": shape.n_layer, "n_embd": shape.n_embd, "n_head": shape.n_head, "n_inner": shape.n_inner}
        targets = {"target_params": None, "target_mb": None, "target_ms": None, "vocab_sizes": None}
        config = self._config.model_copy(update={**targets, **sizes, "refit": True})
        source, device = measured.teacher, current_device()
        kept, _ = choose_parts(config, measured, self._subject.positions, quick=quick)
        student = cut_model(source.cpu(), kept).to(device)
        refit(student, source.to(device), kept, self._fit[::_QUICK] if quick else self._fit, announce=False)
        return Student(student, kept.layers)

    def _distilled(
        self, student: Student, steps: int, vocabulary: Vocabulary | None = None, number: int = 0
    ) -> Student:
        """Return a student after some steps of distillation with the default recipe.

        Args:
            vocabulary: its own; None if it still has the teacher's tokens.
            number: another number gives other blocks of the data.
        """
        subject = self._subject
        tokenizer = subject.tokenizer if vocabulary is None else vocabulary.tokenizer(subject)
        before, after = self._scratch / "start", self._scratch / "student"
        save_model(student.model.cpu(), before, tokenizer, "")
        config = self._config
        options = DistillConfig(
            teacher=config.teacher, student=str(before), data=config.data or "", out=str(after), max_steps=steps,
            micro_batch_size=self._step_blocks, eval_blocks=1, device=config.device, allow_pickle=config.allow_pickle,
            seed=_SEED + number,
        )  # fmt: skip
        read = None if vocabulary is None else vocabulary.data(subject, steps * self._step_blocks, options.seed)
        with without_notes():
            distill(options, read)
        model, _ = load_model(str(after))
        for directory in (before, after):
            shutil.rmtree(directory)
        return Student(model, student.layers)

    @property
    def _length(self) -> int:
        assert self._subject.data is not None
        return self._subject.data.sequence_length

    @property
    def _step_blocks(self) -> int:
        return max(1, STEP_TOKENS // self._length)

    def _in_rounds(self, winner: CutCandidate, start: Student) -> tuple[CutRounds, int]:
        """Compare one round with several, each of which removes at most half, after equally many steps.

        The better student becomes `best`.
        """
        vocabulary = self.best_vocabulary
        share = winner.parameters / vocabulary.space.parameters(vocabulary.space.teacher)
        rounds = max(2, math.ceil(-math.log2(share)))
        shapes = between(vocabulary.space, winner.shape, rounds)
        say(f"the student keeps {share:.0%} of the parameters: cutting it in {rounds} rounds, too")
        one = self._distilled(start, rounds * STEPS, vocabulary)
        source, measured = Student(self._teacher, list(range(self._teacher.config.n_layer))), self._measured
        for number, shape in enumerate(follow(shapes, "cut and distil in rounds", "rounds")):
            cut, layers = self._cut(shape, measured), source.layers
            last = vocabulary if number == rounds - 1 else None  # until then, the texts to fit on are the teacher's
            model = cut.model if last is None else last.own(cut.model)
            source = self._distilled(Student(model, [layers[layer] for layer in cut.layers]), STEPS, last, number)
            if last is None:
                measured = Measurements(source.model.to(current_device()), self._fit)
        scores = [vocabulary.judge.score(student.model, winner.milliseconds) for student in (one, source)]
        self.best = one if scores[0].rank <= scores[1].rank else source
        return CutRounds(rounds, shapes, *scores), rounds * STEPS


def between(space: Space, shape: Shape, rounds: int) -> list[Shape]:
    """Return the shapes after each of several rounds: each size shrinks by the same factor in every round."""
    whole, found = space.teacher, []
    for number in range(1, rounds):
        part = number / rounds

        def size(name: str, multiple: int = 1, part: float = part) -> int:
            old, new = (int(getattr(one, name)) for one in (whole, shape))
            shrunk = old * math.pow(new / old, part)
            return min(old, multiple * math.ceil(shrunk / multiple))

        found.append(Shape(size("n_layer"), size("n_embd", whole.n_head), whole.n_head, size("n_inner")))
    return [*found, shape]


def _halves(config: TruncateStudentConfig, subject: Subject) -> tuple[Batches, Batches]:
    """Return texts to measure and fit on, and as many others to score on, from the training split."""
    assert subject.data is not None
    blocks = subject.data.train
    batches = calibration_batches(blocks, 2 * calibration_count(blocks, config.calibration_sequences), current_device())
    return (batches[::2], batches[1::2]) if len(batches) > 1 else (batches, batches)
