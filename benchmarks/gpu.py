"""Measure everything that docs/benchmarks.md should say of a GPU, in one run that ends in time.

    python benchmarks/gpu.py --json --minutes 8 > gpu.jsonl
    python benchmarks/gpu.py --device cpu --tiny --minutes 2       # whether it works, without a GPU

It needs nothing but the package's own dependencies: models have random weights, and texts are random words. Each case
runs in its own process and gets a share of the time that is left; one that cannot end in its share, or fails, is
reported with the reason. With --json, a line is printed after each case and one with everything at the end, so that an
interrupted run has lost nothing.

Cases:
- `rates`: operations per second of large matrix products in each number format, and bytes per second of a copy.
- `pretrain-*`: GPT-2 124M with the defaults of `pretrain`.
- `distill-*`: GPT-2 small teaches 6 layers of 768, or 4 of 312, with the default recipe; `tinygpt2-*` 4 layers of 312
  with TinyGPT2's recipe.
- `naive-*`: TinyGPT2's way, see naive.py; the largest micro-batch that fits.
- `perplexity-*`: scoring a text of random tokens with GPT-2 small, without overlap.
- `generate`: greedy decoding with GPT-2 small.

Training cases run the command's own function on 8 x 1024 tokens (fewer blocks if memory runs out) for about half of
their share. `tokens_per_second` is the median over steps, without the first two. `mfu` is the model's operations as a
share of the device's peak, if that is known; `rate_share` as a share of the measured rate of `rates`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {"small": (12, 768, 12), "6x768": (6, 768, 12), "4x312": (4, 312, 12)}  # layers, hidden size, heads
SIZES = {"vocabulary": 50257, "length": 1024, "blocks": 256, "batch": 8, "generated": 256}
TINY_SHAPES = {"small": (2, 32, 4), "6x768": (1, 32, 4), "4x312": (1, 24, 4)}
TINY = {"vocabulary": 501, "length": 32, "blocks": 64, "batch": 2, "generated": 8}
ENDING = 5.0  # seconds for a process to end and for this one to write
LEAST = 12.0  # a case with fewer seconds would not get beyond its imports

# each case with its share of the time: what is compiled needs more
CASES: dict[str, float] = {
    "rates": 1, "pretrain-bf16": 2, "distill-6x768-bf16": 2, "distill-4x312-bf16": 2, "tinygpt2-4x312-bf16": 2,
    "tinygpt2-4x312-fp32": 2, "naive-fp32": 2, "naive-bf16": 2, "perplexity-fp32": 1, "perplexity-bf16": 1,
    "generate": 1.5, "pretrain-bf16-compiled": 4, "distill-6x768-bf16-compiled": 5, "distill-4x312-bf16-compiled": 5,
    "tinygpt2-4x312-bf16-compiled": 5,
}  # fmt: skip


# --- runs in a case's own process ----------------------------------------------------------------------


class Place:
    """The files that all cases use, and the sizes of models and steps."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.device = folder, options.device
        self.shapes = TINY_SHAPES if options.tiny else SHAPES
        self.sizes: dict[str, Any] = TINY if options.tiny else SIZES
        self.data, self.teacher = folder / "data", folder / "teacher"

    def shape(self, name: str) -> Any:
        """Return the configuration of a model."""
        from transformers import GPT2Config

        layers, width, heads = self.shapes[name]
        sizes = {"n_positions": self.sizes["length"], "vocab_size": self.sizes["vocabulary"]}
        return GPT2Config(n_layer=layers, n_embd=width, n_head=heads, bos_token_id=0, eos_token_id=0, **sizes)

    def prepare(self) -> None:
        """Make a dataset of random words, a teacher with random weights, and the configurations of the students."""
        import random

        import yaml
        from loop_overhead import words

        from tinygpt2 import PregenerateConfig, pregenerate
        from tinygpt2.models.loading import random_model
        from tinygpt2.models.saving import save_model

        vocabulary, length, blocks = (self.sizes[key] for key in ("vocabulary", "length", "blocks"))
        chosen = random.Random(0).choices(range(1, vocabulary), k=blocks * length)
        (self.folder / "text.txt").write_text(" ".join(f"w{number}" for number in chosen), encoding="utf-8")
        tokenizer = words(vocabulary)
        tokenizer.save_pretrained(self.folder / "tokenizer")
        pregenerate(
            PregenerateConfig(
                source=[str(self.folder / "text.txt")], tokenizer=str(self.folder / "tokenizer"), out=str(self.data),
                sequence_length=length, test_fraction=0,
            )
        )  # fmt: skip
        save_model(random_model(self.shape("small"), 0), self.teacher, tokenizer, "# random weights\n")
        for name, (layers, width, heads) in self.shapes.items():
            shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": length}
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(shape), encoding="utf-8")


def rates(place: Place) -> dict[str, Any]:
    """Measure large matrix products in each number format, and a copy."""
    import torch

    from tinygpt2.runtime.devices import has_fast_bf16, measured_rate

    device, found = torch.device(place.device), dict[str, Any]()
    cuda = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if cuda else "cpu"
    found["torch"] = torch.__version__
    if cuda:
        found["memory_bytes"] = torch.cuda.mem_get_info()[1]
        found["bf16_units"] = torch.cuda.is_bf16_supported(including_emulation=False)
    # a large product in bfloat16 takes minutes on a CPU that is slow with it
    for precision in ("fp32", *(["bf16"] if has_fast_bf16(device) else []), *(["fp16"] if cuda else [])):
        found[f"operations_per_second_{precision}"] = measured_rate(device, precision)
    if cuda:
        torch.set_float32_matmul_precision("high")
        found["operations_per_second_tf32"] = measured_rate(device, "fp32")
    source = torch.ones(2**28 if cuda else 2**24, device=device)  # 1 GiB, 64 MiB
    target, best = torch.empty_like(source), float("inf")
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        synchronise(cuda)
        best = min(best, time.perf_counter() - started)
    return found | {"bytes_per_second": 2 * 4 * source.numel() / best}


def train(place: Place, command: str, model: str, precision: str, seconds: float, *, compiled: bool) -> dict[str, Any]:
    """Run `pretrain` or `distill`, with fewer blocks in a micro-batch while memory runs out."""
    from tinygpt2 import DistillConfig, PretrainConfig, distill, pretrain
    from tinygpt2.errors import MachineError
    from tinygpt2.objectives.weights import LossWeights
    from tinygpt2.training.metrics import read_metrics
    from tinygpt2.training.throughput import step_operations

    size, out, found = place.sizes["batch"], place.folder / f"run-{os.getpid()}", dict[str, Any]()
    while True:
        common = {
            "data": str(place.data), "out": f"{out}-{size}", "micro_batch_size": size, "precision": precision,
            "compile": compiled, "device": place.device, "log_every": 1, "save_every": 10**6,
            "max_minutes": seconds / 120,
        }  # fmt: skip
        shape, config = str(place.folder / f"{model}.yaml"), None
        if command != "pretrain":
            recipe = "tinygpt2" if command == "tinygpt2" else "default"
            config = DistillConfig(teacher=str(place.teacher), student=shape, recipe=recipe, **common)
        try:
            result = distill(config) if config else pretrain(PretrainConfig(model_config=shape, **common))
            break
        except MachineError as error:
            found["memory"] = f"{size} blocks did not fit: {str(error).splitlines()[0]}"
            if size == 1:
                return found | {"error": found.pop("memory")}
            size //= 2
    rows = read_metrics(Path(result.model))
    speeds = [row["tokens_per_second"] for row in rows][2:] or [result.tokens_per_second]
    weights = LossWeights.of(config) if config else LossWeights()
    teacher = place.shape("small") if config and config.needs_teacher else None
    operations = step_operations(place.shape(model), teacher, weights, place.sizes["length"])
    return found | {
        "tokens_per_second": statistics.median(speeds), "steps": result.steps, "micro_batch_size": size,
        "operations_per_token": operations, "peak_memory_bytes": result.peak_memory_bytes,
        **({"mfu": statistics.median(row["mfu"] for row in rows)} if rows and "mfu" in rows[-1] else {}),
    }  # fmt: skip


def naive(place: Place, precision: str, seconds: float) -> dict[str, Any]:
    """Time TinyGPT2's way, with as many blocks as fit."""
    import distill_step
    import torch

    from tinygpt2.objectives.weights import LossWeights
    from tinygpt2.training.throughput import step_operations

    distill_step.VOCABULARY = place.sizes["vocabulary"]
    for target, name in ((distill_step.TEACHER, "small"), (distill_step.STUDENT, "4x312")):
        target["n_layer"], target["n_embd"], distill_step.HEADS = place.shapes[name]
    size, cuda, length = place.sizes["batch"], place.device == "cuda", place.sizes["length"]
    while size:
        options = argparse.Namespace(length=length, micro_batch_size=size, device=place.device)
        try:
            step = distill_step.training_step(options, ours=False, bf16=precision == "bf16")
            times = timed(step, seconds / 2, cuda)
            break
        except torch.OutOfMemoryError:
            step = None
            size //= 2
            torch.cuda.empty_cache()
    if not size:
        return {"error": "not even one block fits into memory"}
    weights = LossWeights(1.0, 1.0, 1.0, 0.0, loss="soft_ce")
    return {
        "tokens_per_second": size * length / statistics.median(times), "steps": len(times), "micro_batch_size": size,
        "operations_per_token": step_operations(place.shape("4x312"), place.shape("small"), weights, length),
        "peak_memory_bytes": peak(cuda),
    }  # fmt: skip


def perplexity(place: Place, precision: str, seconds: float) -> dict[str, Any]:
    """Score random tokens, as `ppl` does."""
    import numpy as np
    import torch

    from tinygpt2.evaluation.scoring import Scorer, windows
    from tinygpt2.models.loading import random_model
    from tinygpt2.runtime.devices import device_chosen

    length, batch = place.sizes["length"], place.sizes["batch"]
    tokens = np.random.default_rng(0).integers(0, place.sizes["vocabulary"], 4 * batch * length)
    spans = list(windows(len(tokens), length, length))
    with device_chosen(place.device):
        scorer = Scorer(random_model(place.shape("small"), 0), precision, torch.device(place.device))
        times = timed(lambda: scorer(tokens, spans, batch * length), seconds / 2, place.device == "cuda")
    return {
        "tokens_per_second": len(tokens) / statistics.median(times), "rounds": len(times),
        "peak_memory_bytes": peak(place.device == "cuda"),
    }  # fmt: skip


def generation(place: Place) -> dict[str, Any]:
    """Continue a prompt greedily, after a text that warms up."""
    from tinygpt2 import GenerateConfig, generate

    config = GenerateConfig(
        model=[str(place.teacher)], prompt=["w1 w2 w3"] * 2, max_new_tokens=place.sizes["generated"],
        temperature=0, device=place.device,
    )  # fmt: skip
    _, text = generate(config).results
    return {"tokens_per_second": text.tokens / text.seconds, "tokens": text.tokens}


def timed(work: Callable[[], Any], seconds: float, cuda: bool) -> list[float]:
    """Repeat some work for about so many seconds, three times or more; return the seconds of each but the first two."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        synchronise(cuda)
        times.append(time.perf_counter() - started)
    return times[2:]


def synchronise(cuda: bool) -> None:
    import torch

    if cuda:
        torch.cuda.synchronize()


def peak(cuda: bool) -> int:
    import torch
    from turns import resident

    return int(torch.cuda.max_memory_reserved()) if cuda else resident("VmHWM")


def measure(name: str, place: Place, seconds: float) -> dict[str, Any]:
    """Measure one case."""
    kind, _, rest = name.partition("-")
    compiled, rest = rest.endswith("-compiled"), rest.removesuffix("-compiled")
    model, _, precision = rest.rpartition("-")
    if kind == "rates":
        return rates(place)
    if kind == "generate":
        return generation(place)
    if place.device == "cuda" and precision == "bf16":
        import torch

        if not torch.cuda.is_bf16_supported(including_emulation=False):
            if kind in ("naive", "perplexity"):
                return {"skipped": "this card has no units for bf16"}
            precision = "fp16"
    if kind == "naive":
        found = naive(place, precision, seconds)
    elif kind == "perplexity":
        found = perplexity(place, precision, seconds)
    else:
        found = train(place, kind, model or "small", precision, seconds, compiled=compiled)
    return {**found, "precision": precision}


# --- runs in the process that starts the cases ---------------------------------------------------------


def run_case(name: str, folder: Path, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run a case in its own process; return its figures, or why there are none."""
    command = [sys.executable, __file__, "--case", name, "--folder", str(folder), "--seconds", str(seconds)]
    command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"skipped": f"it did not end in its share of {seconds:.0f} s"}
    used = {"case_seconds": round(time.monotonic() - started, 1)}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line) | used
    return {"error": done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"], **used}


def finish(name: str, found: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Add to a case's figures its share of the measured rate of matrix products."""
    rates, precision = results.get("rates", {}), found.get("precision")
    rate = rates.get(f"operations_per_second_{precision}")
    if precision == "fp32" and not name.startswith("naive"):
        rate = rates.get("operations_per_second_tf32", rate)  # training uses TF32 on a card
    if rate and "operations_per_token" in found and "tokens_per_second" in found:
        found["rate_share"] = found["tokens_per_second"] * found["operations_per_token"] / rate
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON after each case, and one with all at the end"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="the whole run takes no longer")
    parser.add_argument("--cases", help="cases to run, comma-separated; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and short texts, to see whether it works")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny and options.seconds is not None:  # its figures mean nothing, so it need not fill its time
        options.seconds = min(options.seconds, 24.0)
    started = time.monotonic()
    sys.path.insert(0, str(Path(__file__).parent))
    if options.case:
        seconds = options.seconds - (time.monotonic() - started)
        print(json.dumps(measure(options.case, Place(options.folder, options), seconds)), flush=True)
        return
    end = started + 60 * options.minutes - ENDING
    names, results = options.cases.split(",") if options.cases else list(CASES), dict[str, Any]()
    with tempfile.TemporaryDirectory() as place:
        Place(Path(place), options).prepare()
        for index, name in enumerate(names):
            left, weights = end - time.monotonic(), [CASES[one] for one in names[index:]]
            share = left * weights[0] / sum(weights)
            if left < LEAST:
                results[name] = {"skipped": f"only {max(left, 0):.0f} s were left"}
            else:
                results[name] = finish(name, run_case(name, Path(place), max(share, LEAST), options), results)
            if options.json:
                print(json.dumps({"case": name, **results[name]}), flush=True)
            else:
                print(f"{name:30} {json.dumps(results[name])}", flush=True)
    whole = {"device": options.device, "tiny": options.tiny, "seconds": time.monotonic() - started, "results": results}
    if options.json:
        print(json.dumps(whole), flush=True)


if __name__ == "__main__":
    main()
