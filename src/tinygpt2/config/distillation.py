"""Options of `distill`, and recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from tinygpt2.config.base import extra, flag_name, option, required
from tinygpt2.config.common import OBJECTIVES, OPTIMISATION, OWN_TEXT, RUN
from tinygpt2.config.decoding import OwnTextOptions
from tinygpt2.config.models import SpanOptions
from tinygpt2.config.training import TrainOptions
from tinygpt2.config.yaml_files import built_in_recipes, read_yaml
from tinygpt2.errors import ConfigError, listed
from tinygpt2.utils.suggestions import did_you_mean

PredictionLoss = Literal[
    "soft_ce", "forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation"
]
OwnTextLoss = Literal[
    "soft_ce", "forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation", "ce",
    "policy_gradient",
]  # fmt: skip
HiddenScale = Literal["none", "variance"]
HeadMap = Literal["equal", "average"]
TeacherDtype = Literal["fp32", "bf16"]
SparseKind = Literal["samples", "top"]
CacheKind = Literal["states", "samples", "top"]


class DistillConfig(SpanOptions, OwnTextOptions, TrainOptions):
    """Options of `distill`. A recipe sets objectives and optimisation; an option that is given wins over it.

    Sources: TinyGPT2 (attention, hidden states, soft labels), DistilGPT2 (cosine, temperature).
    """

    shown_defaults: ClassVar[dict[str, str]] = {
        "num_epochs": "1 to 4, from student and data",
        "learning_rate": "from the student's width",
    }
    teacher: str | list[str] | None = option(
        "Teacher: a local directory or a Hub id. Repeat it for several: the student learns the mean of their "
        "probabilities.",
        default=None,
        repeated=True,
        path=True,
        metavar="PATH|ID",
        required="unless --teacher-cache holds its predictions, or only --ce-weight is above 0",
    )
    student: str | None = option(
        "Student: a model's directory or Hub id, or for random weights a preset or a configuration file.",
        default=None,
        path=True,
        metavar="PATH|ID|PRESET",
        required="without --plan",
    )
    data: str | list[str] = option(
        "Pregenerated dataset. Repeat it to train on several; DIR:0.7 gives each a share of the tokens.",
        repeated=True,
        path=True,
    )
    teacher_dtype: TeacherDtype = option(
        "Number format of the teacher's weights. With a 16-bit --precision, its linear layers have that one anyway.",
        default="fp32",
        panel=OPTIMISATION,
    )
    teacher_cache: str | None = option(
        "Directory that caches the teacher's outputs for later epochs and other students.",
        default=None,
        panel=RUN,
        path=True,
    )
    teacher_cache_kind: CacheKind | None = option(
        "What the cache holds: final hidden states, sampled tokens or the likeliest tokens. The last two take 200 "
        "bytes a token and serve forward KL at one temperature. When they are complete, --teacher is not needed.",
        default=None,
        panel=RUN,
        shown="states; without --teacher, what is there",
    )
    recipe: str = option(
        "Objectives and optimisation: default, tinygpt2, distilgpt2, truncation, gkd, distillm, minillm, seqkd or a "
        "YAML file.",
        default="default",
        path=True,
        metavar="RECIPE|PATH",
    )
    attention_weight: float = option(
        "Weight of the squared error of the attention scores.", default=0.0, panel=OBJECTIVES, ge=0
    )
    head_map: HeadMap = option(
        "equal: student and teacher have the same number of heads. average: each student head learns the average of "
        "a group of teacher heads.",
        default="equal",
        panel=OBJECTIVES,
    )
    relation_weight: float = option(
        "Weight of MiniLM's relations (q-q, k-k, v-v) in the student's last layer.",
        default=0.0,
        panel=OBJECTIVES,
        ge=0,
    )
    hidden_weight: float = option(
        "Weight of the squared error of the hidden states.", default=0.0, panel=OBJECTIVES, ge=0
    )
    hidden_map: str = option(
        "Which hidden states of the student to compare: all, inner (all but the last) or numbers such as 0,3. "
        "3=10 compares state 3 with the teacher's state 10.",
        default="all",
        panel=OBJECTIVES,
        commas=True,
        metavar="all|inner|N,...",
    )
    hidden_scale: HiddenScale = option(
        "variance divides the error of a hidden state by the variance of the teacher's state.",
        default="none",
        panel=OBJECTIVES,
    )
    prediction_weight: float = option(
        "Weight of the loss between the predictions of student and teacher.", default=0.0, panel=OBJECTIVES, ge=0
    )
    prediction_loss: PredictionLoss = option(
        "Loss between the two predictions: cross-entropy with soft labels, forward or reverse KL, Jensen-Shannon, KL "
        "to a mixture of both (skewed), or total variation.",
        default="forward_kl",
        panel=OBJECTIVES,
    )
    skew: float = option(
        "Share of the teacher in the mixture of skewed_forward_kl, or of the student in that of skewed_reverse_kl.",
        default=0.1,
        panel=OBJECTIVES,
        gt=0,
        lt=1,
    )
    jsd_beta: float = option(
        "Weight of the teacher in jsd. 0 is forward KL and 1 is reverse KL.",
        default=0.5,
        panel=OBJECTIVES,
        ge=0,
        le=1,
    )
    temperature: float = option(
        "Divide both models' logits by this; the loss is multiplied by its square.",
        default=1.0,
        panel=OBJECTIVES,
        gt=0,
    )
    ce_weight: float = option(
        "Weight of the next-token cross-entropy on the data.", default=0.0, panel=OBJECTIVES, ge=0
    )
    cosine_weight: float = option(
        "Weight of 1 - cosine of the final hidden states. Needs equal hidden sizes.",
        default=0.0,
        panel=OBJECTIVES,
        ge=0,
    )
    on_policy_loss: OwnTextLoss | None = option(
        "Loss on sampled text: one between predictions, ce (the cross-entropy of a teacher's text), or "
        "policy_gradient (MiniLLM: the reverse KL of whole texts).",
        default=None,
        panel=OWN_TEXT,
        shown="--prediction-loss",
    )
    on_policy_weight: float | None = option(
        "Weight of this loss. Each position of sampled text counts as much as one of the data.",
        default=None,
        panel=OWN_TEXT,
        ge=0,
        shown="--prediction-weight",
    )
    layer_map: str = option(
        "Which teacher layer each student layer learns from: uniform, last, first or numbers such as 3,6,9,12.",
        default="uniform",
        panel=OBJECTIVES,
        commas=True,
        metavar="uniform|last|first|N,...",
    )
    plan: bool = option(
        "Report what fits into --budget-minutes, and exit. Times a few steps of --student or, without it, of several "
        "cuts of the teacher.",
        default=False,
        panel=RUN,
    )

    @property
    def teachers(self) -> list[str]:
        """The teachers that are given."""
        return [self.teacher] if isinstance(self.teacher, str) else list(self.teacher or [])

    @property
    def needs_teacher(self) -> bool:
        """Whether any objective with a weight above 0 uses the teacher."""
        weights = (self.attention_weight, self.relation_weight, self.hidden_weight)
        return any((*weights, self.prediction_weight, self.cosine_weight, self.own_text_weight))

    @property
    def own_text_weight(self) -> float:
        """The weight of the loss on sampled text; 0 without such text."""
        weight = self.prediction_weight if self.on_policy_weight is None else self.on_policy_weight
        return weight if self.samples_text else 0.0

    @property
    def losses(self) -> set[str]:
        """The names of the losses whose weight is above 0 and that compare predictions."""
        data = {self.prediction_loss} if self.prediction_weight else set()
        return data | ({self.on_policy_loss or self.prediction_loss} if self.own_text_weight else set())

    @property
    def has_reverse_kl(self) -> bool:
        """Whether a loss is the reverse KL, which is infinite for tokens that the teacher rules out."""
        names = {"reverse_kl", "policy_gradient", *(["jsd"] if self.jsd_beta == 1 else [])}
        return bool(self.losses & names)

    @property
    def from_cache_alone(self) -> bool:
        """Whether the run has no teacher but a cache of one's predictions."""
        given = self.teacher_cache is not None and self.teacher_cache_kind != "states"
        return given and self.teacher is None and self.needs_teacher

    @property
    def caches_predictions(self) -> bool:
        """Whether the teacher's cache holds predictions and not hidden states."""
        return self.teacher_cache_kind in ("samples", "top") or self.from_cache_alone

    @classmethod
    def layered(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Lay the given values over the recipe's."""
        return {**read_recipe(str(values.get("recipe", cls.model_fields["recipe"].default))), **values}

    def conflicts(self) -> Iterator[str]:
        """Require a student, an objective and what the objective needs."""
        yield from super().conflicts()
        if self.plan and self.teacher is None and self.student is None:
            yield "--teacher is required: --plan times cuts of it"
        if self.pilot and self.student is None:
            yield "--pilot needs --student: it trains it"
        if self.student is None and not self.plan:
            yield required("--student", type(self).model_fields["student"])
        if self.needs_teacher and self.teacher is None and not self.from_cache_alone:
            yield "--teacher is required: an objective with a weight above 0 compares the student with it"
        if not self.needs_teacher and not self.ce_weight:
            yield "all objectives have a weight of 0: there is nothing to learn"
        inside = [
            flag_name(name) for name in ("attention_weight", "relation_weight", "hidden_weight") if getattr(self, name)
        ]
        for given in self.changed("layer_map") if not inside else []:
            yield f"{given} has no effect: no objective compares inner layers"
        if self.layer_map not in ("uniform", "last", "first") and not re.fullmatch(r"\d+(,\d+)*", str(self.layer_map)):
            yield f"--layer-map: expected uniform, last, first or numbers such as 3,6,9,12, got {self.layer_map!r}"
        states = r"\d+(=\d+)?"
        if self.hidden_map not in ("all", "inner") and not re.fullmatch(f"{states}(,{states})*", str(self.hidden_map)):
            yield f"--hidden-map: expected all, inner or numbers such as 0,3 or 0,3=10, got {self.hidden_map!r}"
        losses = " and ".join(sorted(self.losses or {self.prediction_loss}))
        unused = [name for name, kind in (("skew", "skewed"), ("jsd_beta", "jsd")) if kind not in losses]
        for given in self.changed(*unused):
            yield f"{given} has no effect on --prediction-loss {losses}"
        yield from self._several_teachers_conflicts(inside)
        for given in self.changed("head_map") if not self.attention_weight else []:
            yield f"{given} has no effect while --attention-weight is 0"
        for given in self.changed("hidden_map", "hidden_scale") if not self.hidden_weight else []:
            yield f"{given} has no effect while --hidden-weight is 0"
        for given in self.changed("teacher_dtype") if not self.needs_teacher else []:
            yield f"{given} has no effect: no objective uses the teacher"
        if self.teacher_cache is not None and (inside or not self.needs_teacher):
            why = f"{inside[0]} needs other states" if inside else "no objective uses the teacher"
            held = "predictions" if self.caches_predictions else "final hidden states"
            yield f"--teacher-cache holds only the teacher's {held}: {why}"
        yield from self._cache_conflicts()
        if self.samples_text:
            yield from self._own_text_conflicts()

    def _own_text_conflicts(self) -> Iterator[str]:
        if not self.own_text_weight:
            yield "--on-policy-fraction has no effect while --on-policy-weight is 0"
        if self.teacher_cache is not None:
            yield "--teacher-cache holds nothing of text that is sampled later: it excludes --on-policy-fraction"
        loss, ours = self.on_policy_loss, (self.sample_temperature, self.temperature)
        if loss == "ce" and self.sampler != "teacher":
            yield "--on-policy-loss ce learns nothing from text of the student: use --sampler teacher"
        if self.reuses_text and self.sampler == "mixture" and loss != "policy_gradient":
            yield "--sampler mixture with --replay or --steps-per-sample needs --on-policy-loss policy_gradient"
        if self.fraction_growth and not self.eval_every:
            yield "--fraction-growth reacts to the held-out loss: it needs --eval-every"
        if loss == "policy_gradient" and self.sampler == "teacher":
            yield "--on-policy-loss policy_gradient judges text of the student: use --sampler student or mixture"
        for given in self.changed("normalise_returns", "clip_ratio") if loss != "policy_gradient" else []:
            yield f"{given} has no effect without --on-policy-loss policy_gradient"
        if (loss == "policy_gradient" or self.sampler == "mixture") and ours != (1, 1):
            yield "--sample-temperature and --temperature have to be 1 with policy_gradient and --sampler mixture"
        if self.on_policy_fraction == 1 and self.ce_weight:
            yield "--ce-weight has no effect with --on-policy-fraction 1: it is the cross-entropy of the data's blocks"

    def _several_teachers_conflicts(self, inside: list[str]) -> Iterator[str]:
        """Several teachers share only their predictions."""
        if len(self.teachers) < 2:
            return
        states = [*inside, *(["--cosine-weight"] if self.cosine_weight else [])]
        if states:
            yield f"a student can only learn the predictions of several teachers: set {listed(states)} to 0"
        if self.teacher_cache is not None:
            yield "--teacher-cache holds the outputs of one teacher, but --teacher is given several times"
        if self.student is None:
            yield "--student is required with several teachers: there is no single teacher to cut it from"

    def _cache_conflicts(self) -> Iterator[str]:
        """Check that the objectives can be computed from a cache of predictions."""
        if self.teacher_cache is None and self.teacher_cache_kind is not None:
            yield f"--teacher-cache-kind {self.teacher_cache_kind} has no effect without --teacher-cache"
        if self.from_cache_alone and self.teacher_dtype != "fp32":
            yield f"--teacher-dtype {self.teacher_dtype} has no effect without --teacher"
        if not self.caches_predictions:
            return
        if self.prediction_loss != "forward_kl":
            yield (
                "--teacher-cache with samples or top serves --prediction-loss forward_kl alone: "
                f"{self.prediction_loss} needs the probabilities of all tokens"
            )
        if self.cosine_weight:
            yield "--teacher-cache with samples or top holds no hidden states, which --cosine-weight compares"


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe: a built-in one by its name, or a YAML file.

    Raises:
        ConfigError: there is no such recipe, or it sets an option that is neither an objective nor optimisation.
    """
    built_in = built_in_recipes()
    path = built_in.get(name, Path(name).expanduser())
    if name not in built_in and not path.is_file():
        raise ConfigError(
            f"no recipe {name!r}: there is no such file{did_you_mean(name, built_in)}",
            f"the built-in recipes are {', '.join(sorted(built_in))}",
        )
    values = read_yaml(path)
    allowed = {
        key
        for key, field in DistillConfig.options().items()
        if extra(field, "panel") in (OBJECTIVES, OPTIMISATION, OWN_TEXT)
    }
    allowed.add("eval_every")  # for a share of sampled text that reacts to the held-out loss
    if others := sorted(set(values) - allowed):
        raise ConfigError(
            f"recipe {name}: {', '.join(others)}: a recipe sets only objectives, sampled text and optimisation"
        )
    return values
