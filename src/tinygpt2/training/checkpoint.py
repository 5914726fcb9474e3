"""Training checkpoints in OUT/checkpoints/step-N. A run resumes only from a checkpoint whose checksums are right.

A thread writes each checkpoint from a copy of the tensors, while the training continues. It writes into a hidden
directory. The last file, state.json, lists the SHA-256 of the others; then one rename makes the checkpoint visible.
Weights and optimizer state are safetensors. With FSDP and DeepSpeed, Accelerate writes and reads the shards, and the
training waits for it.

A checkpoint holds no random generators or data loaders: dropout and the order of the data follow from seed and step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinygpt2.config.training import OnSaveError
from tinygpt2.errors import ConfigError, ModelError, TinyGPT2Error, os_failure, reason_of
from tinygpt2.models.saving import share_files
from tinygpt2.runtime.memory import available_memory
from tinygpt2.training.metrics import METRICS
from tinygpt2.training.optimizers import check_state
from tinygpt2.training.state import CHECKPOINTS, RunState
from tinygpt2.utils.files import flush_to_disk, read_json, sha256_of, write_json
from tinygpt2.utils.progress import say, warn

STATE, WEIGHTS, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"
MASTERS, MEAN, REPLAY = "masters.safetensors", "mean.safetensors", "replay.safetensors"


class Checkpoints:
    """Saves, finds and restores a run's checkpoints, and deletes all but the newest few and the best.

    Args:
        out: the run's directory.
        module, optimizer: as Accelerate prepared them.
        kept: more tensors, by the file that holds them: the weights before rounding (`Rounding`), the mean of the tail
            (`TailAverage`), sampled texts.
        keep: how many of the newest to keep; the one with the lowest evaluation loss is always kept.
        on_error: whether the run stops or continues if a checkpoint cannot be written.
        beside: writes the files that make a checkpoint's directory a model, besides its weights.
    """

    def __init__(
        self,
        out: Path,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: Any,
        kept: dict[str, dict[str, Tensor]],
        keep: int,
        on_error: OnSaveError,
        beside: Callable[[Path], None] | None = None,
    ) -> None:
        self._root, self._accelerator = out / CHECKPOINTS, accelerator
        self._module, self._optimizer, self._kept = module, optimizer, kept
        self._keep, self._on_error, self._beside = keep, on_error, beside
        self._sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self._writer: threading.Thread | None = None
        self._failure: TinyGPT2Error | None = None
        self._best: Path | None = None  # the best checkpoint, if it is on the disk
        if accelerator.is_main_process:
            for unfinished in self._root.glob(".*"):  # a process that was killed left it
                shutil.rmtree(unfinished, ignore_errors=True)

    def save(self, state: RunState) -> None:
        """Wait until the previous checkpoint is written, then start to write the one of `state`.

        Raises:
            MachineError, ConfigError, ModelError: an earlier file could not be written, and `on_error` is "stop".
        """
        failure = self._finish()
        self._begin(state)
        self._report(failure)

    def _begin(self, state: RunState) -> None:
        if self._accelerator.scaler is not None:
            state.scaler = self._accelerator.scaler.state_dict()
        temporary = self._root / f".step-{state.step}"
        parts: dict[str, dict[str, Tensor]] | None = None
        try:
            if self._accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        except OSError as error:
            self._failure = _failed(temporary, error)
        if self._sharded:
            self._save_shards(temporary)
        else:
            moments = self._optimizer.state_dict()["state"]  # every process may have a part of it
            parts = self._parts(moments) if self._accelerator.is_main_process else None
        if self._accelerator.is_main_process and self._failure is None:
            copied, in_background = _copied(parts)
            arguments = (temporary, copied, asdict(state))
            self._writer = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._writer.start()
            if not in_background:
                self._writer.join()

    def _save_shards(self, temporary: Path) -> None:
        """Let Accelerate write the shards. If one process cannot write its shard, the checkpoint fails in all."""
        if self._any(self._failure) is None:
            try:
                self._accelerator.save_state(str(temporary), safe_serialization=True)
            except _library_errors() as error:
                self._failure = _failed(temporary, error)
            self._failure = self._any(self._failure)
        if self._failure is not None and self._accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)

    def settle(self) -> bool:
        """Wait for the checkpoint that is being written; return in every process whether it was.

        Raises:
            MachineError, ConfigError, ModelError: it was not, and `on_error` is "stop".
        """
        self._report(failure := self._finish())
        return failure is None

    def close(self) -> None:
        """Wait for this process's writing thread, but not for other processes: the run may have ended by an error."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _finish(self) -> TinyGPT2Error | None:
        """Wait for the checkpoint that is being written; return the failure if any process could not write a file."""
        self.close()
        failure, self._failure = self._failure, None
        return self._any(failure)

    def _report(self, failure: TinyGPT2Error | None) -> None:
        if failure and self._on_error == "stop":
            self.close()
            raise type(failure)(f"cannot save: {failure.message}", failure.hint)
        if failure:
            warn(f"cannot save: {failure.message}; earlier checkpoints are intact, the training continues")

    @contextmanager
    def may_fail(self, what: str) -> Iterator[None]:
        """If the block cannot write its file, report that as for a checkpoint that cannot be written."""
        try:
            yield
        except OSError as error:
            self._failure = _failed(what, error)

    def resume(self, state: RunState) -> RunState:
        """Restore the newest undamaged checkpoint and return its state; return `state` if there is no checkpoint.

        Raises:
            ConfigError: the run had another global batch size or other data.
            ModelError: the checkpoint belongs to another model, or all are damaged.
        """
        main = self._accelerator.is_main_process
        path, damaged = self._everywhere((self._newest(), finished(self._root)) if main else None)
        if path is None and not damaged:
            return state
        if path is None:
            raise ModelError(f"--resume: every checkpoint in {self._root} is damaged", "give another --out")
        saved = RunState.of(read_json(Path(path) / STATE)["run"])
        if saved.global_batch != state.global_batch:
            raise ConfigError(
                f"--resume: the run had steps of {saved.global_batch} sequences, now they have {state.global_batch}",
                "keep the product of processes, --micro-batch-size and --gradient-accumulation-steps as it was",
            )
        if saved.data != state.data:
            raise ConfigError("--resume: --data: the content of the dataset has changed", "give another --out")
        self._restore(Path(path), saved)
        best = saved.best and self._root / f"step-{saved.best.step}"
        self._best = best if best and best.is_dir() else None
        say(f"resuming from {path}")
        return saved

    def restore_best(self, state: RunState) -> bool:
        """Restore the weights with the lowest evaluation loss; return whether their checkpoint could be used."""
        if state.best is None or state.best.step == state.step:
            return state.best is not None
        path = self._root / f"step-{state.best.step}"
        problem = self._everywhere(damage(path) if self._accelerator.is_main_process else None)
        if problem is None:
            self._restore(path, state)
        else:
            warn(f"cannot restore the best weights from {path}: {problem}; using those of the last step")
        return problem is None

    def _any(self, failure: TinyGPT2Error | None) -> TinyGPT2Error | None:
        """Return the first failure of any process: the same one in every process."""
        failures = gather_object([failure]) if self._accelerator.num_processes > 1 else [failure]
        return next((one for one in failures if one), None)

    def _everywhere(self, value: Any) -> Any:
        """Return the main process's value in every process."""
        return broadcast_object_list([value])[0] if self._accelerator.num_processes > 1 else value

    def _newest(self) -> str | None:
        for path in reversed(finished(self._root)):
            problem = damage(path)
            if problem is None:
                return str(path)
            warn(f"ignoring the damaged checkpoint {path}: {problem}")
        return None

    def _parts(self, moments: dict[int, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each file. They are not copies: the training changes them."""
        weights = self._accelerator.unwrap_model(self._module).state_dict()
        seen: dict[int, str] = {}
        for name, tensor in weights.items():
            seen.setdefault(tensor.data_ptr(), name)  # tied weights are saved once
        return {
            WEIGHTS: {name: weights[name] for name in seen.values()},
            OPTIMIZER: {f"{index}.{key}": value for index, row in moments.items() for key, value in row.items()},
            **{name: dict(tensors) for name, tensors in self._kept.items() if tensors},
        }

    def _write(self, temporary: Path, parts: dict[str, dict[str, Tensor]] | None, state: dict[str, Any]) -> None:
        final = self._root / temporary.name.removeprefix(".")
        try:
            for name, tensors in (parts or {}).items():
                save_file(tensors, temporary / name)
            if parts is not None and self._beside is not None:
                self._beside(temporary)
            share_files(temporary)
            files = {
                str(file.relative_to(temporary)): sha256_of(file) for file in temporary.rglob("*") if file.is_file()
            }
            write_json(temporary / STATE, {"run": state, "files": files, "sha256": _digest(state, files)})
            metrics = self._root.parent / METRICS
            for file in [temporary, *temporary.rglob("*"), *([metrics] if metrics.is_file() else [])]:
                flush_to_disk(file)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one that resume() ignored may be there
            temporary.replace(final)
            flush_to_disk(self._root)
        except Exception as error:  # on a full disk, libraries also raise other errors than OSError
            shutil.rmtree(temporary, ignore_errors=True)
            self._failure = _failed(final, error)
            return
        if state["best"] and state["best"]["step"] == state["step"]:
            self._best = final
        # a checkpoint of a later step is damaged, and resume() ignored it: do not count it, and do not delete it
        for old in [path for path in finished(self._root) if _step(path) <= state["step"]][: -self._keep]:
            if old != self._best:
                hidden = old.with_name(f".{old.name}.old")
                with suppress(OSError):  # the next checkpoint tries again
                    old.replace(hidden)  # so that its name never stands for a half-deleted checkpoint
                shutil.rmtree(hidden, ignore_errors=True)

    def _restore(self, path: Path, state: RunState) -> None:
        try:
            if self._sharded:
                self._accelerator.load_state(str(path))
                return
            module: nn.Module = self._accelerator.unwrap_model(self._module)
            weights = load_file(path / WEIGHTS)
            missing, unexpected = module.load_state_dict(weights, strict=False)
            own = module.state_dict()
            tied = {own[name].data_ptr() for name in weights if name in own}
            lost = [name for name in missing if own[name].data_ptr() not in tied]
            if lost or unexpected:
                raise ValueError(f"its weights belong to another model: {', '.join([*lost, *unexpected][:3])}")
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in load_file(path / OPTIMIZER).items():
                index, key = name.split(".", 1)
                moments.setdefault(int(index), {})[key] = tensor
            check_state(self._optimizer, moments)
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
            for name in [name for name in self._kept if (path / name).is_file()]:
                device = "cpu" if name == REPLAY else str(self._accelerator.device)
                self._kept[name].update(load_file(path / name, device))
            if self._accelerator.scaler is not None and state.scaler is not None:
                self._accelerator.scaler.load_state_dict(state.scaler)
        except _library_errors() as error:  # files of another model make the libraries raise many kinds of errors
            raise ModelError(f"cannot resume from {path}: {reason_of(error)[:300]}", "give another --out") from error


def finished(root: Path) -> list[Path]:
    """Return the checkpoints that look finished, oldest first."""
    paths = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(paths, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damage(path: Path) -> str | None:
    """Return the first fault of a checkpoint, or None if every file is there and has the right SHA-256."""
    try:
        saved = read_json(path / STATE)
        if saved["sha256"] != _digest(saved["run"], saved["files"]):
            return f"{STATE} was changed"
        for name, digest in saved["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if sha256_of(path / name) != digest:
                return f"{name} is damaged (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE} cannot be read: {error}"
    return None


def _library_errors() -> tuple[type[BaseException], ...]:
    """Return the errors that libraries raise for files: torch's CheckpointException is not an Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    return Exception, CheckpointException


def _failed(what: Path | str, error: BaseException) -> TinyGPT2Error:
    """Return the failure of a file that could not be written."""
    hint = (
        "earlier checkpoints are intact: continue with --resume, or use --on-save-error continue to train on even if "
        "a checkpoint cannot be saved"
    )
    return os_failure(error, str(what), hint, ModelError)


def _digest(run: dict[str, Any], files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([run, files], sort_keys=True).encode()).hexdigest()


def _copied(parts: dict[str, dict[str, Tensor]] | None) -> tuple[dict[str, dict[str, Tensor]] | None, bool]:
    """Return copies that the training does not change, and True; if memory is short, return `parts` and False."""
    if parts is None:
        return None, True
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > available_memory() / 2:
        return parts, False
    with torch.no_grad():
        copied = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in part.items()}
            for name, part in parts.items()
        }
    return copied, True
