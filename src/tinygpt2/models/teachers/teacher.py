"""Teachers: what the program asks of one, and how a GPT-2 and any other causal language model give it.

A teacher tells its sizes (`Shape`), runs blocks of the student's tokens to its hidden states, and makes the student's
logits out of the last ones (`lm_head.Head`), chunk by chunk. Its logits of all tokens never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tinygpt2.models.activations import Activations, collect_activations
from tinygpt2.models.documents import Documents
from tinygpt2.models.lm_head import Head, head_operand, losses_of
from tinygpt2.models.parameters import cast_linear_layers
from tinygpt2.models.teachers.vocabularies import Reading

# What models do to their logits, by the names in their configurations.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere, FalconH1
_DIVISORS = ("logits_scaling",)  # Granite
# Of a GPT-2: settings that change its states, in addition to the weights.
_FIGURES = (
    "n_head", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        kind: the name of its class.
        layers: number of layers.
        width: of its hidden states but the last one.
        last_width: of the last hidden state.
        heads: number of attention heads, if it is a GPT-2; None for other models, whose attention is not compared.
        vocabulary: number of tokens that it predicts.
        positions: the longest sequence that it reads; None if there is no limit.
        weights: number of weights in the matrices of its layers. Each token takes two operations for each of them.
    """

    kind: str
    layers: int
    width: int
    last_width: int
    heads: int | None
    vocabulary: int
    positions: int | None
    weights: int

    @classmethod
    def of_gpt2(cls, config: GPT2Config) -> Shape:
        """Return the sizes that a GPT-2's configuration gives."""
        width, inner = int(config.n_embd), int(config.n_inner or 4 * config.n_embd)
        weights = config.n_layer * (4 * width * width + 2 * width * inner)
        sizes = (config.n_head, config.vocab_size, config.n_positions, weights)
        return cls("GPT2LMHeadModel", config.n_layer, width, width, *sizes)

    def operations(self, length: int) -> int:
        """Return the operations per token of a forward pass without logits: of the weights, and of causal attention.

        In a mixture of experts, all experts count.
        """
        return 2 * self.weights + 2 * length * self.width * self.layers


class Teacher(nn.Module):
    """A frozen model that reads blocks of the student's tokens and predicts the student's tokens.

    Args:
        model: the model.
        shape: its sizes.
        reading: how it reads the student's tokens, if its own have other numbers.

    Attributes:
        vocabulary: number of tokens that its head predicts: the student's.
    """

    rows: Tensor | None
    others: Tensor | None

    def __init__(self, model: PreTrainedModel, shape: Shape, reading: Reading | None = None) -> None:
        super().__init__()
        self.model, self.shape = model, shape
        self.read_as(reading or Reading())

    def read_as(self, reading: Reading) -> None:
        """Set how the teacher reads the student's tokens."""
        self.reading = reading
        rows = None if reading.rows is None else torch.tensor(reading.rows)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("others", torch.tensor(reading.others) if reading.others else None, persistent=False)
        self.vocabulary = self.shape.vocabulary if reading.rows is None else len(reading.rows)

    def covered(self, length: int) -> int:
        """Return for how many positions of a block the teacher has states: all, or all but the last one.

        The last one has none if a start token before the block takes the teacher's last position.
        """
        limit = self.shape.positions
        return length - (self.reading.start is not None and limit is not None and length >= limit)

    def collect(
        self,
        input_ids: Int[Tensor, "B T"],
        states: Iterable[int],
        attention: Iterable[int] = (),
        documents: Documents | None = None,
    ) -> Activations:
        """Return hidden states of the positions that are `covered`, and of a GPT-2 also attention.

        See `collect_activations` for the arguments and the numbers of the states.
        """
        if documents is not None:
            return self._collect_apart(input_ids, list(states), documents)
        start, ids = self.reading.start, input_ids
        if self.rows is not None:
            ids = self.rows.clamp(min=0)[ids]
        if start is None:
            return self._run(ids, states, attention)
        ids = torch.cat([ids.new_full((len(ids), 1), start), ids[:, : self.covered(ids.shape[1])]], 1)
        found = self._run(ids, states, attention)
        found.states = {number: state[:, 1:] for number, state in found.states.items()}
        found.attention = {number: fused[:, 1:] for number, fused in found.attention.items()}
        return found

    def _collect_apart(self, input_ids: Int[Tensor, "B T"], states: list[int], documents: Documents) -> Activations:
        """Return hidden states of blocks whose tokens see no other documents: each document runs by itself.

        A document that fills a block may have none at its last position: see `covered`.
        """
        size, length = input_ids.shape
        parts: dict[int, list[Tensor]] = {number: [] for number in states}
        for ids in documents.apart(input_ids):
            for number, state in self.collect(ids, states).states.items():
                parts[number].append(nn.functional.pad(state, (0, 0, 0, ids.shape[1] - state.shape[1])))
        covered = self.covered(length)
        return Activations({number: documents.together(some, size)[:, :covered] for number, some in parts.items()})

    def _run(self, ids: Int[Tensor, "B T"], states: Iterable[int], attention: Iterable[int]) -> Activations:
        """Run the model on its own tokens."""
        raise NotImplementedError

    def compile_passes(self) -> None:
        """Compile the forward pass of the next calls with torch.compile."""
        raise NotImplementedError

    def head(self) -> Head:
        """Return what makes the student's logits, in autocast's type."""
        module, config = self.output, self.model.config.get_text_config()
        cap = _setting(config, _CAPS)
        factor = (_setting(config, _FACTORS) or 1.0) / (_setting(config, _DIVISORS) or 1.0)
        weight: Tensor = module.weight if factor == 1 else module.weight * factor
        bias: Tensor | None = getattr(module, "bias", None)
        bias = bias if bias is None or factor == 1 else bias * factor
        if self.rows is None or self.reading.rows is None:
            return _head(weight, bias, cap)
        rows, numbers = self.rows.clamp(min=0), self.reading.rows
        straight = all(number == row for row, number in enumerate(numbers))
        matrix = weight[: len(rows)] if straight else weight[rows]
        mean = matrix.mean(0, dtype=torch.float32)
        others = None
        if self.others is not None:
            others = _head(weight[self.others], None if bias is None else bias[self.others], cap, mean)
        absent = self.rows < 0 if min(numbers) < 0 else None
        return _head(matrix, None if bias is None else bias[rows], cap, mean, absent, others)

    @property
    def output(self) -> Any:
        """The module with the output matrix."""
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def losses(
        self,
        head: Head,
        input_ids: Int[Tensor, "B T"],
        wanted: Int[Tensor, " N"] | None = None,
        ruled_out: Bool[Tensor, " V"] | None = None,
        documents: Documents | None = None,
    ) -> tuple[Float[Tensor, " N"], Bool[Tensor, "N 2"] | None]:
        """Return the losses of next tokens, and the hits: see `target_losses`."""
        states, targets = self.predicting(input_ids, wanted, documents), input_ids[:, 1:].flatten()
        targets = targets if wanted is None else targets.index_select(0, wanted)
        return losses_of(states, targets, head.logits, self.vocabulary, ruled_out)

    def predicting(
        self,
        input_ids: Int[Tensor, "B T"],
        wanted: Int[Tensor, " N"] | None = None,
        documents: Documents | None = None,
    ) -> Float[Tensor, "N D"]:
        """Return the last hidden states that predict the wanted next tokens: see `target_losses`."""
        last = self.shape.layers
        states = self.collect(input_ids[:, :-1], [last], documents=documents).states[last].flatten(0, 1)
        return states if wanted is None else states.index_select(0, wanted)

    def place_head(self, device: torch.device) -> None:
        """Move the output matrix to a device, and everything else to the host."""
        self.model.to("cpu")
        self.output.to(device)

    def cast(self, dtype: torch.dtype) -> None:
        """Cast the layers' matrices to autocast's type, in place: see `cast_linear_layers`."""
        raise NotImplementedError

    def cast_weights(self) -> int:
        """Return the number of weights that `cast` casts."""
        raise NotImplementedError

    def identity(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yield everything that its hidden states depend on: descriptions, and the weights with their names."""
        raise NotImplementedError


class GPT2Teacher(Teacher):
    """A GPT-2, with the passes that the student uses, too."""

    def __init__(self, model: GPT2LMHeadModel, reading: Reading | None = None) -> None:
        super().__init__(model, Shape.of_gpt2(model.config), reading)
        self._collect: Callable[..., Activations] = collect_activations

    def _run(self, ids: Int[Tensor, "B T"], states: Iterable[int], attention: Iterable[int]) -> Activations:
        return self._collect(self.model, ids, states, attention)

    def _collect_apart(self, input_ids: Int[Tensor, "B T"], states: list[int], documents: Documents) -> Activations:
        if self.reading.start is not None:  # before each document
            return super()._collect_apart(input_ids, states, documents)
        ids = input_ids if self.rows is None else self.rows.clamp(min=0)[input_ids]
        return self._collect(self.model, ids, states, documents=documents)

    def compile_passes(self) -> None:
        """See `Teacher`."""
        self._collect = torch.compile(collect_activations)

    def cast(self, dtype: torch.dtype) -> None:
        """See `Teacher`."""
        cast_linear_layers(self.model.transformer.h, dtype)

    def cast_weights(self) -> int:
        """See `Teacher`."""
        return sum(parameter.numel() for parameter in self.model.transformer.h.parameters())

    def identity(self) -> Iterator[tuple[str, Tensor | None]]:
        """See `Teacher`."""
        yield repr([getattr(self.model.config, key) for key in _FIGURES]), None
        if self.reading != Reading():
            yield repr((self.reading.rows, self.reading.start)), None
        yield from self.model.transformer.state_dict().items()


def _head(
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    cap: float | None,
    mean: Float[Tensor, " D"] | None = None,
    absent: Bool[Tensor, " V"] | None = None,
    others: Head | None = None,
) -> Head:
    """Return a head whose matrix and bias are in autocast's type.

    A soft cap is no shift of all logits, so with one the matrix is not centred.
    """
    offset = weight.new_zeros(weight.shape[1]) if cap is not None else mean
    matrix = head_operand(weight, offset)
    padding = len(matrix) - len(weight)
    bias = None if bias is None else nn.functional.pad(bias.to(matrix.dtype), (0, padding))
    absent = None if absent is None else nn.functional.pad(absent, (0, padding))
    return Head(matrix, len(weight), bias, cap, absent, others)


def _setting(config: Any, names: Iterable[str]) -> float | None:
    """Return the first of some settings that is a number."""
    values = (getattr(config, name, None) for name in names)
    return next((float(x) for x in values if isinstance(x, int | float) and not isinstance(x, bool)), None)
