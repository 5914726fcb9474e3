"""Check whether a dataset, a tokenizer and a model fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinygpt2.data.dataset import PackedDataset
from tinygpt2.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import GPT2Config

    from tinygpt2.utils.types import Tokenizer


def check_fits(packed: PackedDataset, model: Any, tokenizer_fingerprint: str | None, who: str) -> None:
    """Check that a model can read the blocks of a dataset.

    Args:
        model: the model's configuration.
        tokenizer_fingerprint: fingerprint of the model's own tokenizer; None if the model has no tokenizer.
        who: what error messages call the model.

    Raises:
        DataError: the dataset was made with another tokenizer, or its vocabulary is larger than the model's.
        ConfigError: the dataset's blocks have more tokens than the model has positions.
    """
    ours = packed.manifest["tokenizer_fingerprint"]
    if tokenizer_fingerprint not in (None, ours):
        raise DataError(
            f"dataset {packed.name} was made with another tokenizer ({ours[:12]}) "
            f"than {who}'s ({str(tokenizer_fingerprint)[:12]})",
            "pregenerate the text with the model's own tokenizer",
        )
    if packed.vocab_size > model.vocab_size:
        raise DataError(
            f"dataset {packed.name} has a vocabulary of {packed.vocab_size} tokens, "
            f"but {who} has only {model.vocab_size}"
        )
    if packed.sequence_length > model.n_positions:
        raise ConfigError(
            f"the blocks of {packed.name} have {packed.sequence_length} tokens, but {who} has {model.n_positions} "
            "positions",
            f"pregenerate with --sequence-length {model.n_positions}",
        )


def require_tokenizer(tokenizer: Tokenizer | None, model: GPT2Config, name: str) -> Tokenizer:
    """Return a model's own tokenizer after checking that the model's vocabulary covers all of its tokens.

    Raises:
        ModelError: there is no tokenizer, or it has more tokens than the model's vocabulary.
    """
    if tokenizer is None:
        raise ModelError(f"model {name} has no tokenizer", "copy the tokenizer's files into the model's directory")
    if len(tokenizer) > model.vocab_size:
        raise ModelError(
            f"model {name}: its tokenizer has {len(tokenizer)} tokens, but the model has only {model.vocab_size}",
            "put the tokenizer that the model was trained with into its directory",
        )
    return tokenizer


def vocabulary_mismatch(tokenizer: Tokenizer, model: GPT2Config) -> tuple[str, bool] | None:
    """Return how the vocabulary sizes of tokenizer and model differ, and whether that is an error; None if equal.

    A model's vocabulary may be the tokenizer's size rounded up to a multiple of 64.
    """
    have, want = len(tokenizer), model.vocab_size
    if have == want:
        return None
    if have < want and want % 64 == 0 and want - have < 128:
        return f"the model's vocabulary of {want} tokens is the tokenizer's {have}, rounded up", False
    return f"the tokenizer has {have} tokens, but the model has {want}", True


def check_same_vocabulary(teacher: GPT2Config, student: GPT2Config, names: tuple[str | None, str | None]) -> None:
    """Check that teacher and student predict the same tokens.

    Args:
        names: names of teacher and student for the error message.

    Raises:
        ModelError: the two vocabularies have different sizes.
    """
    if teacher.vocab_size != student.vocab_size:
        raise ModelError(
            f"teacher {names[0]} has a vocabulary of {teacher.vocab_size} tokens, "
            f"but student {names[1]} has {student.vocab_size}",
            "the student needs the teacher's tokenizer; tinygpt2 truncate-student makes such a student",
        )
