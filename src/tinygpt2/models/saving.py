"""Save a model in a directory that plain `transformers` can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.errors import ModelError, os_failure
from tinygpt2.models.weights import write_checksums
from tinygpt2.utils.files import staged_files, write_text

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
        MachineError: the disk is full.
        ConfigError: the directory is not writable.
        ModelError: the library cannot write the weights for another reason.
    """
    try:
        with staged_files(out) as temporary:
            model.save_pretrained(str(temporary), state_dict=weights)
            write_checksums(temporary)
            save_description(model, temporary, tokenizer)
            share_files(temporary)
        write_text(out / "README.md", card)
        if run is not None:
            write_text(out / "config.yaml", run)
    except (OSError, SafetensorError) as error:
        raise os_failure(error, f"cannot save the model in {out}", "then run the command again", ModelError) from error


def save_description(model: GPT2LMHeadModel, directory: Path, tokenizer: Tokenizer | None) -> None:
    """Write what a model directory holds besides the weights: the configurations and the tokenizer.

    The tokenizer's limit becomes that of the model, so that `transformers` warns of texts that are too long for it.

    Raises:
        OSError: a file cannot be written.
    """
    model.config.n_ctx = model.config.n_positions  # the older name of n_positions, which llama.cpp's converter reads
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(directory))
    model.generation_config.save_pretrained(str(directory))
    if tokenizer is not None:
        tokenizer.model_max_length = model.config.n_positions
        tokenizer.save_pretrained(str(directory))


def share_files(directory: Path) -> None:
    """Give every file the permissions that new files get: safetensors makes files that only their owner may read.

    Raises:
        OSError: the permissions cannot be set.
    """
    probe = directory / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(mode)
