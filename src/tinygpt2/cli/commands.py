"""All commands: their options, help, examples and the functions that run them. Importing this loads no torch."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NamedTuple

import typer

from tinygpt2.cli.options import Run
from tinygpt2.cli.output.comparison import as_csv, as_markdown
from tinygpt2.cli.session import start_session
from tinygpt2.config.base import Config
from tinygpt2.config.compression import TruncateStudentConfig
from tinygpt2.config.data import PregenerateConfig, TrainTokenizerConfig
from tinygpt2.config.decoding import BenchConfig, GenerateConfig, SampleConfig
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.evaluation import EvaluateTextConfig, PplConfig
from tinygpt2.config.models import PresetsConfig
from tinygpt2.config.training import FinetuneConfig, PretrainConfig
from tinygpt2.config.workflows import (
    ExportConfig,
    PushConfig,
    QuickstartConfig,
    RunsConfig,
    ShowConfig,
    TeachConfig,
    VerifyConfig,
)
from tinygpt2.runtime.processes import rank
from tinygpt2.utils import progress
from tinygpt2.utils.terminal import printable


def _public(function: str) -> Run:
    """Return a function that runs a command: it imports the public function when it is called, and calls it."""

    def run(config: Any, as_json: bool) -> Any:
        start_session()
        return getattr(import_module("tinygpt2"), function)(config)

    return run


def _training(function: str) -> Run:
    """Return a function that runs a training command, or the planning function that a flag selects instead."""

    def run(config: Any, as_json: bool) -> Any:
        flags = {"validate_only": "plan_run", "compile_only": "compile_step", "plan": "plan_budget"}
        name = next((other for flag, other in flags.items() if getattr(config, flag, False)), function)
        return _public(name)(config, as_json)

    return run


def _cut(config: Any, as_json: bool) -> Any:
    return _public("truncate_student" if config.target is None else "cut_to_target")(config, as_json)


def _generate(config: Any, as_json: bool) -> Any:
    start_session()
    from tinygpt2.cli.interactive import generate_on_terminal

    return generate_on_terminal(config, as_json=as_json)


def _ppl(config: Any, as_json: bool) -> Any:
    if config.list_tasks:
        return import_module("tinygpt2").list_tasks()
    result = _public("ppl")(config, as_json)
    write = {"csv": as_csv, "md": as_markdown}.get(config.output_format)
    if rank() or write is None:
        return result
    typer.echo(printable(write(result), sys.stdout), nl=False)
    return None


def _presets(config: Any, as_json: bool) -> Any:
    from tinygpt2.models.configuration import presets

    return presets(config)


def _reading(function: str) -> Run:
    """Return a function that runs a command which only reads the files of runs: without torch, and so at once."""

    def run(config: Any, as_json: bool) -> Any:
        progress.show()
        return getattr(import_module("tinygpt2"), function)(config)

    return run


class Command(NamedTuple):
    """A command: its name, options, help and examples, the function that runs it, and what its --help lists first."""

    name: str
    config: type[Config]
    about: str
    examples: list[str]
    run: Run
    short: tuple[str, ...] = ()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COMMANDS = [
    Command(
        "quickstart",
        QuickstartConfig,
        "Run the whole pipeline in a few minutes, without downloads: teacher, student, baselines, report.",
        ["quickstart", "quickstart --out my-first-student"],
        _public("quickstart"),
    ),
    Command(
        "train-tokenizer",
        TrainTokenizerConfig,
        "Train a byte-level BPE tokenizer, for any language.",
        ["train-tokenizer novels/ --vocab-size 8192 --out tokenizer"],
        _public("train_tokenizer"),
    ),
    Command(
        "pregenerate",
        PregenerateConfig,
        "Tokenize a corpus and pack it into blocks, with a training and a test split.",
        ["pregenerate novels/ pages.jsonl --tokenizer tokenizer --sequence-length 512 --out data"],
        _public("pregenerate"),
        _words("sequence_length test_fraction test_source document text_column num_workers overwrite resume shard"),
    ),
    Command(
        "pretrain",
        PretrainConfig,
        "Train a language model from random weights (--model-config) or existing ones (--model).",
        [
            "pretrain --model-config distilgpt2 --data data --out model",
            "pretrain --model cut --data data --out model",
        ],
        _training("pretrain"),
        _words(
            "num_epochs max_steps micro_batch_size gradient_accumulation_steps optimizer learning_rate "
            "lr_schedule precision eval_data eval_every save_every resume validate_only"
        ),
    ),
    Command(
        "truncate-student",
        TruncateStudentConfig,
        "Cut a student out of a teacher: fewer layers, a smaller hidden size, fewer heads or positions.",
        [
            "truncate-student --teacher gpt2 --num-layers 6 --out cut",
            "truncate-student --teacher gpt2 --n-embd 384 --refit --data data --out cut",
            "truncate-student --teacher gpt2 --target-params 30M --data data --out cut",
        ],
        _cut,
        _words(
            "num_layers strategy layers n_embd axes n_head n_inner refit target_params target_mb target_ms for data"
        ),
    ),
    Command(
        "distill",
        DistillConfig,
        "Distil a teacher into a student.",
        [
            "distill --teacher gpt2 --student cut --data data --out student",
            "distill --plan --teacher gpt2 --data data --out student",
            "distill --recipe tinygpt2 --teacher gpt2 --student tinygpt2-4l-312 --data data --out student",
        ],
        _training("distill"),
        _words(
            "recipe num_epochs max_steps micro_batch_size learning_rate precision resume plan prediction_weight "
            "hidden_weight attention_weight ce_weight"
        ),
    ),
    Command(
        "teach",
        TeachConfig,
        "Cache a teacher's predictions on a dataset, so that distill can run without the teacher.",
        [
            "teach --teacher gpt2 --data data --out taught",
            "teach --teacher gpt2 --data data --out taught --part 2/8",
            "distill --teacher-cache taught --student cut --data data --out student",
        ],
        _public("teach"),
    ),
    Command(
        "finetune",
        FinetuneConfig,
        "Fine-tune any GPT-2 on a text, on pairs of prompt and response, on chats, or on a pregenerated dataset.",
        [
            "finetune --model student --data mine.txt --out mine",
            "finetune --model student --data pairs.jsonl --prompt-column question --response-column answer --out tuned",
        ],
        _training("finetune"),
        _words(
            "num_epochs max_steps micro_batch_size gradient_accumulation_steps learning_rate precision "
            "sequence_length prompt_column response_column template test_fraction eval_data eval_every resume "
            "validate_only"
        ),
    ),
    Command(
        "ppl",
        PplConfig,
        "Measure the zero-shot perplexity of one or several models.",
        [
            "ppl --model student --task mine.txt",
            "ppl --model gpt2 --model student --task wikitext --task-data wiki.test.raw --plot comparison.png",
            "ppl --model student --reference teacher --task mine.txt --plot fidelity.png",
            "ppl --list-tasks",
        ],
        _ppl,
        _words("model reference task_data list_tasks convention stride batch_size plot output_format"),
    ),
    Command(
        "evaluate-text",
        EvaluateTextConfig,
        "Let models continue held-out prompts, and score the texts with a judge model.",
        ["evaluate-text --model student --judge teacher --data data"],
        _public("evaluate_text"),
    ),
    Command(
        "presets",
        PresetsConfig,
        "List the built-in model configurations.",
        ["presets"],
        _presets,
    ),
    Command(
        "generate",
        GenerateConfig,
        "Generate text with one or several models, side by side. Greedy unless you choose sampling or beams.",
        [
            "generate --model teacher --model student --prompt 'Once upon a time' --top-p 0.9",
            "generate --model student --interactive",
            "generate --model teacher --draft student --prompt 'Once upon a time'",
        ],
        _generate,
    ),
    Command(
        "sample",
        SampleConfig,
        "Write a dataset with texts that a model samples: a teacher's, for students to learn from.",
        [
            "sample --model teacher --prompts data --out sampled",
            "sample --model gpt2 --tokens 10000000 --out gpt2-texts",
        ],
        _public("sample"),
        _words("prompts tokens prompt_tokens max_new_tokens temperature sequence_length overwrite resume"),
    ),
    Command(
        "export",
        ExportConfig,
        "Write a model for llama.cpp, onnxruntime or transformers.js, run it, and report how far its results differ.",
        [
            "export student --to gguf --type q8_0 --out student.gguf",
            "export student --to onnx --type int8 --out student-onnx",
        ],
        _public("export"),
    ),
    Command(
        "bench",
        BenchConfig,
        "Measure how fast models decode, beside transformers and the machine's memory bandwidth.",
        ["bench teacher student", "bench gpt2 --json"],
        _public("bench"),
    ),
    Command(
        "runs",
        RunsConfig,
        "List the training runs below a directory: their state, losses and time left.",
        ["runs", "runs experiments --json"],
        _reading("runs"),
    ),
    Command(
        "show",
        ShowConfig,
        "Draw the curves of a training run, and write its picture and its report anew.",
        ["show student"],
        _reading("show"),
    ),
    Command(
        "verify",
        VerifyConfig,
        "Check a pregenerated dataset or a model directory, and list what is wrong.",
        ["verify data", "verify student"],
        _public("verify"),
    ),
    Command(
        "push",
        PushConfig,
        "Upload a model to the Hub, after checking it: weights, tokenizer, card, pictures. No checkpoints, no texts.",
        ["push student --repo me/my-student --dry-run", "push student --repo me/my-student --private"],
        _public("push"),
    ),
]
