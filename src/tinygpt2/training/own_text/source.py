"""Sampled text as a source of batches: some of a step's blocks become continuations of their beginnings.

A text depends on the weights, the seed and the position of its block in the order of training, and on nothing else: not
on the number of processes, nor on when the run was interrupted. Only texts that are used again have to be saved.
Source: GKD, arXiv:2306.13649, algorithm 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.config.distillation import DistillConfig
from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.decoding.library import Decoder, make_decoder
from tinygpt2.decoding.mixture import MixedDecoder
from tinygpt2.decoding.own_text import Lengths, continued
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.errors import ConfigError
from tinygpt2.models.compatibility import first_token
from tinygpt2.models.teachers.ensemble import members_of
from tinygpt2.models.teachers.teacher import GPT2Teacher, Teacher
from tinygpt2.models.teachers.vocabularies import Reading
from tinygpt2.objectives.weights import Counts
from tinygpt2.runtime.devices import float64_device
from tinygpt2.training.own_text.figures import Figures, SampleLog
from tinygpt2.training.own_text.replay import Replay, Text, grown
from tinygpt2.utils.progress import say
from tinygpt2.utils.types import Array

_TOGETHER = 64  # texts that are decoded side by side
_WIDTH = 64  # a batch of sampled text alone is as wide as its longest text, rounded up to this


class OwnText:
    """Writes sampled text into the batches of a run.

    Args:
        config: of the run, with an `on_policy_fraction` above 0.
        student: its current weights sample.
        teacher: judges the samples in the metrics, and may sample, too.
        data: the dataset. If its blocks are labelled, a prompt is what stands before the first target.
        clock: returns the time in seconds.

    Raises:
        ConfigError: the student is divided among the processes, or the teacher cannot sample.

    Attributes:
        lengths: of prompts and continuations.
        figures: of the texts since the last line of metrics.
    """

    def __init__(
        self,
        config: DistillConfig,
        accelerator: Accelerator,
        student: GPT2LMHeadModel,
        teacher: Teacher | None,
        data: PackedDataset,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config, self._accelerator, self._student, self._teacher = config, accelerator, student, teacher
        self._blocks, self._clock = data.train, clock
        check_sampling(config, accelerator, teacher)
        vocabulary = min(data.vocab_size, int(student.config.vocab_size))
        if config.sampler != "student" and teacher is not None:
            vocabulary = min(vocabulary, teacher.shape.vocabulary)
        room = min(data.sequence_length, int(student.config.n_positions))
        self.lengths = Lengths.fitting(config.prompt_range, config.max_new_tokens, room, pairs=data.train.labelled)
        tokenizer = data.tokenizer()
        end = first_token([tokenizer.eos_token_id, student.config.eos_token_id], student.config)
        self._ends = [] if end is None else [end]
        self._sampling = Sampling(config.sample_temperature, vocabulary=vocabulary)
        self._teachers: Decoder | None = None
        drawn = config.reuses_text and config.on_policy_loss == "policy_gradient"
        self._replay = Replay(config.replay, room, config.replay_schedule, config.seed, drawn=drawn)
        self._keeps_drawn = drawn
        self.figures = Figures()
        self._last: tuple[list[Text], Batch] | None = None
        self._text: Callable[[list[int]], str] = lambda tokens: str(tokenizer.decode(tokens))
        self._log: SampleLog | None = None
        self._since: float | None = None  # the time of the last line of metrics

    def into(
        self,
        batch: Batch,
        indices: Sequence[int],
        step: int,
        done: float = 0.0,
        known: tuple[float, float | None] | None = None,
    ) -> tuple[Batch, Counts | None]:
        """Replace some of this process's blocks of a step by sampled text.

        Args:
            batch: this process's blocks, on the host.
            indices: the numbers of the blocks of all processes.
            step: the number of the step.
            done: the share of the run that is done.
            known: what `evaluated` has returned last.

        Returns:
            The batch, and the counts that means divide by; the same batch and None if the step has no sampled text.
        """
        started = self._clock()
        self._since = started if self._since is None else self._since
        share = self._config.on_policy_fraction if known is None else known[0]
        texts = self._texts(indices, step, done, share)
        self.figures.sequences += len(batch.input_ids)
        if texts is None:
            return batch, None
        rows = {place: row for row, place in enumerate(self._own_places(len(indices))) if place in texts}
        own = [texts[place] for place in rows]
        self.figures.sampled += len(own)
        whole = _with(batch, list(rows.values()), own)
        self._last = own, whole
        counts = self._counts(whole)
        self.figures.sampling += self._clock() - started
        return whole, counts.over(len(indices) // self._config.micro_batch_size)

    def _texts(self, indices: Sequence[int], step: int, done: float, share: float) -> dict[int, Text] | None:
        """Return the texts of a step by their places in the global batch, at least those of this process; None without.

        Args:
            share: of the sequences that are sampled text.
            indices, step, done: see `into`.
        """
        config, first = self._config, step * len(indices)
        if step % config.steps_per_sample:
            return self._replay.held(len(indices)) or None
        # Places that were the same in every step would always meet the same one of several datasets.
        shift = float(np.random.default_rng((config.seed, step, 3)).random())
        chosen = [place for place in range(len(indices)) if becomes_text(place, share, shift)]
        origins = {place: chosen[at - at % config.samples_per_prompt] for at, place in enumerate(chosen)}
        old = {place: text for place in chosen if (text := self._replay.chosen(first + place, done)) is not None}
        new = [place for place in self._own_places(len(indices)) if place in origins and place not in old]
        begins = [origins[place] for place in new]
        prompts = [self.lengths.prompt(self._blocks, indices[place], config.seed, first + place) for place in begins]
        made = dict(zip(new, self._sampled(prompts, [first + place for place in new]), strict=True))
        self.figures.add([text.added for text in made.values()], [text.ended for text in made.values()])
        if chosen and config.reuses_text and self._accelerator.num_processes > 1:
            made = dict(gather_object(list(made.items())))
        self._replay.add(text for _, text in sorted(made.items()))
        if config.steps_per_sample > 1:
            self._replay.hold(old | made, len(indices))
        return old | made if chosen else None

    @property
    def replayed(self) -> dict[str, Tensor]:
        """The texts that are used again, which checkpoints keep; empty if none are."""
        return self._replay.tensors

    def evaluated(self, known: tuple[float, float | None] | None, loss: float) -> tuple[float, float | None] | None:
        """Return the share of sampled text after an evaluation, and the loss to compare the next one with.

        Args:
            known: what this has returned before; None in the beginning.
            loss: on the held-out blocks.
        """
        if not self._config.fraction_growth:
            return None
        share, mark = known or (self._config.on_policy_fraction, None)
        after = grown(share, mark, loss, self._config.fraction_growth)
        if after[0] != share:
            say(f"the held-out loss rose from {mark:.3f} to {loss:.3f}: now {after[0]:.0%} of the text is sampled")
        return after

    def _own_places(self, blocks: int) -> list[int]:
        """Return the places in the global batch of this process's blocks, in their order: see `read_step`."""
        size, accelerator = self._config.micro_batch_size, self._accelerator
        turns = range(accelerator.process_index, blocks // size, accelerator.num_processes)
        return [turn * size + place for turn in turns for place in range(size)]

    def _sampled(self, prompts: list[list[int]], numbers: list[int]) -> list[Text]:
        texts: list[Text] = []
        decoder = self._decoder() if prompts else None
        plain = self._config.sampler == "student" or all(isinstance(one, GPT2Teacher) for one in self._writers())
        for start in range(0, len(prompts), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            assert decoder is not None
            with nullcontext() if plain else self._accelerator.autocast():
                made = continued(
                    decoder, prompts[part], numbers[part], seed=self._config.seed, new=self.lengths.new,
                    ends=self._ends, sampling=self._sampling, name=f"the {self._config.sampler}",
                    log_probs=self._keeps_drawn,
                )  # fmt: skip
            drawn = [[]] * len(made.tokens) if made.log_probs is None else made.log_probs.tolist()
            found = zip(
                prompts[part], made.tokens.tolist(), made.lengths.tolist(), made.ended.tolist(), drawn, strict=True
            )
            texts += [Text(prompt, row[:count], end, logs[:count]) for prompt, row, count, end, logs in found]
        return texts

    def _decoder(self) -> Decoder:
        """Return what decodes with the student's weights of now, or with the teacher's, or with both.

        In float32 it uses the weights where they are. In bfloat16 it rounds them: the student's each time, as each pass
        of training does, and the teacher's once.
        """
        config, sixteen = self._config, self._accelerator.mixed_precision == "bf16"
        if config.sampler != "student" and self._teachers is None:
            for number, one in enumerate(self._writers(), 1):
                gpt2 = isinstance(one, GPT2Teacher)
                made = make_decoder(one.model, "bf16" if sixteen and gpt2 else "fp32", name="teacher")
                # each has the same share of the mean of all
                self._teachers = made if self._teachers is None else MixedDecoder(made, self._teachers, 1 / number)
        if config.sampler == "teacher" and self._teachers is not None:
            return self._teachers
        students = make_decoder(self._student, "bf16" if sixteen else "fp32")
        return students if self._teachers is None else MixedDecoder(self._teachers, students, config.teacher_share)

    def _writers(self) -> list[Teacher]:
        """Return the teachers whose mean the teachers' text is sampled from."""
        return [] if self._teacher is None else members_of(self._teacher)

    def forget(self) -> None:
        """Begin anew after steps that were only timed: their texts are neither used again nor counted."""
        self._replay.forget()
        self.figures, self._last, self._since = Figures(), None, None

    def _counts(self, batch: Batch) -> Counts:
        """Return the counts of all processes' batches."""
        lengths = batch.real_lengths
        width = batch.input_ids.shape[1]
        covered = width if self._teacher is None else self._teacher.covered(width)
        targets = batch.targets
        sampled = sum(count for count, own in zip(targets, _own(batch), strict=True) if own)
        counts = Counts.of(lengths, covered, targets)._replace(own_text=sampled)
        device = float64_device(self._accelerator.device)
        sums = self._accelerator.reduce(torch.tensor(counts, dtype=torch.float64, device=device), "sum")
        return Counts(*sums.tolist())

    def metrics(self) -> dict[str, float]:
        """Return the figures of the texts since the last call, and the teacher's loss on some of the last step's.

        All processes call it after the same step.
        """
        now = self._clock()
        seconds, self._since = now - (self._since or now), now
        return {**self.figures.taken(self._accelerator, seconds), **self._teachers_loss()}

    @torch.no_grad()
    def _teachers_loss(self) -> dict[str, float]:
        """Return the teacher's mean loss of the sampled tokens, of up to a micro-batch of texts in each process."""
        sums = torch.zeros(2, dtype=torch.float64, device=float64_device(self._accelerator.device))
        if self._teacher is not None and self._last is not None:
            whole = self._last[1]
            rows = np.nonzero(_own(whole))[0][: self._config.micro_batch_size]
            ids = whole.input_ids[torch.from_numpy(rows)].to(self._accelerator.device)
            if len(rows) and whole.counted is not None:
                wanted = torch.from_numpy(np.flatnonzero(whole.counted[rows, 1:])).to(ids.device)
                with self._accelerator.autocast():
                    losses, _ = self._teacher.losses(self._teacher.head(), ids, wanted)
                sums += torch.stack([losses.sum(), losses.new_full((), len(losses))]).to(sums.device).double()
        total, count = self._accelerator.reduce(sums, "sum").tolist()
        return {"sample/teacher_loss": total / count} if count else {}

    def show(self, step: int) -> None:
        """Keep some texts of the last step, as the main process sampled them."""
        if self._last is None or not self._accelerator.is_main_process:
            return
        out = Path(self._config.out)
        self._log = self._log or SampleLog(out, step - 1, self._text)
        self._log.write(self._accelerator, step, [(text.prompt, text.added) for text in self._last[0]])


def becomes_text(place: int, share: float, shift: float) -> bool:
    """Return whether the block at a place of a step becomes sampled text: evenly spaced ones do.

    Args:
        shift: from 0 to 1. If it is random, every place becomes text with the probability `share`.
    """
    before, after = (math.floor(at * share + shift + 1e-9) for at in (place, place + 1))
    return after > before


def check_sampling(config: DistillConfig, accelerator: Accelerator, teacher: Teacher | None) -> None:
    """Check that the student can sample in every process, and that the teacher can write the student's tokens.

    Raises:
        ConfigError: the student is divided among the processes, the teacher's tokens are others, or the run computes in
            fp16.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError(
            "--on-policy-fraction needs the whole student in every process, which FSDP and DeepSpeed divide",
            "leave them out: each process then holds the student and the teacher",
        )
    if (sampler := config.sampler) == "student" or teacher is None:
        return
    if teacher.reading != Reading():
        raise ConfigError(
            f"--sampler {sampler} needs a teacher with the student's own tokens, but this teacher has other token ids",
            "use --sampler student: such a teacher still judges what the student writes",
        )
    if accelerator.mixed_precision == "fp16":
        raise ConfigError(f"--sampler {sampler} cannot decode the teacher in fp16", "use --precision bf16 or fp32")


def _own(batch: Batch) -> Array:
    """Return which blocks of a batch are sampled text."""
    return np.zeros(len(batch.input_ids), np.bool_) if batch.own_text is None else batch.own_text


def _with(batch: Batch, rows: Sequence[int], texts: Sequence[Text]) -> Batch:
    """Return a batch some of whose blocks are replaced by texts, of which only the continuations count."""
    size, width = batch.input_ids.shape
    ids = batch.input_ids.clone()
    lengths = list(batch.real_lengths)
    counted = np.arange(width) < np.array(lengths)[:, None] if batch.counted is None else batch.counted.copy()
    counted[:, 0] = False
    own = np.zeros(size, np.bool_)
    drawn = np.zeros((size, width), np.float32) if any(text.drawn for text in texts) else None
    for row, text in zip(rows, texts, strict=True):
        begin, end = len(text.prompt), len(text.prompt) + len(text.added)
        ids[row] = 0  # padding must be a valid token
        ids[row, :end] = torch.tensor([*text.prompt, *text.added])
        counted[row] = False
        counted[row, begin:end] = True
        own[row], lengths[row] = True, end
        if drawn is not None:
            drawn[row, begin:end] = text.drawn
    if len(rows) == size:  # no block of the data needs the whole width
        width = min(width, -(-max(lengths) // _WIDTH) * _WIDTH)
    shorter = lengths if min(lengths) < width else None
    documents = batch.documents and [[width] if own[row] else each for row, each in enumerate(batch.documents)]
    likely = None if drawn is None else drawn[:, :width]
    return Batch(ids[:, :width], shorter, counted[:, :width], documents, own, likely)
