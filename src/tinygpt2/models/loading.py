"""Load models, or make them with random weights. They are always plain `transformers` models, and most are GPT-2s."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tinygpt2.data.tokenizer import fingerprint, has_tokenizer, load_tokenizer
from tinygpt2.errors import ModelError, listed, one_line
from tinygpt2.models.configuration import is_gpt2, make_model_config
from tinygpt2.models.directory import no_weights, read_config_json, weight_files
from tinygpt2.models.weights import RUN_PREFIX, stored_tensors, unused_tensors
from tinygpt2.utils.files import read_json
from tinygpt2.utils.hub import local_directory
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)
RUN_STATE = "state.json"  # in the directory of a training checkpoint


def random_model(config: GPT2Config, seed: int, *, hollow: bool = False) -> GPT2LMHeadModel:
    """Make a model with GPT-2's random initial weights; the same seed gives the same weights.

    With `hollow`, the model is on the meta device: its tensors have shapes but no values.
    """
    if hollow:
        with torch.device("meta"):
            return fast_activations(GPT2LMHeadModel(config))
    with torch.random.fork_rng(devices=[]):  # it is made on the CPU, so the GPUs' generators stay as they are
        torch.default_generator.manual_seed(seed)
        return fast_activations(GPT2LMHeadModel(config))


def load_model(
    name: str, role: str = "model", *, allow_pickle: bool = False, hollow: bool = False
) -> tuple[GPT2LMHeadModel, Path]:
    """Load float32 weights, in evaluation mode, from a local directory or the Hub.

    The directory of a training checkpoint (OUT/checkpoints/step-N) is a model, too. One line names the stored tensors
    that the model does not use.

    Args:
        name: a local directory or a Hub id, which may end in @REVISION.
        role: what error messages call the model, such as `teacher`.
        allow_pickle: read pickled weights if there are no safetensors.
        hollow: load only the shapes, on the meta device; the weights of a Hub id are not downloaded then.

    Returns:
        The model, and the directory that it was loaded from.

    Raises:
        ModelError: there is no such model, it has no weights, or only pickled ones without `allow_pickle`, it is not a
            GPT-2, or weights are missing, of another shape, NaN or infinite.
    """
    directory = local_directory(name, role, allow_pickle=allow_pickle, weights=not hollow)
    config, where = model_config(directory, role), f"{role} {directory}"
    try:
        shapes = random_model(config, 0, hollow=True).eval()
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{directory / 'config.json'} describes no possible model: {one_line(error, 200)}") from error
    files = weight_files(directory, allow_pickle=allow_pickle)
    if not files and hollow and not Path(name).expanduser().is_dir():
        return shapes, directory
    if not files:
        raise no_weights(name, directory, role)
    unused = unused_tensors(stored_tensors(files, where), shapes, where)
    if hollow:
        return shapes, directory
    if (directory / RUN_STATE).is_file():
        say(f"{where} is a checkpoint of a training run, from step {_step(directory / RUN_STATE)}")
    elif unused:
        say(f"{where}: its files hold tensors that GPT-2 does not use: {listed(unused)}")
    model, _ = load_weights(
        GPT2LMHeadModel, directory, where, allow_pickle=allow_pickle, config=config, attn_implementation="sdpa",
        key_mapping={f"^{RUN_PREFIX}": ""},
    )  # fmt: skip
    # two different matrices in the files are not tied, whatever config.json says
    model.config.tie_word_embeddings = model.lm_head.weight is model.transformer.wte.weight
    return fast_activations(model), directory


def load_causal_lm(
    name: str, role: str = "model", *, allow_pickle: bool = False, hollow: bool = False
) -> tuple[PreTrainedModel, Path]:
    """Load a causal language model of any architecture that `transformers` has; a GPT-2 is loaded by `load_model`.

    Code that a model brings with it is never run. The arguments and the results are those of `load_model`.

    Raises:
        ModelError: also if `transformers` has no such architecture, or it is no causal language model.
    """
    directory = local_directory(name, role, allow_pickle=allow_pickle, weights=not hollow)
    settings = read_config_json(directory, role)
    if is_gpt2(settings):
        return load_model(name, role, allow_pickle=allow_pickle, hollow=hollow)
    where = f"{role} {directory}"
    if settings.get("quantization_config"):
        raise ModelError(f"{where}: the model is quantized (quantization_config), which is not supported")
    kind = settings.get("model_type")
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        with torch.device("meta"):
            shapes: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # an unknown type, values that make no model, or code that is not run
        raise ModelError(
            f"cannot load {where}: transformers opens no causal language model of type {kind!r}: "
            f"{one_line(error, 200)}",
            "code that a model brings with it is never run",
        ) from error
    if hollow:
        return shapes.eval(), directory
    if not weight_files(directory, allow_pickle=allow_pickle):
        raise no_weights(name, directory, role)
    model, _ = load_weights(
        AutoModelForCausalLM,
        directory,
        where,
        allow_pickle=allow_pickle,
        config=config,
        # torch's attention knows no soft cap of the scores: it would leave the cap out
        attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else None,
        trust_remote_code=False,
    )
    return fast_activations(model), directory


def load_weights(
    kind: type[Any], directory: Path, where: str, *, allow_pickle: bool, **options: Any
) -> tuple[Any, list[str]]:
    """Load a model of any architecture with `transformers`: float32 weights, in evaluation mode.

    Args:
        kind: the model's class, or transformers' class that chooses one.
        where: what error messages call the model.
        options: more arguments of `from_pretrained`.

    Returns:
        The model, and the names of the stored tensors that it does not use.

    Raises:
        ModelError: the library cannot load it, or weights are missing, NaN or infinite.
    """
    unset_hf_deepspeed_config()  # with ZeRO-3, each process would otherwise load only its shard of the weights
    try:
        model, info = kind.from_pretrained(
            str(directory),
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=None if allow_pickle else True,
            **options,
        )
    except Exception as error:  # broken weights can make the library raise any exception
        raise ModelError(f"cannot load {where}: {one_line(error, 300)}") from error
    if missing := sorted(map(str, info["missing_keys"])):
        raise ModelError(f"cannot load {where}: missing weights: {listed(missing)}")
    _check_finite(model, where)
    return model.eval(), sorted(map(str, info["unexpected_keys"]))


def _check_finite(model: PreTrainedModel, where: str) -> None:
    bad = [
        name
        for name, tensor in model.named_parameters()
        # a sum is fast; it may be infinite though every value is finite
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all())
    ]
    if bad:
        raise ModelError(f"{where}: NaN or infinite values in {listed(bad)}", "the training that made it diverged")


def _step(state: Path) -> str:
    """Return the step in the state.json of a training checkpoint."""
    try:
        return str(read_json(state)["run"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def model_config(directory: Path, role: str = "model") -> GPT2Config:
    """Read the config.json of a model directory.

    Raises:
        ModelError: there is none, or it does not describe a GPT-2.
    """
    values = read_config_json(directory, role)
    return make_model_config(values, str(directory / "config.json"), ModelError)


def fast_activations(model: AnyModel) -> AnyModel:
    """Run tanh GELUs as a single torch kernel, the same function. The configuration keeps the activation's name."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def model_tokenizer(directory: Path) -> Tokenizer | None:
    """Load the tokenizer in a model's directory; return None if there is none."""
    return load_tokenizer(str(directory)) if has_tokenizer(directory) else None


def tokenizer_fingerprint(directory: Path | None) -> str | None:
    """Return the fingerprint of the tokenizer in a model's directory; None if there is none."""
    tokenizer = None if directory is None else model_tokenizer(directory)
    return None if tokenizer is None else fingerprint(tokenizer)
