"""The model that is exported: its weights, its tokenizer, and what its card says of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers import GPT2LMHeadModel

from tinygpt2.config.workflows import ExportConfig
from tinygpt2.errors import ModelError, listed
from tinygpt2.models.card import HubMetadata
from tinygpt2.models.compatibility import first_token, require_tokenizer
from tinygpt2.models.loading import load_model, model_tokenizer
from tinygpt2.utils.hub import hub_revision

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")


@dataclass(frozen=True)
class ExportSource:
    """A model to export, in float32 and evaluation mode.

    Attributes:
        name: the last part of its path or Hub id.
        metadata: base models, languages and licence: from the options, or from the model's own card.
    """

    name: str
    model: GPT2LMHeadModel
    tokenizer: Tokenizer | None
    metadata: HubMetadata

    @property
    def ends(self) -> tuple[int | None, int | None]:
        """The tokens that start and end a text; None for one that the model does not have."""
        config = self.model.config
        end = first_token([getattr(self.tokenizer, "eos_token_id", None), config.eos_token_id], config)
        start = first_token([getattr(self.tokenizer, "bos_token_id", None), config.bos_token_id, end], config)
        return start, end


def load_source(config: ExportConfig) -> ExportSource:
    """Load the model of an export.

    Raises:
        ModelError: it cannot be loaded, its tokenizer does not fit it, or it is not a plain GPT-2.
    """
    model, directory = load_model(config.model, allow_pickle=config.allow_pickle)
    tokenizer = model_tokenizer(directory)
    if tokenizer is not None:
        require_tokenizer(tokenizer, model.config, config.model)
    strange = sorted(name for name, _ in model.named_parameters() if "cross" in name or name.endswith(".alpha"))
    if strange:
        raise ModelError(f"model {config.model} has parts that plain GPT-2s do not have: {listed(strange)}")
    local = Path(config.model).expanduser()
    name = local.resolve().name if local.is_dir() else config.model.partition("@")[0].rpartition("/")[2]
    return ExportSource(name, model, tokenizer, _metadata(config, directory))


def _metadata(config: ExportConfig, directory: Path) -> HubMetadata:
    told = _card_data(directory)
    base = [config.model.partition("@")[0]] if hub_revision(config.model, directory) else _texts(told.get("base_model"))
    licence = config.license or told.get("license")
    return HubMetadata(
        base_model=base,
        language=config.language or _texts(told.get("language")),
        license=licence if isinstance(licence, str) else None,
    )


def _card_data(directory: Path) -> dict[str, Any]:
    """Return the metadata of a model's card; nothing if there is no card, or none that can be read."""
    try:
        if not (directory / "README.md").read_text(encoding="utf-8").startswith("---"):
            return {}
        return dict(ModelCard.load(directory / "README.md").data.to_dict())
    except Exception:  # a card that another program wrote may break any rule
        return {}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str) and one]
