"""Prepare a run: check its directory, make the accelerator, and pack texts once for all processes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from transformers import GPT2Config

from tinygpt2.config.base import extra, flag_name
from tinygpt2.config.common import RUN
from tinygpt2.config.data import PackOptions, PregenerateConfig
from tinygpt2.config.training import TrainOptions
from tinygpt2.data.corpus.sources import Corpus
from tinygpt2.data.dataset import Blocks, PackedDataset, is_packed_dataset, load_packed_dataset
from tinygpt2.data.pregenerate import pregenerate
from tinygpt2.data.staging import staging_path
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.evaluation.tasks import load_tasks
from tinygpt2.models.compatibility import check_fits
from tinygpt2.objectives.combined import LossWeights
from tinygpt2.utils.files import require_free

RUN_FILE = "config.yaml"
PACKED_TEXTS = ("data", "eval-data")  # datasets that a run may pack, in its directory
_TRIED = 1 << 26  # largest text in bytes that --validate-only packs to count its tokens


@dataclass(frozen=True)
class TrainingSetup:
    """A run's processes (`accelerator`), and the directory for the texts that it packs (`place`)."""

    accelerator: Accelerator
    place: Path

    def packed(
        self, name: str, source: str, tokenizer: str, length: int, config: TrainOptions, how: PackOptions
    ) -> str:
        """Pack a text into blocks and return the dataset's path. The main process packs, the others wait.

        Args:
            name: of the dataset's directory.
            source: the text.
            tokenizer, length: of the blocks.
            config: of the run, for its seed and whether it resumes.
            how: options for splitting the text into documents and for the test split.
        """
        out = self.place / name
        # in a dry run every process packs, into its own temporary directory
        packs = self.accelerator.is_main_process or config.dry_run
        if packs and not ((config.resume or config.dry_run) and is_packed_dataset(out)):
            if config.validate_only and (Corpus.of([source], how).size_hint() or 0) > _TRIED:
                raise ConfigError(
                    f"--validate-only counts the tokens of texts of up to {_TRIED >> 20} MiB, but {source} is larger",
                    "make a dataset from it first, with tinygpt2 pregenerate",
                )
            options = {key: getattr(how, key) for key in PackOptions.model_fields}
            pregenerate(
                PregenerateConfig(
                    source=[source], tokenizer=tokenizer, out=str(out), sequence_length=length, seed=config.seed,
                    resume=config.resume, **options,
                )
            )  # fmt: skip
        # a barrier instead of this loop would time out after some minutes
        while not is_packed_dataset(out):
            time.sleep(0.2)
        return str(out)

    def evaluated(self, data: PackedDataset, model: GPT2Config, config: TrainOptions) -> Blocks:
        """Return the blocks to evaluate on: those of --eval-data, or the test split of the training dataset.

        Raises:
            DataError, ConfigError: there are no such blocks, or they do not fit the model.
        """
        if config.eval_data is None:
            if not len(data.test) and (config.eval_every or config.early_stopping_patience):
                raise DataError(
                    f"the test split of {data.name} is empty: there are no blocks to evaluate on",
                    "add --eval-data with a held-out text",
                )
            return data.test
        if is_packed_dataset(Path(config.eval_data)):
            packed = load_packed_dataset(config.eval_data)
            check_fits(packed, model, data.manifest["tokenizer_fingerprint"], f"dataset {data.name}")
            if not len(packed.test):
                raise DataError(
                    f"the test split of {config.eval_data} is empty", "give the held-out text as --eval-data"
                )
            return packed.test
        with tempfile.TemporaryDirectory() as scratch:
            data.tokenizer().save_pretrained(scratch)
            whole = PackOptions(test_fraction=0, shuffle=False)
            return load_packed_dataset(
                self.packed("eval-data", config.eval_data, scratch, data.sequence_length, config, whole)
            ).train


@contextmanager
def training_setup(config: TrainOptions, weights: LossWeights) -> Iterator[TrainingSetup]:
    """Check options, machine and output directory, and make the accelerator, before anything is loaded.

    Raises:
        ConfigError: the run would overwrite files or continue another run, or the machine lacks a GPU or a compiler.
    """
    accelerator = _accelerator(config, weights)
    if accelerator.is_main_process:
        _check_start(config)
    accelerator.wait_for_everyone()  # no process writes before the check is done
    if not config.dry_run:
        yield TrainingSetup(accelerator, Path(config.out))
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield TrainingSetup(accelerator, Path(scratch))


def _check_start(config: TrainOptions) -> None:
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("--precision fp16 needs a GPU", "use --precision bf16 or fp32 on a CPU")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if (config.compile or config.compile_only) and shutil.which(compiler) is None:
        raise ConfigError(
            f"--compile needs a C++ compiler: {compiler} was not found", "install it, or set CXX to another compiler"
        )
    load_tasks(config.eval_task, config.task_data)  # report a missing task before anything is loaded
    out = Path(config.out)
    run = out / RUN_FILE
    # a process that was killed left these temporary directories
    left = [path for path in out.glob(".*.tmp") if path.is_dir()] if config.resume else []
    # a run that was interrupted while it packed a text has no config.yaml yet
    begun = run.is_file() or any(
        is_packed_dataset(out / name) or staging_path(out / name).is_dir() for name in PACKED_TEXTS
    )
    if left and (begun or len(left) == len(list(out.iterdir()))):
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
    if not (config.resume and begun):
        require_free(out, "give another --out, or --resume to continue a run")
    elif run.is_file():
        earlier = yaml.safe_load(run.read_text(encoding="utf-8"))
        if not isinstance(earlier, dict) or set(earlier) != set(config.options()):
            raise ConfigError(f"--resume: {run} was written by a different command", "give another --out")
        changed = changed_mathematics(config, earlier)
        if changed:
            raise ConfigError(
                f"--resume: {', '.join(changed)} differ from the run in {out}",
                f"use the options in {run}, or give another --out",
            )


def _accelerator(config: TrainOptions, weights: LossWeights) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may train again with another precision
    # objectives that never reach the logits may leave the top of the student without gradients
    whole = bool(weights.ce or weights.prediction)
    accelerator = Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not whole)],
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=list(config.report_to) or None,
        project_dir=config.out,
    )
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps  # overrides a launcher's file
    _check_sharding(accelerator, config)
    if (fsdp := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        fsdp.mixed_precision_policy = None  # it would round losses and sums of gradients; `Step` runs under autocast
    return accelerator


def _check_sharding(accelerator: Accelerator, config: TrainOptions) -> None:
    """Refuse forms of sharding that do not work here.

    Objectives and Muon need whole matrices, and every process needs the teacher.

    Raises:
        ConfigError: Accelerate's configuration asks for such a form.
    """
    fsdp, deepspeed = getattr(accelerator.state, "fsdp_plugin", None), accelerator.state.deepspeed_plugin
    if fsdp is None and deepspeed is None:
        return
    whole = fsdp is None or (fsdp.fsdp_version == 2 and fsdp.auto_wrap_policy is None)
    if not whole or (fsdp is not None and fsdp.cpu_ram_efficient_loading):
        raise ConfigError(
            "FSDP needs fsdp_version: 2, fsdp_auto_wrap_policy: NO_WRAP and fsdp_cpu_ram_efficient_loading: false",
            "examples/accelerate-fsdp.yaml has them",
        )
    if config.optimizer == "muon":
        raise ConfigError(
            "Muon needs whole matrices, but FSDP and DeepSpeed split them", "add --optimizer adamw, or use DDP"
        )
    if config.dry_run and not config.validate_only:
        raise ConfigError("--compile-only and --plan do not support FSDP or DeepSpeed", "use DDP or a single process")


def changed_mathematics(config: TrainOptions, earlier: dict[str, Any]) -> list[str]:
    """Return the options that differ from those of an earlier run and change the results of a resumed run."""
    now = config.model_dump(mode="json", by_alias=True)
    free = {"out", "micro_batch_size", "gradient_accumulation_steps"}  # Checkpoints.resume checks the global batch
    keys = [key for key, field in config.options().items() if extra(field, "panel") != RUN and key not in free]
    changed = [flag_name(key) for key in keys if key in earlier and earlier[key] != now[key]]
    # the cache's directory may change, but not whether there is one: cached states are rounded
    cached = [bool(options.get("teacher_cache")) for options in (earlier, now)]
    return changed + ["--teacher-cache"] * (cached[0] != cached[1])
