"""Measure speculative decoding with a distilled student: equal text, accepted tokens, speed.

    python benchmarks/drafts.py --json
    python benchmarks/drafts.py --student STUDENT --ahead 2,4,8 --json

The teacher is novels-6x256 of the folder that TINYGPT2_TEST_DATA names, and the prompts are pieces of the novels there
that it was not trained on. Without --student, a student of one layer is cut from the teacher and distilled on another
novel for --steps steps first. Every prompt is continued greedily by the teacher alone and with the draft, in turns:
`different` counts the texts that are not the same (0 is right), up to a step at which the teacher's two best logits
differ by less than 0.001, where rounding decides. `speedup` is the time of the teacher alone divided by that with the
draft, over all prompts. `sampling` has the same at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tinygpt2 import DistillConfig, PregenerateConfig, TruncateStudentConfig, distill, pregenerate, truncate_student
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.decoding.drafts import decode_with_draft
from tinygpt2.decoding.library import Decoder, make_decoder
from tinygpt2.decoding.loop import decode
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.models.loading import load_model
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.threads import enough_threads

NEAR_TIE = 1e-3


def make_student(teacher: str, texts: list[str], folder: Path, options: argparse.Namespace) -> str:
    """Cut a student from the teacher, distil it, and return its directory."""
    data, cut, out = (str(folder / name) for name in ("data", "cut", "student"))
    pregenerate(PregenerateConfig(source=texts, tokenizer=teacher, sequence_length=options.length, out=data))
    truncate_student(TruncateStudentConfig(teacher=teacher, out=cut, num_layers=options.layers))
    how = {"max_steps": options.steps, "micro_batch_size": 8, "learning_rate": 1e-3}
    return str(distill(DistillConfig(teacher=teacher, student=cut, data=data, out=out, **how)).model)


def prompts(teacher: str, text: Path, options: argparse.Namespace) -> list[list[int]]:
    """Return pieces of a text, evenly spaced."""
    ids = load_tokenizer(teacher)(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    apart = (len(ids) - options.prompt_tokens) // options.prompts
    return [ids[index * apart : index * apart + options.prompt_tokens] for index in range(options.prompts)]


def near_tie(decoder: Decoder, prompt: list[int], alone: list[int], drafted: list[int]) -> bool:
    """Return whether the teacher's two best logits are nearly equal where two texts part."""
    same = next((at for at, (a, b) in enumerate(zip(alone, drafted, strict=False)) if a != b), None)
    if same is None:
        return False
    text = torch.tensor([prompt + alone[:same]])
    with torch.inference_mode():
        best = decoder.read(decoder.cache(1, text.shape[1]), text)[0].topk(2).values
    return bool(best[0] - best[1] < NEAR_TIE)


def measure(
    teacher: Decoder, draft: Decoder, given: list[list[int]], ahead: int, sampling: Sampling | None, count: int
) -> dict[str, Any]:
    """Continue every prompt without and with the draft, in turns."""
    seconds = {"alone": 0.0, "drafted": 0.0}
    proposed = accepted = tokens = different = ties = 0
    generator = torch.Generator().manual_seed(0)
    how: dict[str, Any] = {"max_new_tokens": count, "sampling": sampling, "generator": generator}
    for warm_up, prompt in [(True, given[0]), *((False, one) for one in given)]:
        started = time.perf_counter()
        alone = decode(teacher, torch.tensor([prompt]), **how).tokens[0].tolist()
        between = time.perf_counter()
        out, took = decode_with_draft(teacher, draft, prompt, ahead=ahead, timed_steps=0, **how)
        ended = time.perf_counter()
        if warm_up:
            continue
        seconds["alone"] += between - started
        seconds["drafted"] += ended - between
        proposed, accepted, tokens = proposed + took.proposed, accepted + took.accepted, tokens + len(alone)
        drafted = out.tokens[0].tolist()
        if sampling is None and drafted != alone:
            tie = near_tie(teacher, prompt, alone, drafted)
            ties, different = ties + tie, different + (not tie)
    found = {
        "ahead": ahead,
        "sampling": sampling is not None,
        "acceptance": accepted / proposed,
        "speedup": seconds["alone"] / seconds["drafted"],
        "tokens_per_second": tokens / seconds["drafted"],
        "tokens_per_second_alone": tokens / seconds["alone"],
    }
    return found if sampling is not None else {**found, "different": different, "near_ties": ties}


def main() -> None:
    """Measure, and print lines or JSON."""
    data = Path(os.environ.get("TINYGPT2_TEST_DATA", "."))
    novels = data / "corpus" / "novels-valid"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(data / "models" / "novels-6x256"))
    parser.add_argument("--student", help="a model directory; default: one that is made here")
    parser.add_argument("--train-text", default=str(novels / "Hardy_Madding_1874.txt"))
    parser.add_argument("--text", default=str(novels / "Doyle_Hound_1902.txt"), help="where the prompts are from")
    parser.add_argument("--layers", type=int, default=1, help="of the student that is made here")
    parser.add_argument("--steps", type=int, default=300, help="of its distillation")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence of its distillation")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--ahead", default="2,4", help="tokens to draft before each check; several numbers, by commas")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        student = options.student or make_student(options.teacher, [options.train_text], Path(folder), options)
        models = [load_model(name)[0].eval() for name in (options.teacher, student)]
    teacher, draft = (make_decoder(model, copies=True) for model in models)
    given, rows = prompts(options.teacher, Path(options.text), options), []
    for ahead in map(int, options.ahead.split(",")):
        for sampling in (None, Sampling()):
            with enough_threads(2.0 * count_parameters(models[0]) * (ahead + 1)):
                rows.append(measure(teacher, draft, given, ahead, sampling, options.new_tokens))
            if not options.json:
                print(json.dumps(rows[-1]), flush=True)
    if options.json:
        sizes = [count_parameters(model) for model in models]
        print(json.dumps({"teacher_parameters": sizes[0], "student_parameters": sizes[1], "results": rows}))


if __name__ == "__main__":
    main()
