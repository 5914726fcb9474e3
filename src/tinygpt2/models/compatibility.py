"""Whether a dataset, a tokenizer and a model fit each other."""

from __future__ import annotations

from typing import Any

from tinygpt2.data.dataset import PackedDataset
from tinygpt2.errors import ConfigError, DataError


def check_fits(packed: PackedDataset, model: Any, tokenizer_fingerprint: str | None, who: str) -> None:
    """Check that a dataset's blocks can go through a model.

    Args:
        model: the model's configuration.
        tokenizer_fingerprint: of the model's own tokenizer, if it has one.
        who: the model, for the message.

    Raises:
        DataError: the dataset was made with another tokenizer, or its vocabulary is larger.
        ConfigError: its blocks are longer than the model's positions.
    """
    ours = packed.manifest["tokenizer_fingerprint"]
    if tokenizer_fingerprint not in (None, ours):
        raise DataError(
            f"dataset {packed.name} was made with another tokenizer ({ours[:12]}) "
            f"than {who}'s ({str(tokenizer_fingerprint)[:12]})",
            "pregenerate the text with the model's own tokenizer",
        )
    if packed.vocab_size > model.vocab_size:
        raise DataError(f"dataset {packed.name} has a vocabulary of {packed.vocab_size}, {who} of {model.vocab_size}")
    if packed.sequence_length > model.n_positions:
        raise ConfigError(
            f"blocks of {packed.sequence_length} tokens in {packed.name}, but {who} has {model.n_positions} positions",
            f"pregenerate with --sequence-length {model.n_positions}",
        )
