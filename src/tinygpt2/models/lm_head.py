"""The output matrix: how many logits to compute at a time, and the losses of given next tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel

from tinygpt2.models.activations import collect_activations
from tinygpt2.models.documents import Documents


def wide(x: Tensor) -> torch.dtype:
    """Return the type for sums and softmaxes: float64 for float64 numbers, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def default_chunk(vocabulary: int, device: str) -> int:
    """Return for how many tokens to hold logits at a time.

    These are at most 2**25 logits on a CPU and 2**26 on a GPU, but always at least 64 tokens. A matrix of 2**26 logits
    takes 256 MiB in float32 and 128 MiB in 16 bits. The student's logits, the teacher's and the gradient are one each.
    """
    return max(64, (2**25 if device == "cpu" else 2**26) // vocabulary)


def operand_rows(vocabulary: int, device: str) -> int:
    """Return how many rows an output matrix has as an operand of products.

    On a GPU, this is the next multiple of 64. A row of logits then starts at a multiple of 16 bytes in every number
    format, as the fast products need (GPT-2's vocabulary of 50257 is odd). A CPU's products gain nothing from it.
    """
    return vocabulary if device == "cpu" else 64 * math.ceil(vocabulary / 64)


def scoring_chunk(vocabulary: int, device: str) -> int:
    """Return for how many tokens to hold logits at a time if there is no backward pass.

    A quarter of the chunk that training uses is as fast then.
    """
    return max(1, default_chunk(vocabulary, device) // 4)


def rows_at_once(vocabulary: int, device: str) -> int:
    """Return how many rows of logits to process element-wise at a time: 2 MiB of float32 on a CPU, 256 MiB on a GPU."""
    return max(1, (2**19 if device == "cpu" else 2**26) // vocabulary)


def head_operand(head: Float[Tensor, "V D"], offset: Float[Tensor, " D"] | None = None) -> Float[Tensor, "W D"]:
    """Return the output matrix for matrix products: in autocast's type, and centred if that has fewer than 32 bits.

    GPT-2's logits share a large offset of about -100. A softmax ignores the offset, but at that size bfloat16 rounds
    to multiples of 0.5. Subtracting the matrix's mean row removes the offset; losses and gradients stay the same.

    On a GPU, rows of zeros follow the V real ones: see `operand_rows`. Only the first V columns of the logits count.

    Args:
        offset: the row to subtract in fewer than 32 bits, instead of the matrix's own mean.
    """
    device = head.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    if dtype.itemsize >= 4:
        operand = head.to(dtype)
    else:
        operand = (head - (head.mean(0, dtype=torch.float32) if offset is None else offset)).to(dtype)
    padding = operand_rows(len(head), device) - len(head)
    return F.pad(operand, (0, 0, 0, padding)) if padding else operand


@dataclass(frozen=True)
class Head:
    """Makes a model's logits out of its last hidden states, for a chunk of tokens at a time.

    Attributes:
        matrix: the output matrix, as `head_operand` returns it.
        size: V, the number of its real rows.
        bias: added to the logits; None if there is none.
        cap: bound of a soft cap, which makes cap * tanh(logit / cap) of each logit; None if there is none.
        absent: tokens that the model does not have. Their probability is 0.
        others: the head of further tokens of the model, which are left out before the softmax.
    """

    matrix: Float[Tensor, "W D"]
    size: int
    bias: Float[Tensor, " W"] | None = None
    cap: float | None = None
    absent: Bool[Tensor, " W"] | None = None
    others: Head | None = None

    def logits(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N W"]:
        """Return the logits of some last hidden states; only the first V columns count."""
        product = states.to(self.matrix.dtype)
        logits = product @ self.matrix.mT if self.bias is None else torch.addmm(self.bias, product, self.matrix.mT)
        if self.cap is not None:
            logits = logits.div_(self.cap).tanh_().mul_(self.cap)
        if self.absent is not None:  # finite, so that differences of logits are finite, too
            logits = logits.masked_fill_(self.absent, max(-1e30, torch.finfo(logits.dtype).min / 2))
        return logits

    def left_out(self, states: Float[Tensor, "N D"], logits: Float[Tensor, "N W"]) -> Float[Tensor, ""]:
        """Return the probability that the model gives to the tokens that are left out, summed over tokens.

        Args:
            logits: of these states, as `logits` returns them.
        """
        total = torch.zeros((), dtype=wide(logits), device=logits.device)
        if self.others is None:
            return total
        others = self.others.logits(states)[:, : self.others.size].to(total.dtype).logsumexp(-1)
        rows = rows_at_once(self.size, logits.device.type)
        for start in range(0, len(logits), rows):
            kept = logits[start : start + rows, : self.size].to(total.dtype).logsumexp(-1)
            total += (others[start : start + rows] - kept).sigmoid().sum()
        return total


@torch.no_grad()
def target_losses(
    model: GPT2LMHeadModel,
    head: Float[Tensor, "W D"],
    input_ids: Int[Tensor, "B T"],
    wanted: Int[Tensor, " N"] | None = None,
    ruled_out: Bool[Tensor, " V"] | None = None,
    documents: Documents | None = None,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, "N 2"] | None]:
    """Return the loss of each wanted next token, in nats and at least float32, row by row.

    Args:
        head: the output matrix, as `head_operand` returns it.
        input_ids: token ids; the last one of each row is only a target.
        wanted: numbers of the N positions that predict a target, if the T - 1 of each row are counted through; None if
            all do. They are numbers and no mask, because to count a mask a GPU is waited for.
        ruled_out: tokens that do not count as predictions in the second column of the hits.
        documents: of the first T - 1 tokens of each row, if no token sees the documents before its own.

    Returns:
        The losses, and the hits if `ruled_out` is given (else None). The hits tell whether each target is the likeliest
        token: of all tokens (first column), and of those that are not ruled out (second column).
    """
    last = len(model.transformer.h)
    states = collect_activations(model, input_ids[:, :-1], [last], documents=documents).states[last].flatten(0, 1)
    targets = input_ids[:, 1:].flatten()
    if wanted is not None:
        states, targets = states.index_select(0, wanted), targets.index_select(0, wanted)
    return losses_of(states, targets, lambda chunk: chunk @ head.mT, model.config.vocab_size, ruled_out)


@torch.no_grad()
def losses_of(
    states: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    logits_of: Callable[[Tensor], Tensor],
    vocabulary: int,
    ruled_out: Bool[Tensor, " V"] | None = None,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, "N 2"] | None]:
    """Return the losses of the tokens that follow N last hidden states, and the hits: see `target_losses`.

    Args:
        logits_of: makes the logits of some of the states; only the first V columns count.
        vocabulary: V.
    """
    device = states.device.type
    chunk, rows = scoring_chunk(vocabulary, device), rows_at_once(vocabulary, device)
    losses = torch.empty(len(targets), dtype=wide(states), device=states.device)
    hits = None if ruled_out is None else torch.empty(len(targets), 2, dtype=torch.bool, device=states.device)
    for start in range(0, len(targets), chunk):
        logits = logits_of(states[start : start + chunk])
        for inner in range(0, len(logits), rows):
            part = slice(start + inner, min(start + inner + rows, start + len(logits)))
            scores = logits[inner : inner + rows, :vocabulary].to(losses.dtype)
            right = targets[part]
            losses[part] = scores.logsumexp(-1) - scores.gather(-1, right[:, None])[:, 0]
            if hits is not None and ruled_out is not None:
                hits[part, 0] = scores.argmax(-1) == right
                hits[part, 1] = scores.masked_fill(ruled_out, -math.inf).argmax(-1) == right
    return losses, hits
