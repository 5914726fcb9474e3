"""Measure time and peak memory of one distillation step, of the naive way and of its matrix products alone.

    python benchmarks/distill_step.py --json
    python benchmarks/distill_step.py --json --sequence-length 256,512,1024,2048 --scaling

Every variant runs in its own process, so that its peak memory can be measured separately. The processes take turns,
step by step, so that the ratios are fair on a machine whose speed varies. Times are medians over the rounds.

Variants:
- `naive`: TinyGPT2's way, see naive.py.
- `ours`: this package's `Step`. Only this variant keeps freed memory, as the command line does.
- `products`: only the matrix products that `ours` needs. These are each linear layer of both models (forward once, for
  the student backward twice), the attention scores of the mapped layers (lower triangle only), and both output matrices
  (forward once, for the student backward twice). The products inside the attention layers and of the learned map are
  not counted. `products_fp32` uses torch's default products, `products_fp32_onednn` those that `ours` uses
  (tinygpt2.runtime.cpu.fast_products).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

from turns import Worker, resident

VOCABULARY, HEADS = 50257, 12
TEACHER, STUDENT = {"n_layer": 12, "n_embd": 768}, {"n_layer": 4, "n_embd": 312}
STRIP = 128  # query rows in one strip of attention scores, in `products`
WARM_UP = 2  # steps until all the memory that a step needs has been allocated once


# --- runs in a variant's own process -------------------------------------------------------------------


def models(options: argparse.Namespace, ours: bool) -> tuple[Any, Any]:
    """Make the student and the teacher. The seeds are the same for every variant."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from tinygpt2.models.loading import random_model

    made = []
    for seed, shape in ((1, STUDENT), (2, TEACHER)):
        config = GPT2Config(
            **shape, n_head=HEADS, n_positions=max(1024, options.length), vocab_size=VOCABULARY,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
        if ours:
            made.append(random_model(config, seed))
        else:
            torch.manual_seed(seed)
            made.append(GPT2LMHeadModel(config))
    student, teacher = (model.to(options.device) for model in made)
    return student.train(), teacher.eval()


def training_step(options: argparse.Namespace, ours: bool, bf16: bool) -> Any:
    """Return a function that runs one training step and returns its objectives."""
    import torch
    from naive import NaiveStep

    from tinygpt2.config.training import PretrainConfig
    from tinygpt2.objectives.weights import LossWeights
    from tinygpt2.training.optimizers import make_optimizer
    from tinygpt2.training.step import Step

    run = PretrainConfig(data="", out="", shape="gpt2", learning_rate=2.5e-4)
    student, teacher = models(options, ours)
    torch.manual_seed(3)
    projection = torch.nn.Linear(STUDENT["n_embd"], TEACHER["n_embd"]).to(options.device)
    if ours:
        if bf16:
            teacher.to(torch.bfloat16)
        teacher.requires_grad_(False)
        module: Any = Step(student, teacher, LossWeights(1.0, 1.0, 1.0, 0.0, loss="soft_ce"), run)
        module.objectives.projection = projection
    else:
        module = NaiveStep(student, teacher, projection)
    optimizer = make_optimizer(module, run)
    generator = torch.Generator().manual_seed(4)
    shape = (options.micro_batch_size, options.length)
    ids = torch.randint(0, VOCABULARY, shape, generator=generator).to(options.device)
    device = options.device

    def step() -> dict[str, float]:
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            loss, terms = module(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: float(term) for name, term in terms.items()}

    return step


def product_shapes(options: argparse.Namespace) -> list[tuple[int, int, int, int, int]]:
    """Return the matrix products of a step as (repetitions, batch, m, k, n): batches of (m, k) times (k, n)."""
    tokens = options.micro_batch_size * options.length
    shapes = []
    for model, passes in ((TEACHER, 1), (STUDENT, 3)):
        layers, width = model["n_layer"], model["n_embd"]
        for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            forward, to_input, to_weight = (
                (layers, 1, tokens, inputs, outputs),
                (layers, 1, tokens, outputs, inputs),
                (layers, 1, inputs, tokens, outputs),
            )
            shapes += [forward, to_input, to_weight][:passes]
        head = (
            (1, 1, tokens, width, VOCABULARY),
            (1, 1, tokens, VOCABULARY, width),
            (1, 1, VOCABULARY, tokens, width),
        )
        shapes += head[:passes]
        # attention scores, strip by strip of the lower triangle: forward q k^T, backward D k and D^T q
        pairs, inner = options.micro_batch_size * HEADS, width // HEADS
        for start in range(0, options.length, STRIP):
            rows = min(STRIP, options.length - start)
            strip = (
                (pairs, rows, inner, start + rows),
                (pairs, rows, start + rows, inner),
                (pairs, start + rows, rows, inner),
            )
            shapes += [(STUDENT["n_layer"], *one) for one in strip[:passes]]
    return shapes


def bare_products(options: argparse.Namespace, bf16: bool) -> Any:
    """Return a function that runs every product of `product_shapes` as often as a step needs it."""
    import torch

    dtype = torch.bfloat16 if bf16 else torch.float32
    like = {"dtype": dtype, "device": options.device}
    # One arena holds all operands, so that its pages are warm, as in a real step that reuses memory.
    shapes = product_shapes(options)
    sizes = [
        max(b * x * y for _, b, *dims in shapes for x, y in [pick(dims)])
        for pick in (lambda d: (d[0], d[1]), lambda d: (d[1], d[2]), lambda d: (d[0], d[2]))
    ]
    arenas = [torch.full((size,), 0.01, **like) for size in sizes]
    jobs = []
    for times, batch, m, k, n in shapes:
        left, right, out = (
            arena[: batch * rows * columns].view(batch, rows, columns)
            for arena, (rows, columns) in zip(arenas, ((m, k), (k, n), (m, n)), strict=True)
        )
        if n == VOCABULARY:  # the output matrix is stored as (V, D)
            right = arenas[1][: k * n].view(1, n, k).mT
        elif m in (VOCABULARY, STUDENT["n_embd"], 4 * STUDENT["n_embd"]) and batch == 1:  # the gradient of a weight
            left = arenas[0][: m * k].view(1, k, m).mT
        jobs.append((times, left, right, out))

    def step() -> dict[str, float]:
        for times, left, right, out in jobs:
            for _ in range(times):
                if left.shape[0] == 1:
                    torch.mm(left[0], right[0], out=out[0])
                else:
                    torch.bmm(left, right, out=out)
        return {}

    return step


def work(options: argparse.Namespace) -> None:
    """Run a step for every line on stdin and answer with a line of JSON."""
    from tinygpt2.runtime.cpu import fast_products, keep_memory

    if options.worker.startswith("ours"):
        keep_memory()  # as the command line does
    tuned = options.worker.startswith("ours") or options.worker.endswith("onednn")
    with fast_products() if tuned else nullcontext():
        answer(options)


def answer(options: argparse.Namespace) -> None:
    """Make the variant, then run a step for every line on stdin."""
    import torch

    kind, bf16 = options.worker.split("_")[0], "bf16" in options.worker
    step = bare_products(options, bf16) if kind == "products" else training_step(options, kind == "ours", bf16)
    cuda = options.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    print(json.dumps({"before": before}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        terms = step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
        print(json.dumps({"seconds": seconds, "peak": peak, "terms": terms}), flush=True)


# --- runs in the process that compares the variants ----------------------------------------------------


def worker(name: str, length: int, options: argparse.Namespace) -> Worker:
    """Start the process of one variant."""
    arguments = ["--worker", name, "--length", str(length), "--device", options.device]
    return Worker(__file__, [*arguments, "--micro-batch-size", str(options.micro_batch_size)])


def figures(worker: Worker, tokens: int) -> dict[str, Any]:
    """End a variant's process and return its figures. Warm-up steps count for the peak memory, but not for the time."""
    worker.end()
    seconds = statistics.median(step["seconds"] for step in worker.turns[WARM_UP:])
    peak = worker.turns[-1]["peak"]
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "step_memory_bytes": peak - worker.ready["before"],
    }


def measure(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the variants at one sequence length, in turns."""
    workers = {name: worker(name, length, options) for name in options.variants}
    for _ in range(options.rounds + WARM_UP):
        for one in workers.values():
            one.turn()
    tokens = options.micro_batch_size * length
    found: dict[str, Any] = {"sequence_length": length, "micro_batch_size": options.micro_batch_size}
    found["variants"] = {name: figures(one, tokens) for name, one in workers.items()}
    speed = {name: row["tokens_per_second"] for name, row in found["variants"].items()}
    memory = {name: row["peak_memory_bytes"] for name, row in found["variants"].items()}
    for precision in ("fp32", "bf16"):
        ours, bound = f"ours_{precision}", f"products_{precision}"
        naive = "naive_fp32"  # the precision of its authors, for every precision of ours
        if ours in speed and naive in speed:
            found[f"speedup_{precision}"] = speed[ours] / speed[naive]
            found[f"memory_ratio_{precision}"] = memory[ours] / memory[naive]
        if ours in speed and f"naive_{precision}" in speed and precision != "fp32":
            found[f"speedup_{precision}_over_naive_{precision}"] = speed[ours] / speed[f"naive_{precision}"]
        for suffix in ("", "_onednn"):
            if ours in speed and bound + suffix in speed:
                found[f"bound_share_{precision}{suffix}"] = speed[ours] / speed[bound + suffix]
    if {"ours_fp32", "naive_fp32"} <= set(workers):
        a, b = (workers[name].turns[0]["terms"] for name in ("naive_fp32", "ours_fp32"))
        found["loss_difference"] = max(abs(a[name] - b[name]) / abs(a[name]) for name in a)
    return found


def growth(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the factors by which a step's seconds and memory grow from one length to the next, for each variant."""
    rows = []
    for a, b in itertools.pairwise(found):
        for name in a["variants"]:
            ratios = {
                key: b["variants"][name][key] / a["variants"][name][key] for key in ("seconds", "step_memory_bytes")
            }
            rows.append({"from": a["sequence_length"], "to": b["sequence_length"], "variant": name, **ratios})
    return rows


def main() -> None:
    """Read the options, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--sequence-length", default="1024", help="sequence lengths to measure, comma-separated")
    parser.add_argument(
        "--scaling", action="store_true", help="measure only `ours`, and print how time and memory grow with the length"
    )
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each variant, after the warm-up")
    parser.add_argument("--variants", help="variants to measure, comma-separated; all by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    all_variants = ["naive_fp32", "ours_fp32", "ours_bf16", "products_fp32", "products_fp32_onednn", "products_bf16"]
    if options.device == "cuda":
        all_variants[1:1] = ["naive_bf16"]
        all_variants.remove("products_fp32_onednn")
    if options.scaling:
        all_variants = ["ours_fp32", "ours_bf16"]
    options.variants = options.variants.split(",") if options.variants else all_variants
    found = [measure(int(length), options) for length in options.sequence_length.split(",")]
    if options.json:
        print(json.dumps(found[0] if len(found) == 1 else {"lengths": found, "growth": growth(found)}, indent=2))
        return
    for one in found:
        for name, row in one["variants"].items():
            speed, memory = row["tokens_per_second"], row["peak_memory_bytes"] / 1e9
            print(f"{one['sequence_length']:6d}  {name:22s} {speed:8.0f} tokens/s  {memory:6.2f} GB")


if __name__ == "__main__":
    main()
