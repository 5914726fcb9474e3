"""Training checkpoints: OUT/checkpoints/step-N, whole and proved to be so, or never trusted.

A checkpoint is written under a hidden name, by a thread beside the training, from a copy of what it holds; its last
file, state.json, lists the SHA-256 of the others, and one rename makes it visible. Weights and optimizer are
safetensors; what Accelerate shards (FSDP, DeepSpeed) it writes and reads itself, while the training waits.

Nothing is kept of random generators and data loaders: dropout and the order of the data are functions of seed and step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
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
from tinygpt2.errors import ConfigError, ModelError, one_line
from tinygpt2.runtime.memory import available_memory
from tinygpt2.training.metrics import METRICS
from tinygpt2.training.state import RunState
from tinygpt2.utils.files import flush_to_disk, read_json, sha256_of, write_json
from tinygpt2.utils.progress import say

STATE, WEIGHTS, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"


class Checkpoints:
    """A run's checkpoints: saves, finds and restores them, and keeps the newest few and the best.

    Args:
        out: the run's directory.
        module, optimizer: as Accelerate prepared them.
        keep: how many of the newest to keep; the best by evaluation is always kept.
        on_error: whether a checkpoint that cannot be written ends the run.
    """

    def __init__(
        self,
        out: Path,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: Any,
        keep: int,
        on_error: OnSaveError,
    ) -> None:
        self._root, self._accelerator = out / "checkpoints", accelerator
        self._module, self._optimizer = module, optimizer
        self._keep, self._on_error = keep, on_error
        self._sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self._writer: threading.Thread | None = None
        self._failure: str | None = None
        self._best: Path | None = None  # the best checkpoint that is on the disk
        if accelerator.is_main_process:
            for left in self._root.glob(".*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)

    def save(self, state: RunState) -> None:
        """Begin to write the checkpoint of `state`, once the one before is finished.

        Raises:
            ModelError: something before could not be written, and the run is to stop then.
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
            self._failure = f"{temporary}: {_reason(error)}"
        if self._sharded:
            self._save_shards(temporary)
        elif self._accelerator.is_main_process:
            parts = self._parts()
        if self._accelerator.is_main_process and self._failure is None:
            copied, beside = _copied(parts)
            arguments = (temporary, copied, asdict(state))
            self._writer = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._writer.start()
            if not beside:
                self._writer.join()

    def _save_shards(self, temporary: Path) -> None:
        """Let Accelerate write, in all processes: a shard that one of them cannot write is missing for all."""
        if self._any(self._failure) is None:
            try:
                self._accelerator.save_state(str(temporary), safe_serialization=True)
            except _library_errors() as error:
                self._failure = f"{temporary}: {_reason(error)}"
            self._failure = self._any(self._failure)
        if self._failure is not None and self._accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; all processes learn whether it could be.

        Raises:
            ModelError: it could not, and the run is to stop then.
        """
        self._report(self._finish())

    def close(self) -> None:
        """Wait for what is being written, in this process alone: when the run ends by an error."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _finish(self) -> str | None:
        """Wait for what is being written; return what any process could not write."""
        self.close()
        mine, self._failure = self._failure, None
        return self._any(mine)

    def _report(self, failure: str | None) -> None:
        if failure and self._on_error == "stop":
            self.close()
            raise ModelError(
                f"cannot save: {failure}",
                "earlier checkpoints are intact: free some space and continue with --resume, "
                "or go on without saving by --on-save-error continue",
            )
        if failure:
            say(f"warning: cannot save: {failure}; earlier checkpoints are intact, going on")

    @contextmanager
    def may_fail(self, what: str) -> Iterator[None]:
        """Treat a file that cannot be written in the block as a checkpoint that cannot."""
        try:
            yield
        except OSError as error:
            self._failure = f"{what}: {_reason(error)}"

    def resume(self, state: RunState) -> RunState:
        """Restore the newest whole checkpoint; return its state, or `state` where there is none.

        Raises:
            ConfigError: the run had another global batch or other data.
            ModelError: the checkpoint is another model's.
        """
        path = self._everywhere(self._newest() if self._accelerator.is_main_process else None)
        if path is None:
            return state
        found = RunState.of(read_json(Path(path) / STATE)["run"])
        if found.global_batch != state.global_batch:
            raise ConfigError(
                f"--resume: steps of {found.global_batch} sequences became steps of {state.global_batch}",
                "keep processes x --micro-batch-size x --gradient-accumulation-steps as it was",
            )
        if found.data != state.data:
            raise ConfigError("--resume: the data set's content is not what it was", "give another --out")
        self._restore(Path(path), found)
        best = found.best and self._root / f"step-{found.best.step}"
        self._best = best if best and best.is_dir() else None
        say(f"resuming from {path}")
        return found

    def restore_best(self, state: RunState) -> bool:
        """Restore the weights that evaluated best; say whether their checkpoint is there and whole."""
        if state.best is None or state.best.step == state.step:
            return state.best is not None
        path = self._root / f"step-{state.best.step}"
        problem = self._everywhere(damage(path) if self._accelerator.is_main_process else None)
        if problem is None:
            self._restore(path, state)
        else:
            say(f"warning: the best weights, {path}, cannot be had: {problem}; keeping the last ones")
        return problem is None

    def _any(self, failure: str | None) -> str | None:
        """Return a failure of any process, alike in all."""
        all_ = gather_object([failure]) if self._accelerator.num_processes > 1 else [failure]
        return next((one for one in all_ if one), None)

    def _everywhere(self, value: Any) -> Any:
        """Return the main process's value in every process."""
        return broadcast_object_list([value])[0] if self._accelerator.num_processes > 1 else value

    def _newest(self) -> str | None:
        for path in reversed(finished(self._root)):
            problem = damage(path)
            if problem is None:
                return str(path)
            say(f"warning: passing over the checkpoint {path}: {problem}")
        return None

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each file, as they lie in the training."""
        weights = self._accelerator.unwrap_model(self._module).state_dict()
        seen: dict[int, str] = {}
        for name, tensor in weights.items():
            seen.setdefault(tensor.data_ptr(), name)  # tied weights once
        moments = self._optimizer.state_dict()["state"]
        return {
            WEIGHTS: {name: weights[name] for name in seen.values()},
            OPTIMIZER: {f"{index}.{key}": value for index, row in moments.items() for key, value in row.items()},
        }

    def _write(self, temporary: Path, parts: dict[str, dict[str, Tensor]] | None, state: dict[str, Any]) -> None:
        final = self._root / temporary.name.removeprefix(".")
        try:
            for name, tensors in (parts or {}).items():
                save_file(tensors, temporary / name)
            files = {
                str(file.relative_to(temporary)): sha256_of(file) for file in temporary.rglob("*") if file.is_file()
            }
            write_json(temporary / STATE, {"run": state, "files": files, "sha256": _digest(state, files)})
            metrics = self._root.parent / METRICS
            for file in [temporary, *temporary.rglob("*"), *([metrics] if metrics.is_file() else [])]:
                flush_to_disk(file)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
            temporary.replace(final)
            flush_to_disk(self._root)
        except Exception as error:  # full disks make the libraries raise errors of their own
            shutil.rmtree(temporary, ignore_errors=True)
            self._failure = f"{final}: {_reason(error)}"
            return
        if state["best"] and state["best"]["step"] == state["step"]:
            self._best = final
        # a later one is damaged, and was passed over: it neither counts nor goes
        for old in [path for path in finished(self._root) if _step(path) <= state["step"]][: -self._keep]:
            if old != self._best:
                hidden = old.with_name(f".{old.name}.old")
                with suppress(OSError):  # the next one tries again
                    old.replace(hidden)  # never half a checkpoint under its name
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
                raise ValueError(f"its weights are another model's: {', '.join([*lost, *unexpected][:3])}")
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in load_file(path / OPTIMIZER).items():
                index, key = name.split(".", 1)
                moments.setdefault(int(index), {})[key] = tensor
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
            if self._accelerator.scaler is not None and state.scaler is not None:
                self._accelerator.scaler.load_state_dict(state.scaler)
        except _library_errors() as error:  # whatever another model's file makes the libraries raise
            raise ModelError(f"cannot resume from {path}: {_reason(error)[:300]}", "give another --out") from error


def finished(root: Path) -> list[Path]:
    """Return the checkpoints that look finished, oldest first."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None: every file is there and has its SHA-256."""
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
    """Return what libraries raise where a file cannot be written or read: torch's own is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    return Exception, CheckpointException


def _reason(error: BaseException) -> str:
    return one_line(getattr(error, "strerror", None) or error)


def _digest(run: dict[str, Any], files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([run, files], sort_keys=True).encode()).hexdigest()


def _copied(parts: dict[str, dict[str, Tensor]] | None) -> tuple[dict[str, dict[str, Tensor]] | None, bool]:
    """Return a copy that training leaves alone, and True; or the thing itself where memory is short, and False."""
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
