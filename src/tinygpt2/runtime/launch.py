"""One command on several processes of this machine: start them, pass on signals, and let none outlive another.

Each process is told its place as torchrun would tell it, so that everything below knows one kind of launch only.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from typing import Any

from tinygpt2.errors import ConfigError, InterruptedRunError, TinyGPT2Error
from tinygpt2.runtime.cpu import keep_memory
from tinygpt2.utils import progress

_PATIENCE = 20.0  # seconds that the others have to notice that a process is gone


def launched() -> bool:
    """Say whether this process is one of several that somebody started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return this process's number among all."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def command_line() -> None:
    """Make this process one of the command line's: with progress, without the libraries' own bars and chatter."""
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C
    progress.show()
    keep_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    datasets.disable_progress_bars()
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for library in ("transformers", "datasets", "accelerate", "huggingface_hub", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)


def check_number(asked: int | None) -> None:
    """Check that as many processes run as an option asks for, and that each can have a GPU where there are any.

    Raises:
        ConfigError: another launcher started another number, or there are fewer GPUs.
    """
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    devices = torch.cuda.device_count()
    if not launched() and devices and (asked or 1) > devices:
        raise ConfigError(f"--num-processes {asked}, but there are {devices} GPUs: each process takes one")
    if launched() and asked not in (None, 1, world):
        raise ConfigError(
            f"--num-processes {asked}, but {world} processes were launched", "leave it out under another launcher"
        )


def launch(name: str, processes: int, *arguments: Any) -> Any:
    """Call a public function of the package in so many processes; return what the first one returns.

    Raises:
        TinyGPT2Error: what a process raised; or one was killed, and the others were stopped.
    """
    context = get_context("spawn")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    # where torchrun would put it: as many processes as cores are no faster with as many threads each
    address["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    started: list[SpawnProcess] = []
    receivers = []
    with _environment(address), _passed_on(started) as asked:
        for number in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            told = {**address, "RANK": str(number), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(processes)}
            process = context.Process(target=_work, args=(name, arguments, told, progress.shown(), sender))
            process.start()
            sender.close()
            started.append(process)
            receivers.append(receiver)
        return _wait(started, receivers, asked)


def _work(name: str, arguments: tuple[Any, ...], told: dict[str, str], shown: bool, sender: Any) -> None:
    """Do one process's part, and report what came of it through a pipe."""
    os.environ.update(told)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    signal.signal(signal.SIGTERM, _interrupt)
    if shown:
        command_line()
    try:
        result = getattr(import_module("tinygpt2"), name)(*arguments)
    except BaseException as error:
        if os.environ.get("TINYGPT2_DEBUG") == "1":
            traceback.print_exc()
        known = isinstance(error, TinyGPT2Error | KeyboardInterrupt) or type(error) in (OSError, FileNotFoundError)
        sender.send(error if known else _described(error))
        os._exit(1)  # the libraries' own clearing up would wait for processes that are gone
    sender.send(result if told["RANK"] == "0" else None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to be done, and libraries' threads may take their time


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _end_with(parent: Any) -> None:
    """End this process when the one that started it is gone: nobody would know of it."""
    connection.wait([parent.sentinel])
    os._exit(1)


def _described(error: BaseException) -> TinyGPT2Error:
    return TinyGPT2Error(
        f"process {rank()}: {type(error).__name__}: {' '.join(str(error).split())[:500]}",
        "run again with TINYGPT2_DEBUG=1 to see where, and report it",
    )


def _wait(started: list[SpawnProcess], receivers: list[Any], asked: list[int]) -> Any:
    """Wait for all processes; return what the first reports, or raise the first failure, which none outlives long."""
    reports: dict[int, Any] = {}
    failures: list[BaseException] = []
    deadline, ending = math.inf, False
    waiting: dict[Any, int] = {receiver: number for number, receiver in enumerate(receivers)}
    waiting |= {process.sentinel: number for number, process in enumerate(started)}
    while waiting:
        ready: list[Any] = connection.wait(list(waiting), max(0.0, min(1.0, deadline - time.monotonic())))
        for source in ready:
            number = waiting.pop(source)
            process = started[number]
            if isinstance(source, int):
                process.join()
                if process.exitcode == -signal.SIGTERM and asked:
                    failures.append(InterruptedRunError("interrupted before the first step"))
                elif process.exitcode and process.exitcode < 0 and number not in reports:
                    # nobody does SIGKILL to himself: what the others say came of it, even where they say it first
                    place = 0 if process.exitcode == -signal.SIGKILL and not ending else len(failures)
                    failures.insert(place, _killed(number, len(started), -process.exitcode))
            else:
                try:
                    reports[number] = source.recv()
                except EOFError:  # it is gone, without a word
                    process.join()
                    if (process.exitcode or 0) >= 0:
                        failures.append(TinyGPT2Error(f"process {number} ended with status {process.exitcode}"))
                    continue
                if isinstance(reports[number], BaseException):
                    failures.append(reports[number])
        if (failures or len(reports) == len(started)) and deadline == math.inf:
            deadline = time.monotonic() + _PATIENCE
        ending = time.monotonic() >= deadline
        if ending:
            for process in started:
                process.kill()
    if failures:
        raise failures[0]
    return reports[0]


def _killed(number: int, count: int, signal_number: int) -> TinyGPT2Error:
    name = signal.Signals(signal_number).name
    return TinyGPT2Error(
        f"process {number} of {count} was killed by {name}; the others were stopped",
        "training goes on from its last checkpoint with --resume; a SIGKILL out of nowhere often means out of memory",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that libraries read when they are imported, for processes started meanwhile."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def _passed_on(started: list[SpawnProcess]) -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to the processes, which finish their step and save; a second one kills them.

    Yields the signals that came.
    """
    asked: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        for process in started:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

    earlier = {}
    if threading.current_thread() is threading.main_thread():
        earlier = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
