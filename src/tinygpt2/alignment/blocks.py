"""The same blocks in the teacher's tokens, and where the teacher predicts each of the student's tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend
from torch import Tensor

from tinygpt2.alignment.decomposition import Decomposition
from tinygpt2.alignment.rank_cut import RankCut
from tinygpt2.data.batches.batch import to_device
from tinygpt2.data.encoding import token_bytes, without_dropout
from tinygpt2.utils.types import Array

if TYPE_CHECKING:
    from tinygpt2.data.batches.batch import Batch
    from tinygpt2.utils.types import Tokenizer

TEXT = -1  # stands for "no special token"
_MULTIPLE = 32  # of the number of teacher's tokens in a batch, so that few shapes occur


class AlignedBlocks(NamedTuple):
    """Some blocks of the student in the teacher's tokens.

    Attributes:
        ids: the teacher's tokens, with zeros after the end of shorter blocks (B, S).
        records: for each position of the student but the last of a block (B, T - 1, 3): the number of the teacher's
            state that predicts the next token, counted through the batch, or -1 if the teacher does not predict it; the
            node of the teacher's token that was read so far (see `Decomposition`); and the next token itself, or -1 if
            the text ends there.
        absent: the share of next tokens that the teacher does not predict.
    """

    ids: Int[Tensor, "B S"]
    records: Int[Tensor, "B T 3"]
    absent: Float[Tensor, ""]

    def to(self, device: torch.device) -> AlignedBlocks:
        """Return them on another device, which is not waited for."""
        return AlignedBlocks(*(to_device(one, device) for one in self))


class BlockAligner:
    """Encodes blocks of a student in the tokens of its teacher.

    A block is cut anywhere in a text. So its first and its last word may be incomplete, and what the teacher makes of
    a part of a word need not be what it makes of the whole: it predicts nothing inside them.

    Args:
        whole: the teacher's tokenizer.
        pieces: the bytes of each of the student's tokens, and none of a special token.
        special: for each of them, the teacher's special token in its place; `TEXT` if it is no special token.
        limit: for how many of its tokens the teacher has states; None if there is no limit.
    """

    _longer = True  # whether a text can have more of the teacher's tokens than of the student's

    def __init__(self, whole: Tokenizer, pieces: list[bytes], special: list[int], limit: int | None) -> None:
        content = json.loads(whole.backend_tokenizer.to_str())
        self._backend = without_dropout(Backend.from_str(json.dumps(content | {"truncation": None, "padding": None})))
        self._backend.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        self._pieces, self._special, self._limit = pieces, np.array(special), limit
        self._sizes = np.array([len(piece) for piece in pieces])

    def __call__(self, batch: Batch, whole: Sequence[bool] | None = None) -> AlignedBlocks:
        """Return the blocks of a batch in the teacher's tokens.

        Args:
            whole: whether the last word of each block is complete; None means that those of padded blocks are.

        Raises:
            ValueError: documents see only themselves.
        """
        if batch.documents is not None:
            raise ValueError("other tokens are aligned in whole blocks")
        ids = batch.input_ids.cpu().numpy().astype(np.int64)
        size, length = ids.shape
        real = batch.real_lengths
        complete = whole or [count < length for count in real]
        blocks = [self._block(row[:n], whole=one) for row, n, one in zip(ids, real, complete, strict=True)]
        most = max(len(tokens) for tokens, _, _ in blocks)
        roomy = min(-(-most // _MULTIPLE) * _MULTIPLE, max(most, length) if self._longer else length)
        width = max(1, min(roomy, self._limit or roomy))
        read, records = np.zeros((size, width), np.int64), np.zeros((size, length - 1, 3), np.int64)
        records[:, :, 0], records[:, :, 2] = -1, ids[:, 1:]
        absent = targets = 0
        for number, (tokens, states, nodes) in enumerate(blocks):
            read[number, : min(len(tokens), width)] = tokens[:width]
            states[states >= width] = -1
            end = len(states)
            records[number, :end, 0] = np.where(states < 0, -1, states + number * width)
            records[number, :end, 1] = nodes
            records[number, real[number] - 1 :, 2] = -1
            if end + 1 < length and len(tokens) <= width:  # what follows a whole text is predicted, too
                records[number, end, 0] = number * width + len(tokens) - 1
            absent, targets = absent + int((states < 0).sum()), targets + end
        share = torch.tensor(absent / max(1, targets), dtype=torch.float32)
        return AlignedBlocks(torch.from_numpy(read), torch.from_numpy(records), share)

    def _block(self, ids: Array, *, whole: bool) -> tuple[Array, Array, Array]:
        """Return a block in the teacher's tokens, and for each position but the last the teacher's state and the node.

        Args:
            whole: whether its last word is complete.
        """
        raise NotImplementedError

    def _spans(self, ids: Array) -> list[tuple[int, int]]:
        """Return where the texts between a block's special tokens begin and end."""
        places = np.flatnonzero(self._special[ids] != TEXT)
        bounds: list[int] = [0, *(end for place in places.tolist() for end in (place, place + 1)), len(ids)]
        return list(zip(bounds[::2], bounds[1::2], strict=True))

    def _text(self, ids: Array) -> tuple[str, int]:
        """Return the text of some tokens without incomplete characters at its ends, and how many bytes it skips."""
        raw = b"".join(map(self._pieces.__getitem__, ids.tolist()))
        skipped = next((at for at, byte in enumerate(raw[:4]) if byte & 0xC0 != 0x80), min(4, len(raw)))
        try:
            return raw[skipped:].decode(), skipped
        except UnicodeDecodeError as error:
            return raw[skipped : skipped + error.start].decode(), skipped


class RankCutAligner(BlockAligner):
    """Encodes blocks of a student, whose tokenizer is the teacher's cut by rank, in the teacher's tokens.

    Args:
        whole, cut: the teacher's tokenizer, and the student's.
        rows: number of tokens that the teacher has rows for.
        limit: see `BlockAligner`.
    """

    _longer = False

    def __init__(self, whole: Tokenizer, cut: RankCut, rows: int, limit: int | None) -> None:
        self.decomposition = Decomposition.of(whole, cut, rows)
        numbers = whole.get_vocab()
        special = {token.content for token in whole.added_tokens_decoder.values() if token.special}
        names = cut.tokenizer.convert_ids_to_tokens(range(len(cut.tokenizer)))
        pieces = [b"" if name in special else token_bytes(name) for name in names]
        super().__init__(whole, pieces, [numbers[name] if name in special else TEXT for name in names], limit)
        known = whole.convert_ids_to_tokens(range(max(numbers.values()) + 1))
        self._teacher_sizes = np.array([0 if name is None else len(token_bytes(name)) for name in known])

    def _block(self, ids: Array, *, whole: bool) -> tuple[Array, Array, Array]:
        """See `BlockAligner`."""
        spans = self._spans(ids)
        texts = [self._text(ids[start:stop]) for start, stop in spans]
        encoded = self._backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
        tokens: list[Array] = []
        states, nodes = np.full(len(ids), -1), np.zeros(len(ids), np.int64)  # of each token, by what precedes it
        count = 0
        for (start, stop), (_, skipped), one in zip(spans, texts, encoded, strict=True):
            edges = start == 0, stop == len(ids) and not whole
            self._align(ids, start, stop, skipped, one, count, edges, (states, nodes))
            tokens.append(np.array(one.ids, np.int64))
            count += len(one.ids)
            if stop < len(ids):
                states[stop] = count - 1
                tokens.append(self._special[ids[stop : stop + 1]])
                count += 1
        return np.concatenate(tokens), states[1:], nodes[1:]

    def _align(
        self,
        ids: Array,
        start: int,
        stop: int,
        skipped: int,
        encoding: Encoding,
        count: int,
        edges: tuple[bool, bool],
        found: tuple[Array, Array],
    ) -> None:
        """Find the state and the node for the tokens of a text inside a block.

        Args:
            ids, start, stop: the block, and where the text's tokens are.
            skipped: bytes of the text that the teacher does not read.
            encoding: the text in the teacher's tokens.
            count: number of the teacher's tokens before it.
            edges: whether the first word and the last word may be incomplete.
            found: states and nodes of the block's tokens, which this method sets.
        """
        tokens, pieces = np.array(encoding.ids, np.int64), self.decomposition
        if not len(tokens):
            return
        borders = np.concatenate([[0], self._sizes[ids[start:stop]].cumsum()])
        ends = skipped + self._teacher_sizes[tokens].cumsum()
        begins = np.concatenate([[skipped], ends[:-1]])
        first = np.searchsorted(borders, begins)
        sizes = pieces.starts[tokens + 1] - pieces.starts[tokens]
        flat = np.repeat(pieces.starts[tokens] - sizes.cumsum() + sizes, sizes) + np.arange(sizes.sum())
        number = np.arange(len(flat)) - np.repeat(sizes.cumsum() - sizes, sizes)  # of a piece in its token
        place = np.repeat(first, sizes) + number
        inside = place < stop - start
        here = ids[start + place.clip(max=stop - start - 1)]
        same = np.logical_and.reduceat(inside & (here == pieces.pieces[flat]), sizes.cumsum() - sizes)
        common = borders[first.clip(max=stop - start)] == begins
        # what precedes a token predicts its first piece, whether or not the token is the right one
        right = np.repeat(common, sizes) & (np.repeat(same, sizes) | (number == 0))
        words = np.repeat([-1 if word is None else word for word in encoding.word_ids], sizes)
        incomplete = (words == words[0]) & edges[0]
        if edges[1]:
            last = words == words[-1]
            last[last.argmax()] = False  # what precedes the word predicts its first piece
            incomplete |= last
        state = np.repeat(count + np.arange(len(tokens)) - 1, sizes)
        kept = right & ~incomplete & inside
        at = start + place[kept]
        found[0][at], found[1][at] = state[kept], pieces.nodes[flat][kept]
