"""Options of `export`, and which types of numbers each format has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from tinygpt2.config.base import option
from tinygpt2.config.models import CardOptions, ModelOptions

Format = Literal["gguf", "onnx", "safetensors"]
NumberType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "int8"]

TYPES: dict[Format, tuple[NumberType, ...]] = {
    "gguf": ("f32", "f16", "bf16", "q8_0", "q4_0"),
    "onnx": ("f32", "int8"),
    "safetensors": ("f32", "f16", "bf16"),
}
PACKAGES: dict[Format, tuple[str, ...]] = {"gguf": ("gguf",), "onnx": ("onnx", "onnxruntime"), "safetensors": ()}
"""The packages that a format needs. The extra of tinygpt2 that installs them has the format's name."""


class ExportConfig(ModelOptions, CardOptions):
    """Options of `export`."""

    model: str = option("Model: a local directory or a Hub id.", positional=True, path=True, metavar="PATH|ID")
    to: Format = option(
        "Format. gguf: one file for llama.cpp, Ollama and LM Studio. onnx: a folder for onnxruntime and "
        "transformers.js. safetensors: a plain model directory."
    )
    type: NumberType = option(
        "How the weights are stored. gguf: f32, f16, bf16, q8_0 or q4_0; onnx: f32 or int8; safetensors: f32, f16 or "
        "bf16. q8_0 and q4_0 round blocks of 32 weights to 8 and 4 bits.",
        default="f32",
    )
    out: str = option("What to write: a file for gguf, a directory for the other formats.", path=True)
    overwrite: bool = option("Replace what exists at --out.", default=False)
    check: bool = option(
        "Run what was written and compare it with the model: logits, greedy text, loss, speed.", default=True
    )
    data: str | None = option(
        "Text, or pregenerated dataset, on which to compare.",
        default=None,
        path=True,
        metavar="SOURCE|PATH",
        shown="python-docs, the text of quickstart",
    )

    def conflicts(self) -> Iterator[str]:
        """Check that the format has the type, and that --data has an effect."""
        yield from super().conflicts()
        if self.type not in TYPES[self.to]:
            yield f"--type {self.type}: --to {self.to} has the types {', '.join(TYPES[self.to])}"
        if self.data is not None and not self.check:
            yield "--data has no effect with --no-check"
