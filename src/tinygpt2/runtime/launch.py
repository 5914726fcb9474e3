"""Run one command in several processes on this machine: start them, pass on signals, and end them together.

Each process gets its rank and the number of processes in the same environment variables as from torchrun. So the rest
of the package need not know which launcher started it.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from typing import Any

from tinygpt2.errors import (
    ConfigError,
    InterruptedRunError,
    MachineError,
    TinyGPT2Error,
    internal_error,
    machine_failure,
)
from tinygpt2.runtime.cpu import usable_cores
from tinygpt2.runtime.processes import BEGAN, command_began, launched, rank
from tinygpt2.runtime.signals import raise_interrupt

_SIGKILL = getattr(signal, "SIGKILL", 9)  # Windows has none
_PATIENCE = 20.0  # seconds in which the other processes must end after one has failed
_set_up: Callable[[], None] | None = None  # what a started process calls first


def check_number(asked: int | None) -> None:
    """Check that the number of processes is the one asked for, and that there are enough GPUs for them, if any.

    Raises:
        ConfigError: another launcher started a different number of processes, or there are fewer GPUs than processes.
    """
    import torch

    from tinygpt2.runtime.devices import on_cuda

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if sys.platform == "win32" and (asked or 1) > 1:
        raise ConfigError("--num-processes needs Linux or macOS", "leave it out: one process uses all cores")
    devices = torch.cuda.device_count() if on_cuda() else 0
    if not launched() and devices and (asked or 1) > devices:
        raise ConfigError(f"--num-processes {asked}, but there are {devices} GPUs: each process needs one")
    if launched() and asked not in (None, 1, world):
        raise ConfigError(
            f"--num-processes {asked}, but {world} processes were launched",
            "leave out --num-processes if another launcher starts the processes",
        )


def set_up_processes_with(function: Callable[[], None]) -> None:
    """Have every process that `launch` starts call a module-level function before it does its work."""
    global _set_up
    _set_up = function


def launch(name: str, processes: int, *arguments: Any) -> Any:
    """Call a public function of the package in several processes; return what process 0 returns.

    Raises:
        TinyGPT2Error: a process raised it, or a process was killed and the others were stopped.
    """
    context = get_context("spawn")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    # the processes share the cores: with more threads than cores, all of them would be slower
    address["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    address[BEGAN] = str(command_began())
    started: list[SpawnProcess] = []
    receivers = []
    with _environment(address), _forwarded_signals(started) as signals:
        for number in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            place = {**address, "RANK": str(number), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(processes)}
            process = context.Process(target=_work, args=(name, arguments, place, _set_up, sender))
            try:
                process.start()
            except BaseException:
                for other in started:  # they would wait for this one
                    other.kill()
                raise
            sender.close()
            started.append(process)
            receivers.append(receiver)
        return _Watch(started, receivers, signals).result()


def _work(
    name: str, arguments: tuple[Any, ...], place: dict[str, str], set_up: Callable[[], None] | None, sender: Any
) -> None:
    """Run one process's share of the work, and send its result or its error through a pipe."""
    os.environ.update(place)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    signal.signal(signal.SIGTERM, raise_interrupt)
    if set_up is not None:
        set_up()
    try:
        result = getattr(import_module("tinygpt2"), name)(*arguments)
    except BaseException as error:
        if os.environ.get("TINYGPT2_DEBUG") == "1":
            traceback.print_exc()
        known = isinstance(error, TinyGPT2Error | KeyboardInterrupt)
        if not known and (failure := machine_failure(error)) is not None:
            error, known = failure, True
        # the errors of libraries may not pass through the pipe
        known = known or (isinstance(error, OSError) and type(error).__module__ == "builtins")
        sender.send(error if known else internal_error(error, f"process {rank()}: "))
        os._exit(1)  # the libraries' own cleanup would wait for processes that are gone
    sender.send(result if place["RANK"] == "0" else None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all work is done, and the libraries' threads may take long to end


def _end_with(parent: Any) -> None:
    """End this process when the process that started it is gone."""
    connection.wait([parent.sentinel])
    os._exit(1)


class _Watch:
    """Waits until all processes have ended, and kills those that outlive a failure by 20 seconds.

    The first failure in the list is the one that the user sees. Process 1 of 3 runs out of memory:

        the system kills process 1  ->  failures [process 1 was killed]; the deadline is in 20 s
        process 2 loses its peer    ->  failures [process 1 was killed, connection lost]
        the deadline passes         ->  process 0, which waits for the others, is killed too

    Args:
        processes: by number.
        receivers: the pipe from each process, which carries one result or one error.
        signals: the signals that this process has received so far.
    """

    def __init__(self, processes: list[SpawnProcess], receivers: list[Any], signals: list[int]) -> None:
        self._processes, self._signals = processes, signals
        self._waiting: dict[Any, int] = {receiver: number for number, receiver in enumerate(receivers)}
        self._waiting |= {process.sentinel: number for number, process in enumerate(processes)}
        self._reports: dict[int, Any] = {}
        self._failures: list[BaseException] = []
        self._deadline = math.inf

    def result(self) -> Any:
        """Return what process 0 reports, or raise the first failure."""
        while self._waiting:
            patience = max(0.0, min(1.0, self._deadline - time.monotonic()))
            ready: list[Any] = connection.wait(list(self._waiting), patience)
            for source in ready:
                number = self._waiting.pop(source)
                if isinstance(source, int):  # a sentinel: the process has ended
                    self._ended(number)
                else:
                    self._reported(number, source)
            complete = len(self._reports) == len(self._processes)
            if (self._failures or complete) and self._deadline == math.inf:
                self._deadline = time.monotonic() + _PATIENCE
            if self._overdue:
                for process in self._processes:
                    process.kill()
        if self._failures:
            raise self._failures[0]
        return self._reports[0]

    @property
    def _overdue(self) -> bool:
        return time.monotonic() >= self._deadline

    def _ended(self, number: int) -> None:
        process = self._processes[number]
        process.join()
        code = process.exitcode or 0
        if code == -signal.SIGTERM and self._signals:
            self._failures.append(
                InterruptedRunError("interrupted before the first step", "add --resume to continue, or run it again")
            )
        elif code == -_SIGKILL and len(self._signals) > 1:
            self._failures.append(
                InterruptedRunError("the second signal ended the run at once", "add --resume to continue")
            )
        elif code < 0 and number not in self._reports:
            # a process that was killed is the cause of what the others report, even if they report first
            first = code == -_SIGKILL and not self._overdue
            failure = _killed(number, len(self._processes), -code)
            self._failures.insert(0 if first else len(self._failures), failure)

    def _reported(self, number: int, receiver: Any) -> None:
        try:
            report = receiver.recv()
        except EOFError:  # the process ended without a report
            process = self._processes[number]
            process.join()
            if (process.exitcode or 0) >= 0:
                self._failures.append(TinyGPT2Error(f"process {number} ended with status {process.exitcode}"))
            return
        self._reports[number] = report
        if isinstance(report, BaseException):
            self._failures.append(report)


def _killed(number: int, count: int, signal_number: int) -> TinyGPT2Error:
    name = signal.Signals(signal_number).name
    kind = MachineError if name == "SIGKILL" else TinyGPT2Error
    return kind(
        f"process {number} of {count} was killed by {name}; the others were stopped",
        "continue from the last checkpoint with --resume; an unexpected SIGKILL often means that memory ran out",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """While the block runs, set environment variables for the processes that are started in it."""
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
def _forwarded_signals(started: list[SpawnProcess]) -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to the processes, which finish their step and save; a second signal kills them.

    Yields the list of the signals received so far.
    """
    asked: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        for process in started:
            if process.is_alive():
                process.terminate() if len(asked) == 1 else process.kill()

    earlier = {}
    if threading.current_thread() is threading.main_thread():
        earlier = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
