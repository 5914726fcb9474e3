"""The Typer app: all commands, their help and the exit codes. Importing this module does not import torch."""

from __future__ import annotations

import os
import sys
import time
import traceback
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer

from tinygpt2.cli.options import Run, add_command, print_version
from tinygpt2.cli.render import as_csv, as_markdown, print_error
from tinygpt2.cli.session import start_session
from tinygpt2.config.base import Config
from tinygpt2.config.compression import TruncateStudentConfig
from tinygpt2.config.data import PregenerateConfig, TrainTokenizerConfig
from tinygpt2.config.decoding import GenerateConfig
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.evaluation import PplConfig
from tinygpt2.config.models import PresetsConfig
from tinygpt2.config.training import FinetuneConfig, PretrainConfig
from tinygpt2.config.workflows import PushConfig, QuickstartConfig, RunsConfig, ShowConfig, VerifyConfig
from tinygpt2.errors import ConfigError, InterruptedRunError, TinyGPT2Error, internal_error, machine_failure
from tinygpt2.runtime.processes import command_begins, rank
from tinygpt2.runtime.signals import stop_like_ctrl_c
from tinygpt2.utils import progress
from tinygpt2.utils.terminal import printable, tolerate_encodings

app = typer.Typer(
    name="tinygpt2",
    help="Make GPT-2 small: cut a student out of a teacher, distil it, and measure how good it is.",
    epilog="First time here? Run: tinygpt2 quickstart",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    pass


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


def _generate(config: Any, as_json: bool) -> Any:
    start_session()
    from tinygpt2.cli.interactive import generate_on_terminal

    return generate_on_terminal(config, as_json=as_json)


def _ppl(config: Any, as_json: bool) -> Any:
    if as_json and (config.csv or config.markdown):
        raise ConfigError("--json cannot be combined with --csv or --markdown: give one of them")
    if config.list_tasks:
        return import_module("tinygpt2").list_tasks()
    result = _public("ppl")(config, as_json)
    if rank() or not (config.csv or config.markdown):
        return result
    typer.echo(printable(as_csv(result) if config.csv else as_markdown(result), sys.stdout), nl=False)
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
    """A command: its name, options, help and examples, and the function that runs it."""

    name: str
    config: type[Config]
    about: str
    examples: list[str]
    run: Run


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
    ),
    Command(
        "truncate-student",
        TruncateStudentConfig,
        "Cut a student out of a teacher: fewer layers, a smaller hidden size, fewer heads or positions.",
        ["truncate-student --teacher gpt2 --num-layers 6 --out cut"],
        _public("truncate_student"),
    ),
    Command(
        "distill",
        DistillConfig,
        "Distil a teacher into a student.",
        [
            "distill --teacher gpt2 --student cut --data data --out student",
            "distill --plan --budget-minutes 60 --teacher gpt2 --data data --out student",
            "distill --recipe tinygpt2 --teacher gpt2 --student tinygpt2-4l-312 --data data --out student",
        ],
        _training("distill"),
    ),
    Command(
        "finetune",
        FinetuneConfig,
        "Fine-tune any GPT-2 on a text or a pregenerated dataset.",
        ["finetune --model student --data mine.txt --out mine"],
        _training("finetune"),
    ),
    Command(
        "ppl",
        PplConfig,
        "Measure the zero-shot perplexity of one or several models.",
        [
            "ppl --model student --task mine.txt",
            "ppl --model gpt2 --model student --task wikitext --task-data wiki.test.raw --plot comparison.png",
            "ppl --list-tasks",
        ],
        _ppl,
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
        ],
        _generate,
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

for _command in COMMANDS:
    add_command(app, *_command)

_TURN = 3.0  # seconds that other processes wait before they report an error


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented exit code."""
    tolerate_encodings()
    stop_like_ctrl_c()
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with command_begins():
        sys.exit(_run(arguments, as_json="--json" in arguments))


def _unexpected(error: Exception) -> TinyGPT2Error:
    if not isinstance(error, OSError):
        return internal_error(error)
    return ConfigError(
        f"{error.filename or 'input or output'}: {error.strerror or error}",
        "check the path, its permissions and the disk space",
    )


def _run(arguments: list[str], *, as_json: bool) -> int:
    debug = os.environ.get("TINYGPT2_DEBUG") == "1"
    try:
        code = int(app(arguments, standalone_mode=False) or 0)
        if code != InterruptedRunError.exit_code:
            return code
        failure: TinyGPT2Error = InterruptedRunError("interrupted")  # before the command began
    except TinyGPT2Error as error:
        failure = error
        if debug and error.__cause__ is not None:
            traceback.print_exc()
    except typer.TyperException as error:
        failure = ConfigError(error.format_message(), "run tinygpt2 --help, or add --help to the command")
    except (KeyboardInterrupt, typer.Abort):
        failure = InterruptedRunError("interrupted")
    except Exception as error:
        failure = machine_failure(error) or _unexpected(error)
        if debug:
            traceback.print_exc()
    if rank():
        time.sleep(_TURN)  # process 0 usually reports the same error first, and its launcher then ends this process
        failure = TinyGPT2Error(f"process {rank()}: {failure.message}", failure.hint)
    print_error(failure, as_json=as_json and not rank())
    return failure.exit_code
