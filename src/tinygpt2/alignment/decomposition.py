"""What the tokens of a whole vocabulary consist of, in the tokens of one that was cut by rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer as Backend

from tinygpt2.alignment.rank_cut import RankCut
from tinygpt2.utils.types import Array

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


@dataclass(frozen=True)
class Decomposition:
    """The pieces of every token of a teacher: the student's tokens that the kept merges alone make of its bytes.

    All pieces of all tokens stand one after another. `nodes` are the nodes of the tree that they span: the root (0) is
    a place where a token begins, and every other node is a beginning of some token's pieces that a further piece
    follows.

    Attributes:
        starts: where the pieces of each of the teacher's tokens begin, and where the last ones end (W + 1).
        pieces: the student's tokens.
        nodes: the node before each piece.
        reachable: the teacher's tokens that texts can have, in ascending order.
        first: the first piece of each of these.
        inner_starts: where the entries of each inner node begin in the next two arrays (nodes 1, 2 and so on).
        inner_tokens: for each inner node, the tokens that go on from there, as places in `reachable`.
        inner_pieces: the next piece of each of them.
    """

    starts: Array
    pieces: Array
    nodes: Array
    reachable: Array
    first: Array
    inner_starts: Array
    inner_tokens: Array
    inner_pieces: Array

    @classmethod
    def of(cls, whole: Tokenizer, cut: RankCut, rows: int) -> Decomposition:
        """Find the pieces of every token.

        Args:
            whole: the teacher's tokenizer.
            rows: number of tokens that the teacher has rows for.
        """
        special = {index: token.content for index, token in whole.added_tokens_decoder.items()}
        names = {token: name for name, token in whole.get_vocab().items() if token < rows}
        texts = [token for token in sorted(names) if token not in special]
        spelled = [names[token] for token in texts]
        # a token that its own bytes do not give is never the canonical one
        made = {token for token, ids in zip(texts, _merged(whole, spelled), strict=True) if ids == [token]}
        numbers = cut.tokenizer.get_vocab()
        paths = dict(zip(texts, _merged(cut.tokenizer, spelled), strict=True))
        paths |= {token: [numbers[name]] for token, name in special.items() if token < rows}
        reachable = sorted(made | {token for token in special if token < rows})
        return cls._of_paths([paths.get(token, []) for token in range(rows)], reachable)

    @classmethod
    def _of_paths(cls, paths: list[list[int]], reachable: list[int]) -> Decomposition:
        """Make the tree of the pieces of all tokens."""
        place = {token: number for number, token in enumerate(reachable)}
        children: dict[tuple[int, int], int] = {}
        entries: list[list[tuple[int, int]]] = [[]]
        nodes = []
        for token, path in enumerate(paths):
            node = 0
            for number, piece in enumerate(path):
                if number:
                    key = node, path[number - 1]
                    node = children.setdefault(key, len(entries))
                    if node == len(entries):
                        entries.append([])
                    if token in place:
                        entries[node].append((place[token], piece))
                nodes.append(node)
        flat = [entry for node in entries[1:] for entry in node]
        return cls(
            starts=np.array([0, *accumulate(map(len, paths))], np.int64),
            pieces=np.array([piece for path in paths for piece in path], np.int64),
            nodes=np.array(nodes, np.int64),
            reachable=np.array(reachable, np.int64),
            first=np.array([paths[token][0] for token in reachable], np.int64),
            inner_starts=np.array([0, *accumulate(map(len, entries[1:]))], np.int64),
            inner_tokens=np.array([token for token, _ in flat], np.int64),
            inner_pieces=np.array([piece for _, piece in flat], np.int64),
        )


def _merged(tokenizer: Tokenizer, spelled: list[str]) -> list[list[int]]:
    """Return the tokens that the merges alone make of some texts in the letters of bytes, without a pre-tokenizer."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"added_tokens": [], "pre_tokenizer": None, "post_processor": None}
    return [encoding.ids for encoding in Backend.from_str(json.dumps(content)).encode_batch_fast(spelled)]
