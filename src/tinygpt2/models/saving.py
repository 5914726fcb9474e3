"""Write a model directory that plain `transformers` opens."""

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
    from transformers import PreTrainedTokenizerFast as Tokenizer


def save_model(
    model: GPT2LMHeadModel,
    out: Path,
    tokenizer: Tokenizer | None,
    card: str,
    weights: dict[str, Tensor] | None = None,
    run: str | None = None,
) -> None:
    """Write a directory that plain `transformers` opens; each file appears whole.

    Args:
        card: the model card, README.md.
        weights: the model's, where it holds only a shard of them itself.
        run: the resolved configuration, config.yaml.

    Raises:
        ModelError: the disk is full, or does not let us write.
    """
    model.config.n_ctx = model.config.n_positions  # an older name of it, which llama.cpp's conversion reads
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
        raise ModelError(f"cannot save the model in {out}: {reason}", "check rights and space") from error
