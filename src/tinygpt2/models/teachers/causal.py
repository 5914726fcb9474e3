"""Any causal language model of `transformers` as a teacher: its own forward pass, checked when it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tinygpt2.errors import ModelError, one_line
from tinygpt2.models.activations import Activations
from tinygpt2.models.compatibility import positions_of
from tinygpt2.models.lm_head import Head
from tinygpt2.models.parameters import cast_linear_layers
from tinygpt2.models.teachers.teacher import Shape, Teacher
from tinygpt2.models.teachers.vocabularies import Reading

_PROBE = 8  # tokens
_TOLERANCE = 1e-4  # in float32, of the largest logit
# settings that change no hidden state
_IRRELEVANT = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")


class CausalTeacher(Teacher):
    """Any causal language model that `transformers` opens, by its own forward pass.

    Args:
        model: in evaluation mode. If it has values, a probe checks that it can be a teacher.

    Raises:
        ModelError: its configuration does not tell its sizes, its logits are not what the head makes of its last hidden
            states, or a token sees the tokens after it.
    """

    def __init__(self, model: PreTrainedModel, reading: Reading | None = None) -> None:
        super().__init__(model, _shape(model), reading)
        self._base: Callable[..., Any] = model.base_model
        self._layers = _layers(model, self.shape.layers)
        if next(model.parameters()).device.type != "meta":
            self._probe()

    @torch.no_grad()
    def _run(self, ids: Int[Tensor, "B T"], states: Iterable[int], attention: Iterable[int] = ()) -> Activations:
        if attention := sorted(attention):
            raise ValueError(f"{self.shape.kind} gives no attention scores")
        wanted, last, found = set(states), self.shape.layers, Activations()
        inner = wanted - {last}
        with ExitStack() as stack:
            if self._layers is not None:  # keeps only what is asked for
                for number in inner:
                    keep = partial(_keep, found.states, number)
                    stack.callback(self._layers[number].register_forward_pre_hook(keep, with_kwargs=True).remove)
            everything = bool(inner) and self._layers is None
            output = self._base(input_ids=ids, use_cache=False, output_hidden_states=everything, return_dict=True)
        if everything:
            found.states = {number: output.hidden_states[number] for number in inner}
        if last in wanted:
            found.states[last] = output.last_hidden_state
        return found

    @torch.no_grad()
    def _probe(self) -> None:
        """Check on a few tokens that the head makes the model's own logits, and that no token sees those after it."""
        kind, size = self.shape.kind, self.shape.vocabulary
        device = next(self.model.parameters()).device
        ids = torch.arange(_PROBE, device=device)[None] * max(1, size // _PROBE) % size
        try:
            own = self.model(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True)
            last = self._run(ids, [self.shape.layers]).states[self.shape.layers]
            other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % size], 1)
            changed = self._run(other, [self.shape.layers]).states[self.shape.layers]
            same = _close(self._unmapped_head().logits(last[0])[:, :size], own.logits[0])
        except Exception as error:  # any model of any library version may fail in any way
            raise ModelError(f"a {kind} cannot be a teacher: {one_line(error, 200)}") from error
        if not same:
            raise ModelError(
                f"a {kind} cannot be a teacher: its logits are not its output matrix times its last hidden states",
                "use a teacher of another class; docs/teachers.md names classes that are tested",
            )
        if not _close(last[:, :-1], changed[:, :-1]):
            raise ModelError(f"a {kind} cannot be a teacher: it is not causal, its tokens see the tokens after them")
        self._check_states(ids, own.hidden_states)

    def _unmapped_head(self) -> Head:
        """Return the head of the model's own tokens."""
        reading = self.reading
        self.read_as(Reading())
        head = self.head()
        self.read_as(reading)
        return head

    def _check_states(self, ids: Int[Tensor, "1 T"], own: tuple[Tensor, ...] | None) -> None:
        """Take the layers' inputs as hidden states only if they are what `transformers` returns."""
        if own is None or len(own) != self.shape.layers + 1:
            self._layers = None
            return
        if self._layers is not None:
            numbers = range(self.shape.layers)
            try:
                found = self._run(ids, numbers).states
            except (RuntimeError, ValueError, TypeError, KeyError):
                found = {}
            if len(found) < len(numbers) or not all(_close(found[number], own[number]) for number in numbers):
                self._layers = None

    def compile_passes(self) -> None:
        """See `Teacher`."""
        self._base = torch.compile(self.model.base_model)

    def cast(self, dtype: torch.dtype) -> None:
        """See `Teacher`."""
        cast_linear_layers(self.model.base_model, dtype)

    def cast_weights(self) -> int:
        """See `Teacher`."""
        linear = (module for module in self.model.base_model.modules() if isinstance(module, nn.Linear | Conv1D))
        return sum(parameter.numel() for module in linear for parameter in module.parameters())

    def identity(self) -> Iterator[tuple[str, Tensor | None]]:
        """See `Teacher`."""
        settings = {key: value for key, value in self.model.config.to_dict().items() if key not in _IRRELEVANT}
        yield f"{self.shape.kind} {sorted(settings.items(), key=str)} {self.reading.rows} {self.reading.start}", None
        yield from self.model.base_model.state_dict().items()


def _shape(model: PreTrainedModel) -> Shape:
    kind, config, output = type(model).__name__, model.config.get_text_config(), model.get_output_embeddings()
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(width, int) or getattr(output, "weight", None) is None:
        raise ModelError(f"a {kind} cannot be a teacher: it has no output matrix, or no known number of layers")
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    inside = (one for one in model.base_model.parameters() if one.dim() > 1 and id(one) not in embeddings)
    rows, last = output.weight.shape
    return Shape(kind, layers, width, last, None, rows, positions_of(config), sum(one.numel() for one in inside))


def _layers(model: PreTrainedModel, count: int) -> nn.ModuleList | None:
    """Return the list of a model's layers: of all lists with so many modules, the one with the most weights."""
    lists = [one for one in model.base_model.modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    return max(lists, key=lambda one: sum(each.numel() for each in one.parameters()), default=None)


def _keep(states: dict[int, Tensor], number: int, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Keep the hidden state that a layer is given under its number."""
    states[number] = given[0] if given else named["hidden_states"]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * max(1.0, float(b.abs().max())))
