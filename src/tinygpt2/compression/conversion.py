"""Load a teacher as a GPT-2. The weights of GPT-Neo, OPT and GPT-BigCode go over into a GPT-2 that computes the same.

One thing does not: in some layers of GPT-Neo, attention reaches only a window of tokens back. GPT-2 has no such layers,
so there the conversion computes the same only for texts that are not longer than the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tinygpt2.compression.architectures import NAMES, gpt2_settings
from tinygpt2.compression.calibration import Batches, held_out_batches, mean_loss, tokens_of
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.errors import ModelError, listed
from tinygpt2.models.configuration import make_model_config
from tinygpt2.models.directory import no_weights, read_config_json, weight_files
from tinygpt2.models.lm_head import scoring_chunk
from tinygpt2.models.loading import load_model, load_weights, random_model
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.devices import current_device
from tinygpt2.utils.hub import local_directory
from tinygpt2.utils.progress import ProgressStage, say, track

TOLERANCE = 1e-4  # of the logits, relative to the largest one: float32 sums depend on their order
_PROBE = 128  # tokens of each of the two rows on which both models are compared

Weights = dict[str, Tensor]
Part = tuple[Float[Tensor, "... O"], Float[Tensor, " O"]]
"""The weight of a norm (O) or, as GPT-2's Conv1D stores it, of a linear layer (in, O); and the bias."""


@dataclass(frozen=True)
class Conversion:
    """How a model of another architecture became a GPT-2.

    Attributes:
        model_type: the architecture, as in its config.json.
        logits: the largest difference between both models' logits for random tokens.
        largest_logit: the largest absolute logit, to compare the difference with.
        local_layers: in how many layers of the original attention reaches only `window` tokens back.
        window: None if there are no such layers.
        loss, original_loss: nats per token of the conversion and of the original on blocks of --data; None if both
            models compute the same for them, or without --data.
        sequences, sequence_length: on how many blocks, and of how many tokens, the losses were measured.
    """

    model_type: str
    logits: float
    largest_logit: float
    local_layers: int = 0
    window: int | None = None
    loss: float | None = None
    original_loss: float | None = None
    sequences: int | None = None
    sequence_length: int | None = None

    def described(self) -> str:
        """Return the conversion in words, for the model card."""
        text = f"{NAMES[self.model_type]}: logits for random tokens differ by at most {self.logits:.1e}"
        if self.window is not None:
            text += (
                f"; in {self.local_layers} layers attention reached only {self.window} tokens back and now reaches "
                "all, so for longer texts it computes something else"
            )
        if self.loss is not None:
            text += (
                f": a loss of {self.loss:.4f} instead of {self.original_loss:.4f} nats per token, on {self.sequences} "
                f"held-out blocks of {self.sequence_length} tokens"
            )
        return text


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher as a GPT-2.

    Attributes:
        directory: the directory that it was loaded from.
        parameters: the number of the teacher's own weights.
        conversion: None if the teacher is a GPT-2 itself.
        original: the model as it was, if the GPT-2 does not compute the same for long texts.
    """

    model: GPT2LMHeadModel
    directory: Path
    parameters: int
    conversion: Conversion | None = None
    original: PreTrainedModel | None = None


def load_as_gpt2(name: str, *, allow_pickle: bool = False) -> LoadedTeacher:
    """Load a teacher from a local directory or the Hub, and make a GPT-2 of it if it is none.

    Raises:
        ModelError: there is no such model, it cannot be loaded, or GPT-2 does not have its parts.
    """
    described = local_directory(name, "teacher")  # of a Hub id, only the description is downloaded so far
    kind = read_config_json(described, "teacher").get("model_type") or "gpt2"
    if kind == "gpt2":
        model, directory = load_model(name, "teacher", allow_pickle=allow_pickle)
        return LoadedTeacher(model, directory, count_parameters(model))
    settings = gpt2_settings(read_config_json(described), str(described / "config.json"), ModelError)
    directory = local_directory(name, "teacher", allow_pickle=allow_pickle, weights=True)
    original = _load_original(name, directory, kind, allow_pickle=allow_pickle)
    tied = original.get_output_embeddings().weight is original.get_input_embeddings().weight
    config = make_model_config(settings | {"tie_word_embeddings": tied}, str(directory / "config.json"), ModelError)
    model = random_model(config, 0).eval()
    model.load_state_dict(_gpt2_weights(kind, original.state_dict(), config))
    local = [layer for layer in getattr(original.config, "attention_layers", []) if layer == "local"]
    window = original.config.window_size if local else None
    conversion = replace(_compared(name, original, model, window), local_layers=len(local), window=window)
    say(
        f"teacher {name} is a {NAMES[kind]}; as a GPT-2 its logits differ by at most {conversion.logits:.1e} "
        f"(the largest is {conversion.largest_logit:.3g})"
    )
    return LoadedTeacher(model, directory, count_parameters(original), conversion, original if local else None)


def _load_original(name: str, directory: Path, kind: str, *, allow_pickle: bool) -> PreTrainedModel:
    """Load a model of another architecture, and check that its files hold this model and no larger one."""
    where = f"teacher {directory}"
    if not weight_files(directory, allow_pickle=allow_pickle):
        raise no_weights(name, directory, "teacher")
    classes = {
        "gpt_neo": transformers.GPTNeoForCausalLM, "opt": transformers.OPTForCausalLM,
        "gpt_bigcode": transformers.GPTBigCodeForCausalLM,
    }  # fmt: skip
    original, unused = load_weights(classes[kind], directory, where, allow_pickle=allow_pickle)
    known = {_in_any_layer(name) for name in original.state_dict()}
    if beyond := [name for name in unused if _in_any_layer(name) in known]:
        layers = original.config.num_hidden_layers
        raise ModelError(f"{where}: unexpected weights {listed(beyond)}: config.json says that it has {layers} layers")
    if unused:
        say(f"{where}: its files hold tensors that {NAMES[kind]} does not use: {listed(unused)}")
    return original.requires_grad_(False)


def _in_any_layer(name: str) -> str:
    """Return the name of a tensor without the number of its layer."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


@torch.no_grad()
def _compared(name: str, original: PreTrainedModel, model: GPT2LMHeadModel, window: int | None) -> Conversion:
    """Compare both models on random tokens, no more than the window of local attention.

    Raises:
        ModelError: they do not compute the same.
    """
    length = min(model.config.n_positions, window or _PROBE, _PROBE)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected, logits = original(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    gap, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    kind = original.config.model_type
    if not gap <= TOLERANCE * largest:  # also true if one of them is NaN
        raise ModelError(
            f"teacher {name}: as a GPT-2 this {NAMES[kind]} computes other logits: they differ by up to {gap:.3g} "
            f"(the largest is {largest:.3g})",
            "this version of transformers may compute the model in another way than this program knows",
        )
    return Conversion(kind, gap, largest)


def measured(
    teacher: LoadedTeacher, name: str, data: PackedDataset | None, count: int | None, positions: int
) -> Conversion | None:
    """Say what it costs that GPT-2 has no local attention, and measure it if there is something to measure.

    Args:
        name: what the notes call the teacher.
        data: measured on `held_out_batches` of its test split or, if that is empty, of its training split.
        positions: the number of the student's positions; blocks are shortened to it.

    Returns:
        The teacher's conversion, with the losses if they were measured.
    """
    conversion, original = teacher.conversion, teacher.original
    if conversion is None or conversion.window is None or original is None:
        return conversion
    window, kind = conversion.window, NAMES[conversion.model_type]
    say(
        f"teacher {name}: in {conversion.local_layers} of its {teacher.model.config.n_layer} layers, attention "
        f"reaches only {window} tokens back; in a GPT-2 it reaches all. For texts of up to {window} tokens both "
        "compute the same"
    )
    blocks = None if data is None else data.test if len(data.test) else data.train
    device = current_device()
    batches = held_out_batches(blocks, count, device) if blocks is not None and len(blocks) else []
    batches = [ids[:, :positions] for ids in batches]
    length = max((ids.shape[1] for ids in batches), default=0)
    if positions <= window:
        say(f"the student has {positions} positions, so this makes no difference to it")
    elif not length:
        say(f"to measure what this costs give --data; with --n-positions {window} it costs nothing")
    elif length <= window:
        say(f"the blocks of --data have {length} tokens, so this makes no difference to them")
    else:
        with track("measure the teacher with local attention and without", 2 * tokens_of(batches), "tokens") as stage:
            before = _mean_loss(original.to(device), batches, stage)
            after = mean_loss(teacher.model.to(device), batches, stage)
        number = sum(len(ids) for ids in batches)
        say(
            f"on {number} blocks of {length} tokens of --data the {kind} has a loss of {before:.4f} nats per token; "
            f"as a GPT-2 it has {after:.4f} ({after - before:+.4f})"
        )
        return replace(conversion, loss=after, original_loss=before, sequences=number, sequence_length=length)
    return conversion


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, batches: Batches, stage: ProgressStage) -> float:
    """Return the cross-entropy of any causal model in nats per token, as `calibration.mean_loss` does for GPT-2."""
    head, total, count = model.get_output_embeddings(), 0.0, 0
    chunk = scoring_chunk(model.config.vocab_size, model.device.type)
    for ids in batches:
        states = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        targets = ids[:, 1:].flatten().long()
        for part, wanted in zip(torch.split(states, chunk), torch.split(targets, chunk), strict=True):
            total += float(F.cross_entropy(head(part), wanted, reduction="none").double().sum())
        count += len(targets)
        stage.advance(ids.numel())
    return total / count


def _part(weights: Weights, name: str, width: int) -> Part:
    """Return weight and bias of a norm or a linear layer. A norm may lack both, a linear layer its bias."""
    weight = weights.get(f"{name}.weight", torch.ones(width))
    weight = weight.T if weight.dim() == 2 else weight
    return weight, weights.get(f"{name}.bias", torch.zeros(weight.shape[-1]))


def _joined(weights: Weights, names: list[str], width: int) -> Part:
    """Return the projections to queries, keys and values as one."""
    parts = [_part(weights, name, width) for name in names]
    return torch.cat([weight for weight, _ in parts], dim=-1), torch.cat([bias for _, bias in parts])


def _gpt_neo_attention(weights: Weights, layer: str, config: GPT2Config) -> Part:
    """Join the projections. GPT-2 divides scores by the root of the head width, GPT-Neo does not: scale the queries."""
    names = [f"{layer}.attn.attention.{part}_proj" for part in "qkv"]
    weight, bias = _joined(weights, names, config.n_embd)
    weight[:, : config.n_embd] *= math.sqrt(config.n_embd // config.n_head)
    return weight, bias


def _opt_attention(weights: Weights, layer: str, config: GPT2Config) -> Part:
    return _joined(weights, [f"{layer}.self_attn.{part}_proj" for part in "qkv"], config.n_embd)


def _gpt_bigcode_attention(weights: Weights, layer: str, config: GPT2Config) -> Part:
    """Sort the columns that are stored head by head, or give every head a copy of the one head of keys and values."""
    width, heads = config.n_embd, config.n_head
    parts = _part(weights, f"{layer}.attn.c_attn", width)
    if parts[0].shape[-1] == 3 * width:
        weight, bias = (x.reshape(*x.shape[:-1], heads, 3, -1).transpose(-3, -2).flatten(-3) for x in parts)
    else:
        shared = [x[..., width:].reshape(*x.shape[:-1], 2, 1, -1) for x in parts]
        copies = [x.expand(*x.shape[:-2], heads, -1).flatten(-3) for x in shared]
        weight, bias = (torch.cat([x[..., :width], both], -1) for x, both in zip(parts, copies, strict=True))
    return weight, bias


@dataclass(frozen=True)
class _Names:
    """What an architecture calls the parts of GPT-2.

    Attributes:
        layers: the name of the list of layers.
        outside, inside: for each part outside the layers and in each layer its name; `inside` without c_attn.
        attention: returns c_attn of one layer.
    """

    layers: str
    outside: dict[str, str]
    inside: dict[str, str]
    attention: Callable[[Weights, str, GPT2Config], Part]


_GPT2_OUTSIDE = {name: f"transformer.{name}" for name in ("wte", "wpe", "ln_f")}
_GPT2_INSIDE = {name: name for name in ("ln_1", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")}
_NAMES = {
    "gpt_neo": _Names(
        "transformer.h", _GPT2_OUTSIDE, {**_GPT2_INSIDE, "attn.c_proj": "attn.attention.out_proj"}, _gpt_neo_attention
    ),
    "opt": _Names(
        "model.decoder.layers",
        {
            "wte": "model.decoder.embed_tokens", "wpe": "model.decoder.embed_positions",
            "ln_f": "model.decoder.final_layer_norm",
        },
        {
            "ln_1": "self_attn_layer_norm", "attn.c_proj": "self_attn.out_proj", "ln_2": "final_layer_norm",
            "mlp.c_fc": "fc1", "mlp.c_proj": "fc2",
        },
        _opt_attention,
    ),
    "gpt_bigcode": _Names("transformer.h", _GPT2_OUTSIDE, _GPT2_INSIDE, _gpt_bigcode_attention),
}  # fmt: skip


def _gpt2_weights(kind: str, weights: Weights, config: GPT2Config) -> Weights:
    """Return the weights of a GPT-2 that computes what the original computes.

    Args:
        weights: the original's state_dict. Its linear layers store (out, in), GPT-2's Conv1D stores (in, out).
        config: the configuration of the GPT-2.
    """
    names = _NAMES[kind]
    found = {"lm_head.weight": weights["lm_head.weight"]}
    for table in ("wte", "wpe"):
        found[f"transformer.{table}.weight"] = weights[f"{names.outside[table]}.weight"]
    # OPT's positions count from 2, so its first two rows are not used
    found["transformer.wpe.weight"] = found["transformer.wpe.weight"][-config.n_positions :]
    parts = {"transformer.ln_f": _part(weights, names.outside["ln_f"], config.n_embd)}
    for number in range(config.n_layer):
        block, layer = f"transformer.h.{number}", f"{names.layers}.{number}"
        for ours, theirs in names.inside.items():
            parts[f"{block}.{ours}"] = _part(weights, f"{layer}.{theirs}", config.n_embd)
        parts[f"{block}.attn.c_attn"] = names.attention(weights, layer, config)
    for name, (weight, bias) in parts.items():
        found |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return found
