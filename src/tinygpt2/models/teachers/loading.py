"""Load a teacher, and fit it to a dataset and a student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tinygpt2.data.dataset import PackedDataset
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.models.compatibility import check_fits, check_length
from tinygpt2.models.loading import load_causal_lm, model_tokenizer
from tinygpt2.models.teachers.causal import CausalTeacher
from tinygpt2.models.teachers.teacher import GPT2Teacher, Teacher
from tinygpt2.models.teachers.vocabularies import teacher_reading
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


def load_teacher(
    name: str,
    data: PackedDataset,
    dtype: torch.dtype,
    *,
    allow_pickle: bool = False,
    hollow: bool = False,
    other_tokens: bool = False,
) -> tuple[Teacher, Path]:
    """Load a frozen teacher of any architecture, and check that it can read the blocks of a dataset.

    Args:
        name, allow_pickle, hollow: see `load_causal_lm`.
        dtype: of its weights.
        other_tokens: whether the blocks are not in the teacher's tokens, so that it need not be able to read them.

    Returns:
        The teacher, and the directory that it was loaded from.

    Raises:
        ModelError: it cannot be loaded, cannot be a teacher, or has fewer tokens than the dataset.
        DataError: it is a GPT-2, and the dataset was made with another tokenizer.
        ConfigError: the blocks have more tokens than it has positions.
    """
    model, directory = load_causal_lm(name, "teacher", allow_pickle=allow_pickle, hollow=hollow)
    teacher = as_teacher(model)
    if isinstance(teacher, GPT2Teacher) and not other_tokens:
        tokenizer = model_tokenizer(directory)
        check_fits(data, model.config, tokenizer and fingerprint(tokenizer), f"teacher {name}", smaller=ModelError)
    elif not other_tokens or data.train.padded:
        check_length(data, teacher.shape.positions, f"teacher {name}")
    teacher.requires_grad_(requires_grad=False).to(dtype)
    return teacher, directory


def read_as_student(
    teacher: Teacher,
    data: PackedDataset,
    student: GPT2Config,
    tokenizer: Tokenizer | None,
    names: tuple[str | None, str | None],
    *,
    reverse_kl: bool = False,
) -> None:
    """Let a teacher read the tokens of a dataset, and predict a student's tokens.

    A GPT-2 with as many tokens as the student has the same ones: its tokenizer was compared with the data's.

    Args:
        tokenizer: the teacher's own.
        names: of teacher and student for error messages.
        reverse_kl: whether the student learns by it.

    Raises:
        ModelError: their pieces of text differ.
        ConfigError: with reverse KL, if the student has tokens that the teacher lacks.
    """
    size = teacher.shape.vocabulary
    if isinstance(teacher, GPT2Teacher) and size == student.vocab_size:
        return
    reading = teacher_reading(data.tokenizer(), student.vocab_size, tokenizer, size, names)
    teacher.read_as(reading)
    if reading.rows is not None:
        counts = {
            "tokens have other numbers": sum(row not in (token, -1) for token, row in enumerate(reading.rows)),
            "tokens that the student lacks are left out": len(reading.others),
            "tokens of the student are unknown to it": reading.rows.count(-1),
        }
        say(f"teacher {names[0]}: {', '.join(f'{count:,} {what}' for what, count in counts.items() if count)}")
    if reverse_kl and -1 in (reading.rows or ()):
        raise ConfigError(
            f"reverse_kl is infinite for tokens that the teacher lacks, and student {names[1]} has "
            f"{(reading.rows or ()).count(-1):,} of them",
            "use another --prediction-loss, and with sampled text another --on-policy-loss",
        )
    if reading.start is not None:
        say(f"teacher {names[0]} reads its start token (number {reading.start}) before each block")
        if teacher.covered(data.sequence_length) < data.sequence_length:
            say("it has no position left for the last token of a block, which therefore has no teacher")


def as_teacher(model: PreTrainedModel | Teacher) -> Teacher:
    """Return a model as a teacher; a teacher stays itself.

    Raises:
        ModelError: it cannot be one; see `CausalTeacher`.
    """
    if isinstance(model, Teacher):
        return model
    return GPT2Teacher(model) if isinstance(model, GPT2LMHeadModel) else CausalTeacher(model)
