"""A GPT-2 as one ONNX graph: the prompt in one go, then one token after another with past keys and values.

Inputs, with B rows, T new tokens and P earlier ones: input_ids (B, T), attention_mask (B, P + T), position_ids (B, T),
past_key_values.N.key and .value (B, H, P, K). Outputs: logits (B, T, V), present.N.key and .value (B, H, P + T, K).
These are the names that transformers.js and onnxruntime's tools expect. An initializer has the name of the model's
parameter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.errors import ModelError
from tinygpt2.exporting.source import TANH_GELU
from tinygpt2.utils.types import Array

OPSET, IR_VERSION = 20, 10  # Gelu is an operator since opset 20
_HIDDEN = float(np.finfo(np.float32).min)  # the score of a position that is not visible


class _Graph:
    """Collects the nodes, inputs, outputs and initializers of a graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.constants: dict[str, Any] = {}

    def constant(self, name: str, value: Array) -> str:
        """Add an initializer, once."""
        self.constants.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def numbers(self, *values: int) -> str:
        """Add a list of whole numbers, for shapes and axes."""
        return self.constant(f"numbers_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def number(self, value: float) -> str:
        """Add one float."""
        return self.constant(f"number_{value!r}", np.array(value, np.float32))

    def whole(self, value: int) -> str:
        """Add one whole number."""
        return self.constant(f"whole_{value}", np.array(value, np.int64))

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node with one output, which has the node's name."""
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def split(self, x: str, sizes: str, outputs: list[str]) -> list[str]:
        """Split the last axis."""
        self.nodes.append(helper.make_node("Split", [x, sizes], outputs, name=f"{outputs[0]}.split", axis=-1))
        return outputs

    def linear(self, x: str, module: str) -> str:
        """Add a linear layer whose matrix has shape (in, out), as Conv1D's."""
        product = self.node("MatMul", [x, f"{module}.weight"], f"{module}.product")
        return self.node("Add", [product, f"{module}.bias"], f"{module}.output")

    def norm(self, x: str, module: str, epsilon: float) -> str:
        """Add a layer norm."""
        inputs = [x, f"{module}.weight", f"{module}.bias"]
        return self.node("LayerNormalization", inputs, f"{module}.output", axis=-1, epsilon=epsilon)


def onnx_model(model: GPT2LMHeadModel) -> ModelProto:
    """Return a float32 model as an ONNX graph.

    Raises:
        ModelError: ONNX has no operator for its activation.
    """
    config, graph = model.config, _Graph()
    for name, weight in model.named_parameters():  # tied weights come once
        # an own output matrix is stored as the product needs it, and so that the quantizer finds it
        value = weight.detach().numpy()
        graph.constant(name, value.T if name == "lm_head.weight" else value)
    for name, axes in (("input_ids", "BT"), ("attention_mask", "BS"), ("position_ids", "BT")):
        graph.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, [_AXES[axis] for axis in axes]))
    shape = ["batch", "sequence", config.vocab_size]
    graph.outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))
    tokens = graph.node("Gather", ["transformer.wte.weight", "input_ids"], "token_embeddings", axis=0)
    places = graph.node("Gather", ["transformer.wpe.weight", "position_ids"], "position_embeddings", axis=0)
    x, mask = graph.node("Add", [tokens, places], "embeddings"), _mask(graph)
    for index in range(config.n_layer):
        x = _block(graph, x, mask, index, config)
    x = graph.norm(x, "transformer.ln_f", config.layer_norm_epsilon)
    head = "lm_head.weight"
    if head not in graph.constants:
        head = graph.node("Transpose", ["transformer.wte.weight"], "tied_head", perm=[1, 0])
    graph.node("MatMul", [x, head], "logits")
    made = helper.make_graph(graph.nodes, "gpt2", graph.inputs, graph.outputs, list(graph.constants.values()))
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(made, opset_imports=[opset], ir_version=IR_VERSION, producer_name="tinygpt2")


_AXES = {"B": "batch", "T": "sequence", "S": "total_sequence", "P": "past_sequence"}


def _mask(graph: _Graph) -> str:
    """Add the scores' mask (B, 1, T, S): 0 where a position is visible, and the lowest number elsewhere.

    New token i sees key j if j <= P + i and the attention mask has a 1 at j.
    """
    one = graph.whole(1)
    new = graph.node("Gather", [graph.node("Shape", ["input_ids"], "new_shape"), one], "new_length", axis=0)
    total = graph.node("Gather", [graph.node("Shape", ["attention_mask"], "mask_shape"), one], "total_length", axis=0)
    past = graph.node("Sub", [total, new], "past_length")
    keys = graph.node("Range", [graph.whole(0), total, one], "key_positions")
    queries = graph.node("Range", [past, total, one], "query_positions")
    column = graph.node("Unsqueeze", [queries, graph.numbers(1)], "query_column")
    causal = graph.node("LessOrEqual", [keys, column], "causal")
    given = graph.node("Cast", ["attention_mask"], "given", to=TensorProto.BOOL)
    visible = graph.node("And", [causal, graph.node("Unsqueeze", [given, graph.numbers(1, 2)], "given_4d")], "visible")
    return graph.node("Where", [visible, graph.number(0.0), graph.number(_HIDDEN)], "mask")


def _block(graph: _Graph, x: str, mask: str, index: int, config: GPT2Config) -> str:
    name, heads, width = f"transformer.h.{index}", config.n_head, config.n_embd
    own = graph.linear(graph.norm(x, f"{name}.ln_1", config.layer_norm_epsilon), f"{name}.attn.c_attn")
    split = graph.numbers(0, 0, heads, width // heads)
    parts = {}
    outputs = [f"{name}.attn.{part}_flat" for part in ("query", "key", "value")]
    for part, flat in zip(
        ("query", "key", "value"), graph.split(own, graph.numbers(*[width] * 3), outputs), strict=True
    ):
        by_head = graph.node("Reshape", [flat, split], f"{name}.attn.{part}_heads")
        parts[part] = graph.node("Transpose", [by_head], f"{name}.attn.{part}", perm=[0, 2, 1, 3])
    for part in ("key", "value"):
        past, present = f"past_key_values.{index}.{part}", f"present.{index}.{part}"
        for names, label, axis in ((graph.inputs, past, "P"), (graph.outputs, present, "S")):
            shape = ["batch", heads, _AXES[axis], width // heads]
            names.append(helper.make_tensor_value_info(label, TensorProto.FLOAT, shape))
        parts[part] = graph.node("Concat", [past, parts[part]], present, axis=2)
    keys = graph.node("Transpose", [parts["key"]], f"{name}.attn.keys", perm=[0, 1, 3, 2])
    scale = (width // heads) ** -0.5 if config.scale_attn_weights else 1.0
    scale /= index + 1 if config.scale_attn_by_inverse_layer_idx else 1
    products = graph.node("MatMul", [parts["query"], keys], f"{name}.attn.products")
    scores = graph.node("Mul", [products, graph.number(scale)], f"{name}.attn.scores")
    masked = graph.node("Add", [scores, mask], f"{name}.attn.masked")
    shares = graph.node("Softmax", [masked], f"{name}.attn.shares", axis=-1)
    mixed = graph.node("MatMul", [shares, parts["value"]], f"{name}.attn.mixed")
    rows = graph.node("Transpose", [mixed], f"{name}.attn.rows", perm=[0, 2, 1, 3])
    joined = graph.node("Reshape", [rows, graph.numbers(0, 0, width)], f"{name}.attn.joined")
    x = graph.node("Add", [x, graph.linear(joined, f"{name}.attn.c_proj")], f"{name}.middle")
    inner = graph.linear(graph.norm(x, f"{name}.ln_2", config.layer_norm_epsilon), f"{name}.mlp.c_fc")
    active = _activation(graph, inner, f"{name}.mlp.active", config.activation_function)
    return graph.node("Add", [x, graph.linear(active, f"{name}.mlp.c_proj")], f"{name}.output")


def _activation(graph: _Graph, x: str, output: str, name: str) -> str:
    if name in TANH_GELU:
        return graph.node("Gelu", [x], output, approximate="tanh")
    if name in ("gelu", "gelu_python"):
        return graph.node("Gelu", [x], output, approximate="none")
    if name in ("relu", "tanh", "sigmoid"):
        return graph.node(name.capitalize(), [x], output)
    raise ModelError(f"the export to ONNX has no operator for activation_function {name!r}", "export to safetensors")
