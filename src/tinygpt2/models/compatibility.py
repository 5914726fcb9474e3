"""Check whether a dataset, a tokenizer and a model fit each other.

A model may have more rows than its tokenizer has tokens. A tokenizer may have special tokens that the model has no rows
for, such as an added [PAD], because no text contains them.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tinygpt2.data.dataset import PackedDataset
from tinygpt2.data.tokenizer import encoded_size, vocabulary_size
from tinygpt2.errors import ConfigError, DataError, ModelError, TinyGPT2Error
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedModel

    from tinygpt2.utils.types import Tokenizer

_WINDOW = 2048


def check_fits(
    packed: PackedDataset,
    model: Any,
    tokenizer_fingerprint: str | None,
    who: str,
    *,
    smaller: type[TinyGPT2Error] = DataError,
) -> None:
    """Check that a model can read the blocks of a dataset.

    Args:
        model: the model's configuration.
        tokenizer_fingerprint: fingerprint of the model's own tokenizer; None if the model has no tokenizer.
        who: what error messages call the model.
        smaller: the error if the model's vocabulary is too small.

    Raises:
        DataError: the dataset was made with another tokenizer.
        TinyGPT2Error: the dataset has tokens that the model lacks.
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
            raise smaller(
                f"dataset {packed.name} has token ids up to {largest}, but {who} has only {model.vocab_size} tokens",
                "pregenerate the text with the model's own tokenizer",
            )
        say(f"{who} has only {model.vocab_size} tokens; the tokenizer's other tokens, which are special, do not occur")
    check_length(packed, model.n_positions, who)


def check_length(packed: PackedDataset, positions: int | None, who: str) -> None:
    """Check that a model has enough positions for the blocks of a dataset; None means that it has no limit.

    Raises:
        ConfigError: the blocks have more tokens.
    """
    if positions is not None and packed.sequence_length > positions:
        raise ConfigError(
            f"the blocks of {packed.name} have {packed.sequence_length} tokens, but {who} has {positions} positions",
            f"pregenerate with --sequence-length {positions}",
        )


def positions_of(config: Any) -> int | None:
    """Return the longest sequence that a model of any architecture reads; None if there is no limit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    found = (getattr(config, name, None) for name in names)
    return next((int(size) for size in found if isinstance(size, int) and size > 0), None)


def text_sizes(model: PreTrainedModel) -> Any:
    """Return the sizes of a model that decide how texts are laid out for it: `vocab_size` and `n_positions`.

    They are those of a GPT-2's configuration. A model of another architecture may read texts of any length, or very
    long ones; it reads at most 2,048 tokens at a time, as GPT-Neo and OPT do.
    """
    if model.config.model_type == "gpt2":
        return model.config
    positions = min(positions_of(model.config.get_text_config()) or _WINDOW, _WINDOW)
    return SimpleNamespace(vocab_size=len(model.get_output_embeddings().weight), n_positions=positions)


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
