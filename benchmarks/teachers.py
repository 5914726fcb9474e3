"""Measure a distillation step with teachers of several architectures and one shape, in turns.

    python benchmarks/teachers.py --json
    python benchmarks/teachers.py --json --precision bf16 --teachers opt

All teachers have 12 layers of 768, GPT-2's vocabulary and random weights. The student is a GPT-2 of 6 such layers. A
Llama's MLP has three matrices, so it is two thirds as wide and has as many weights. Every teacher runs in a process of
its own beside one with a GPT-2; both together need about 10 GB. `ratio` compares with the GPT-2: speed (1 is as fast)
and peak memory of the process (1 is as much).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

from turns import Worker, resident

TEACHERS = ("gpt-neo", "opt", "llama")
VOCABULARY, WARM_UP = 50257, 2


def make_teacher(name: str, layers: int, width: int) -> Any:
    """Make a teacher with random weights, as a loaded one is."""
    import torch
    from transformers import (
        GPT2Config,
        GPTNeoConfig,
        GPTNeoForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )

    from tinygpt2.models.loading import fast_activations, random_model

    heads = width // 64
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2":
        return random_model(GPT2Config(n_layer=layers, n_embd=width, n_head=heads), 1).eval()
    torch.manual_seed(1)
    wide = {"hidden_size": width, "vocab_size": VOCABULARY, "max_position_embeddings": 2048, **ends}
    if name == "gpt-neo":
        kinds = [[["global", "local"], layers // 2]]
        model: Any = GPTNeoForCausalLM(GPTNeoConfig(num_layers=layers, num_heads=heads, attention_types=kinds, **wide))
    elif name == "opt":
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * width}
        model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=width, **wide, pad_token_id=1))
    else:
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 8 * width // 3}
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, **wide))
    return fast_activations(model.eval())


def work(options: argparse.Namespace) -> None:
    """Run a step for every line on stdin and answer with a line of JSON."""
    import torch
    from transformers import GPT2Config

    from tinygpt2.config.training import PretrainConfig
    from tinygpt2.models.loading import random_model
    from tinygpt2.models.teachers.loading import as_teacher
    from tinygpt2.objectives.weights import LossWeights
    from tinygpt2.runtime.cpu import fast_products, keep_memory
    from tinygpt2.training.optimizers import make_optimizer
    from tinygpt2.training.step import Step

    keep_memory()  # as the command line does
    run = PretrainConfig(data="", out="", shape="gpt2", learning_rate=2.5e-4)
    teacher = as_teacher(make_teacher(options.worker, options.layers, options.width)).requires_grad_(False)
    if options.precision == "bf16":
        teacher.cast(torch.bfloat16)
    shape = GPT2Config(n_layer=options.layers // 2, n_embd=options.width, n_head=options.width // 64)
    student = random_model(shape, 2).train()
    module = Step(student, teacher, LossWeights(prediction=1.0, ce=0.0), run)
    optimizer = make_optimizer(module, run)
    size = (options.micro_batch_size, options.length)
    ids = torch.randint(0, VOCABULARY, size, generator=torch.Generator().manual_seed(4))
    print(json.dumps({"before": resident("VmRSS")}), flush=True)
    with fast_products():
        for _ in sys.stdin:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16) if options.precision == "bf16" else nullcontext():
                loss, _ = module(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            print(json.dumps({"seconds": seconds, "peak": resident("VmHWM"), "loss": loss.item()}), flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every teacher beside the GPT-2, two processes in turns."""
    found: dict[str, Any] = {"precision": options.precision, "sequence_length": options.length, "teachers": {}}
    for name in options.teachers.split(","):
        base, row = pair(["gpt2", name], options)
        row["ratio"] = {key: row[key] / base[key] for key in row}
        found["teachers"][name] = row
    return found


def pair(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of two teachers, measured in turns."""
    shape = ["--precision", options.precision, "--length", options.length, "--layers", options.layers]
    shape += ["--width", options.width, "--micro-batch-size", options.micro_batch_size]
    workers = [Worker(__file__, ["--worker", name, *map(str, shape)]) for name in names]
    for _ in range(options.rounds + WARM_UP):
        for worker in workers:
            worker.turn()
    rows = []
    for worker in workers:
        worker.end()
        seconds = statistics.median(turn["seconds"] for turn in worker.turns[WARM_UP:])
        tokens = options.micro_batch_size * options.length
        rows.append({"tokens_per_second": tokens / seconds, "peak_memory_bytes": worker.turns[-1]["peak"]})
    return rows


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", default=",".join(TEACHERS))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    for name, row in found["teachers"].items():
        print(
            f"{name:8} {row['tokens_per_second']:8.0f} tokens/s {row['peak_memory_bytes'] / 1e9:6.2f} GB",
            row.get("ratio"),
        )


if __name__ == "__main__":
    main()
