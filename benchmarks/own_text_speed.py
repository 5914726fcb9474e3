"""Measure sampling in a run beside the step on the same tokens and beside transformers' generate, in turns.

    python benchmarks/own_text_speed.py --json
    python benchmarks/own_text_speed.py --students fifth --prompts 4 --new-tokens 4 --turns 1   # a try

The students have the shapes of the study of recipes (half and a fifth of novels-6x256) and random weights, which are
as fast as trained ones. Each line is one precision. `sampling` is what a run does before a step: it makes the decoder
from the weights of now and decodes all prompts side by side. `step` is the loss of these texts with a teacher (reverse
KL) and its gradients, without the optimizer. `generate` samples with transformers in the same precision. `products` are
the matrix products of the same tokens alone, without attention. `sampling_share` is sampling's share of both together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from tinygpt2 import DistillConfig
from tinygpt2.decoding.library import make_decoder
from tinygpt2.decoding.own_text import continued
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.models.loading import random_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.step import Step

COMMON = {"vocab_size": 8192, "n_positions": 256, "bos_token_id": None, "eos_token_id": None}
TEACHER = {"n_layer": 6, "n_embd": 256, "n_head": 8}
STUDENTS: dict[str, dict[str, int]] = {
    "half": {"n_layer": 3, "n_embd": 256, "n_head": 8},
    "fifth": {"n_layer": 6, "n_embd": 128, "n_head": 4, "n_inner": 384},
}
Job = Callable[[], Any]


def main() -> None:
    """Measure every student in float32 and bfloat16, and print lines or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5, help="after one that warms up; the best one counts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for name in options.students:
        for precision in options.precisions:
            seconds = best(jobs(name, precision, options), options.turns)
            results.append({"student": name, "precision": precision, **figures(seconds, options)})
            if not options.json:
                print("  ".join(f"{key} {value:,.3g}" if isinstance(value, float) else str(value)
                                for key, value in results[-1].items()))  # fmt: skip
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "results": results}))


def jobs(name: str, precision: str, options: argparse.Namespace) -> dict[str, Job]:
    """Return what is measured of a student, by its name."""
    student = random_model(GPT2Config(**STUDENTS[name], **COMMON), 0).eval()
    teacher = random_model(GPT2Config(**TEACHER, **COMMON), 1).eval()
    prompts = torch.randint(
        0, COMMON["vocab_size"], (options.prompts, options.prompt_tokens), generator=torch.Generator().manual_seed(0)
    )
    how = {"seed": 0, "new": options.new_tokens, "ends": [], "sampling": Sampling()}
    numbers, rows = range(options.prompts), prompts.tolist()

    def sampling() -> torch.Tensor:
        return continued(make_decoder(student, precision), rows, numbers, **how).tokens

    theirs = GPT2LMHeadModel(student.config).eval()
    theirs.load_state_dict(student.state_dict())
    theirs.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    asked = GenerationConfig(max_new_tokens=options.new_tokens, do_sample=True, top_k=0, pad_token_id=0)

    def generate() -> torch.Tensor:
        with torch.no_grad():
            return theirs.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=asked)

    return {
        "sampling": sampling,
        "step": step_job(student, teacher, torch.cat([prompts, sampling()], 1), precision, options.prompt_tokens),
        "generate": generate,
        "products": products_job(student, precision, options),
    }


def step_job(student: GPT2LMHeadModel, teacher: GPT2LMHeadModel, ids: torch.Tensor, precision: str, begin: int) -> Job:
    """Return the loss of sampled texts with its gradients.

    Args:
        ids: the texts (B, T).
        begin: tokens of each prompt.
    """
    config = DistillConfig(teacher="teacher", student="student", data="data", out="out")
    weights = LossWeights(ce=0.0, own_text=1.0, own_text_loss="reverse_kl")
    step = Step(student, teacher, weights, config).train()
    counted = np.arange(ids.shape[1])[None] >= np.full((len(ids), 1), begin)
    own = np.ones(len(ids), np.bool_)

    def job() -> None:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            loss, _ = step(ids, None, None, None, counted, None, own)
        loss.backward()
        step.zero_grad(set_to_none=True)

    return job


def products_job(student: GPT2LMHeadModel, precision: str, options: argparse.Namespace) -> Job:
    """Return the matrix products of reading the prompts and of decoding, and nothing else."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    blocks = [part for block in student.transformer.h for part in (block.attn.c_attn, block.attn.c_proj,
                                                                  block.mlp.c_fc, block.mlp.c_proj)]  # fmt: skip
    matrices = [part.weight.detach().to(dtype) for part in blocks]
    head = student.lm_head.weight.detach().to(dtype).mT
    inputs = {
        rows: [torch.ones(rows, matrix.shape[0], dtype=dtype) for matrix in matrices]
        for rows in (options.prompts * options.prompt_tokens, options.prompts)
    }
    last = torch.ones(options.prompts, head.shape[0], dtype=dtype)

    def job() -> None:
        reads = [options.prompts * options.prompt_tokens, *[options.prompts] * (options.new_tokens - 1)]
        for rows in reads:
            for given, matrix in zip(inputs[rows], matrices, strict=True):
                given @ matrix
            last @ head

    return job


def best(work: dict[str, Job], turns: int) -> dict[str, float]:
    """Run jobs in turns, and return the shortest time of each."""
    seconds = dict.fromkeys(work, float("inf"))
    for turn in range(turns + 1):  # the first turn warms up
        for name, job in work.items():
            started = time.perf_counter()
            job()
            took = time.perf_counter() - started
            seconds[name] = min(seconds[name], took) if turn else seconds[name]
    return seconds


def figures(seconds: dict[str, float], options: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second and ratios. A token is one that is sampled, also of the step."""
    tokens = options.prompts * options.new_tokens
    speeds = {f"{name}_tokens_per_second": tokens / taken for name, taken in seconds.items()}
    return {
        **speeds,
        "sampling_over_step": seconds["sampling"] / seconds["step"],
        "generate_over_sampling": seconds["generate"] / seconds["sampling"],
        "sampling_over_products": seconds["sampling"] / seconds["products"],
        "sampling_share": seconds["sampling"] / (seconds["sampling"] + seconds["step"]),
    }


if __name__ == "__main__":
    main()
