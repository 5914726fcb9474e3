"""The README's library examples as a program: a teacher from your own text, and a student with a third of its layers.

python examples/library.py TEXTS OUT
"""

from __future__ import annotations

import sys
from typing import Any

import tinygpt2


def make_data(texts: str, out: str, vocab_size: int = 8192, sequence_length: int = 256) -> str:
    """Train a tokenizer on texts, and pack them into a dataset; return its directory."""
    tokenizer = tinygpt2.train_tokenizer(
        tinygpt2.TrainTokenizerConfig(source=[texts], vocab_size=vocab_size, out=f"{out}/tokenizer")
    )
    tinygpt2.pregenerate(
        tinygpt2.PregenerateConfig(
            source=[texts], tokenizer=tokenizer.tokenizer, sequence_length=sequence_length, out=f"{out}/data"
        )
    )
    return f"{out}/data"


def make_student(teacher: str, data: str, out: str, steps: int = 500) -> tinygpt2.TrainResult:
    """Cut a student out of a teacher, and distil the teacher into it."""
    cut = tinygpt2.truncate_student(
        tinygpt2.TruncateStudentConfig(teacher=teacher, num_layers=2, refit=True, data=data, out=f"{out}/cut")
    )
    config = tinygpt2.DistillConfig(
        teacher=teacher, student=cut.model, data=data, out=f"{out}/student", max_steps=steps
    )
    plan = tinygpt2.plan_run(config)
    print(f"{plan.steps} steps take about {plan.seconds:.0f} seconds and {plan.memory_bytes / 1e9:.1f} GB of memory")
    return tinygpt2.distill(config)


def train_on_rows(train: Any, test: Any, tokenizer: Any, shape: str, out: str) -> tinygpt2.TrainResult:
    """Train on your own map-style datasets: items with `input_ids`, all of one length."""
    data = tinygpt2.from_map_style(train, test, tokenizer, "my rows")
    config = tinygpt2.PretrainConfig(model_config=shape, data="my rows", out=out)
    return tinygpt2.pretrain(config, data)


def compare(models: list[str], text: str) -> None:
    """Print the perplexity of several models on one text."""
    for row in tinygpt2.ppl(tinygpt2.PplConfig(model=models, task=[text])).results:
        print(f"{row.model}: perplexity {row.perplexity:.2f} per {row.unit}, {row.parameters:,} parameters")


def main(texts: str, out: str) -> None:
    """Run everything."""
    data = make_data(texts, out)
    config = tinygpt2.PretrainConfig(model_config="distilgpt2", data=data, out=f"{out}/teacher", max_steps=500)
    teacher = tinygpt2.pretrain(config)
    student = make_student(teacher.model, data, out)
    compare([teacher.model, student.model], data)


if __name__ == "__main__":
    main(*sys.argv[1:3])
