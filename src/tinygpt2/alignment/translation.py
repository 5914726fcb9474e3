"""A model with another tokenizer: the embedding of each new token is the mean of those of its parts.

The parts of a token are the old tokens that spell it: those that the old tokenizer makes of its text, or if these are
not the same bytes (a part of a character, or a space that the tokenizer adds), the fewest that are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.alignment.borders import spelled
from tinygpt2.alignment.rank_cut import ENDS, with_rows
from tinygpt2.data.encoding import encode
from tinygpt2.errors import ModelError
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


@dataclass(frozen=True)
class Translation:
    """Another tokenizer's tokens as those of a model.

    Attributes:
        tokenizer: the other one.
        parts: for each of its tokens, the model's tokens that it consists of; none if they cannot spell it.
        rows: number of tokens that the model has rows for.
    """

    tokenizer: Tokenizer
    parts: tuple[tuple[int, ...], ...]
    rows: int

    @classmethod
    def of(cls, whole: Tokenizer, tokenizer: Tokenizer, rows: int) -> Translation:
        """Find the parts of a tokenizer's tokens.

        Special tokens are those of the same name; the token that ends a text is the one that does so for the model.

        Args:
            whole: the model's tokenizer.
            rows: number of tokens that the model has rows for.
        """
        (own, own_special), (pieces, special) = spelled(whole), spelled(tokenizer)
        known: dict[bytes, tuple[int, ...]] = {
            piece: (token,) for token, piece in enumerate(own) if piece and token < rows
        }
        names = {name: (token,) for token, name in own_special.items() if token < rows}
        ends = [names.get(str(one.eos_token), ()) for one in (whole, tokenizer)]
        parts: list[tuple[int, ...]] = []
        for token, (piece, found) in enumerate(zip(pieces, _encoded(whole, pieces), strict=True)):
            if token in special:
                end = special[token] == tokenizer.eos_token
                parts.append(names.get(special[token]) or (ends[0] if end else ()))
            elif piece in known:
                parts.append(known[piece])
            elif max(found, default=0) < rows and b"".join(own[part] for part in found) == piece:
                parts.append(tuple(found))
            else:
                parts.append(_fewest(piece, known))
        same, none = (sum(len(one) == count for one in parts) for count in (1, 0))
        say(
            f"{same:,} of {len(parts):,} tokens are also the teacher's; {len(parts) - same - none:,} get the mean of "
            f"the teacher's tokens that spell them, and {none:,} that of all"
        )
        return cls(tokenizer, tuple(parts), rows)

    def means(self, table: Float[Tensor, "V D"]) -> Float[Tensor, "W D"]:
        """Return the mean row of the parts of each token; that of all rows where there are none."""
        sizes = torch.tensor([len(one) for one in self.parts], device=table.device)
        flat = torch.tensor([token for one in self.parts for token in one], device=table.device)
        owner = torch.arange(len(sizes), device=table.device).repeat_interleave(sizes)
        sums = table.new_zeros(len(sizes), table.shape[1]).index_add_(0, owner, table[flat])
        whole = table[: self.rows].mean(0)
        return (sums / sizes.clamp(min=1)[:, None]).where(sizes[:, None] > 0, whole)


def _encoded(tokenizer: Tokenizer, pieces: list[bytes]) -> list[list[int]]:
    """Return the tokens of the texts of pieces; none if the tokenizer cannot encode all texts."""
    try:
        return encode(tokenizer, [piece.decode(errors="replace") for piece in pieces])
    except ModelError:
        return [[] for _ in pieces]


def _fewest(piece: bytes, known: dict[bytes, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the fewest tokens that spell a piece; none if no tokens do."""
    best: list[tuple[int, ...] | None] = [(), *[None] * len(piece)]
    for end in range(1, len(piece) + 1):
        for start in range(end):
            before, last = best[start], known.get(piece[start:end])
            if before is None or last is None:
                continue
            now = best[end]
            if now is None or len(before) + 1 < len(now):
                best[end] = (*before, *last)
    return best[-1] or ()


@torch.no_grad()
def translate(model: GPT2LMHeadModel, translation: Translation) -> GPT2LMHeadModel:
    """Return a model with the tokens of another tokenizer, in evaluation mode."""
    ends = {name: getattr(translation.tokenizer, name) for name in ENDS}
    return with_rows(model, len(translation.parts), ends, translation.means)
