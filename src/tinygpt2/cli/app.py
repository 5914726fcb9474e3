"""The one Typer app. Nothing here imports torch: help and version answer at once."""

from __future__ import annotations

import os
import sys
import time
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer

from tinygpt2 import config as c
from tinygpt2.cli.options import Run, add_command, print_version
from tinygpt2.cli.render import ppl_as_text, print_error
from tinygpt2.config.base import Config
from tinygpt2.errors import ConfigError, InterruptedRunError, TinyGPT2Error
from tinygpt2.runtime.launch import command_line, rank

app = typer.Typer(
    name="tinygpt2",
    help="Make GPT-2 small: cut a student out of a teacher, distil it, and measure honestly how good it is.",
    epilog="First time here? Run: tinygpt2 quickstart",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def _library(name: str) -> Run:
    """Return what runs the command of that name: the library's function, loaded when it is called."""

    def run(config: Any, as_json: bool) -> Any:
        command_line()
        return getattr(import_module("tinygpt2"), name.replace("-", "_"))(config)

    return run


def _generate(config: Any, as_json: bool) -> Any:
    command_line()
    from tinygpt2.cli.interactive import speak

    return speak(config, as_json=as_json)


def _ppl(config: Any, as_json: bool) -> Any:
    if as_json and (config.csv or config.markdown):
        raise ConfigError("--json contradicts --csv and --markdown: give one")
    result = _library("ppl")(config, as_json)
    if rank() or not (config.csv or config.markdown):
        return result
    typer.echo(ppl_as_text(result, as_csv=config.csv), nl=False)
    return None


def _presets(config: Any, as_json: bool) -> Any:
    from tinygpt2.models.configuration import presets

    return presets(config)


_TURN = 3.0  # seconds

COMMANDS: list[tuple[str, type[Config], str, list[str]]] = [
    (
        "quickstart",
        c.QuickstartConfig,
        "The whole pipeline in a few minutes, on text that needs no download: teacher, student, baselines, table.",
        ["quickstart", "quickstart --out my-first-student"],
    ),
    (
        "train-tokenizer",
        c.TrainTokenizerConfig,
        "Train a byte-level BPE tokenizer, for any language.",
        ["train-tokenizer novels/ --vocab-size 8192 --out tokenizer"],
    ),
    (
        "pregenerate",
        c.PregenerateConfig,
        "Turn a corpus into packed token blocks, split into train and test by document.",
        ["pregenerate novels/ pages.jsonl --tokenizer tokenizer --sequence-length 512 --out data"],
    ),
    (
        "pretrain",
        c.PretrainConfig,
        "Train a language model from random weights (--model-config) or given ones (--model).",
        [
            "pretrain --model-config distilgpt2 --data data --out model",
            "pretrain --model cut --data data --out model",
        ],
    ),
    (
        "truncate-student",
        c.TruncateStudentConfig,
        "Cut a student's starting weights from a teacher's layers.",
        ["truncate-student --teacher gpt2 --num-layers 6 --out cut"],
    ),
    (
        "distill",
        c.DistillConfig,
        "Teach a student what its teacher computes.",
        [
            "distill --teacher gpt2 --student cut --data data --out student",
            "distill --plan --budget-minutes 60 --teacher gpt2 --data data --out student",
            "distill --recipe tinygpt2 --teacher gpt2 --student tinygpt2-4l-312 --data data --out student",
        ],
    ),
    (
        "finetune",
        c.FinetuneConfig,
        "Fine-tune any GPT-2 on a text or a pregenerated dataset.",
        ["finetune --model student --data mine.txt --out mine"],
    ),
    (
        "ppl",
        c.PplConfig,
        "Zero-shot perplexity of one or several models, in one table.",
        [
            "ppl --model student --task mine.txt",
            "ppl --model gpt2 --model student --task wikitext --task-data wiki.test.raw --plot comparison.png",
            "ppl --list-tasks",
        ],
    ),
    (
        "presets",
        c.PresetsConfig,
        "The shapes that --model-config and --student know by name.",
        ["presets"],
    ),
    (
        "generate",
        c.GenerateConfig,
        "Text from one or several models side by side; greedy unless sampling or beams are asked for.",
        [
            "generate --model teacher --model student --prompt 'Once upon a time' --top-p 0.9",
            "generate --model student --interactive",
        ],
    ),
    (
        "verify",
        c.VerifyConfig,
        "Check a pregenerated dataset or a model directory, and say what is wrong.",
        ["verify data", "verify student"],
    ),
]

for _name, _config, _about, _examples in COMMANDS:
    _command = {"generate": _generate, "ppl": _ppl, "presets": _presets}.get(_name, _library(_name))
    add_command(app, _name, _config, _command, _about, _examples)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with the promised exit code."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    sys.exit(_run(arguments, as_json="--json" in arguments))


def _run(arguments: list[str], *, as_json: bool) -> int:
    debug = os.environ.get("TINYGPT2_DEBUG") == "1"
    try:
        return int(app(arguments, standalone_mode=False) or 0)
    except TinyGPT2Error as error:
        failure = error
    except typer.TyperException as error:
        failure = ConfigError(error.format_message(), "see tinygpt2 --help, or --help after the command")
    except (KeyboardInterrupt, typer.Abort):
        failure = InterruptedRunError("interrupted")
    except OSError as error:
        failure = ConfigError(
            f"{error.filename or 'input or output'}: {error.strerror or error}", "check paths, rights and space"
        )
        if debug:
            traceback.print_exc()
    except Exception as error:
        failure = TinyGPT2Error(
            f"a defect of tinygpt2: {type(error).__name__}: {' '.join(str(error).split())[:500]}",
            "run again with TINYGPT2_DEBUG=1 to see where, and report it",
        )
        if debug:
            traceback.print_exc()
    else:
        return 0
    if rank():
        time.sleep(_TURN)  # most often the first process says the same, and then its launcher ends this one
        failure = TinyGPT2Error(f"process {rank()}: {failure.message}", failure.hint)
    print_error(failure, as_json=as_json and not rank())
    return failure.exit_code
