"""Options of every command that loads a model, and of `presets`."""

from __future__ import annotations

from tinygpt2.config.base import Config, option
from tinygpt2.config.common import RUN, Device


class PresetsConfig(Config):
    """Options of `presets`: it has none."""


class ModelOptions(Config):
    """How weights are read."""

    allow_pickle: bool = option(
        "Load pickled weights (.bin) if there are no safetensors. Only for models you trust.", default=False, panel=RUN
    )


class DeviceOptions(Config):
    """Where a command computes."""

    device: Device = option(
        "Where to compute: cpu, cuda (NVIDIA or AMD) or mps (Apple). auto takes a CUDA GPU if there is one.",
        default="auto",
        panel=RUN,
    )
