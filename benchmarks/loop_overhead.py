"""Measure the time of the training loop outside forward pass, backward pass and optimizer step, at two sizes.

    python benchmarks/loop_overhead.py --json

`quickstart` pretrains the teacher of tinygpt2's quickstart; `distill_step` distils the models of distill_step.py.
Both call the command's own function on a dataset of random words, with its defaults for logging and saving.

The overhead is the share of the loop's time that is spent on everything else: batches, learning rate, random seeds,
the gradient norm (also reported separately), checks, metrics.jsonl and progress. Clipping is part of the optimizer
step. The wait for the last checkpoint, once in a run, is reported in seconds. Evaluation is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinygpt2 import DistillConfig, PregenerateConfig, PretrainConfig, distill, pregenerate, pretrain
from tinygpt2.errors import ConfigError
from tinygpt2.models.configuration import make_model_config
from tinygpt2.models.loading import random_model
from tinygpt2.models.saving import save_model
from tinygpt2.runtime.cpu import keep_memory
from tinygpt2.training import loop

SIZES: dict[str, dict[str, Any]] = {
    "quickstart": {"vocabulary": 2048, "length": 128, "batch": 4, "steps": 300,
                   "student": {"n_layer": 4, "n_embd": 160, "n_head": 5}},
    "distill_step": {"vocabulary": 50257, "length": 1024, "batch": 2, "steps": 6,
                     "student": {"n_layer": 4, "n_embd": 312, "n_head": 12},
                     "teacher": {"n_layer": 12, "n_embd": 768, "n_head": 12}},
}  # fmt: skip


def timed(spent: dict[str, float], name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    return run


@contextmanager
def measured(spent: dict[str, float]) -> Iterator[None]:
    """Replace the functions to measure by timed ones, and restore them at the end."""
    kept = [
        (torch.nn.Module, "__call__"), (torch.Tensor, "backward"), (torch.optim.AdamW, "step"), (loop, "evaluate"),
        (loop.Checkpoints, "settle"), (loop.Checkpoints, "save"), (loop, "clip_gradients"),
    ]  # fmt: skip
    before = [getattr(owner, name) for owner, name in kept]

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, loop.Step):
            return before[0](self, *args, **kwargs)
        return timed(spent, "forward", before[0])(self, *args, **kwargs)

    torch.nn.Module.__call__ = forward  # type: ignore[method-assign]
    torch.Tensor.backward = timed(spent, "backward", before[1])  # type: ignore[method-assign]
    torch.optim.AdamW.step = timed(spent, "optimizer", before[2])  # type: ignore[method-assign]
    loop.evaluate = timed(spent, "evaluation", before[3])
    loop.Checkpoints.settle = timed(spent, "last checkpoint", before[4])  # type: ignore[method-assign]
    loop.Checkpoints.save = timed(spent, "saving", before[5])  # type: ignore[method-assign]
    loop.clip_gradients = timed(spent, "norm", before[6])
    try:
        yield
    finally:
        for (owner, name), value in zip(kept, before, strict=True):
            setattr(owner, name, value)


def words(count: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(count)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w0")


def measure(name: str, folder: Path) -> dict[str, float]:
    size = SIZES[name]
    tokenizer, text, data = words(size["vocabulary"]), folder / f"{name}.txt", str(folder / f"{name}-data")
    chosen = random.Random(0).choices(range(1, size["vocabulary"]), k=64 * size["length"])
    text.write_text(" ".join(f"w{number}" for number in chosen))
    tokenizer.save_pretrained(folder / f"{name}-tokenizer")
    pregenerate(
        PregenerateConfig(
            source=[str(text)], tokenizer=str(folder / f"{name}-tokenizer"), out=data, sequence_length=size["length"],
            test_fraction=0,
        )
    )  # fmt: skip
    shape = folder / f"{name}.yaml"
    shape.write_text(yaml.safe_dump({**size["student"], "n_positions": size["length"]}))
    common = {"data": data, "out": str(folder / name), "max_steps": size["steps"], "micro_batch_size": size["batch"]}
    spent: dict[str, float] = {}
    if "teacher" in size:
        teacher = make_model_config(
            {**size["teacher"], "n_positions": size["length"], "vocab_size": size["vocabulary"]}, name, ConfigError
        )
        save_model(random_model(teacher, 0), folder / "teacher", tokenizer, "")
        config: Any = DistillConfig(teacher=str(folder / "teacher"), student=str(shape), recipe="tinygpt2", **common)
    else:
        config = PretrainConfig(model_config=str(shape), **common)
    loop.run_loop, run_loop = timed(spent, "loop", loop.run_loop), loop.run_loop
    from tinygpt2.workflows import train

    train.run_loop = loop.run_loop
    with measured(spent):
        (distill if "teacher" in size else pretrain)(config)
    loop.run_loop = train.run_loop = run_loop
    last = spent.pop("last checkpoint")
    whole = spent.pop("loop") - spent.pop("evaluation", 0.0) - last
    model = spent.pop("forward") + spent.pop("backward") + spent.pop("optimizer")
    shares = {name: seconds / whole for name, seconds in spent.items()}
    return {"seconds": whole, "overhead": 1 - model / whole, **shares, "last_checkpoint_seconds": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keep_memory()
    result: dict[str, Any] = {}
    for name in SIZES:
        rounds = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                rounds.append(measure(name, Path(folder)))
        result[name] = {"steps": SIZES[name]["steps"], "rounds": rounds}
        result[f"overhead_{name}"] = sorted(row["overhead"] for row in rounds)[options.rounds // 2]
    print(json.dumps(result) if options.json else result)


if __name__ == "__main__":
    main()
