"""--max-minutes: the steps that fit are found by a clock, and the schedule ends with the last one. The clock is fake."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tinygpt2 import PretrainConfig
from tinygpt2.config.training import TrainOptions
from tinygpt2.errors import ConfigError
from tinygpt2.training import loop
from tinygpt2.training.job import prepared_job
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.resuming import record_run
from tinygpt2.training.schedule import Plan, learning_rate, warmup_steps
from tinygpt2.training.state import RunState
from tinygpt2.training.step import Step
from tinygpt2.training.throughput import ThroughputMeter, TimeLimit

PEAK = 1e-3


class Clock:
    """A clock that goes on when a model computes: by `step()` seconds for a training pass, by `batch` without one."""

    def __init__(self, step: Callable[[float], float], batch: float = 0.5, start: float = 0.0) -> None:
        self.now, self.step, self.batch = start, step, batch

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunState]:
    """Run the loop with a clock; `start` seconds pass before it begins."""
    forward = Step.forward

    def with_clock(config: PretrainConfig, clock: Clock, start: float = 0.0, dies_at: float = 1e9) -> RunState:
        def timed(self: Step, *arguments: object, **more: object) -> object:
            clock.now += clock.step(clock.now) if self.training else clock.batch
            if clock.now > dies_at:
                raise OSError("killed")
            return forward(self, *arguments, **more)

        monkeypatch.setattr(Step, "forward", timed)
        with prepared_job(config) as (job, accelerator):
            job.clock, job.started = clock, clock.now - start
            if not config.resume:
                record_run(job.recorded_config())
            state, _ = loop.run_loop(job, accelerator, Step(job.model, None, job.weights, config))
            return state

    return with_clock


def options(teacher: Path, data: Path, out: Path, **more: object) -> PretrainConfig:
    base = {"model": str(teacher), "data": str(data), "out": str(out), "micro_batch_size": 2, "log_every": 1}
    base |= {"learning_rate": PEAK, "warmup_ratio": 0.1, "max_minutes": 2, "eval_blocks": 4, "save_every": 20}
    return PretrainConfig(**{**base, **more})


def rates(out: Path) -> list[float]:
    return [row["learning_rate"] for row in read_metrics(out)]


@pytest.mark.parametrize(
    ("step", "steps", "schedule"),
    [
        (lambda now: 1.0, range(95, 105), "cosine"),
        (lambda now: 1.0 if now < 60 else 2.0, range(68, 80), "linear"),
        (lambda now: 1.0 if now < 60 else 0.5, range(143, 158), "wsd"),
        (lambda now: 1.0 if now < 60 else 2.0, range(68, 80), "plateau"),
    ],
    ids=["steady", "slower", "faster", "slower with a plateau"],
)
def test_the_schedule_ends_with_the_time(
    teacher: Path, data: Path, tmp_path: Path, run: Callable, step: Callable, steps: range, schedule: str
) -> None:
    clock = Clock(step)
    state = run(options(teacher, data, tmp_path / "m", lr_schedule=schedule), clock, start=4.0)
    assert state.step in steps
    used = state.used_seconds
    assert used == clock.now + 4
    assert 105 < used < 117  # the rest is for checkpoint, model and curves
    found = rates(tmp_path / "m")
    assert len(found) == state.step == state.plan["steps"]
    assert max(found) == PEAK
    top = max(number for number, rate in enumerate(found) if rate == PEAK)
    assert all(later <= earlier for earlier, later in zip(found[top:], found[top + 1 :], strict=False))
    assert Plan(**state.plan).at(state.step - 1) > 0.95 * state.plan["length"]
    assert found[-1] < (0.25 if schedule == "wsd" else 0.06) * PEAK
    assert state.warmup == warmup_steps(state.plan["length"], TrainOptions(out="o", warmup_ratio=0.1))


def test_what_is_said(
    teacher: Path, data: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loop, "say", said.append)
    run(options(teacher, data, tmp_path / "m"), Clock(lambda now: 1.0 if now < 60 else 3.0))
    first, *corrections = said
    assert first.startswith("--max-minutes 2: about 10")
    assert first.endswith(" steps")
    assert corrections
    assert all("steps instead of" in line for line in corrections)
    assert len(corrections) < 8
    said.clear()
    run(options(teacher, data, tmp_path / "n"), Clock(lambda now: 1.0))
    assert len(said) == 1


def test_evaluations_during_the_run_are_paid_from_the_time(
    teacher: Path, data: Path, tmp_path: Path, run: Callable
) -> None:
    clock = Clock(lambda now: 1.0, batch=2.0)  # 4 seconds for each evaluation
    state = run(options(teacher, data, tmp_path / "m", eval_every=10), clock)
    assert 104 < state.used_seconds < 117
    assert 60 < state.step < 80
    assert state.eval_seconds == 4 * (2 + (state.step - 1) // 10)  # before, every 10 steps, and at the end


def test_a_resumed_run_goes_on_with_its_time_and_its_plan(
    teacher: Path, data: Path, tmp_path: Path, run: Callable
) -> None:
    config = options(teacher, data, tmp_path / "m")
    with pytest.raises(OSError, match="killed"):
        run(config, Clock(lambda now: 1.0), dies_at=70)
    before = rates(tmp_path / "m")
    state = run(config.model_copy(update={"resume": True}), Clock(lambda now: 1.0, start=1000.0), start=5.0)
    after = rates(tmp_path / "m")
    assert after[:60] == before[:60]  # it goes on at step 60
    assert 105 < state.used_seconds < 117
    assert 90 < state.step < 106  # the second start took time
    assert after[-1] < 0.03 * PEAK
    again = run(config.model_copy(update={"resume": True}), Clock(lambda now: 1.0))
    assert again.step == state.step
    with pytest.raises(ConfigError, match="--max-minutes differ"):
        run(config.model_copy(update={"resume": True, "max_minutes": 9}), Clock(lambda now: 1.0))


def test_early_stopping_ends_before_the_time(teacher: Path, data: Path, tmp_path: Path, run: Callable) -> None:
    wild = {"learning_rate": 0.5, "warmup_ratio": 0, "eval_every": 2, "early_stopping_patience": 2}
    state = run(options(teacher, data, tmp_path / "m", **wild), Clock(lambda now: 1.0))
    assert state.step < 60
    assert state.worse == 2


def test_one_step_is_taken_whatever_the_time(teacher: Path, data: Path, tmp_path: Path, run: Callable) -> None:
    state = run(options(teacher, data, tmp_path / "m", max_minutes=0.01), Clock(lambda now: 100.0))
    assert state.step == 1


def test_a_checkpoint_at_least_every_ten_minutes(teacher: Path, data: Path, tmp_path: Path, run: Callable) -> None:
    base = {"max_minutes": None, "max_steps": 10, "keep": 9}
    for name, every, expected in (("m", None, ["step-10", "step-4", "step-9"]), ("n", 1000, ["step-10"])):
        run(options(teacher, data, tmp_path / name, save_every=every, **base), Clock(lambda now: 200.0))
        assert sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) == expected


def test_a_plan_that_does_not_change_has_every_step_at_its_number() -> None:
    plan = Plan.of(977)
    assert [plan.at(step) for step in range(977)] == list(range(977))
    assert plan.changed(5, 977) is plan


def test_a_changed_plan_neither_jumps_nor_goes_back_and_ends_with_the_last_step() -> None:
    plan, places = Plan.of(100), []
    for step, steps in ((30, 50), (45, 300), (200, 210)):
        places += [plan.at(number) for number in range(len(places), step)]
        assert plan.changed(step, steps).at(step) == pytest.approx(plan.at(step))
        plan = plan.changed(step, steps)
    places += [plan.at(number) for number in range(len(places), plan.steps)]
    assert all(later > earlier for earlier, later in pairwise(places))
    assert places[-1] < 100
    assert plan.at(plan.steps) == pytest.approx(100)
    flat = TrainOptions(out="o", lr_schedule="constant", warmup_ratio=0.1)
    assert max(learning_rate(place, 100, flat, 2.0) for place in places) == 2.0


def test_what_fits_into_a_time() -> None:
    limit = TimeLimit(600, lambda: 100.0, None, 0)
    assert limit.steps(1.0, 41.0) == 600 - 100 - 12 - 41
    assert TimeLimit(600, lambda: 100.0, 10, 0).steps(0.5, 5.0) == 600 - 100 - 12 - 5
    assert TimeLimit(600, lambda: 595.0, None, 0).steps(1.0, 1.0) == 0
    assert TimeLimit(600, lambda: 100.0, None, 125_000_000).steps(1.0, 0.0) == 600 - 100 - 12 - 20


def test_the_first_step_says_nothing_of_the_speed() -> None:
    clock = Clock(lambda now: 0.0)
    meter = ThroughputMeter(RunState(4, "data"), 100, None, clock)
    clock.now = 60.0
    meter.stepped()
    assert meter.step_seconds is None
    assert "eta" not in meter.note({"loss": 1.0}, meter.lap(1), left=9)
    for _ in range(3):
        clock.now += 2.0
        meter.stepped()
    assert meter.step_seconds == pytest.approx(2.0)
    assert meter.note({"loss": 1.0}, meter.lap(4), left=9).endswith("eta 18 s")
    with meter.paused(evaluating=True):
        clock.now += 50.0
    clock.now += 2.0
    meter.stepped()
    assert (meter.step_seconds, meter.eval_seconds) == (pytest.approx(2.0), 50.0)
    for _ in range(60):
        clock.now += 4.0
        meter.stepped()
    assert meter.step_seconds == pytest.approx(4.0, rel=0.01)
