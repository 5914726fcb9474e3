"""Measure tokens/s and peak memory of perplexity, and compare with other loops and with matrix products alone.

    python benchmarks/perplexity.py --json --harness /path/to/env/with/lm-eval/bin/python

A model with GPT-2 small's shape and random weights scores the beginning of the WikiText-2 raw test set, at strides 1024
and 512.

Variants:
- `ours`: this package's Scorer, used as in `ppl`.
- `page`: the loop of transformers' page "Perplexity of fixed-length models".
- `tinygpt2`: the loop of TinyGPT2's calc_ppl.
- `lm_eval`: lm-evaluation-harness' rolling log-likelihood, which does not support overlapping windows.
- `bound`: only the matrix products of `ours` (linear layers, attention scores and mixing of the lower triangle, the
  output matrix for the targets alone), with torch's default engine.
- `bound_onednn`: the same products with oneDNN, which `ours` uses in float32.

The tokens per second count target tokens. Every variant runs in its own process. The variants take turns, and the
medians over the rounds are reported. Peak memory is measured above the memory of the loaded model.
`largest_difference` is the largest relative difference between the loss of `ours` and that of another variant over the
same targets, in float32. The variants average differently, so sums of losses are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from turns import Worker, forget_peak, resident

WINDOW, STRIP = 1024, 128
SHAPE = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": WINDOW, "vocab_size": 50257}
Job = Callable[[], dict[str, float]]


# --- runs in a variant's own process -------------------------------------------------------------------


def load(options: argparse.Namespace) -> Any:
    import torch
    from transformers import GPT2LMHeadModel

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    return touched(GPT2LMHeadModel.from_pretrained(options.folder, dtype=dtype).to(options.device).eval())


def touched(model: Any) -> Any:
    """Read all weights once, because a memory-mapped file is not in memory before."""
    for parameter in model.parameters():
        parameter.detach().sum()
    return model


def ours(options: argparse.Namespace, tokens: list[int]) -> Job:
    import numpy as np
    import torch

    from tinygpt2.evaluation.perplexity import _budget
    from tinygpt2.evaluation.scoring import Scorer, windows
    from tinygpt2.models.loading import load_model

    scorer = Scorer(touched(load_model(options.folder)[0]), options.precision, torch.device(options.device))
    ids, budget = np.array(tokens), _budget(options.device)
    rolling = np.array([50256, *tokens])

    def job() -> dict[str, float]:
        scores = scorer(ids, list(windows(len(ids), WINDOW, options.stride)), budget)
        return {"total": float(scores.sums.sum()), "targets": int(scores.counts.sum())}

    def as_harness() -> float:
        return float(scorer(rolling, list(windows(len(rolling), WINDOW + 1, WINDOW, full=True)), budget).sums.sum())

    job.as_harness = as_harness  # type: ignore[attr-defined]
    return job


def page(options: argparse.Namespace, tokens: list[int]) -> Job:
    """Return the loop of the page, with each window weighted by its number of targets."""
    import torch

    model, ids = load(options), torch.tensor([tokens])

    def job() -> dict[str, float]:
        total, targets, before = 0.0, 0, 0
        for begin in range(0, ids.shape[1], options.stride):
            end = min(begin + WINDOW, ids.shape[1])
            fresh = end - before
            inputs = ids[:, begin:end].to(options.device)
            labels = inputs.clone()
            labels[:, :-fresh] = -100
            with torch.no_grad():
                loss = model(inputs, labels=labels).loss
            counted = int((labels[:, 1:] != -100).sum())
            total, targets, before = total + float(loss) * counted, targets + counted, end
            if end == ids.shape[1]:
                break
        return {"total": total, "targets": targets}

    return job


def tinygpt2(options: argparse.Namespace, tokens: list[int]) -> Job:
    import torch

    model, ids = load(options), torch.tensor([tokens])

    def job() -> dict[str, float]:
        total, targets = 0.0, 0
        for start in range(0, ids.shape[1], options.stride):
            begin, end = max(start + options.stride - WINDOW, 0), min(start + options.stride, ids.shape[1])
            inputs = ids[:, begin:end].to(options.device)
            labels = inputs.clone()
            labels[:, : -(end - start)] = -100
            with torch.no_grad():
                loss = model(inputs, labels=labels).loss
            counted = int((labels[:, 1:] != -100).sum())
            total, targets = total + float(loss) * counted, targets + counted
        return {"total": total, "targets": targets}

    return job


def lm_eval(options: argparse.Namespace, tokens: list[int]) -> Job:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.precision]
    model = HFLM(pretrained=options.folder, dtype=dtype, device=options.device, batch_size=1)
    touched(model.model)
    text = model.tokenizer.decode(tokens)
    assert model.tok_encode(text) == tokens

    def job() -> dict[str, float]:
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        return {"total": -model.loglikelihood_rolling([request], disable_tqdm=True)[0], "targets": len(tokens)}

    return job


def bound(options: argparse.Namespace, tokens: list[int]) -> Job:
    """Return a job that runs the matrix products of one window, once for each window of the text."""
    import torch

    from tinygpt2.evaluation.scoring import windows

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    like = {"dtype": dtype, "device": options.device}
    width, heads, targets = SHAPE["n_embd"], SHAPE["n_head"], options.stride
    linear = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    weights = [torch.full((a, b), 0.01, **like) for a, b in linear]
    inputs = {a: torch.full((WINDOW, a), 0.01, **like) for a, _ in linear}
    outputs = {b: torch.empty(WINDOW, b, **like) for _, b in linear}
    query, key = (torch.full((heads, WINDOW, width // heads), 0.01, **like) for _ in range(2))
    head = torch.full((SHAPE["vocab_size"], width), 0.01, **like)
    logits = torch.empty(targets, len(head), **like)
    count = len(list(windows(len(tokens), WINDOW, options.stride)))

    def job() -> dict[str, float]:
        for _ in range(count):
            for _ in range(SHAPE["n_layer"]):
                for (a, b), weight in zip(linear, weights, strict=True):
                    torch.mm(inputs[a], weight, out=outputs[b])
                for start in range(0, WINDOW, STRIP):
                    stop = start + STRIP
                    torch.bmm(torch.bmm(query[:, start:stop], key[:, :stop].mT), key[:, :stop])
            torch.mm(inputs[width][:targets], head.mT, out=logits)
        return {"total": 0.0, "targets": len(tokens) - 1}

    return job


VARIANTS = {"ours": ours, "page": page, "tinygpt2": tinygpt2, "lm_eval": lm_eval, "bound": bound, "bound_onednn": bound}


def work(options: argparse.Namespace) -> None:
    """Run the job for every line on stdin and answer with a line of JSON."""
    tuned = nullcontext()
    if options.worker in ("ours", "bound_onednn"):
        from tinygpt2.runtime.cpu import fast_products, keep_memory

        tuned = fast_products()
        keep_memory()
    import torch

    cuda = options.device == "cuda"
    tokens = json.loads((Path(options.folder) / "tokens.json").read_text())
    with tuned:
        job = VARIANTS[options.worker](options, tokens)
        rolling = job.as_harness() if options.worker == "ours" else None  # type: ignore[attr-defined]
        before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()
        print(json.dumps({}), flush=True)
        for _ in sys.stdin:
            started = time.perf_counter()
            found: dict[str, Any] = job()
            if cuda:
                torch.cuda.synchronize()
            found["seconds"] = time.perf_counter() - started
            found["memory"] = (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before
            found["as_harness"] = rolling
            print(json.dumps(found), flush=True)


# --- runs in the process that compares the variants ----------------------------------------------------


def prepare(folder: Path, data: Path, count: int) -> None:
    """Write the model, its tokenizer and the tokens of the text."""
    from transformers import GPT2Config

    from tinygpt2.data.tokenizer import load_tokenizer
    from tinygpt2.evaluation.tasks import load_tasks
    from tinygpt2.models.loading import random_model
    from tinygpt2.models.saving import save_model

    tokenizer = load_tokenizer(str(data / "tokenizers" / "gpt2"))
    save_model(random_model(GPT2Config(**SHAPE), 1), folder, tokenizer, "# random\n")
    (task,) = load_tasks(["wikitext"], str(data))
    (folder / "tokens.json").write_text(json.dumps(tokenizer(task.joined())["input_ids"][: count or None]))


def measure(precision: str, stride: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the variants in turns at one precision and stride, and return their last turns and median speeds."""
    names = [name for name in VARIANTS if name != "bound_onednn" or (precision == "fp32" and options.device == "cpu")]
    if options.harness is None or stride != WINDOW:
        names.remove("lm_eval")
    workers = {}
    for name in names:
        arguments = ["--worker", name, "--precision", precision, "--stride", str(stride), "--folder", str(folder)]
        python = options.harness if name == "lm_eval" else sys.executable
        workers[name] = Worker(__file__, [*arguments, "--device", options.device], python)
    for _ in range(options.rounds + 1):  # the first turn is the warm-up
        for worker in workers.values():
            worker.turn()
    found = {}
    for name, worker in workers.items():
        worker.end()
        seconds = statistics.median(turn["seconds"] for turn in worker.turns[1:])
        found[name] = {**worker.turns[-1], "speed": worker.turns[-1]["targets"] / seconds}
    return found


def difference(found: dict[str, Any]) -> float:
    """Return the largest relative difference between the loss of `ours` and the losses of the other variants."""
    own, worst = found["ours"], 0.0
    for name, other in found.items():
        if name in ("page", "tinygpt2") and other["targets"] == own["targets"]:
            worst = max(worst, abs(other["total"] / own["total"] - 1))
        if name == "lm_eval":
            worst = max(worst, abs(other["total"] / own["as_harness"] - 1))
    return worst


def main() -> None:
    """Read the options, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("TINYGPT2_TEST_DATA", "."),
        help="directory with the tokenizer and the texts",
    )
    parser.add_argument("--tokens", type=int, default=8192, help="number of tokens of the text; 0 for all 287,644")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant, after the warm-up")
    parser.add_argument("--precision", default="fp32,bf16", help="precisions, comma-separated")
    parser.add_argument("--strides", default="1024,512", help="strides, comma-separated")
    parser.add_argument(
        "--harness", help="Python interpreter of an environment with lm-eval; without it, lm_eval is null"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--stride", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    result: dict[str, Any] = {"tokens": options.tokens, "peak_memory_bytes": {}, "largest_difference": 0.0}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.data, options.tokens)
        for precision in options.precision.split(","):
            result[precision] = {}
            for stride in map(int, options.strides.split(",")):
                found = measure(precision, stride, Path(name), options)
                speeds = {variant: found[variant]["speed"] if variant in found else None for variant in VARIANTS}
                result[precision][str(stride)] = speeds
                for variant, row in found.items():
                    if not variant.startswith("bound"):
                        result["peak_memory_bytes"][f"{variant}_{precision}_{stride}"] = row["memory"]
                if precision == "fp32":
                    result["largest_difference"] = max(result["largest_difference"], difference(found))
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
