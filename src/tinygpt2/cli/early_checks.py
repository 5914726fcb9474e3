"""Checks of paths, names and shapes that need no torch, so that a mistake is reported at once.

The commands check the same again, with the same functions: a session that comes from Python has no command line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tinygpt2.config.base import Config
from tinygpt2.config.common import OTHER_OUT, OTHER_OUT_OR_RESUME
from tinygpt2.config.compression import TruncateStudentConfig
from tinygpt2.config.data import PackOptions, PregenerateConfig, TrainTokenizerConfig
from tinygpt2.config.decoding import BenchConfig, GenerateConfig, SampleConfig
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.evaluation import EvaluateTextConfig, PplConfig
from tinygpt2.config.training import FinetuneConfig, PretrainConfig, TrainOptions, dataset_shares
from tinygpt2.config.workflows import ExportConfig, TeachConfig, VerifyConfig
from tinygpt2.errors import ModelError


def check_early(config: Config) -> None:
    """Check what can be checked without torch. Names that may be Hub ids are left to the command.

    Raises:
        ConfigError, DataError, ModelError: a path, a name or a shape is wrong.
    """
    if isinstance(config, TrainOptions):
        _check_training(config)
    elif isinstance(config, TruncateStudentConfig):
        _check_cut(config)
    elif isinstance(config, PregenerateConfig):
        _check_pregenerate(config)
    elif isinstance(config, TrainTokenizerConfig):
        _require_free(config.out, OTHER_OUT)
        _check_sources(config.source)
    elif isinstance(config, PplConfig) and not config.list_tasks:
        _check_tasks(config.task, config.task_data)
        for name in [*config.model, *([config.reference] if config.reference else [])]:
            _local_causal_lm(config, name)
    elif isinstance(config, GenerateConfig):
        for name in [*config.model, *([config.draft] if config.draft else [])]:
            _local_causal_lm(config, name)
        if config.prompt_file is not None:
            _read_text(config.prompt_file)
    elif isinstance(config, EvaluateTextConfig):
        _check_datasets(config.data)
        for name in [*config.model, config.judge]:
            _local_causal_lm(config, name)
    elif isinstance(config, SampleConfig):
        _check_sample(config)
    elif isinstance(config, ExportConfig):
        _check_export(config)
    elif isinstance(config, BenchConfig):
        _check_bench(config)
    elif isinstance(config, TeachConfig):
        _check_datasets(config.data)
        _local_causal_lm(config, config.teacher, "teacher")
    elif isinstance(config, VerifyConfig):
        _check_verify(config)


def _check_training(config: TrainOptions) -> None:
    _check_tasks(config.eval_task, config.task_data)
    if not config.resume:
        _require_free(config.out, OTHER_OUT_OR_RESUME)
    _check_data(config)
    if isinstance(config, PretrainConfig) and config.shape is not None:
        _read_shape(config.shape)
    elif isinstance(config, PretrainConfig | FinetuneConfig):
        _local_model(config, config.model or "")
    elif isinstance(config, DistillConfig):
        for teacher in config.teachers * (config.needs_teacher or config.plan):
            _local_causal_lm(config, teacher, "teacher")
        if config.student is not None:
            _check_student(config, config.student)


def _check_student(config: DistillConfig, name: str) -> None:
    from tinygpt2.models.configuration import is_model_config

    if is_model_config(name):
        _read_shape(name)
    else:
        _local_model(config, name, "student")


def _check_data(config: TrainOptions) -> None:
    from tinygpt2.data.layout import is_packed_dataset

    names = list(dataset_shares(getattr(config, "data", [])))
    if isinstance(config, FinetuneConfig) and len(names) == 1 and not is_packed_dataset(Path(names[0])):
        _check_pairs(config)
        _check_sources(names)
    else:
        _check_datasets(names)
    if config.eval_data is not None and not is_packed_dataset(Path(config.eval_data)):
        _check_sources([config.eval_data])


def _check_datasets(names: str | list[str]) -> None:
    from tinygpt2.data.layout import dataset_folders

    for name in dataset_shares(names):
        dataset_folders(name)


def _check_cut(config: TruncateStudentConfig) -> None:
    from tinygpt2.compression.architectures import gpt2_settings
    from tinygpt2.compression.sizes import check_sizes
    from tinygpt2.data.layout import dataset_folders
    from tinygpt2.data.tokenizer import check_tokenizer
    from tinygpt2.models.configuration import GPT2_DEFAULTS

    _require_free(config.out, OTHER_OUT)
    if config.tokenizer is not None:
        check_tokenizer(config.tokenizer)
    settings = _local_model(config, config.teacher, "teacher", gpt2_settings)
    if settings is not None:
        check_sizes(config, SimpleNamespace(**(GPT2_DEFAULTS | settings)))
    if config.data is not None:
        dataset_folders(config.data)


def _check_pregenerate(config: PregenerateConfig) -> None:
    from tinygpt2.data.pregenerate import check_output
    from tinygpt2.data.tokenizer import check_tokenizer

    check_output(config)
    check_tokenizer(config.tokenizer)
    _check_pairs(config)
    _check_sources([*config.source, *(config.test_source or [])])
    if config.from_dataset is not None:
        _check_datasets(config.from_dataset)


def _check_pairs(config: PackOptions) -> None:
    from tinygpt2.data.corpus.pairs import PairReader

    PairReader.of(config)


def _check_sample(config: SampleConfig) -> None:
    from tinygpt2.data.pregenerate import check_output

    check_output(config)
    _local_causal_lm(config, config.model)
    if config.prompts is not None:
        _check_datasets(config.prompts)


def _check_export(config: ExportConfig) -> None:
    from tinygpt2.data.layout import is_packed_dataset
    from tinygpt2.exporting.outputs import check_output

    check_output(config)
    _local_model(config, config.model)
    if config.data is not None and not is_packed_dataset(Path(config.data)):
        _check_sources([config.data])


def _check_bench(config: BenchConfig) -> None:
    from tinygpt2.exporting.outputs import exported_format, require_engine

    for name in config.model:
        if (to := exported_format(Path(name))) is not None:
            require_engine(to)
        else:
            _local_causal_lm(config, name)


def _check_verify(config: VerifyConfig) -> None:
    from tinygpt2.data.layout import is_packed_dataset
    from tinygpt2.exporting.outputs import exported_format, require_packages
    from tinygpt2.models.directory import directory_to_verify, is_model_directory, nothing_to_verify

    if (to := exported_format(Path(config.path))) is not None:
        require_packages(to)
        return
    path = directory_to_verify(config.path)
    if path is not None and not is_model_directory(path) and not is_packed_dataset(path):
        raise nothing_to_verify(path)


def _require_free(out: str, hint: str) -> None:
    from tinygpt2.utils.files import require_free

    require_free(Path(out), hint)


def _check_sources(names: list[str]) -> None:
    from tinygpt2.data.corpus.sources import source_kind

    for name in names:
        source_kind(name)


def _check_tasks(names: list[str], data: str | None) -> None:
    if names:
        from tinygpt2.evaluation.task_files import check_tasks

        check_tasks(names, data)


def _read_shape(name: str) -> None:
    from tinygpt2.models.configuration import read_shape

    read_shape(name)


def _read_text(name: str) -> None:
    from tinygpt2.utils.files import read_text

    read_text(Path(name))


def _local_model(
    config: Any, name: str, role: str = "model", read: Callable[..., dict[str, Any]] | None = None
) -> dict[str, Any] | None:
    """Check a model's directory, and return the settings of the model; None for a Hub id.

    Args:
        read: returns the settings of a config.json; by default `check_settings`, which reads those of a GPT-2.
    """
    from tinygpt2.models.configuration import check_settings
    from tinygpt2.models.directory import no_weights, read_config_json, weight_files
    from tinygpt2.utils.hub import local_path

    directory = local_path(name, role)
    if directory is None:
        return None
    where = str(directory / "config.json")
    settings = (read or check_settings)(read_config_json(directory, role), where, ModelError)
    if not weight_files(directory, allow_pickle=config.allow_pickle):
        raise no_weights(name, directory, role)
    return settings


def _local_causal_lm(config: Any, name: str, role: str = "model") -> None:
    """Check a model's directory, whose architecture may be any that `transformers` has."""
    from tinygpt2.models.configuration import is_gpt2
    from tinygpt2.models.directory import no_weights, read_config_json, weight_files
    from tinygpt2.utils.hub import local_path

    directory = local_path(name, role)
    if directory is None or is_gpt2(read_config_json(directory, role)):
        _local_model(config, name, role)
    elif not weight_files(directory, allow_pickle=config.allow_pickle):
        raise no_weights(name, directory, role)
