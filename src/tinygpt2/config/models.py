"""Options of every command that loads a model, and of `presets`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from tinygpt2.config.base import Config, option
from tinygpt2.config.common import OBJECTIVES, RUN, Device

Alignment = Literal["pieces", "spans", "both"]
_NUMBERS = re.compile(r"\d+(\.\d+)?(,\d+(\.\d+)?)*")


class PresetsConfig(Config):
    """Options of `presets`: it has none."""


class ModelOptions(Config):
    """How weights are read."""

    allow_pickle: bool = option(
        "Load pickled weights (.bin) if there are no safetensors. Only for models you trust.", default=False, panel=RUN
    )


class CardOptions(Config):
    """What the model card says that a command cannot know."""

    license: str | None = option(
        "Licence of the model, for its card: an identifier of the Hub, such as apache-2.0. Not written if not given.",
        default=None,
        panel=RUN,
    )
    language: list[str] = option(
        "Language of the texts, for the model card: a code such as en. Repeatable.", default=[], panel=RUN
    )

    def conflicts(self) -> Iterator[str]:
        """Check the form of the identifiers."""
        yield from super().conflicts()
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            yield f"--license {self.license!r}: expected an identifier of the Hub, such as apache-2.0, mit or other"
        for code in self.language:
            if not re.fullmatch(r"[a-z]{2,3}", code):
                yield f"--language {code!r}: expected a code of two or three small letters, such as en"


class DeviceOptions(Config):
    """Where a command computes."""

    device: Device = option(
        "Where to compute: cpu, cuda (NVIDIA or AMD) or mps (Apple). auto takes a CUDA GPU if there is one.",
        default="auto",
        panel=RUN,
    )


class AlignmentOptions(Config):
    """How a student learns from a teacher with other tokens."""

    alignment: Alignment | None = option(
        "Learn from a teacher with any other tokenizer. pieces compares predictions where tokens of both begin, summed "
        "over tokens that cannot be told apart. spans compares the likelihoods of the texts between such places. both "
        "adds the two. A student whose tokens are the first of its teacher's needs none.",
        default=None,
        panel=OBJECTIVES,
    )


class SpanOptions(AlignmentOptions):
    """How the likelihoods of spans are compared."""

    span_temperatures: str = option(
        "Temperatures at which --alignment spans compares likelihoods, such as 1,100. The mean over them counts.",
        default="100",
        panel=OBJECTIVES,
        commas=True,
        metavar="N,...",
    )

    @property
    def temperatures_of_spans(self) -> list[float]:
        """The temperatures as numbers."""
        return [float(one) for one in self.span_temperatures.split(",")]

    def conflicts(self) -> Iterator[str]:
        """Check the temperatures, and that they have an effect."""
        yield from super().conflicts()
        if not _NUMBERS.fullmatch(self.span_temperatures) or not min(self.temperatures_of_spans):
            yield f"--span-temperatures: expected numbers above 0 such as 1,100, got {self.span_temperatures!r}"
        for given in self.changed("span_temperatures") if self.alignment not in ("spans", "both") else []:
            yield f"{given} has no effect without --alignment spans or both"
