"""Make GPT-2 small: cut a student out of a teacher, distil it, measure honestly how good it is.

Every command of the command line is one function here, with one configuration:
`tinygpt2.distill(tinygpt2.DistillConfig(...))` does what `tinygpt2 distill ...` does and returns a typed
result. Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygpt2.compression.truncate import truncate_student
    from tinygpt2.config.data import PregenerateConfig, TrainTokenizerConfig
    from tinygpt2.config.models import (
        GenerateConfig,
        PplConfig,
        PresetsConfig,
        QuickstartConfig,
        TruncateStudentConfig,
        VerifyConfig,
    )
    from tinygpt2.config.training import DistillConfig, FinetuneConfig, PretrainConfig
    from tinygpt2.data.dataset import from_map_style
    from tinygpt2.data.pregenerate import pregenerate
    from tinygpt2.data.tokenizer import train_tokenizer
    from tinygpt2.decoding.generation import generate
    from tinygpt2.errors import ConfigError, DataError, DivergedError, InterruptedRunError, ModelError, TinyGPT2Error
    from tinygpt2.evaluation.perplexity import ppl
    from tinygpt2.models.configuration import presets
    from tinygpt2.workflows.quickstart import quickstart
    from tinygpt2.workflows.train import distill, finetune, pretrain
    from tinygpt2.workflows.verification import verify

__version__ = "0.1.0"

_HOME = {
    "data.dataset": ["from_map_style"],
    "config": [
        "DistillConfig", "FinetuneConfig", "GenerateConfig", "PplConfig", "PregenerateConfig", "PresetsConfig",
        "PretrainConfig", "QuickstartConfig", "TrainTokenizerConfig", "TruncateStudentConfig", "VerifyConfig",
    ],
    "errors": ["ConfigError", "DataError", "DivergedError", "InterruptedRunError", "ModelError", "TinyGPT2Error"],
    "decoding.generation": ["generate"],
    "data.pregenerate": ["pregenerate"],
    "evaluation.perplexity": ["ppl"],
    "workflows.quickstart": ["quickstart"],
    "models.configuration": ["presets"],
    "data.tokenizer": ["train_tokenizer"],
    "workflows.train": ["distill", "finetune", "pretrain"],
    "compression.truncate": ["truncate_student"],
    "workflows.verification": ["verify"],
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ConfigError",
    "DataError",
    "DistillConfig",
    "DivergedError",
    "FinetuneConfig",
    "GenerateConfig",
    "InterruptedRunError",
    "ModelError",
    "PplConfig",
    "PregenerateConfig",
    "PresetsConfig",
    "PretrainConfig",
    "QuickstartConfig",
    "TinyGPT2Error",
    "TrainTokenizerConfig",
    "TruncateStudentConfig",
    "VerifyConfig",
    "distill",
    "finetune",
    "from_map_style",
    "generate",
    "ppl",
    "pregenerate",
    "presets",
    "pretrain",
    "quickstart",
    "train_tokenizer",
    "truncate_student",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'tinygpt2' has no attribute {name!r}")
    value = getattr(import_module(f"tinygpt2.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE])
