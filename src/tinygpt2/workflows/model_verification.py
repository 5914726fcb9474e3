"""Check a model directory: its files, its weights, and whether it computes what a GPT-2 computes.

A model runs under `transformers` and under this package's own GPT-2 (reference.py). The two implementations do not
share any code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.compression.conversion import load_as_gpt2
from tinygpt2.config.workflows import VerifyConfig
from tinygpt2.errors import ModelError, listed
from tinygpt2.models import reference
from tinygpt2.models.compatibility import vocabulary_mismatch
from tinygpt2.models.directory import weight_files
from tinygpt2.models.loading import load_model, model_config, model_tokenizer
from tinygpt2.models.weights import (
    CHECKSUMS,
    block_of,
    check_checksums,
    stored_tensors,
    unused_tensors,
)
from tinygpt2.training.checkpoint import STATE, damage
from tinygpt2.utils.files import read_json

TOLERANCE = 1e-4  # relative to the largest logit or state: float32 sums depend on their order
_PROMPT, _TOKENS = 16, 32  # tokens of the prompt and of the greedy text, if the model has enough positions


@dataclass(frozen=True)
class Agreement:
    """Differences between the outputs of two implementations for one model, in float32.

    Attributes:
        logits, states: the largest absolute difference.
        largest_logit, largest_state: the largest absolute value, to compare the difference with.
        greedy_tokens: the number of tokens that each implementation generated greedily.
        same_greedy_text: whether both generated the same tokens.
    """

    logits: float
    largest_logit: float
    states: float
    largest_state: float
    greedy_tokens: int
    same_greedy_text: bool


@dataclass(frozen=True)
class ModelFindings:
    """What the check of a model directory found; see `VerifyResult`."""

    problems: list[str]
    notes: list[str]
    reference: Agreement | None = None
    copies: dict[str, str] | None = None


def check_model(path: Path, config: VerifyConfig) -> ModelFindings:
    """Check a model directory and, with a teacher, what the model has copied from it.

    Raises:
        ModelError: the teacher cannot be loaded.
    """
    problems, notes = list(check_checksums(path)), list[str]()
    if (path / STATE).is_file():
        problems += [fault] if (fault := damage(path)) else []
    elif not (path / CHECKSUMS).is_file():
        notes.append(f"there is no {CHECKSUMS} file, so the weights could not be checked for corruption")
    try:
        model, _ = load_model(str(path), allow_pickle=config.allow_pickle)
    except ModelError as error:
        return ModelFindings([*problems, str(error)], notes)
    for problem, is_fault in _check_loaded(path, model, allow_pickle=config.allow_pickle):
        (problems if is_fault else notes).append(problem)
    agreement = None
    try:
        # pickles are read once, by the library
        agreement = compare(model, reference.load(path, None if weight_files(path) else model.state_dict()))
    except ValueError as error:
        notes.append(f"not compared with the reference: {error}")
    else:
        problems += _disagreements(agreement)
    copies = None
    if config.teacher is not None:
        teacher = load_as_gpt2(config.teacher, allow_pickle=config.allow_pickle)
        copies = copied(model, teacher.model)
        problems += _misplaced(copies)
    return ModelFindings(problems, notes, agreement, copies)


def _check_loaded(directory: Path, model: GPT2LMHeadModel, *, allow_pickle: bool) -> Iterator[tuple[str, bool]]:
    """Yield a message for each oddity of weights, configuration and tokenizer, and whether it is a fault."""
    config = model.config
    stored = stored_tensors(weight_files(directory, allow_pickle=allow_pickle), str(directory))
    if unused := unused_tensors(stored, model, str(directory)):
        yield f"the files hold tensors that GPT-2 does not use: {listed(unused)}", False
    ties = model_config(directory).tie_word_embeddings
    if ties and not config.tie_word_embeddings:
        yield "lm_head.weight differs from the embeddings, so both are used, but config.json ties them", False
    if not ties and torch.equal(model.lm_head.weight, model.transformer.wte.weight):
        yield "lm_head.weight is equal to the embeddings, but config.json does not tie them", False
    yield from _check_ends(directory, config)
    try:
        tokenizer = model_tokenizer(directory)
    except ModelError as error:
        yield str(error), True
        return
    if tokenizer is None:
        yield "the directory does not contain a tokenizer", False
    elif (mismatch := vocabulary_mismatch(tokenizer, config)) is not None:
        yield mismatch


def _check_ends(directory: Path, config: GPT2Config) -> Iterator[tuple[str, bool]]:
    """Check whether the special tokens of both configurations (begin, end and padding) are in the vocabulary.

    If one is not, that is no fault: the model runs, but it never generates this token.
    """
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings: dict[str, dict[str, Any]] = {"config.json": {key: getattr(config, key, None) for key in keys}}
    file = directory / "generation_config.json"
    if file.is_file():
        try:
            values = read_json(file)
            settings[file.name] = {key: values.get(key) for key in keys}
        except (OSError, ValueError, AttributeError) as error:
            yield f"{file.name}: {error}", True
    for name, tokens in settings.items():
        for key, token in tokens.items():
            for one in token if isinstance(token, list) else [token]:
                if one is None or (isinstance(one, int) and 0 <= one < config.vocab_size):
                    continue
                yield f"{name}: {key} {one} is not in the vocabulary of {config.vocab_size} tokens", False


@torch.no_grad()
def compare(model: GPT2LMHeadModel, other: reference.GPT2) -> Agreement:
    """Run both implementations of a model on fixed random tokens, and let both continue the first tokens greedily.

    `model` uses the forward pass of `transformers`, with torch's kernel for GPT-2's tanh GELU.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    length = min(config.n_positions, 256)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    output, expected = model(ids, output_hidden_states=True), other(ids)
    prompt = ids[:1, : max(1, min(_PROMPT, config.n_positions // 2))]
    count = min(_TOKENS, config.n_positions - prompt.shape[1])
    text = prompt
    for _ in range(count):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    pairs = list(zip(output.hidden_states, expected.states, strict=True))
    return Agreement(
        logits=float((output.logits - expected.logits).abs().max()),
        largest_logit=float(expected.logits.abs().max()),
        states=max(float((a - b).abs().max()) for a, b in pairs),
        largest_state=max(float(b.abs().max()) for _, b in pairs),
        greedy_tokens=count,
        same_greedy_text=bool(torch.equal(text, other.greedy(prompt, count))),
    )


def _disagreements(agreement: Agreement) -> Iterator[str]:
    for name, gap, largest in (
        ("logits", agreement.logits, agreement.largest_logit),
        ("hidden states", agreement.states, agreement.largest_state),
    ):
        if not gap <= TOLERANCE * largest:  # also true if one of them is NaN
            yield f"the {name} differ from the reference's by up to {gap:.3g} (the largest value is {largest:.3g})"


def copied(student: GPT2LMHeadModel, teacher: GPT2LMHeadModel) -> dict[str, str]:
    """Return which tensors of a student are exact copies: student's name -> teacher's name.

    A tensor may equal several tensors of the teacher, for example if it is a bias of zeros. The block decides: if most
    tensors of the student's block 1 are copies from the teacher's block 3, such a tensor counts as a copy from there:

        h.1.attn.c_attn.weight: only h.3.attn.c_attn.weight is equal  ->  h.3.attn.c_attn.weight
        h.1.mlp.c_proj.weight:  only h.3.mlp.c_proj.weight is equal   ->  h.3.mlp.c_proj.weight
        h.1.attn.c_attn.bias:   equal in h.0, h.1, h.2 and h.3        ->  h.3.attn.c_attn.bias
    """
    by_content: dict[bytes, list[str]] = {}
    for name, tensor in teacher.named_parameters(remove_duplicate=False):  # tied weights count under both names
        by_content.setdefault(_content(tensor), []).append(name)
    candidates = {name: by_content.get(_content(tensor), []) for name, tensor in student.named_parameters()}
    blocks: dict[str, list[str]] = {}  # for each block of the student, the teacher's block of every candidate
    for name, origins in candidates.items():
        if block_of(name):
            blocks.setdefault(block_of(name), []).extend(block_of(origin) for origin in origins)
    source = {block: _most_common(origins) for block, origins in blocks.items() if origins}
    copies = {}
    for name, origins in candidates.items():
        expected = _in_block(name, source.get(block_of(name), ""))
        if origins:
            copies[name] = expected if expected in origins else origins[0]
    return copies


def _misplaced(copies: dict[str, str]) -> Iterator[str]:
    """Yield a message for each copy in the wrong place: another block than its neighbours, or another part.

    If the other tensors of the student's block 0 are copies from the teacher's block 2:

        h.0.ln_1.weight is a copy of h.2.ln_1.weight  ->  right
        h.0.ln_1.weight is a copy of h.5.ln_1.weight  ->  another block
        h.0.ln_1.weight is a copy of h.2.ln_2.weight  ->  another part
    """
    blocks: dict[str, list[str]] = {}
    for name, origin in copies.items():
        blocks.setdefault(block_of(name), []).append(block_of(origin))
    source = {block: _most_common(origins) if block else "" for block, origins in blocks.items()}
    for name, origin in copies.items():
        of_a_block = source[block_of(name)] or not block_of(name)
        if of_a_block and origin != _in_block(name, source[block_of(name)]):
            yield f"{name} is a copy of the teacher's {origin}, which does not belong there"
    order = [int(origin.split(".")[2]) for block, origin in source.items() if block and origin]
    if order != sorted(order):
        yield f"the blocks are copies of the teacher's blocks {', '.join(map(str, order))}, which are not in order"


def _in_block(name: str, block: str) -> str:
    """Return the tensor's name in another block: h.1.ln_1.bias in block h.3 becomes h.3.ln_1.bias."""
    return block + name.removeprefix(block_of(name))


def _most_common(values: list[str]) -> str:
    return max(sorted(set(values)), key=values.count)


def _content(tensor: Tensor) -> bytes:
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + tensor.detach().numpy().tobytes()).digest()
