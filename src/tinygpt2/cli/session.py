"""Settings of the process that the command line makes once, before a command runs."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial

from tinygpt2.errors import ConfigError
from tinygpt2.runtime.cpu import keep_memory, wait_passively
from tinygpt2.runtime.launch import set_up_processes_with
from tinygpt2.utils import progress
from tinygpt2.utils.terminal import tolerate_encodings

_QUIET = {  # read by the libraries when they are imported, which is later or never
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error",
}  # fmt: skip

_level: progress.Level = "normal"


def choose_level(*, quiet: bool, verbose: bool) -> None:
    """Choose how much the command tells: nothing but warnings, notes and progress, or also what it decides.

    Raises:
        ConfigError: both were asked for.
    """
    global _level
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose cannot be combined", "give one of them")
    _level = "quiet" if quiet else "verbose" if verbose else "normal"


def start_session(level: progress.Level | None = None) -> None:
    """Report progress, keep freed memory, wait without spinning, and silence the libraries' progress bars and logs.

    No library is imported for this. The processes that a command starts call this function too.
    """
    level = level or _level
    set_up_processes_with(partial(start_session, level))
    tolerate_encodings()
    progress.show(level)
    keep_memory()
    wait_passively()
    _let_gpu_memory_grow()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    _silence_libraries()


def _let_gpu_memory_grow() -> None:
    """Let torch's memory on a GPU grow in small segments, so that it is not wasted between blocks of other sizes.

    torch reads the setting when it is imported, and a build for CPUs ignores it. Settings of the user stay.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _silence_libraries() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for library in ("transformers", "datasets", "accelerate", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # a program that calls the command line may have imported them earlier
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
