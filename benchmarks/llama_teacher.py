"""Train a Llama-shaped teacher on the novels until its held-out loss is that of a GPT-2 teacher.

    python benchmarks/llama_teacher.py --work WORK --out TEACHER                # continues where it stopped
    python benchmarks/llama_teacher.py --work WORK --out TEACHER --minutes 20   # stops after 20 minutes, and saves

The model is transformers' own LlamaForCausalLM of about as many weights as the GPT-2 (models/novels-6x256 of the folder
that TINYGPT2_TEST_DATA names), whose tokenizer it takes: rotary positions, gated MLPs, RMSNorm. The training is
plain PyTorch: torch's Muon for the matrices of the layers, AdamW for the rest, bfloat16 autocast, a warm-up, a constant
rate and a linear decay. It ends as soon as the loss on the held-out novels is no higher than the GPT-2's on the same
blocks, or when all tokens are seen. TEACHER/training.json says how it went.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tinygpt2 import PregenerateConfig, pregenerate
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import Blocks, PackedDataset, load_packed_dataset

GPT2 = "models/novels-6x256"
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
    "intermediate_size": 688, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How to train. `tokens` is the most that are seen, and the length of the schedule."""

    tokens: int
    batch: int = 16  # blocks per step
    micro_batch: int = 4  # blocks per forward pass
    matrix_rate: float = 0.02  # of Muon
    other_rate: float = 2e-3  # of AdamW
    warm_up: float = 0.02  # of the steps
    decay: float = 0.5  # of the steps, at the end
    eval_every: int = 50  # steps
    eval_blocks: int = 200
    seed: int = 42


class Run:
    """A training that can stop after any step and continue from its last checkpoint."""

    def __init__(self, model: PreTrainedModel, data: PackedDataset, plan: Plan, checkpoint: Path) -> None:
        self.model, self.data, self.plan, self.checkpoint = model, data, plan, checkpoint
        self.steps = plan.tokens // (plan.batch * data.sequence_length)
        if not 0 < self.steps * plan.batch <= len(data.train):
            raise SystemExit(f"--tokens: at least one step, and at most the {len(data.train)} blocks of the novels")
        matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
        others = [p for name, p in model.named_parameters() if not (".layers." in name and p.dim() == 2)]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01), plan.matrix_rate),
            (torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0), plan.other_rate),
        ]
        self.step, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float]] = []  # tokens, held-out loss
        if checkpoint.is_file():
            state = torch.load(checkpoint, weights_only=True)
            self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
            model.load_state_dict(state["model"])
            for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Write the checkpoint under a temporary name, and rename it."""
        state = {
            "model": self.model.state_dict(), "optimizers": [one.state_dict() for one, _ in self.optimizers],
            "step": self.step, "seconds": self.seconds, "curve": self.curve,
        }  # fmt: skip
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").rename(self.checkpoint)

    def rate(self, step: int) -> float:
        """Return the factor of the learning rates at a step: warm-up, constant, linear decay to zero."""
        up = (step + 1) / max(1.0, self.plan.warm_up * self.steps)
        down = (self.steps - step) / max(1.0, self.plan.decay * self.steps)
        return min(1.0, up, down)

    def take_step(self) -> float:
        """Take one step and return its loss."""
        size, micro = self.plan.batch, self.plan.micro_batch
        rows = Shuffle(len(self.data.train), self.plan.seed)[self.step * size : (self.step + 1) * size]
        total = 0.0
        self.model.train()
        for start in range(0, size, micro):
            ids = self.data.train.batch(list(rows[start : start + micro])).input_ids.long()
            with torch.autocast("cpu", torch.bfloat16):
                loss = token_losses(self.model, ids).mean() * (len(ids) / size)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * self.rate(self.step)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total

    def go_on(self, target: float, until: float) -> bool:
        """Train until the held-out loss is at most `target`, all tokens are seen, or the clock shows `until`.

        Returns:
            Whether the training is finished.
        """
        while not self.reached(target) and self.step < self.steps:
            if time.monotonic() > until:
                self.save()
                return False
            started = time.perf_counter()
            loss = self.take_step()
            if self.step % self.plan.eval_every == 0 or self.step == self.steps:
                held_out = mean_loss(self.model, spaced(self.data.test, self.plan.eval_blocks))
                self.curve.append((self.step * self.plan.batch * self.data.sequence_length, held_out))
                self.seconds += time.perf_counter() - started
                self.save()
                print(
                    f"step {self.step:,} of {self.steps:,}: loss {loss:.4f}, held out {held_out:.4f} "
                    f"(target {target:.4f}), {self.curve[-1][0] / self.seconds:,.0f} tokens/s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            else:
                self.seconds += time.perf_counter() - started
        return True

    def reached(self, target: float) -> bool:
        """Return whether the last evaluation gave at most the target."""
        return bool(self.curve) and self.curve[-1][1] <= target


def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the loss of every token of some blocks but the first, in nats; shape (B (T - 1))."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Iterator[Tensor]) -> float:
    """Return the mean loss in float32, in nats per token."""
    model.eval()
    losses = [token_losses(model, ids).double() for ids in batches]
    return float(torch.cat(losses).mean())


def spaced(blocks: Blocks, count: int | None = None) -> Iterator[Tensor]:
    """Yield about `count` evenly spaced blocks, or all, eight at a time."""
    rows = list(range(0, len(blocks), max(1, len(blocks) // (count or len(blocks)))))
    for start in range(0, len(rows), 8):
        yield blocks.batch(rows[start : start + 8]).input_ids.long()


def novels(work: Path, shared: Path) -> PackedDataset:
    """Return all novels, and the two that are held out, in blocks of the GPT-2's tokens."""
    if not (work / "all-data").is_dir():
        begun = work / ".all-novels"
        with tarfile.open(shared / "corpus" / "english-novels.tar.xz") as archive:
            archive.extractall(begun, filter="data")
        pregenerate(
            PregenerateConfig(
                source=[str(begun)], test_source=[str(shared / "corpus" / "novels-valid")], out=str(work / "all-data"),
                tokenizer=str(shared / GPT2), sequence_length=SHAPE["max_position_embeddings"],
            )
        )  # fmt: skip
        shutil.rmtree(begun)
    return load_packed_dataset(str(work / "all-data"))


def new_model(data: PackedDataset, seed: int) -> PreTrainedModel:
    """Return a Llama of SHAPE with random weights."""
    torch.manual_seed(seed)
    ends = {key: data.tokenizer().eos_token_id for key in ("bos_token_id", "eos_token_id")}
    return LlamaForCausalLM(LlamaConfig(vocab_size=data.vocab_size, pad_token_id=None, **SHAPE, **ends))


def finish(run: Run, gpt2: PreTrainedModel, out: Path) -> dict[str, Any]:
    """Save the model with its tokenizer and measure both teachers on all held-out blocks."""
    result = {
        "parameters": run.model.num_parameters(), "gpt2_parameters": gpt2.num_parameters(),
        "tokens": run.step * run.plan.batch * run.data.sequence_length, "seconds": round(run.seconds),
        "loss": mean_loss(run.model, spaced(run.data.test)), "gpt2_loss": mean_loss(gpt2, spaced(run.data.test)),
        "curve": run.curve,
    }  # fmt: skip
    run.model.save_pretrained(str(out))
    run.data.tokenizer().save_pretrained(str(out))
    (out / "training.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def main() -> None:
    """Continue the training, and save the teacher when it is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the dataset and the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="directory for the teacher")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after this many minutes")
    parser.add_argument("--tokens", type=int, default=9_961_472, help="the most that the teacher sees")
    parser.add_argument("--target", type=float, help="held-out loss to stop at; by default that of the GPT-2")
    options = parser.parse_args()
    if "TINYGPT2_TEST_DATA" not in os.environ:
        raise SystemExit("set TINYGPT2_TEST_DATA to the folder that holds the novels and models/novels-6x256")
    until = time.monotonic() + 60 * options.minutes
    shared = Path(os.environ["TINYGPT2_TEST_DATA"])
    options.work.mkdir(parents=True, exist_ok=True)
    data, plan = novels(options.work, shared), Plan(options.tokens)
    gpt2 = AutoModelForCausalLM.from_pretrained(str(shared / GPT2))
    target = options.target
    if target is None:
        target = mean_loss(gpt2, spaced(data.test, plan.eval_blocks))
    run = Run(new_model(data, plan.seed), data, plan, options.work / f"llama-{options.tokens}.pt")
    if not run.go_on(target, until):
        raise SystemExit(f"stopped after {run.step:,} of {run.steps:,} steps: run the same command again to go on")
    print(json.dumps(finish(run, gpt2, options.out)))


if __name__ == "__main__":
    main()
