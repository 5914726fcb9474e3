"""A GPT-2 as a folder for onnxruntime and transformers.js: the graph, in float32 or int8, and what goes with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import GPT2LMHeadModel

from tinygpt2.config.workflows import NumberType
from tinygpt2.errors import ModelError, one_line
from tinygpt2.exporting.onnx_graph import onnx_model
from tinygpt2.exporting.outputs import ONNX_FILES
from tinygpt2.exporting.source import ExportSource
from tinygpt2.models.loading import model_config, random_model
from tinygpt2.models.saving import save_description
from tinygpt2.utils.types import Array

_ONE_FILE = 2**31 - 2**20  # bytes: the largest message that protobuf writes


def write_onnx(source: ExportSource, kind: NumberType, folder: Path) -> None:
    """Write a model into an empty folder: onnx/model.onnx or onnx/model_quantized.onnx, configurations, tokenizer.

    A graph of more than 2 GB has its weights in a file beside it, NAME.onnx_data.

    Args:
        kind: f32 or int8. onnxruntime's quantizer makes int8: one scale for each matrix, activations as they come.

    Raises:
        ModelError: ONNX has no operator for the model's activation.
        OSError: a file cannot be written.
    """
    target = folder / "onnx" / ONNX_FILES[kind]
    target.parent.mkdir(parents=True)
    graph = onnx_model(source.model)
    plain = target.with_name(ONNX_FILES["f32"])
    large = graph.ByteSize() > _ONE_FILE
    if large:
        onnx.save(graph, plain, save_as_external_data=True, location=f"{plain.name}_data", size_threshold=1024)
    else:
        onnx.save(graph, plain)
    onnx.checker.check_model(str(plain))
    if kind == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with _without_logs():
            quantize_dynamic(
                plain,
                target,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gather"],
                use_external_data_format=large,
            )
        for file in (plain, plain.with_name(f"{plain.name}_data")):
            file.unlink(missing_ok=True)
    tokenizer = source.tokenizer
    if tokenizer is not None:  # transformers.js removes spaces before punctuation unless the file says not to
        tokenizer.init_kwargs.setdefault("clean_up_tokenization_spaces", tokenizer.clean_up_tokenization_spaces)
    save_description(source.model, folder, tokenizer)


@contextmanager
def _without_logs() -> Iterator[None]:
    """Keep the quantizer from logging advice that does not concern a graph written by hand."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def onnx_file(folder: Path) -> tuple[Path, NumberType]:
    """Return the graph in a folder that `write_onnx` wrote, and its type.

    Raises:
        ModelError: there is none.
    """
    kinds: tuple[NumberType, ...] = ("f32", "int8")
    for kind in kinds:
        if (file := folder / "onnx" / ONNX_FILES[kind]).is_file():
            return file, kind
    raise ModelError(f"{folder} has no onnx/{ONNX_FILES['f32']} and no onnx/{ONNX_FILES['int8']}")


def read_weights(file: Path) -> dict[str, Array]:
    """Return the weights that an ONNX graph stores, in float32, by the names of the model's parameters.

    Raises:
        ModelError: the file is no ONNX graph.
    """
    try:
        stored = {one.name: numpy_helper.to_array(one, str(file.parent)) for one in onnx.load(file).graph.initializer}
    except Exception as error:  # a broken file makes the library raise many kinds of exceptions
        raise ModelError(f"{file} cannot be read as ONNX: {one_line(error, 200)}") from error
    read = {}
    for name, values in stored.items():
        plain = name.removesuffix("_quantized")
        if plain != name:
            offset = values.astype(np.float32) - stored[f"{plain}_zero_point"].astype(np.float32)
            values = offset * stored[f"{plain}_scale"]
        read[plain] = values.T if plain == "lm_head.weight" else values
    return read


def read_onnx(folder: Path) -> GPT2LMHeadModel:
    """Read a folder that `write_onnx` wrote as a model in float32: what the numbers of its graph stand for.

    Raises:
        ModelError: the configuration or the graph cannot be read, or they make no model.
    """
    file, _ = onnx_file(folder)
    config, read = model_config(folder), read_weights(file)
    config.tie_word_embeddings = "lm_head.weight" not in read
    model = random_model(config, 0, hollow=True).to_empty(device="cpu").eval()
    model.tie_weights()
    for name, parameter in model.named_parameters():
        values = read.get(name)
        if values is None or values.shape != parameter.shape:
            raise ModelError(f"{file}: {name} is missing, or has a shape that does not fit config.json")
        parameter.data.copy_(torch.from_numpy(np.array(values, np.float32)))
        if not bool(parameter.isfinite().all()):
            raise ModelError(f"{file}: {name} holds NaN or infinite values")
    return model


def compare_onnx(source: ExportSource, folder: Path) -> None:
    """Read an ONNX folder back, and compare every tensor with the model's.

    In float32 they have to be equal. An int8 matrix may differ by half a step.

    Raises:
        ModelError: the file cannot be read, or a tensor differs.
    """
    file, _ = onnx_file(folder)
    read = read_weights(file)
    scales = {one.name: numpy_helper.to_array(one) for one in onnx.load(file).graph.initializer if "_scale" in one.name}
    for name, weight in source.model.named_parameters():
        expected = weight.detach().numpy()
        step = np.max(scales.get(f"{name}_scale", 0.0))
        if name not in read or not np.abs(read[name] - expected).max() <= 0.502 * step:
            raise ModelError(f"{file}: {name} was not written as it should be")
