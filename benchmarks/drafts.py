"""Measure speculative decoding: is the text the teacher's own, how much is accepted, and is it faster.

    python benchmarks/drafts.py --draft STUDENT --json
    python benchmarks/drafts.py --teacher T --draft S --text FILE --prompts 200

Greedy texts of the teacher alone and with drafts are compared on evenly spaced prompts of a text, and timed in turns.
A text may differ only from a step on where the teacher's two best logits are nearly equal, because a pass over several
tokens sums in another order than one over a single token. By default the teacher is models/novels-6x256 of the folder
that TINYGPT2_TEST_DATA names, and the text is a novel that was held out. Exits with 1 if a text differs otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinygpt2.data.encoding import Encoder
from tinygpt2.decoding.drafts import decode_with_draft
from tinygpt2.decoding.library import make_decoder
from tinygpt2.decoding.loop import decode
from tinygpt2.models.loading import load_model, model_tokenizer
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.threads import enough_threads

NEAR_TIE = 1e-3  # of logits


def first_gap(teacher: Any, prompt: list[int], alone: list[int], drafted: list[int]) -> float:
    """Return how near the teacher's two best logits are where two texts part; infinity if they are equal."""
    if alone == drafted:
        return float("inf")
    at = next(index for index, (a, b) in enumerate(zip(alone, drafted, strict=True)) if a != b)
    with torch.no_grad():
        best = teacher(torch.tensor([[*prompt, *alone[:at]]])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def main() -> None:
    """Measure and print."""
    data = Path(os.environ.get("TINYGPT2_TEST_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(data / "models" / "novels-6x256"))
    parser.add_argument("--draft", required=True)
    parser.add_argument("--text", type=Path, default=data / "corpus" / "novels-valid" / "Doyle_Hound_1902.txt")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--ahead", default="1,2,4,8", help="numbers of drafted tokens")
    parser.add_argument("--json", action="store_true", help="in one line")
    options = parser.parse_args()
    teacher, directory = load_model(options.teacher)
    ids = Encoder(model_tokenizer(directory)).whole(options.text.read_text(encoding="utf-8")).tolist()
    starts = np.linspace(0, len(ids) - options.prompt_tokens, options.prompts).astype(int)
    prompts = [ids[start : start + options.prompt_tokens] for start in starts]
    ours, theirs = (make_decoder(load_model(name)[0], copy_head=True) for name in (options.teacher, options.draft))
    result: dict[str, Any] = {}
    wrong = 0
    with enough_threads(2.0 * count_parameters(teacher)):
        for ahead in map(int, options.ahead.split(",")):
            seconds, proposed, accepted, gaps = [0.0, 0.0], 0, 0, []
            for prompt in prompts:
                started = time.perf_counter()
                alone = decode(ours, torch.tensor([prompt]), max_new_tokens=options.new_tokens).tokens[0].tolist()
                between = time.perf_counter()
                decoded, figures = decode_with_draft(
                    ours, theirs, prompt, max_new_tokens=options.new_tokens, ahead=ahead, timed_steps=0
                )
                seconds[0] += between - started
                seconds[1] += time.perf_counter() - between
                proposed, accepted = proposed + figures.proposed, accepted + figures.accepted
                gaps.append(first_gap(teacher, prompt, alone, decoded.tokens[0].tolist()))
            wrong += sum(NEAR_TIE <= gap < float("inf") for gap in gaps)
            result[str(ahead)] = {
                "texts": len(prompts), "equal": sum(gap == float("inf") for gap in gaps),
                "parted_at_a_near_tie": sum(gap < NEAR_TIE for gap in gaps), "acceptance": accepted / proposed,
                "speedup": seconds[0] / seconds[1],
                "teacher_tokens_per_second": len(prompts) * options.new_tokens / seconds[0],
            }  # fmt: skip
    print(json.dumps(result, indent=None if options.json else 2))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
