"""Check whether a dataset, a tokenizer and a model fit each other.

A model may have more rows than its tokenizer has tokens. A tokenizer may have special tokens that the model has no rows
for, such as an added [PAD], because no text contains them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tinygpt2.data.dataset import PackedDataset
from tinygpt2.data.tokenizer import encoded_size, vocabulary_size
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.utils.progress import say

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
        if (largest := _largest_token(packed)) >= model.vocab_size:
            raise DataError(
                f"dataset {packed.name} has token ids up to {largest}, but {who} has only {model.vocab_size} tokens",
                "pregenerate the text with the model's own tokenizer",
            )
        say(f"{who} has only {model.vocab_size} tokens; the tokenizer's other tokens, which are special, do not occur")
    if packed.sequence_length > model.n_positions:
        raise ConfigError(
            f"the blocks of {packed.name} have {packed.sequence_length} tokens, but {who} has {model.n_positions} "
            "positions",
            f"pregenerate with --sequence-length {model.n_positions}",
        )


def _largest_token(packed: PackedDataset) -> int:
    """Return the largest token id that can occur in a dataset."""
    if not packed.manifest.get("splits"):  # the rows of a map-style dataset may contain any token
        return packed.vocab_size - 1
    end = packed.manifest["eos_token_id"] if packed.manifest["append_eos"] else None
    return max(encoded_size(packed.tokenizer()) - 1, -1 if end is None else end)


def require_tokenizer(tokenizer: Tokenizer | None, model: GPT2Config, name: str) -> Tokenizer:
    """Return a model's own tokenizer after checking that the model has a row for every token of a text.

    Raises:
        ModelError: there is no tokenizer, or encoding a text can produce a token that the model does not have.
    """
    if tokenizer is None:
        raise ModelError(f"model {name} has no tokenizer", "copy the tokenizer's files into the model's directory")
    if (mismatch := vocabulary_mismatch(tokenizer, model)) is not None:
        message, is_fault = mismatch
        if is_fault:
            raise ModelError(
                f"model {name}: {message}", "put the tokenizer that the model was trained with into its directory"
            )
        if vocabulary_size(tokenizer) > model.vocab_size:
            say(f"model {name}: {message}")
    return tokenizer


def vocabulary_mismatch(tokenizer: Tokenizer, model: GPT2Config) -> tuple[str, bool] | None:
    """Return how the vocabulary sizes of tokenizer and model differ, and whether that is an error; None if equal."""
    size, needed, rows = vocabulary_size(tokenizer), encoded_size(tokenizer), model.vocab_size
    if size == rows:
        return None
    if size < rows:
        return f"the model has {rows} rows, but its tokenizer has only {size} tokens; the others are not used", False
    if needed <= rows:
        added = [token for token, index in tokenizer.get_vocab().items() if index >= rows]
        names = ", ".join(sorted(added)[:3])
        return f"the model has only {rows} tokens, so it does not know the tokenizer's special tokens {names}", False
    return f"its tokenizer has token ids up to {needed - 1}, but the model has only {rows} tokens", True


def first_token(tokens: Iterable[object], model: GPT2Config) -> int | None:
    """Return the first of some token ids (None and lists may be among them) that the model has."""
    for token in tokens:
        for one in token if isinstance(token, list) else [token]:
            if isinstance(one, int) and 0 <= one < model.vocab_size:
                return one
    return None


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
