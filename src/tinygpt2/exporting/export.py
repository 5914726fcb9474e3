"""`export`: write a model for another engine, read it back, run it, and say what it lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from tinygpt2.config.workflows import ExportConfig, Format, NumberType
from tinygpt2.errors import ModelError, explained
from tinygpt2.exporting.checks import CheckText, ExportChecks, check_text, run_checks
from tinygpt2.exporting.outputs import ONNX_FILES, card_path, check_output
from tinygpt2.exporting.reading import engine_of
from tinygpt2.exporting.source import ExportSource, load_source
from tinygpt2.models.card import TRANSFORMERS, model_card
from tinygpt2.models.loading import load_model
from tinygpt2.models.quantization import round_rows
from tinygpt2.models.saving import save_description, share_files
from tinygpt2.models.weights import write_checksums
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.utils.files import atomic_path, write_text
from tinygpt2.utils.locks import writes_out
from tinygpt2.utils.progress import track, warn
from tinygpt2.utils.units import size

EXACT = ("f32", "f16", "bf16")  # types whose export computes nearly what the model computes
_MOST = 0.01  # nats per token: more KL than that is no rounding of such a type


@dataclass(frozen=True)
class ExportResult:
    """The result of `export`.

    Attributes:
        bytes: size of what was written: the file, or the files of a directory, without the card.
        checked: None with --no-check.
    """

    out: str
    format: Format
    type: NumberType
    bytes: int
    checked: ExportChecks | None


@writes_out
@fast_products()
def export(config: ExportConfig) -> ExportResult:
    """Write a model for another engine. What was written is read back before it appears at `out`.

    Raises:
        ConfigError: a package is missing, there is something at `out`, or nothing can be written there.
        DataError: the text to compare on cannot be read, or does not fit the model.
        ModelError: the model cannot be loaded, or the format cannot hold it.
        MachineError: the disk is full.
    """
    check_output(config)
    source = load_source(config)
    out = Path(config.out)
    text = check_text(source, config.data) if config.check else None
    writing = explained(f"cannot write {out}", "then run the command again", ModelError)
    with track(f"write {config.to} {config.type}"), writing, _placed(out, config) as path:
        model = _write(source, config, path)
    written = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file())
    checked = None
    if text is not None:
        file = out / "onnx" / ONNX_FILES[config.type] if config.to == "onnx" else out
        checked = run_export(source, config.to, file, model, text)
        for problem in disagreements(checked, config.type):
            warn(problem)
    result = ExportResult(str(out.resolve()), config.to, config.type, written, checked)
    with explained(f"cannot write the card of {out}", "the exported model itself is whole"):
        write_text(card_path(out, config.to), _card(config, source, result))
    return result


@contextmanager
def _placed(out: Path, config: ExportConfig) -> Iterator[Path]:
    """Yield a temporary path that becomes `out` if the block succeeds. A directory exists already."""
    with atomic_path(out) as path:
        if config.to != "gguf":
            path.mkdir()
        yield path


def _write(source: ExportSource, config: ExportConfig, path: Path) -> GPT2LMHeadModel | None:
    """Write the model and compare every tensor with what it should be; return the model that was written, if read."""
    if config.to == "gguf":
        from tinygpt2.exporting.gguf import compare_gguf, write_gguf

        write_gguf(source, config.type, path)
        return compare_gguf(source, config.type, path)
    if config.to == "onnx":
        from tinygpt2.exporting.onnx_folder import compare_onnx, write_onnx

        write_onnx(source, config.type, path)
        compare_onnx(source, path)
        return None
    return _write_safetensors(source, config.type, path)


def _write_safetensors(source: ExportSource, kind: NumberType, path: Path) -> GPT2LMHeadModel:
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    weights = {name: weight.detach().to(dtype) for name, weight in source.model.named_parameters()}
    if large := [name for name, weight in weights.items() if not bool(weight.isfinite().all())]:
        raise ModelError(f"{large[0]} holds weights that are too large for {kind}", "use --type bf16 or f32")
    before = source.model.config.dtype
    try:
        source.model.save_pretrained(str(path), state_dict=weights)
        source.model.config.dtype = dtype  # save_pretrained writes that of the model in memory
        save_description(source.model, path, source.tokenizer)
    finally:
        source.model.config.dtype = before
    write_checksums(path)
    share_files(path)
    read, _ = load_model(str(path))
    for (name, weight), found in zip(source.model.named_parameters(), read.parameters(), strict=True):
        if not torch.equal(round_rows(weight.detach(), kind), found.detach()):
            raise ModelError(f"{path}: {name} was not written as it should be")
    return read


def run_export(
    source: ExportSource, to: Format, file: Path, model: GPT2LMHeadModel | None, text: CheckText
) -> ExportChecks:
    """Run an exported model and the model that it was made from on the same tokens.

    Args:
        file: the GGUF file or the ONNX graph.
        model: what the file holds, for the formats that torch can run.

    Raises:
        ModelError: the engine cannot load the file.
    """
    engine = engine_of(to, file, model)
    try:
        return run_checks(source, engine, text)
    finally:
        engine.close()


def disagreements(checked: ExportChecks, kind: NumberType) -> Iterator[str]:
    """Yield what an engine does otherwise than it should. Rounding to few bits is no fault."""
    if not math.isfinite(checked.loss):
        yield f"{checked.engine} computes NaN or infinite logits"
    elif kind in EXACT and not checked.kl <= _MOST:
        yield f"{checked.engine} computes something else than the model: mean KL {checked.kl:.3g} nats per token"
    if checked.tokens_equal is False:
        yield "llama.cpp splits the text into other tokens than the model's tokenizer"


def figures(result: ExportResult) -> dict[str, str]:
    """Return the result as rows of a table: the same on the terminal and in the card."""
    rows = {"format": f"{result.format} {result.type}", "size": size(result.bytes)}
    return rows if result.checked is None else rows | check_rows(result.checked)


def check_rows(found: ExportChecks) -> dict[str, str]:
    """Return what was measured as rows of a table."""
    rows = {
        "engine": found.engine,
        "largest difference of a logit": f"{found.logits:.3g}",
        "64 greedy tokens": "the same" if found.greedy_equal else "different",
        "loss (nats/token)": f"{found.loss:.4f} (the model in float32: {found.float_loss:.4f})",
        "KL to the model (nats/token)": f"{found.kl:.3g}",
        "measured on": f"{found.targets:,} tokens",
    }
    if found.tokens_equal is not None:
        rows["tokens of a text"] = "the same" if found.tokens_equal else "different"
    if found.tokens_per_second is not None:
        rows["greedy tokens/s"] = f"{found.tokens_per_second:,.0f}"
    return rows


def _card(config: ExportConfig, source: ExportSource, result: ExportResult) -> str:
    how = f"{source.name}, exported to {config.to} with weights in {config.type}."
    name = Path(config.out).name
    engine = {
        "gguf": (None, f"llama.cpp and what is built on it load it: `llama-cli -m {name}`."),
        "onnx": ("transformers.js", "transformers.js loads this folder, and onnxruntime the graph in onnx/."),
        "safetensors": TRANSFORMERS,
    }[config.to]
    command = f"export {config.flags(shared=True)}"
    return model_card(name, how, figures(result), command, source.metadata, engine=engine, configured=False)
