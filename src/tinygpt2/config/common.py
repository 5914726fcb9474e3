"""What options of several commands share: headings of help, bounds, how weights are read."""

from __future__ import annotations

from typing import Literal

from tinygpt2.config.base import Config, option

Precision = Literal["fp32", "bf16", "fp16"]

LENGTH, OPTIMISATION, RUN = "Length of training", "Optimisation", "Running, logging and saving"
OBJECTIVES, TEXT, DECODING = "Objectives", "Text", "Decoding"
MAX_SEED = 2**32 - 1  # what every random generator takes
DEFAULT_SEQUENCE_LENGTH = 1024


class ModelOptions(Config):
    """How weights are read: shared by every command that loads a model."""

    allow_pickle: bool = option(False, "Read pickled weights where there are no safetensors.", panel=RUN)
