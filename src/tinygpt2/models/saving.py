"""Save a model in a directory that plain `transformers` can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.errors import ModelError
from tinygpt2.models.weights import write_checksums
from tinygpt2.utils.files import atomic_contents, write_text

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


def save_model(
    model: GPT2LMHeadModel,
    out: Path,
    tokenizer: Tokenizer | None,
    card: str,
    weights: dict[str, Tensor] | None = None,
    run: str | None = None,
) -> None:
    """Save a model in a directory that plain `transformers` can load. No half-written file is left behind.

    Args:
        card: text of the model card, saved as README.md.
        weights: all weights of the model, if `model` itself holds only a shard of them.
        run: the resolved options, saved as config.yaml.

    Raises:
        ModelError: the disk is full, or the directory is not writable.
    """
    model.config.n_ctx = model.config.n_positions  # the older name of n_positions, which llama.cpp's converter reads
    try:
        with atomic_contents(out) as temporary:
            model.save_pretrained(str(temporary), state_dict=weights)
            write_checksums(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(temporary))
        write_text(out / "README.md", card)
        if run is not None:
            write_text(out / "config.yaml", run)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelError(f"cannot save the model in {out}: {reason}", "check permissions and disk space") from error
