"""Prepare a run: check its directory, make the accelerator, and pack texts once for all processes."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from transformers import GPT2Config

from tinygpt2.config.common import OTHER_OUT_OR_RESUME
from tinygpt2.config.data import PackOptions, PairOptions, PregenerateConfig, TextOptions
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import FinetuneConfig, TrainOptions
from tinygpt2.data.block_writers import MANIFEST
from tinygpt2.data.corpus.sources import Corpus
from tinygpt2.data.dataset import Blocks, PackedDataset, content_of, load_packed_dataset
from tinygpt2.data.layout import is_packed_dataset
from tinygpt2.data.pregenerate import pregenerate
from tinygpt2.data.staging import staging_path
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.evaluation.tasks import load_tasks
from tinygpt2.models.compatibility import check_fits, check_length
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.devices import current_device, on_cuda, repeatable
from tinygpt2.training.resuming import check_same_run
from tinygpt2.training.state import RUN_FILE
from tinygpt2.utils.files import is_free, read_json, remove_leftovers, require_free
from tinygpt2.utils.locks import only_writer
from tinygpt2.utils.progress import say

PACKED_TEXTS = ("data", "eval-data")  # datasets that a run may pack, in its directory
_PATIENCE = 120.0  # seconds until a process that waits says so
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
        options = {key: getattr(how, key) for key in PackOptions.model_fields}
        made = PregenerateConfig(
            source=[source], tokenizer=tokenizer, out=str(out), sequence_length=length, seed=config.seed,
            resume=config.resume, **options,
        )  # fmt: skip
        if packs and (config.resume or config.dry_run) and is_packed_dataset(out):
            _check_same_text(made)
        elif packs:
            if config.validate_only and (Corpus.of([source], how).size_hint() or 0) > _TRIED:
                raise ConfigError(
                    f"--validate-only counts the tokens of texts of up to {_TRIED >> 20} MiB, but {source} is larger",
                    "make a dataset from it first, with tinygpt2 pregenerate",
                )
            pregenerate(made)
        # a barrier instead of this loop would time out after some minutes
        silent_until = time.monotonic() + _PATIENCE
        while not is_packed_dataset(out):
            time.sleep(0.2)
            if time.monotonic() > silent_until:
                silent_until = math.inf
                sys.stderr.write(f"waiting until process 0 has packed {source} into {out}: every machine must see it\n")
        return str(out)

    def evaluated(
        self, data: PackedDataset, model: GPT2Config, config: TrainOptions, positions: int | None = None
    ) -> Blocks:
        """Return the blocks to evaluate on: `--eval-blocks` of the held-out ones.

        Args:
            positions: of a teacher that reads the same blocks.

        Raises:
            DataError, ConfigError: there are no such blocks, or they do not fit the model.
        """
        held_out = self._held_out(data, model, config, positions)
        used = config.evaluated_blocks(len(held_out), held_out.sequence_length)
        if used < len(held_out):
            say(f"evaluating on {used:,} of {len(held_out):,} held-out blocks; --eval-blocks all uses all")
        return held_out.spaced(used)

    def _held_out(self, data: PackedDataset, model: GPT2Config, config: TrainOptions, positions: int | None) -> Blocks:
        """Return the blocks of --eval-data, or those of the test split of the training dataset."""
        if config.eval_data is None:
            if not len(data.test) and (config.eval_every or config.early_stopping_patience):
                raise DataError(
                    f"the test split of {data.name} is empty: there are no blocks to evaluate on",
                    "add --eval-data with a held-out text",
                )
            return data.test
        if is_packed_dataset(Path(config.eval_data)):
            packed = load_packed_dataset(config.eval_data)
            check_fits(packed, model, data.manifest["tokenizer_fingerprint"], f"the model that learns {data.name}")
            check_length(packed, positions, f"the teacher of the model that learns {data.name}")
            if not len(packed.test):
                raise DataError(
                    f"the test split of {config.eval_data} is empty", "give the held-out text as --eval-data"
                )
            return packed.test
        with tempfile.TemporaryDirectory() as scratch:
            data.tokenizer().save_pretrained(scratch)
            keys = [*TextOptions.model_fields, *PairOptions.model_fields] if isinstance(config, PackOptions) else []
            read = {key: getattr(config, key) for key in keys}
            ends = data.manifest.get("append_eos", True) and data.manifest.get("eos_token_id") is not None
            whole = PackOptions(test_fraction=0, shuffle=False, append_eos=ends, **read)
            return load_packed_dataset(
                self.packed("eval-data", config.eval_data, scratch, data.sequence_length, config, whole)
            ).train


def check_packed(data: PackedDataset, config: FinetuneConfig) -> None:
    """Check that no option of `finetune` is given that only a text has.

    Raises:
        ConfigError: there is one.
    """
    length = config.sequence_length
    if length not in (None, data.sequence_length):
        raise ConfigError(
            f"--sequence-length {length}: the blocks of {data.name} have {data.sequence_length} tokens",
            "make a dataset with other blocks: tinygpt2 pregenerate",
        )
    for given in config.changed("test_fraction", "append_eos", "shuffle"):
        raise ConfigError(f"{given} has no effect on {data.name}, which is a dataset and not a text")


def documents_apart(
    data: PackedDataset, evaluated: Blocks, config: TrainOptions, weights: LossWeights
) -> tuple[PackedDataset, Blocks]:
    """With --document-mask, return dataset and blocks such that no token sees the documents before its own.

    Pairs are always apart.

    Raises:
        ConfigError: an option does not fit that, or nothing says where documents end.
    """
    end = data.manifest.get("eos_token_id") if data.manifest.get("append_eos", True) else None
    if config.document_mask and end is None and not data.train.divided:
        raise ConfigError(
            f"--document-mask: the documents of {data.name} do not end with an end-of-text token",
            "make the dataset without --no-append-eos, and with a tokenizer that has such a token",
        )
    if not (config.document_mask or data.train.divided):
        return data, evaluated
    what = "--document-mask" if config.document_mask else f"{data.name}, which has pairs,"
    if weights.attention or weights.relation:
        option = "--attention-weight" if weights.attention else "--relation-weight"
        raise ConfigError(f"{what} does not fit {option}: attention is compared in whole blocks", f"use {option} 0")
    if config.document_mask and isinstance(config, DistillConfig) and config.teacher_cache is not None:
        raise ConfigError(f"{what} does not fit --teacher-cache: it has whole blocks", "leave --teacher-cache out")
    if config.compile or config.compile_only:
        raise ConfigError(f"{what} does not fit --compile: documents have many lengths", "leave --compile out")
    if not config.document_mask or end is None:
        return data, evaluated
    return _apart(data, int(end)), evaluated.ending(int(end))


def _apart(data: PackedDataset, end: int) -> PackedDataset:
    members = tuple(_apart(member, end) for member in data.members)
    return replace(data, train=data.train.ending(end), test=data.test.ending(end), members=members)


def _check_same_text(made: PregenerateConfig) -> None:
    """Check that a text with another name or a later date than the one that a run has packed has the same content.

    Raises:
        ConfigError: it makes other blocks.
    """
    packed, text = Path(made.out), Path(made.source[0])
    files = text.rglob("*") if text.is_dir() else [text] if text.is_file() else []
    written = (packed / MANIFEST).stat().st_mtime
    if read_json(packed / MANIFEST)["sources"] == made.source and all(f.stat().st_mtime <= written for f in files):
        return
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch) / packed.name
        pregenerate(made.model_copy(update={"out": str(again), "resume": False}))
        if content_of(again) != content_of(packed):
            raise ConfigError(
                f"--resume: the text of --{packed.name} differs from the one that the run has packed in {packed}",
                "give the same text, or another --out",
            )


@contextmanager
def training_arithmetic(config: TrainOptions) -> Iterator[None]:
    """While the block runs, compute as training does: fast, and with --deterministic the same bits in every run."""
    if config.deterministic and on_cuda():
        cost = ", and float32 products without TF32, which take several times as long" * (config.precision == "fp32")
        say(f"--deterministic: slower sums in the backward pass{cost}")
    with repeatable(config.deterministic), fast_products(tf32=config.tf32):
        yield


@contextmanager
def training_setup(config: TrainOptions, weights: LossWeights) -> Iterator[TrainingSetup]:
    """Check options, machine and output directory, and make the accelerator, before anything is loaded.

    Raises:
        ConfigError: another run writes to the output directory, the run would overwrite files or continue another run,
            or the machine lacks a GPU or a compiler.
    """
    accelerator = _accelerator(config, weights)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            if not config.dry_run:
                stack.enter_context(only_writer(Path(config.out)))
            _check_start(config)
        accelerator.wait_for_everyone()  # no process writes before the check is done
        place = stack.enter_context(tempfile.TemporaryDirectory()) if config.dry_run else config.out
        yield TrainingSetup(accelerator, Path(place))


def _check_start(config: TrainOptions) -> None:
    if config.precision == "fp16" and not on_cuda():
        raise ConfigError("--precision fp16 needs a CUDA GPU", "use --precision bf16 or fp32 elsewhere")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if (config.compile or config.compile_only) and shutil.which(compiler) is None:
        raise ConfigError(
            f"--compile needs a C++ compiler: {compiler} was not found", "install it, or set CXX to another compiler"
        )
    load_tasks(config.eval_task, config.task_data)  # report a missing task before anything is loaded
    out = Path(config.out)
    run = out / RUN_FILE
    # a run that was interrupted while it packed a text has no config.yaml yet
    begun = run.is_file() or any(
        is_packed_dataset(out / name) or staging_path(out / name).is_dir() for name in PACKED_TEXTS
    )
    if config.resume and (begun or is_free(out)):
        remove_leftovers(out)
    if not (config.resume and begun):
        require_free(out, OTHER_OUT_OR_RESUME)
    elif run.is_file():
        check_same_run(config)


def _accelerator(config: TrainOptions, weights: LossWeights) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may train again with another precision
    ddp = DistributedDataParallelKwargs(
        # objectives that never reach the logits may leave the top of the student without gradients
        find_unused_parameters=not weights.predicts,
        gradient_as_bucket_view=True,  # else every gradient would be in memory twice
    )
    accelerator = Accelerator(
        kwargs_handlers=[ddp],
        cpu=current_device().type == "cpu",
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=list(config.report_to) or None,
        project_dir=config.out,
    )
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps  # overrides a launcher's file
    if len({*gather_object([config.precision])}) > 1:
        raise ConfigError("the GPUs of the machines differ, and so would the precision", "give it as --precision")
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
    if config.shard_optimizer:
        raise ConfigError("--shard-optimizer does not fit FSDP and DeepSpeed, which shard the state themselves")
    if deepspeed is not None and config.precision == "fp16":
        raise ConfigError(
            "--precision fp16 does not support DeepSpeed: it scales the losses by itself, and tinygpt2 would take its "
            "first overflow for a loss that diverged",
            "add --precision bf16 or fp32, or use DDP",
        )
    if config.quantize:
        raise ConfigError("--quantize needs whole matrices, but FSDP and DeepSpeed split them", "use DDP")
    if config.average_tail:
        raise ConfigError("--average-tail needs whole matrices, but FSDP and DeepSpeed split them", "use DDP")
    if config.max_minutes:
        raise ConfigError("--max-minutes does not support FSDP or DeepSpeed", "give the length as --max-steps")
    if config.dry_run and not config.validate_only:
        raise ConfigError("--compile-only and --plan do not support FSDP or DeepSpeed", "use DDP or a single process")


def tell_deepspeed(accelerator: Accelerator, config: TrainOptions) -> None:
    """If DeepSpeed is used, set the options it would read from a data loader; they override those in its file."""
    if accelerator.state.deepspeed_plugin is None:
        return
    options = accelerator.state.deepspeed_plugin.deepspeed_config
    options |= {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.grad_clip,
    }
    if options.get("zero_optimization", {}).get("stage") == 3:
        options["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # also gathers 32-bit ones


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed dropout from seed, step and process, so that checkpoints need not hold the state of the generators."""
    number = int.from_bytes(hashlib.blake2b(f"{seed} {step} {process}".encode(), digest_size=7).digest())
    # torch.manual_seed takes a millisecond, because it looks for every kind of device
    torch.default_generator.manual_seed(number)
    if (kind := current_device().type) != "cpu":
        (torch.cuda if kind == "cuda" else torch.mps).manual_seed(number)
