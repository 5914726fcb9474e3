"""What a run was started with, and whether `--resume` continues it: the same command, mathematics, data and models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tinygpt2.config.base import extra, flag_name
from tinygpt2.config.common import RUN
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import TrainOptions, dataset_shares, length_options
from tinygpt2.config.yaml_files import read_yaml
from tinygpt2.data.layout import is_packed_dataset
from tinygpt2.data.mixture import content_of_datasets
from tinygpt2.errors import ConfigError
from tinygpt2.models.configuration import is_model_config, preset_names
from tinygpt2.models.directory import weight_files
from tinygpt2.objectives.stored import find_predictions
from tinygpt2.runtime.cpu import has_bf16_units
from tinygpt2.runtime.devices import DTYPES, chosen_precision, current_device, has_fast_bf16
from tinygpt2.training.schedule import learning_rate, warmup_steps
from tinygpt2.training.state import RECORD_FILE, RUN_FILE, RunState
from tinygpt2.utils.files import read_json, sha256_of, write_json, write_text
from tinygpt2.utils.hub import local_directory
from tinygpt2.utils.progress import say

T = TypeVar("T", bound=TrainOptions)

_DATASETS, _MODELS = ("data", "eval_data"), ("model_config", "model", "student", "teacher")


def as_begun(config: T) -> T:
    """With --resume, return the options with the run's optimizer, rate and schedule in place of those not given.

    So a run can be continued after a default or a rule has changed.
    """
    file = Path(config.out) / RUN_FILE
    if not (config.resume and file.is_file()):
        return config
    earlier, given = read_yaml(file), {key for key in config.model_fields_set if getattr(config, key) is not None}
    keys = ("optimizer", "learning_rate", "lr_schedule")
    kept: dict[str, Any] = {key: earlier[key] for key in keys if key in earlier and key not in given}
    return config.model_copy(update=kept)


def with_precision(config: T) -> T:
    """Return the options of a run with a precision in place of `auto`; call it once the device is chosen.

    With --resume it is the precision that the run was begun with, so that a run can be continued after the default
    has changed.
    """
    if config.precision != "auto":
        if config.precision == "bf16":
            _tell_slow_bf16()
        return config
    file = Path(config.out) / RUN_FILE
    begun = read_yaml(file).get("precision") if config.resume and file.is_file() else None
    if begun not in DTYPES:
        begun = chosen_precision("auto")
        _tell_precision(current_device().type, begun)
    return config.model_copy(update={"precision": begun})


@cache  # once in a process, which may train several times
def _tell_precision(device: str, precision: str) -> None:
    if device == "cuda":
        say(f"training in {precision} on this GPU; --precision fp32 trains in float32")
    elif device == "cpu" and has_bf16_units():
        say("this CPU has units for bfloat16: --precision bf16 trains about 1.7 times as fast as float32")


@cache
def _tell_slow_bf16() -> None:
    if not has_fast_bf16(current_device()):
        better = "fp16" if current_device().type == "cuda" else "fp32"
        say(f"this machine multiplies bfloat16 slowly: --precision {better} is faster")


def record_run(config: TrainOptions) -> None:
    """Write a run's options to config.yaml, and its command, version and the fingerprints of its inputs to run.json.

    Every input is compared by its content when the run resumes, so that it may move. A resumed run keeps the
    fingerprints that were recorded when it started.
    """
    from tinygpt2 import __version__

    out = Path(config.out)
    content = (earlier_record(out) if config.resume else {}).get("content")
    record = {"command": _command(config), "version": __version__, "content": content or _contents(config)}
    write_text(out / RUN_FILE, config.to_yaml())  # first: a run that is killed in between can be resumed
    write_json(out / RECORD_FILE, record)


def record_end(out: Path, **end: Any) -> None:
    """Add to run.json how a run ended: its `result`, or the message of the error by which it `failed`."""
    write_json(out / RECORD_FILE, earlier_record(out) | end)


def earlier_record(out: Path) -> dict[str, Any]:
    """Return the content of a run's run.json; empty if an older version began the run."""
    record: dict[str, Any] = read_json(out / RECORD_FILE) if (out / RECORD_FILE).is_file() else {}
    return record


def check_schedule(
    config: TrainOptions,
    state: RunState,
    steps: Callable[[TrainOptions], int],
    peak: Callable[[TrainOptions], float],
) -> None:
    """Check that a resumed run may have the length and the peak learning rate that it now has.

    Another length is possible if the learning rates of the steps that are done are the same for both. So a run whose
    schedule is constant, or wsd and not yet decaying, can be made longer; not any more if something has begun that
    belongs to the end of a run.

    Args:
        steps, peak: return the number of steps and the peak rate that options mean for this run.

    Raises:
        ConfigError: the learning rates differ, more steps are done than the run may now have, or its end has begun.
    """
    earlier = read_yaml(Path(config.out) / RUN_FILE)
    before = config.model_copy(update={key: earlier.get(key) for key in (*length_options(), "learning_rate")})
    if peak(before) != peak(config):
        raise _differs("--learning-rate", Path(config.out))
    if before.max_minutes != config.max_minutes:
        raise _differs("--max-minutes", Path(config.out))
    if config.max_minutes is not None or steps(before) == steps(config):
        return
    total = steps(config)
    rates = [
        [learning_rate(step, end, config, peak(config), state.warmup) for step in range(state.step)]
        for end in (steps(before), total)
    ]
    if rates[0] != rates[1] or total < state.step:
        raise ConfigError(
            f"--resume: the run has {steps(before)} steps, and {state.step} of them are done with a learning rate that "
            f"does not fit a run of {total} steps (--max-steps, --max-tokens, --num-epochs)",
            "keep the length; only a run with --lr-schedule constant, or wsd before its decay, can be made longer",
        )
    if begun := _begun_at(config, max(state.step / end for end in (steps(before), total))):
        raise ConfigError(
            f"--resume: {begun} has begun, so a run of {steps(before)} steps cannot become one of {total}",
            "keep the length",
        )
    if state.warmup not in (None, warmup_steps(total, config)):
        say(f"the run now has {total} steps instead of {steps(before)}, and keeps its warm-up of {state.warmup} steps")


def _begun_at(config: TrainOptions, share: float) -> str | None:
    """Return the option that has begun to take effect when this share of a run is over, and would not have later."""
    if config.average_tail and share > 1 - config.average_tail + 1e-9:
        return "--average-tail"
    if getattr(config, "replay", 0) and getattr(config, "replay_schedule", "constant") != "constant" and share:
        return "--replay-schedule"
    return "--quantize-from" if config.quantize and 0 < config.quantize_from <= share + 1e-9 else None


def _differs(options: str, out: Path) -> ConfigError:
    return ConfigError(
        f"--resume: {options} differ from the run in {out}",
        f"use the options in {out / RUN_FILE}, or give another --out",
    )


def check_same_run(config: TrainOptions) -> None:
    """Check that a run continues the one in its output directory. `loop` checks its length and its global batch.

    Raises:
        ConfigError: the directory belongs to another command, or options or inputs differ that change the results.
    """
    out = Path(config.out)
    earlier, record = read_yaml(out / RUN_FILE), earlier_record(out)
    command = record.get("command") or _command_of(earlier)
    if command != _command(config):
        raise ConfigError(
            f"--resume: {out / RUN_FILE} was written by a different command, {command}", "give another --out"
        )
    changed = changed_mathematics(config, earlier, record.get("content"))
    if changed:
        raise _differs(", ".join(changed), out)


def changed_mathematics(config: TrainOptions, earlier: dict[str, Any], content: dict[str, Any] | None) -> list[str]:
    """Return the options that differ from those of an earlier run and change the results of a resumed run.

    Args:
        config: the options now.
        earlier: the options of the run; one that it lacks, because an older version wrote it, had its default.
        content: the fingerprints of the run's inputs. Without them, which older versions did not write, the names of
            the inputs are compared.
    """
    now = config.model_dump(mode="json", by_alias=True)
    # Checkpoints.resume checks the global batch, `check_schedule` the length, and the rate if its rule is used
    free = {"out", "micro_batch_size", "gradient_accumulation_steps", "batch_tokens", *length_options()}
    free |= {*_DATASETS, *_MODELS} if content is not None else set()
    free |= {"learning_rate"} if None in (now["learning_rate"], earlier.get("learning_rate")) else set()
    # the held-out loss decides how much text is sampled
    used = {"eval_every", "eval_blocks"} if getattr(config, "fraction_growth", 0) else set()
    keys = [key for key, field in config.options().items() if extra(field, "panel") != RUN or key in used]
    keys = [key for key in keys if key not in free]
    recipe = {"recipe": earlier["recipe"]} if "recipe" in earlier else {}
    defaults = {key: field.default for key, field in config.options().items()} | config.layered(recipe)
    changed = [flag_name(key) for key in keys if earlier.get(key, defaults[key]) != now[key]]
    if content is not None:
        found = _contents(config)
        changed += [flag_name(key) for key in {**content, **found} if content.get(key) != found.get(key)]
    # the cache's directory may change, but not whether there is one: cached states are rounded
    cached = [bool(options.get("teacher_cache")) for options in (earlier, now)]
    changed += ["--teacher-cache"] * (cached[0] != cached[1] and "--teacher-cache" not in changed)
    kinds = [options.get("teacher_cache_kind") or "states" for options in (earlier, now)]
    return changed + ["--teacher-cache-kind"] * (kinds[0] != kinds[1] and now.get("teacher") is not None)


def _command(config: TrainOptions) -> str:
    return type(config).__name__.removesuffix("Config").lower()


def _command_of(options: dict[str, Any]) -> str:
    """Return the command that wrote a config.yaml, for runs without a run.json."""
    return "distill" if "student" in options else "pretrain" if "model_config" in options else "finetune"


def _contents(config: TrainOptions) -> dict[str, str]:
    """Return the fingerprint of every input of a run, by the name of its option.

    A text has none: it is packed in the run's directory, and compared when it is packed. Neither has a dataset that
    the caller of the library passes: checkpoints compare its content.
    """
    given = {key: value for key, value in config.model_dump(by_alias=True).items() if isinstance(value, str)}
    if not getattr(config, "needs_teacher", True):
        given.pop("teacher", None)
    names = {key: getattr(config, key) for key in _DATASETS if getattr(config, key, None)}
    found = {
        key: content_of_datasets(value)
        for key, value in names.items()
        if all(is_packed_dataset(Path(name)) for name in dataset_shares(value))
    }
    if isinstance(config, DistillConfig) and config.from_cache_alone and "data" in found:
        root, kind = Path(config.teacher_cache or ""), config.teacher_cache_kind
        cache = find_predictions(root, found["data"], kind, config.temperature)
        found["teacher_cache"] = cache.path.name  # its fingerprint
    models = {key: [given[key]] for key in _MODELS if key in given}
    if isinstance(config, DistillConfig) and len(config.teachers) > 1 and config.needs_teacher:
        models["teacher"] = config.teachers
    return found | {key: " ".join(_model_content(one, key, config) for one in names) for key, names in models.items()}


def _model_content(name: str, role: str, config: TrainOptions) -> str:
    """Return the fingerprint of a model's weights and configuration, or of a configuration file."""
    if role in ("model_config", "student") and is_model_config(name):
        return f"preset {name}" if name in preset_names() else sha256_of(Path(name))
    directory = local_directory(name, role, allow_pickle=config.allow_pickle, weights=True)
    files = [*weight_files(directory, allow_pickle=config.allow_pickle), directory / "config.json"]
    sums = [sha256_of(file) for file in files if file.is_file()]  # what is missing is an error when the model is loaded
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()
