"""Which models can become a GPT-2, and with which configuration. This needs only their config.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinygpt2.errors import TinyGPT2Error
from tinygpt2.models.configuration import GPT2_DEFAULTS, check_settings

NAMES = {"gpt_neo": "GPT-Neo", "opt": "OPT", "gpt_bigcode": "GPT-BigCode"}
"""The architectures whose weights GPT-2 can hold, by their model_type."""

# For each setting of GPT-2, its name in config.json and the value if it is missing there.
_SETTINGS: dict[str, dict[str, tuple[str, Any]]] = {
    "gpt_neo": {
        "vocab_size": ("vocab_size", 50257), "n_positions": ("max_position_embeddings", 2048),
        "n_embd": ("hidden_size", 2048), "n_layer": ("num_layers", 24), "n_head": ("num_heads", 16),
        "n_inner": ("intermediate_size", None), "activation_function": ("activation_function", "gelu_new"),
        "resid_pdrop": ("resid_dropout", 0.0), "embd_pdrop": ("embed_dropout", 0.0),
        "attn_pdrop": ("attention_dropout", 0.0), "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "initializer_range": ("initializer_range", 0.02), "bos_token_id": ("bos_token_id", 50256),
        "eos_token_id": ("eos_token_id", 50256), "pad_token_id": ("pad_token_id", None),
    },
    "opt": {
        "vocab_size": ("vocab_size", 50272), "n_positions": ("max_position_embeddings", 2048),
        "n_embd": ("hidden_size", 768), "n_layer": ("num_hidden_layers", 12), "n_head": ("num_attention_heads", 12),
        "n_inner": ("ffn_dim", 3072), "activation_function": ("activation_function", "relu"),
        "resid_pdrop": ("dropout", 0.1), "attn_pdrop": ("attention_dropout", 0.0),
        "initializer_range": ("init_std", 0.02), "bos_token_id": ("bos_token_id", 2),
        "eos_token_id": ("eos_token_id", 2), "pad_token_id": ("pad_token_id", 1),
    },
    "gpt_bigcode": {
        **{name: (name, value) for name, value in GPT2_DEFAULTS.items()},
        "activation_function": ("activation_function", "gelu_pytorch_tanh"),
        "scale_attn_weights": ("scale_attn_weights", True), "bos_token_id": ("bos_token_id", 50256),
        "eos_token_id": ("eos_token_id", 50256), "pad_token_id": ("pad_token_id", None),
    },
}  # fmt: skip
# Other names that `transformers` reads for some of these.
_ALIASES = {
    "gpt_neo": {"num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"},
    "gpt_bigcode": {
        "n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
    },
}  # fmt: skip
# What some well-known architectures have where GPT-2 has other parts.
_OTHER_PARTS = {
    "rotary positions, gated MLPs and RMSNorm": (
        "apertus", "arcee", "deepseek_v2", "deepseek_v3", "exaone4", "gemma", "gemma2", "gemma3", "gemma3_text", "glm4",
        "gpt_oss", "granite", "helium", "llama", "llama4_text", "ministral", "mistral", "mixtral", "olmo2", "olmo3",
        "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
    ),
    "rotary positions and gated MLPs": ("cohere", "cohere2", "olmo", "stablelm"),
    "rotary positions, and attention beside the MLP instead of before it": (
        "codegen", "falcon", "gpt_neox", "gptj", "phi",
    ),
    "rotary positions": ("gpt_neox_japanese", "nemotron", "persimmon", "starcoder2"),
    "a bias of the attention scores in place of position embeddings (ALiBi)": ("bloom", "mpt"),
    "norms after the blocks": ("bert", "camembert", "openai-gpt", "roberta"),
    "positions that are computed, not learned": ("ctrl", "xglm"),
    "scaled token embeddings": ("biogpt",),
    "no attention": ("falcon_mamba", "mamba", "mamba2", "rwkv"),
}  # fmt: skip


def gpt2_settings(values: dict[str, Any], where: str, error: type[TinyGPT2Error]) -> dict[str, Any]:
    """Return the settings of the GPT-2 that holds a model's weights, after checking that there is one.

    Args:
        values: keys and values of the model's config.json.
        where: where they come from, for error messages.
        error: the class of the exception.

    Raises:
        TinyGPT2Error: of the given class: GPT-2 does not have the model's parts, or the values are impossible.
    """
    kind = values.get("model_type") or "gpt2"
    if kind == "gpt2":
        return check_settings(values, where, error)
    if parts := list(_other_parts(str(kind), values)):
        raise error(
            f"{where}: the weights of a {kind} model cannot become those of a GPT-2: it has {', and '.join(parts)}",
            "the way that remains is a student of a preset (see tinygpt2 presets): "
            "tinygpt2 distill --teacher TEACHER --student PRESET --data DATA --out STUDENT",
        )
    values = {name: values[alias] for name, alias in _ALIASES.get(kind, {}).items() if alias in values} | values
    settings = {ours: values.get(theirs, default) for ours, (theirs, default) in _SETTINGS[kind].items()}
    if settings["n_inner"] == 4 * settings["n_embd"]:
        settings["n_inner"] = None  # as GPT-2's own configurations say it
    quantization = {key: values[key] for key in ("quantization_config",) if key in values}
    return check_settings(settings | quantization, where, error)


def _other_parts(kind: str, values: dict[str, Any]) -> Iterator[str]:
    """Yield what a model has where GPT-2 has other parts."""
    known = (parts for parts, kinds in _OTHER_PARTS.items() if kind in kinds)
    if kind not in NAMES:
        yield next(known, "an architecture whose parts are not known to be GPT-2's")
    if kind == "opt":
        width = values.get("hidden_size", 768)
        if (own := values.get("word_embed_proj_dim") or width) != width:
            yield f"token embeddings of {own} dimensions before layers of {width}"
        if not values.get("do_layer_norm_before", True):
            yield "norms after the blocks"
        elif values.get("_remove_final_layer_norm"):
            yield "no norm after the last block"
    if kind == "gpt_bigcode" and values.get("add_cross_attention"):
        yield "cross-attention"
