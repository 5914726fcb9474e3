"""MiniLLM's policy gradient: what the later tokens of a sampled text say about an earlier one.

The gradient of KL(student || teacher) over whole texts is the sum of two parts. The single-step part is the gradient of
the reverse KL at each position, which has a closed form (`divergences.reverse_kl`). The long part is the mean of
-R(t + 1) times the gradient of log S(y_t), where R(t + 1) is the sum of log T/S over the later tokens: a cross-entropy
of the sampled tokens with a factor for each. The factors are computed here.

The tokens may come from another distribution than the student's of now: from a mixture with the teacher, or from the
student of an earlier step. Each token's part is then multiplied by the ratio of the probabilities, which is clipped.
Sources: MiniLLM, arXiv:2306.08543, section 2.2 and appendix A; clipping: PPO, arXiv:1707.06347, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tinygpt2.data.batches.batch import to_device
from tinygpt2.models.lm_head import Head, head_operand, losses_of


def token_log_probs(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    teacher: tuple[Tensor, Head],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return log S and log T of the tokens that were sampled, without gradients, a chunk of logits at a time.

    Args:
        hidden, head: the student's final hidden states and output matrix.
        teacher: the teacher's final hidden states (N, Dt) and head.
    """
    matrix, (states, other) = head_operand(head.detach()), teacher
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        own, _ = losses_of(hidden.to(matrix.dtype), targets, lambda part: part @ matrix.mT, len(head))
        its, _ = losses_of(states.to(other.matrix.dtype), targets, other.logits, len(head))
        return -own, -its


def importance(log_s: Float[Tensor, " N"], log_t: Float[Tensor, " N"], share: float) -> Float[Tensor, " N"]:
    """Return S / (share T + (1 - share) S) of sampled tokens: at most 1 / (1 - share), and 1 if the share is 0.

    It corrects for tokens that come from the mixture instead of the student, each at its own step alone.
    """
    if not share:
        return torch.ones_like(log_s)
    return (log_s - torch.logaddexp(log_t + math.log(share), log_s + math.log1p(-share))).exp()


def factors_of(
    ratio: Float[Tensor, " N"], returns: Float[Tensor, " N"], clip: float
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return by what the gradients of the two parts at each token are multiplied: the single step, and the long part.

    As in PPO, the long part has no gradient where the ratio has already left 1 by more than `clip` in the direction in
    which the return pushes it. The ratio at the single step is only bounded from above: its mean is 1 for any return.

    Args:
        ratio: of the student's probability of a token to that with which it was drawn.
        returns: see `later_returns`.
        clip: 0 does not clip.
    """
    if not clip:
        return ratio, ratio * returns
    gone = ((returns > 0) & (ratio > 1 + clip)) | ((returns < 0) & (ratio < 1 - clip))
    return ratio.clamp(max=1 + clip), (ratio * returns).masked_fill(gone, 0.0)


def later_returns(log_ratio: Float[Tensor, " N"], lengths: Sequence[int], *, normalised: bool) -> Float[Tensor, " N"]:
    """Return R(t + 1) of each token: the sum of log T/S over the tokens after it in its text.

    Args:
        log_ratio: log T/S of the tokens of all texts, one text after another.
        lengths: number of tokens of each text; they add up to N.
        normalised: divide by the number of later tokens, so that long texts weigh no more than short ones.
    """
    most, counts = max(lengths, default=0), np.array(lengths, np.int64)
    places = np.concatenate([np.arange(count) + row * most for row, count in enumerate(lengths)] or [np.arange(0)])
    index = to_device(torch.from_numpy(places), log_ratio.device)
    padded = log_ratio.new_zeros(len(lengths) * most).index_copy(0, index, log_ratio).view(len(lengths), most)
    later = (padded.flip(1).cumsum(1).flip(1) - padded).flatten().index_select(0, index)
    if not normalised:
        return later
    left = np.repeat(counts, counts) - 1 - places % max(1, most)
    return later / to_device(torch.from_numpy(np.maximum(left, 1).astype(np.float32)), later.device)
