"""Compare the two ways to choose a smaller vocabulary: tokens per byte of a text that nothing was counted on.

    python benchmarks/vocabulary_choice.py --tokenizer T --texts counted.txt --held-out other.txt --sizes 4096 2048

T is the tokenizer of a teacher. `used` counts on the texts. For each size, a row has the tokens per byte of each choice
on the held-out texts, the ratio, and how many of the teacher's borders the `used` tokens do not have. (`rank` keeps all
of them.)
"""

from __future__ import annotations

import argparse
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt2.alignment.rank_cut import cut_by_rank
from tinygpt2.alignment.used_tokens import by_use
from tinygpt2.data.encoding import encode, token_bytes
from tinygpt2.data.tokenizer import load_tokenizer


def borders(tokenizer: Any, text: str) -> tuple[int, set[int]]:
    """Return the number of a text's tokens, and the bytes where they end."""
    names = tokenizer.convert_ids_to_tokens(encode(tokenizer, [text])[0])
    return len(names), set(accumulate(len(token_bytes(name)) for name in names))


def rows(tokenizer: Any, counted: list[str], held_out: list[str], sizes: list[int]) -> list[str]:
    """Return a table in Markdown."""
    vocabulary = len(tokenizer)
    counts = np.bincount(np.concatenate(encode(tokenizer, counted)), minlength=vocabulary)
    order, size = by_use(tokenizer, counts), sum(len(text.encode()) for text in held_out)
    whole = [borders(tokenizer, text) for text in held_out]
    table = [
        "| tokens | rank, tokens per byte | used, tokens per byte | used / rank | borders lost by used |",
        "|--:|--:|--:|--:|--:|",
    ]
    table.append(f"| {vocabulary:,} | {sum(count for count, _ in whole) / size:.4f} | | | |")
    for number in sizes:
        cuts = [cut_by_rank(tokenizer, number, vocabulary, one).tokenizer for one in (None, order)]
        rank, used = ([borders(cut, text) for text in held_out] for cut in cuts)
        rank_tokens, used_tokens = (sum(count for count, _ in one) for one in (rank, used))
        lost = sum(len(theirs - ours) for (_, theirs), (_, ours) in zip(whole, used, strict=True))
        every = sum(len(theirs) for _, theirs in whole)
        table.append(
            f"| {number:,} | {rank_tokens / size:.4f} | {used_tokens / size:.4f} | {used_tokens / rank_tokens:.4f} | "
            f"{lost:,} of {every:,} |"
        )
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--held-out", nargs="+", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", type=int, required=True)
    options = parser.parse_args()
    texts, held_out = (
        [path.read_text(encoding="utf-8") for path in paths] for paths in (options.texts, options.held_out)
    )
    print("\n".join(rows(load_tokenizer(options.tokenizer), texts, held_out, options.sizes)))


if __name__ == "__main__":
    main()
