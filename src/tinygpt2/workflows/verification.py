"""`verify`: whether a dataset or model is what it should be.

A model is run under `transformers` and under this package's own GPT-2 (reference.py), which share no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.config.workflows import VerifyConfig
from tinygpt2.data.dataset import is_packed_dataset
from tinygpt2.data.validation import check_dataset
from tinygpt2.errors import DataError, ModelError
from tinygpt2.models import reference
from tinygpt2.models.compatibility import vocabulary_mismatch
from tinygpt2.models.loading import load_model, model_tokenizer
from tinygpt2.models.weights import CHECKSUMS, block_of, check_checksums, stored_tensor

TOLERANCE = 1e-4  # of the largest logit or state: float32 in another order
_PROMPT, _TOKENS = 16, 32  # of the greedy text, where the positions allow it


@dataclass(frozen=True)
class Agreement:
    """How far two implementations are apart on one model, in float32.

    Attributes:
        logits, states: the largest absolute difference.
        largest_logit, largest_state: the largest absolute value, to compare it with.
        greedy_tokens: how many tokens of greedy text were made, and `same_greedy_text` whether they are the same.
    """

    logits: float
    largest_logit: float
    states: float
    largest_state: float
    greedy_tokens: int
    same_greedy_text: bool


@dataclass(frozen=True)
class VerifyResult:
    """What was found: `problems` are faults, `notes` are not.

    Attributes:
        reference: how a model agrees with the GPT-2 of `tinygpt2.reference`; None for a dataset.
        copies: with a teacher, for each of the student's tensors that is one of the teacher's the name of that.
    """

    path: str
    kind: Literal["dataset", "model"]
    ok: bool
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    reference: Agreement | None = None
    copies: dict[str, str] | None = None

    @property
    def exit_code(self) -> int:
        """What the command line exits with: 0, or the code of a faulty dataset or model."""
        faulty = DataError.exit_code if self.kind == "dataset" else ModelError.exit_code
        return 0 if self.ok else faulty


def verify(config: VerifyConfig) -> VerifyResult:
    """Check a pregenerated dataset or a model directory and list every fault found.

    Raises:
        DataError: there is neither at that path.
        ModelError: the teacher cannot be loaded.
    """
    path = Path(config.path)
    if not path.is_dir():
        raise DataError(f"no such directory: {path}", "verify takes a pregenerated dataset or a model directory")
    # a model first: what was fine-tuned on a text holds a dataset too
    if not any((path / name).is_file() for name in ("config.json", "model.safetensors", "pytorch_model.bin")):
        if not is_packed_dataset(path):
            raise DataError(f"{path} is neither a pregenerated dataset nor a model directory")
        if config.teacher is not None:
            raise DataError(f"{path} is a dataset: --teacher goes with a student")
        problems = list(check_dataset(path))
        return VerifyResult(str(path.resolve()), "dataset", not problems, problems)
    problems, notes = list(check_checksums(path)), []
    if not (path / CHECKSUMS).is_file():
        notes.append(f"no {CHECKSUMS} beside the weights: whether they are those that were saved cannot be seen")
    try:
        model, _ = load_model(str(path), allow_pickle=config.allow_pickle)
    except ModelError as error:
        return VerifyResult(str(path.resolve()), "model", False, [*problems, str(error)], notes)
    for problem, is_fault in _check_loaded(path, model):
        (problems if is_fault else notes).append(problem)
    agreement = None
    if all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        try:
            agreement = compare(model, reference.load(path))
        except ValueError as error:
            notes.append(f"not compared with the reference: {error}")
        else:
            problems += _disagreements(agreement)
    copies = None
    if config.teacher is not None:
        teacher, _ = load_model(config.teacher, "teacher", allow_pickle=config.allow_pickle)
        copies = copied(model, teacher)
        problems += _misplaced(copies)
    return VerifyResult(str(path.resolve()), "model", not problems, problems, notes, agreement, copies)


def _check_loaded(directory: Path, model: GPT2LMHeadModel) -> Iterator[tuple[str, bool]]:
    """Yield what is odd about weights, configuration and tokenizer, and whether it is a fault."""
    config = model.config
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            yield f"{name} holds numbers that are not finite", True
    head, embeddings = (stored_tensor(directory, name) for name in ("lm_head.weight", "transformer.wte.weight"))
    if head is not None and embeddings is not None:
        same = head.shape == embeddings.shape and bool(torch.equal(head, embeddings))
        if config.tie_word_embeddings and not same:
            yield "lm_head.weight is not the embeddings, to which config.json ties it", True
        if not config.tie_word_embeddings and same:
            yield "lm_head.weight equals the embeddings, but config.json does not tie them", False
    yield from ((problem, True) for problem in _check_ends(directory, config))
    try:
        tokenizer = model_tokenizer(directory)
    except ModelError as error:
        yield str(error), True
        return
    if tokenizer is None:
        yield "no tokenizer beside the weights", False
    elif (mismatch := vocabulary_mismatch(tokenizer, config)) is not None:
        yield mismatch


def _check_ends(directory: Path, config: Any) -> Iterator[str]:
    """Compare the tokens that begin and end a text with the vocabulary, in both configurations."""
    found = {"config.json": {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id")}}
    file = directory / "generation_config.json"
    if file.is_file():
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            found[file.name] = {key: values.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        except (ValueError, AttributeError) as error:
            yield f"{file.name}: {error}"
    for name, ends in found.items():
        for key, token in ends.items():
            for one in token if isinstance(token, list) else [token]:
                if one is not None and not 0 <= one < config.vocab_size:
                    yield f"{name}: {key} {one} is beyond the vocabulary of {config.vocab_size}"


@torch.no_grad()
def compare(model: GPT2LMHeadModel, other: reference.GPT2) -> Agreement:
    """Run a model under both implementations, on fixed random tokens, and let both continue the first of them.

    The library's own forward pass is used, GPT-2's tanh GELU as torch's one kernel.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    length = min(config.n_positions, 256)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    theirs, ours = model(ids, output_hidden_states=True), other(ids)
    prompt = ids[:1, : max(1, min(_PROMPT, config.n_positions // 2))]
    count = min(_TOKENS, config.n_positions - prompt.shape[1])
    text = prompt
    for _ in range(count):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    pairs = list(zip(theirs.hidden_states, ours.states, strict=True))
    return Agreement(
        logits=float((theirs.logits - ours.logits).abs().max()),
        largest_logit=float(ours.logits.abs().max()),
        states=max(float((a - b).abs().max()) for a, b in pairs),
        largest_state=max(float(b.abs().max()) for _, b in pairs),
        greedy_tokens=count,
        same_greedy_text=bool(torch.equal(text, other.greedy(prompt, count))),
    )


def _disagreements(found: Agreement) -> Iterator[str]:
    for name, gap, largest in (
        ("logits", found.logits, found.largest_logit),
        ("hidden states", found.states, found.largest_state),
    ):
        if not gap <= TOLERANCE * largest:  # nor if either is not a number
            yield f"the {name} differ from the reference's by {gap:.3g}, with {largest:.3g} the largest"


def copied(student: GPT2LMHeadModel, teacher: GPT2LMHeadModel) -> dict[str, str]:
    """Return which tensors of a student are exact copies: student's name -> teacher's name.

    Equal tensors (biases of zeros, for example) have several candidates. The block decides: if most tensors of the
    student's block 1 are copies from the teacher's block 3, an ambiguous one counts as a copy from there too:

        h.1.attn.c_attn.weight: only h.3.attn.c_attn.weight is equal  ->  h.3.attn.c_attn.weight
        h.1.mlp.c_proj.weight:  only h.3.mlp.c_proj.weight is equal   ->  h.3.mlp.c_proj.weight
        h.1.attn.c_attn.bias:   h.0, h.1, h.2 and h.3 have an equal   ->  h.3.attn.c_attn.bias
    """
    by_content: dict[bytes, list[str]] = {}
    for name, tensor in teacher.named_parameters(remove_duplicate=False):  # a tied head under both of its names
        by_content.setdefault(_content(tensor), []).append(name)
    candidates = {name: by_content.get(_content(tensor), []) for name, tensor in student.named_parameters()}
    blocks: dict[str, list[str]] = {}  # of the student: the teacher's blocks, once for every candidate
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
    """Return a tensor's name with another block: `transformer.h.1.ln_1.bias` in h.3 is `transformer.h.3.ln_1.bias`."""
    return block + name.removeprefix(block_of(name))


def _most_common(values: list[str]) -> str:
    return max(sorted(set(values)), key=values.count)


def _content(tensor: Tensor) -> bytes:
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + tensor.detach().numpy().tobytes()).digest()
