"""A GPT-2 as a GGUF file, for llama.cpp and what is built on it, and such a file as a model again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.config.workflows import TYPES, NumberType
from tinygpt2.errors import ModelError, listed, one_line
from tinygpt2.exporting.gguf_vocabulary import gguf_vocabulary
from tinygpt2.exporting.source import TANH_GELU, ExportSource
from tinygpt2.models.compatibility import require_tokenizer
from tinygpt2.models.loading import random_model
from tinygpt2.models.quantization import BLOCK, finer_matrices, is_conv1d, rounded, stored_type
from tinygpt2.utils.progress import say
from tinygpt2.utils.types import Array

ARCHITECTURE = "gpt2"
_TOP = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
_IN_BLOCK = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_SIZES = {
    "n_layer": "gpt2.block_count", "n_positions": "gpt2.context_length", "n_embd": "gpt2.embedding_length",
    "n_inner": "gpt2.feed_forward_length", "n_head": "gpt2.attention.head_count",
    "layer_norm_epsilon": "gpt2.attention.layer_norm_epsilon", "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """Return the name of a parameter of `GPT2LMHeadModel` in a GGUF file."""
    if name == "lm_head.weight":
        return "output.weight"
    module, _, kind = name.removeprefix("transformer.").rpartition(".")
    if found := re.fullmatch(r"h\.(\d+)\.(.+)", module):
        return f"blk.{found[1]}.{_IN_BLOCK[found[2]]}.{kind}"
    return f"{_TOP[module]}.{kind}"


def gguf_weights(model: GPT2LMHeadModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a model as llama.cpp computes with them, by their names in `GPT2LMHeadModel`.

    llama.cpp always divides the scores of attention by the square root of the heads' width. Where a configuration
    scales them otherwise, the queries make up for it.
    """
    config = model.config
    width = config.n_embd
    for name, weight in model.named_parameters():  # tied weights come once
        block = re.match(r"transformer\.h\.(\d+)\.attn\.c_attn\.", name)
        factor = 1.0
        if block and not config.scale_attn_weights:
            factor *= (width // config.n_head) ** 0.5
        if block and config.scale_attn_by_inverse_layer_idx:
            factor /= int(block[1]) + 1
        if factor != 1.0:
            weight = torch.cat([weight[..., :width] * factor, weight[..., width:]], dim=-1)
        yield name, weight.detach()


def write_gguf(source: ExportSource, kind: NumberType, path: Path) -> None:
    """Write a model as a GGUF file.

    Args:
        kind: f32, f16, bf16, q8_0 or q4_0; see `stored_type` for what each matrix gets.

    Raises:
        ModelError: llama.cpp cannot compute what the model computes, or encode as its tokenizer does, or a weight is
            too large for half precision.
        OSError: the file cannot be written.
    """
    import gguf

    config = source.model.config
    if config.activation_function not in TANH_GELU:
        raise ModelError(
            f"llama.cpp runs GPT-2 with the tanh GELU only, and the model has {config.activation_function!r}",
            "export it to onnx or safetensors",
        )
    if finer := finer_matrices(source.model, kind):
        say(f"stored in f16, because their rows do not divide into blocks of {BLOCK} weights: {listed(finer)}")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _describe(writer, source, kind)
    types = gguf.GGMLQuantizationType
    for name, weight in gguf_weights(source.model):
        stored = stored_type(name, weight.shape, kind)
        rows = np.ascontiguousarray((weight.T if is_conv1d(name) else weight).numpy())
        if stored == "f16" and np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
            raise ModelError(f"{name} holds weights that are too large for half precision", "use --type bf16 or f32")
        number = types[stored.upper()]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(rows, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, source: ExportSource, kind: NumberType) -> None:
    """Write everything but the tensors: the model's sizes, its vocabulary and what its card says."""
    import gguf

    config = source.model.config
    writer.add_file_type(_file_type(gguf, kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    start, end = source.ends
    tokenizer = require_tokenizer(source.tokenizer, config, source.name)
    vocabulary = gguf_vocabulary(tokenizer, config.vocab_size, (start, end))
    writer.add_tokenizer_model("gpt2")  # a byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # split by GPT-2's pattern; without it, llama.cpp splits by another one
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(start)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(vocabulary.starts)
    told = source.metadata
    if told.license is not None:
        writer.add_license(told.license)
    if told.language:
        writer.add_languages(told.language)
    writer.add_tags(["text-generation", "gpt2", "tinygpt2"])
    if told.base_model:
        writer.add_base_model_count(len(told.base_model))
    for index, name in enumerate(told.base_model):
        organization, _, short = name.rpartition("/")
        writer.add_base_model_name(index, short)
        if organization:
            writer.add_base_model_organization(index, organization)
        writer.add_base_model_repo_url(index, f"https://huggingface.co/{name}")


def open_gguf(path: Path) -> Any:
    """Open a GGUF file for reading.

    Raises:
        ModelError: it is no GGUF file, or not one of a GPT-2.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        architecture = field_of(reader, "general.architecture")
    except Exception as error:  # a broken file makes the reader raise many kinds of exceptions
        raise ModelError(f"{path} cannot be read as a GGUF file: {one_line(error, 200)}") from error
    if architecture != ARCHITECTURE:
        raise ModelError(f"{path} is a GGUF file of {architecture}, not of {ARCHITECTURE}")
    return reader


def field_of(reader: Any, key: str) -> Any:
    """Return a value of a GGUF file's metadata; None if it is missing."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def file_type(path: Path) -> NumberType:
    """Return the type of a GGUF file's matrices.

    Raises:
        ModelError: the file cannot be read, or has a type that `export` does not write.
    """
    import gguf

    found = field_of(open_gguf(path), "general.file_type")
    for kind in TYPES["gguf"]:
        if found == _file_type(gguf, kind):
            return kind
    raise ModelError(f"{path} has the file type {found}, not one of {', '.join(TYPES['gguf'])}")


def _file_type(gguf: Any, kind: NumberType) -> Any:
    return gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]


def read_gguf(path: Path) -> GPT2LMHeadModel:
    """Read a GGUF file of a GPT-2 as a model in float32: what its numbers stand for.

    Raises:
        ModelError: the file cannot be read, or its metadata and its tensors make no model.
    """
    import gguf

    reader = open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sizes = {key: field_of(reader, name) for key, name in _SIZES.items()}
    if missing := [_SIZES[key] for key, value in sizes.items() if value is None]:
        raise ModelError(f"{path} lacks {missing[0]}")
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{path} lacks the tensor token_embd.weight")
    tied = "output.weight" not in tensors
    config = GPT2Config(**sizes, vocab_size=int(tensors["token_embd.weight"].shape[1]), tie_word_embeddings=tied)
    model = random_model(config, 0, hollow=True).to_empty(device="cpu").eval()
    model.tie_weights()
    for name, parameter in model.named_parameters():
        stored = tensors.get(gguf_name(name))
        if stored is None:
            raise ModelError(f"{path} lacks the tensor {gguf_name(name)}")
        values: Array = gguf.quants.dequantize(stored.data, stored.tensor_type)
        read = torch.from_numpy(np.array(values, np.float32))
        read = read.T if is_conv1d(name) else read
        if read.shape != parameter.shape:
            raise ModelError(f"{path}: {gguf_name(name)} has shape {list(stored.shape)}, which does not fit the model")
        parameter.data.copy_(read)
        if not bool(parameter.isfinite().all()):
            raise ModelError(f"{path}: {gguf_name(name)} holds NaN or infinite values")
    return model


def compare_gguf(source: ExportSource, kind: NumberType, path: Path) -> GPT2LMHeadModel:
    """Read a GGUF file back and compare every tensor with the source's, rounded as it should be.

    Returns:
        The model that the file holds.

    Raises:
        ModelError: the file cannot be read, or a tensor differs.
    """
    model = read_gguf(path)
    read = dict(model.named_parameters())
    for name, weight in gguf_weights(source.model):
        if not torch.equal(read[name].data, rounded(name, weight, kind)):
            raise ModelError(f"{path}: {gguf_name(name)} was not written as it should be")
    return model
