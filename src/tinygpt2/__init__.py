"""Make GPT-2 small: cut a student out of a teacher, distil it, and measure how good it is.

Every command of the command line is a function here, with one configuration and one result:
`tinygpt2.distill(tinygpt2.DistillConfig(...))` does what `tinygpt2 distill ...` does and returns a `TrainResult`.
Names are imported when they are first used, so that `import tinygpt2` costs nothing. docs/api.md lists them all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygpt2.compression.importance import DepthImportance, RemovalRound
    from tinygpt2.compression.sizes import Shape
    from tinygpt2.compression.truncate import CutPerplexity, TruncateStudentResult, truncate_student
    from tinygpt2.config.compression import TruncateStudentConfig
    from tinygpt2.config.data import PregenerateConfig, TrainTokenizerConfig
    from tinygpt2.config.decoding import BenchConfig, GenerateConfig, SampleConfig
    from tinygpt2.config.distillation import DistillConfig
    from tinygpt2.config.evaluation import EvaluateTextConfig, PplConfig
    from tinygpt2.config.models import PresetsConfig
    from tinygpt2.config.training import FinetuneConfig, PretrainConfig
    from tinygpt2.config.workflows import (
        ExportConfig,
        PushConfig,
        QuickstartConfig,
        RunsConfig,
        ShowConfig,
        TeachConfig,
        VerifyConfig,
    )
    from tinygpt2.data.dataset import PackedDataset, from_map_style
    from tinygpt2.data.pregenerate import PregenerateResult, pregenerate
    from tinygpt2.data.tokenizer_training import TrainTokenizerResult, train_tokenizer
    from tinygpt2.decoding.generation import DraftFigures, GenerateResult, Generation, ModelStatistics, generate
    from tinygpt2.decoding.sampled_dataset import SampleResult, sample
    from tinygpt2.decoding.speed import BenchRow
    from tinygpt2.decoding.text_statistics import TextStatistics
    from tinygpt2.errors import (
        ConfigError,
        DataError,
        DivergedError,
        InterruptedRunError,
        MachineError,
        ModelError,
        TinyGPT2Error,
    )
    from tinygpt2.evaluation.fidelity import Fidelity, FidelityPart
    from tinygpt2.evaluation.named_tasks import TaskInfo, TaskList, list_tasks
    from tinygpt2.evaluation.perplexity import ppl
    from tinygpt2.evaluation.results import Paired, PplResult, PplRow
    from tinygpt2.evaluation.texts.own_text import EvaluateTextResult, ExcessError, TextEvaluation, evaluate_text
    from tinygpt2.exporting.bench import BenchResult, bench
    from tinygpt2.exporting.checks import ExportChecks
    from tinygpt2.exporting.export import ExportResult, export
    from tinygpt2.models import reference
    from tinygpt2.models.configuration import Preset, PresetList, presets
    from tinygpt2.planning.dry_run import CompiledStep, RunPlan, compile_step, plan_run
    from tinygpt2.training.step import Evaluation
    from tinygpt2.workflows.budget import BudgetPlan, Candidate, LossPrediction, plan_budget
    from tinygpt2.workflows.cuts.results import CutBits, CutCandidate, CutRounds, CutSearchResult, CutVocabulary
    from tinygpt2.workflows.cuts.scoring import CutScore
    from tinygpt2.workflows.cuts.search import cut_to_target
    from tinygpt2.workflows.model_verification import Agreement
    from tinygpt2.workflows.push import PushedFile, PushResult, push
    from tinygpt2.workflows.quickstart import quickstart
    from tinygpt2.workflows.quickstart_report import Gain, ModelSummary, QuickstartResult, QuickstartSizes
    from tinygpt2.workflows.runs import RunList, RunStatus, runs
    from tinygpt2.workflows.show import ShowResult, show
    from tinygpt2.workflows.teach import TeachResult, teach
    from tinygpt2.workflows.train import TrainResult, distill, finetune, pretrain
    from tinygpt2.workflows.verification import VerifyResult, verify

__version__ = "0.2.0"

_HOME = {
    "compression.importance": ["DepthImportance", "RemovalRound"],
    "compression.sizes": ["Shape"],
    "compression.truncate": ["CutPerplexity", "TruncateStudentResult", "truncate_student"],
    "config.compression": ["TruncateStudentConfig"],
    "config.data": ["PregenerateConfig", "TrainTokenizerConfig"],
    "config.decoding": ["BenchConfig", "GenerateConfig", "SampleConfig"],
    "config.distillation": ["DistillConfig"],
    "config.evaluation": ["EvaluateTextConfig", "PplConfig"],
    "config.models": ["PresetsConfig"],
    "config.training": ["FinetuneConfig", "PretrainConfig"],
    "config.workflows": [
        "ExportConfig",
        "PushConfig",
        "QuickstartConfig",
        "RunsConfig",
        "ShowConfig",
        "TeachConfig",
        "VerifyConfig",
    ],
    "data.dataset": ["PackedDataset", "from_map_style"],
    "data.pregenerate": ["PregenerateResult", "pregenerate"],
    "data.tokenizer_training": ["TrainTokenizerResult", "train_tokenizer"],
    "decoding.sampled_dataset": ["SampleResult", "sample"],
    "decoding.speed": ["BenchRow"],
    "decoding.generation": ["DraftFigures", "GenerateResult", "Generation", "ModelStatistics", "generate"],
    "decoding.text_statistics": ["TextStatistics"],
    "errors": [
        "ConfigError",
        "DataError",
        "DivergedError",
        "InterruptedRunError",
        "MachineError",
        "ModelError",
        "TinyGPT2Error",
    ],
    "evaluation.fidelity": ["Fidelity", "FidelityPart"],
    "evaluation.named_tasks": ["TaskInfo", "TaskList", "list_tasks"],
    "evaluation.perplexity": ["ppl"],
    "evaluation.results": ["Paired", "PplResult", "PplRow"],
    "evaluation.texts.own_text": ["EvaluateTextResult", "ExcessError", "TextEvaluation", "evaluate_text"],
    "exporting.bench": ["BenchResult", "bench"],
    "exporting.checks": ["ExportChecks"],
    "exporting.export": ["ExportResult", "export"],
    "models": ["reference"],
    "models.configuration": ["Preset", "PresetList", "presets"],
    "planning.dry_run": ["CompiledStep", "RunPlan", "compile_step", "plan_run"],
    "training.step": ["Evaluation"],
    "workflows.budget": ["BudgetPlan", "Candidate", "LossPrediction", "plan_budget"],
    "workflows.cuts.results": ["CutBits", "CutCandidate", "CutRounds", "CutSearchResult", "CutVocabulary"],
    "workflows.cuts.scoring": ["CutScore"],
    "workflows.cuts.search": ["cut_to_target"],
    "workflows.model_verification": ["Agreement"],
    "workflows.quickstart": ["quickstart"],
    "workflows.quickstart_report": ["Gain", "ModelSummary", "QuickstartResult", "QuickstartSizes"],
    "workflows.push": ["PushResult", "PushedFile", "push"],
    "workflows.runs": ["RunList", "RunStatus", "runs"],
    "workflows.show": ["ShowResult", "show"],
    "workflows.teach": ["TeachResult", "teach"],
    "workflows.train": ["TrainResult", "distill", "finetune", "pretrain"],
    "workflows.verification": ["VerifyResult", "verify"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Agreement",
    "BenchConfig",
    "BenchResult",
    "BenchRow",
    "BudgetPlan",
    "Candidate",
    "CompiledStep",
    "ConfigError",
    "CutBits",
    "CutCandidate",
    "CutPerplexity",
    "CutRounds",
    "CutScore",
    "CutSearchResult",
    "CutVocabulary",
    "DataError",
    "DepthImportance",
    "DistillConfig",
    "DivergedError",
    "DraftFigures",
    "EvaluateTextConfig",
    "EvaluateTextResult",
    "Evaluation",
    "ExcessError",
    "ExportChecks",
    "ExportConfig",
    "ExportResult",
    "Fidelity",
    "FidelityPart",
    "FinetuneConfig",
    "Gain",
    "GenerateConfig",
    "GenerateResult",
    "Generation",
    "InterruptedRunError",
    "LossPrediction",
    "MachineError",
    "ModelError",
    "ModelStatistics",
    "ModelSummary",
    "PackedDataset",
    "Paired",
    "PplConfig",
    "PplResult",
    "PplRow",
    "PregenerateConfig",
    "PregenerateResult",
    "Preset",
    "PresetList",
    "PresetsConfig",
    "PretrainConfig",
    "PushConfig",
    "PushResult",
    "PushedFile",
    "QuickstartConfig",
    "QuickstartResult",
    "QuickstartSizes",
    "RemovalRound",
    "RunList",
    "RunPlan",
    "RunStatus",
    "RunsConfig",
    "SampleConfig",
    "SampleResult",
    "Shape",
    "ShowConfig",
    "ShowResult",
    "TaskInfo",
    "TaskList",
    "TeachConfig",
    "TeachResult",
    "TextEvaluation",
    "TextStatistics",
    "TinyGPT2Error",
    "TrainResult",
    "TrainTokenizerConfig",
    "TrainTokenizerResult",
    "TruncateStudentConfig",
    "TruncateStudentResult",
    "VerifyConfig",
    "VerifyResult",
    "bench",
    "compile_step",
    "cut_to_target",
    "distill",
    "evaluate_text",
    "export",
    "finetune",
    "from_map_style",
    "generate",
    "list_tasks",
    "plan_budget",
    "plan_run",
    "ppl",
    "pregenerate",
    "presets",
    "pretrain",
    "push",
    "quickstart",
    "reference",
    "runs",
    "sample",
    "show",
    "teach",
    "train_tokenizer",
    "truncate_student",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'tinygpt2' has no attribute {name!r}")
    home = import_module(f"tinygpt2.{_MODULE[name]}")
    value = getattr(home, name) if hasattr(home, name) else import_module(f"{home.__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE])
