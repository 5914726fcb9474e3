"""Options of `quickstart`, `runs`, `show` and `verify`."""

from __future__ import annotations

from tinygpt2.config.base import Config, option
from tinygpt2.config.common import MAX_SEED
from tinygpt2.config.models import ModelOptions


class QuickstartConfig(Config):
    """Options of `quickstart`."""

    out: str = option(
        "Directory for all results. If it holds an interrupted quickstart, that one continues.",
        default="tinygpt2-quickstart",
        path=True,
    )
    seed: int = option("Seed of every random choice.", default=42, ge=0, le=MAX_SEED)


class RunsConfig(Config):
    """Options of `runs`."""

    path: str = option(
        "Directory that holds training runs, at any depth.", default=".", positional=True, path=True, shown="here"
    )


class ShowConfig(Config):
    """Options of `show`."""

    path: str = option("Directory of a training run.", positional=True, path=True)


class VerifyConfig(ModelOptions):
    """Options of `verify`."""

    path: str = option("Pregenerated dataset, model directory or Hub id.", positional=True, path=True)
    teacher: str | None = option(
        "Teacher model: also report which tensors of the student are exact copies of the teacher's.",
        default=None,
        path=True,
    )
