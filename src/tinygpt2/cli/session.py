"""Settings of the process that the command line makes once, before a command runs."""

from __future__ import annotations

import logging
import os

from tinygpt2.runtime.cpu import keep_memory
from tinygpt2.runtime.launch import set_up_processes_with
from tinygpt2.utils import progress
from tinygpt2.utils.terminal import tolerate_encodings


def start_session() -> None:
    """Show progress, keep freed memory, and silence the libraries' progress bars and logs.

    The processes that a command starts call this function too.
    """
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    set_up_processes_with(start_session)
    tolerate_encodings()
    progress.show()
    keep_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    datasets.disable_progress_bars()
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for library in ("transformers", "datasets", "accelerate", "huggingface_hub", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)
