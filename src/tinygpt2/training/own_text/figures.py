"""What a run says of the text that it samples: figures, a collapse, and some texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator

from tinygpt2.runtime.devices import float64_device
from tinygpt2.utils.files import write_text
from tinygpt2.utils.progress import warn

SAMPLES = "samples.jsonl"
_SHOWN = 3  # texts that are kept at each evaluation
_REPEATED = 0.9  # share of a text's tokens that are the same one, above which it repeats that token
_SHORT = 8  # tokens of a text that is too short to say that it repeats one


def distinct_pairs(tokens: Sequence[int]) -> float:
    """Return the share of a text's pairs of neighbouring tokens that are different ones (distinct-2); 1 without pairs.

    Source: Li et al. 2016, arXiv:1510.03055, section 5.2, here of one text.
    """
    pairs = list(pairwise(tokens))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def repeats_one(tokens: Sequence[int]) -> bool:
    """Return whether nearly all tokens of a text are the same one."""
    return len(tokens) >= _SHORT and max(Counter(tokens).values()) > _REPEATED * len(tokens)


@dataclass
class Figures:
    """Sums over the sequences and the texts since the last line of metrics, in this process."""

    sequences: int = 0
    sampled: int = 0
    texts: int = 0
    tokens: int = 0
    ended: int = 0
    distinct: float = 0.0
    empty: int = 0
    repeating: int = 0
    sampling: float = 0.0
    collapsed: bool = field(default=False, compare=False)

    def add(self, continuations: Sequence[Sequence[int]], ended: Sequence[bool]) -> None:
        """Count some continuations, whose last token is the end of the text if they `ended`."""
        for tokens, end in zip(continuations, ended, strict=True):
            self.texts, self.tokens, self.ended = self.texts + 1, self.tokens + len(tokens), self.ended + end
            self.distinct += distinct_pairs(tokens)
            self.empty += end and len(tokens) == 1
            self.repeating += repeats_one(tokens)

    def taken(self, accelerator: Accelerator, seconds: float) -> dict[str, float]:
        """Return the figures of all processes for metrics.jsonl, and begin anew. A collapse of the texts is said once.

        Args:
            seconds: the time since the last call.

        Returns:
            `sample/share`, the share of the sequences that were sampled text, and if texts were sampled,
            `sample/length` and `sample/ended` (means of a text), `sample/distinct_2`, and `sample/seconds_share`, the
            share of the time that sampling took.
        """
        own = [self.sequences, self.sampled, self.texts, self.tokens, self.ended, self.empty, self.repeating]
        sums = torch.tensor(
            [*own, self.distinct, self.sampling, seconds],
            dtype=torch.float64,
            device=float64_device(accelerator.device),
        )
        sequences, sampled, texts, tokens, ended, empty, repeating, distinct, sampling, whole = accelerator.reduce(
            sums, "sum"
        ).tolist()
        self.sequences = self.sampled = self.texts = self.tokens = self.ended = self.empty = self.repeating = 0
        self.distinct = self.sampling = 0.0
        found = {"sample/share": sampled / sequences} if sequences else {}
        if not texts:
            return found
        said, self.collapsed = self.collapsed, max(empty, repeating) == texts
        if self.collapsed and not said:
            warn_of_collapse(empty=empty == texts)
        return found | {
            "sample/length": tokens / texts,
            "sample/ended": ended / texts,
            "sample/distinct_2": distinct / texts,
            "sample/seconds_share": sampling / whole if whole else 0.0,
        }


def warn_of_collapse(*, empty: bool) -> None:
    """Say that the sampled texts have become useless, and what helps."""
    what = "is empty: the first token ends it" if empty else "repeats one token"
    warn(
        f"every sampled text {what}; a smaller --on-policy-fraction learns more from the data, and a smaller "
        "--learning-rate changes the student more slowly"
    )


class SampleLog:
    """Some sampled texts of each evaluation, in samples.jsonl of the run's directory and in TensorBoard.

    Args:
        out: the run's directory.
        step: the step that the run continues from. Texts of later steps, from an earlier attempt, are deleted.
        text: makes text of tokens.
    """

    def __init__(self, out: Path, step: int, text: Callable[[list[int]], str]) -> None:
        self._path, self._text = out / SAMPLES, text
        lines = self._path.read_text(encoding="utf-8").splitlines() if step and self._path.is_file() else []
        self._lines = [line for line in lines if json.loads(line)["step"] <= step]

    def write(self, accelerator: Accelerator, step: int, texts: Sequence[tuple[list[int], list[int]]]) -> None:
        """Write the first few of some texts: pairs of a prompt and its continuation."""
        rows = [
            {"step": step, "prompt": self._text(prompt), "text": self._text(added)} for prompt, added in texts[:_SHOWN]
        ]
        self._lines += [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(self._path, "".join(f"{line}\n" for line in self._lines))
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                shown = "\n\n".join(f"**{row['prompt']}**{row['text']}" for row in rows)
                tracker.writer.add_text("own_text", shown, global_step=step)
