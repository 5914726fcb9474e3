"""One typed configuration per command. An option is declared once, here.

Order of precedence, weakest first: the default below, the recipe (distill), `--config FILE`, the flag.
"""

from __future__ import annotations

from tinygpt2.config.common import DECODING, DEFAULT_SEQUENCE_LENGTH, MAX_SEED, ModelOptions, Precision
from tinygpt2.config.data import (
    EncodingErrors,
    Format,
    PackOptions,
    PregenerateConfig,
    SourceOptions,
    TextOptions,
    TrainTokenizerConfig,
)
from tinygpt2.config.models import (
    Convention,
    GenerateConfig,
    Position,
    PplConfig,
    PresetsConfig,
    QuickstartConfig,
    Strategy,
    TruncateStudentConfig,
    VerifyConfig,
)
from tinygpt2.config.training import (
    DEFAULT_RATE,
    MOST_PASSES,
    DistillConfig,
    FinetuneConfig,
    HeadMap,
    HiddenScale,
    OnSaveError,
    PredictionLoss,
    PretrainConfig,
    TrainOptions,
    changed_mathematics,
    read_recipe,
)

__all__ = [
    "DECODING",
    "DEFAULT_RATE",
    "DEFAULT_SEQUENCE_LENGTH",
    "MAX_SEED",
    "MOST_PASSES",
    "Convention",
    "DistillConfig",
    "EncodingErrors",
    "FinetuneConfig",
    "Format",
    "GenerateConfig",
    "HeadMap",
    "HiddenScale",
    "ModelOptions",
    "OnSaveError",
    "PackOptions",
    "Position",
    "PplConfig",
    "Precision",
    "PredictionLoss",
    "PregenerateConfig",
    "PresetsConfig",
    "PretrainConfig",
    "QuickstartConfig",
    "SourceOptions",
    "Strategy",
    "TextOptions",
    "TrainOptions",
    "TrainTokenizerConfig",
    "TruncateStudentConfig",
    "VerifyConfig",
    "changed_mathematics",
    "read_recipe",
]
