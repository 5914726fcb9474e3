"""Measure from which size of a model two threads are faster than one, and what spinning threads cost.

    python benchmarks/threads.py --json

Models of several sizes generate greedily, and quickstart's teacher takes training steps: with one thread and with one
for each core, in turns, with torch's default OMP_WAIT_POLICY, with PASSIVE, and as the command line sets it (PASSIVE
after a short spin), on the machine as it is and beside one other busy process. `shared` is the smallest number of
operations in a forward pass from which every core is no slower than one thread (by 5 %) with our setting, by the
geometric mean over both states of the machine; `SHARED` in runtime/threads.py is about this number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from turns import Worker

SIZES = {  # layers, width, vocabulary
    "quickstart's student": (1, 160, 2048),
    "quickstart's teacher": (4, 160, 2048),
    "6x256": (6, 256, 8192),
    "6x512": (6, 512, 50257),
    "distilgpt2": (6, 768, 50257),
    "gpt2": (12, 768, 50257),
}
POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "ours": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"},  # runtime/cpu.wait_passively
}
BUSY = "while True: pass"


def rate(work: Callable[[], int], seconds: float) -> float:
    """Return how much of its unit the work does in a second; it is repeated for about `seconds`."""
    done, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or not done:
        done += work()
    return done / passed


def jobs() -> dict[str, tuple[float, Callable[[], int]]]:
    """Return each job with the operations of one of its forward passes; a job returns the tokens that it made."""
    import torch
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    from tinygpt2.models.loading import random_model
    from tinygpt2.models.parameters import count_parameters

    def shape(layers: int, width: int, vocabulary: int) -> GPT2Config:
        sizes = {
            "n_layer": layers,
            "n_embd": width,
            "n_head": width // 32,
            "n_positions": 128,
            "vocab_size": vocabulary,
        }
        return GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)

    made: dict[str, tuple[float, Callable[[], int]]] = {}
    prompt = torch.arange(16)[None]
    how = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)

    def decode(model: GPT2LMHeadModel) -> int:
        with torch.no_grad():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=how)
        return 8

    for name, (layers, width, vocabulary) in SIZES.items():
        model = random_model(shape(layers, width, vocabulary), 0).eval()
        made[f"generate with {name}"] = (2.0 * count_parameters(model), lambda model=model: decode(model))  # type: ignore[misc]
    learner = random_model(shape(4, 160, 2048), 0).train()
    optimizer = torch.optim.AdamW(learner.parameters())
    blocks = torch.randint(0, 2048, (4, 128))

    def step() -> int:
        learner(blocks).logits.logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return blocks.numel()

    made["train quickstart's teacher"] = (2.0 * count_parameters(learner) * blocks.numel(), step)
    return made


def work(seconds: float) -> None:
    """Measure every job on one thread and on all, for each line that is read."""
    import torch

    made, every = jobs(), torch.get_num_threads()
    print(json.dumps({"threads": every}), flush=True)
    for _ in sys.stdin:
        found = []
        for name, (operations, job) in made.items():
            rates: dict[int, list[float]] = {1: [], every: []}
            for _turn in range(2):
                for threads in (1, every):
                    torch.set_num_threads(threads)
                    job()  # the threads of another number have to start
                    rates[threads].append(rate(job, seconds))
            found.append({"job": name, "operations": operations, "one": max(rates[1]), "every": max(rates[every])})
        print(json.dumps({"rows": found}), flush=True)


def summary(turns: dict[tuple[str, bool], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the medians over the turns: a row for each job, policy and state of the machine."""
    rows = []
    for (policy, busy), answers in turns.items():
        for index, first in enumerate(answers[0]["rows"]):
            one, every = (
                statistics.median(answer["rows"][index][key] for answer in answers) for key in ("one", "every")
            )
            setting = {"job": first["job"], "operations": first["operations"], "policy": policy, "busy": busy}
            rows.append({**setting, "one_thread": one, "every_core": every, "ratio": every / one})
    return rows


def threshold(rows: list[dict[str, Any]]) -> float | None:
    """Return the operations from which every core loses at most 5 % with our setting; None if it always loses more."""
    ratios: dict[float, list[float]] = {}
    for row in rows:
        if row["policy"] == "ours" and row["job"].startswith("generate"):
            ratios.setdefault(row["operations"], []).append(row["ratio"])
    found = None
    for size in sorted(ratios, reverse=True):
        if statistics.geometric_mean(ratios[size]) < 0.95:
            break
        found = size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="turns of each setting")
    parser.add_argument("--seconds", type=float, default=0.4, help="time of one measurement")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true")
    options = parser.parse_args()
    if options.worker:
        return work(options.seconds)
    turns: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    threads = 0
    os.environ.pop("OMP_NUM_THREADS", None)
    for _ in range(options.rounds):
        for policy, settings in POLICIES.items():
            for name in POLICIES["ours"]:
                os.environ.pop(name, None)
            os.environ.update(settings)
            worker = Worker(__file__, ["--worker", "--seconds", str(options.seconds)])
            threads = worker.ready["threads"]
            for busy in (False, True):
                other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
                worker.turn()
                if other is not None:
                    other.kill()
                    other.wait()
                turns.setdefault((policy, busy), []).append(worker.turns[-1])
            worker.end()
    rows = summary(turns)
    result = {"threads": threads, "load": os.getloadavg()[0], "shared": threshold(rows), "rows": rows}
    if options.json:
        print(json.dumps(result))
        return None
    for row in rows:
        where = f"{row['operations'] / 1e6:8,.0f} M  {row['policy']:8} {'busy' if row['busy'] else 'alone':6}"
        print(
            f"{row['job']:32} {where} {row['one_thread']:10,.1f} {row['every_core']:10,.1f} tokens/s {row['ratio']:.2f}"
        )
    print(f"every core is no slower from {result['shared']} operations on")
    return None


if __name__ == "__main__":
    main()
