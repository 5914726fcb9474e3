"""A student cut from a teacher: chosen layers, weights copied, everything else as it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import GPT2LMHeadModel

from tinygpt2.config import Strategy, TruncateStudentConfig
from tinygpt2.errors import ConfigError
from tinygpt2.files import require_free
from tinygpt2.metrics import model_card
from tinygpt2.model import count_parameters, load_model, model_tokenizer, save_model


@dataclass(frozen=True)
class TruncateStudentResult:
    """What was cut: `layers` are the teacher's blocks that were kept, counted from 0."""

    model: str
    layers: list[int]
    parameters: int
    teacher_parameters: int


def choose_layers(total: int, keep: int, strategy: Strategy) -> list[int]:
    """Return which of `total` blocks to keep, counted from 0.

    `uniform` keeps both ends, evenly spaced: 0,2,4,7,9,11 of 12, as DistilGPT2. `alternate` takes
    floor(i * total / keep): 0,2,4,6,8,10 of 12, as Li et al. 2021, arXiv:2110.08460. `first` and `last` say
    it.

    Raises:
        ConfigError: more layers than there are.
    """
    if keep > total:
        raise ConfigError(f"--num-layers {keep}: the teacher has only {total}")
    if strategy == "first":
        return list(range(keep))
    if strategy == "last":
        return list(range(total - keep, total))
    if strategy == "alternate":
        return [i * total // keep for i in range(keep)]
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)] if keep > 1 else [0]


def cut_layers(teacher: GPT2LMHeadModel, layers: list[int]) -> GPT2LMHeadModel:
    """Return a new model of the teacher's chosen blocks, embeddings, final layer norm and head, all copied.

    Raises:
        ConfigError: a block that does not exist, a repeated one, or an order that is not the teacher's.
    """
    total = teacher.config.n_layer
    if bad := [layer for layer in layers if layer >= total]:
        raise ConfigError(f"--layers: block {bad[0]} does not exist, the teacher has blocks 0 to {total - 1}")
    if sorted(set(layers)) != layers:
        raise ConfigError(f"--layers {','.join(map(str, layers))}: blocks must rise, without repetition")
    config = teacher.config.__class__.from_dict({**teacher.config.to_dict(), "n_layer": len(layers)})
    student = GPT2LMHeadModel(config)
    weights = {}
    for name, tensor in teacher.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["transformer", "h"]:
            if int(parts[2]) not in layers:
                continue
            parts[2] = str(layers.index(int(parts[2])))
        weights[".".join(parts)] = tensor
    student.load_state_dict(weights)
    return student


def truncate_student(config: TruncateStudentConfig) -> TruncateStudentResult:
    """Cut a student's starting weights from a teacher and save them as a plain GPT-2 with its tokenizer.

    Raises:
        ConfigError: layers that do not exist, or an output directory that is not empty.
        ModelError: the teacher cannot be loaded.
    """
    out = Path(config.out)
    require_free(out, "give another --out")
    teacher, directory = load_model(config.teacher, "teacher", allow_pickle=config.allow_pickle)
    if config.layers is not None:
        layers = [int(number) for number in config.layers.split(",")]
    else:
        layers = choose_layers(teacher.config.n_layer, config.num_layers or 0, config.strategy or "uniform")
    student = cut_layers(teacher, layers)
    parameters, before = count_parameters(student), count_parameters(teacher)
    kept = ", ".join(map(str, layers))
    card = model_card(
        out.name,
        f"A GPT-2 of {len(layers)} layers, cut from {config.teacher} and not trained since: "
        f"its blocks {kept}, weights copied.",
        {"parameters": f"{parameters:,}", "teacher's parameters": f"{before:,}", "blocks kept, from 0": kept},
        f"truncate-student {config.flags()}",
    )
    save_model(student, out, model_tokenizer(directory), card, run=config.to_yaml())
    return TruncateStudentResult(str(out.resolve()), layers, parameters, before)
