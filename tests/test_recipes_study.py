"""The study of recipes: its plan resolves, its runs see the same tokens, its tables say what the lines say."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml

from tinygpt2.compression.sizes import sizes_of
from tinygpt2.config.compression import TruncateStudentConfig
from tinygpt2.config.distillation import DistillConfig, read_recipe
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import load_packed_dataset

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


load("result_lines")  # which recipes.py imports by name
study, report = load("recipes"), load("recipes_report")
PLAN = yaml.safe_load((BENCHMARKS / "recipes" / "plan.yaml").read_text())


@pytest.mark.parametrize("size", ["half", "fifth"])
def test_every_recipe_of_the_plan_resolves(
    size: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYGPT2_TEST_DATA", str(shared_data))
    plan = study.Study(tmp_path, tmp_path / "results.jsonl")
    (tmp_path / size).mkdir()
    teacher = json.loads((Path(plan.teacher) / "config.json").read_text())
    shape = {"n_embd": teacher["n_embd"] // (1 if size == "half" else 2)}
    shape["n_head"] = teacher["n_head"] * shape["n_embd"] // teacher["n_embd"]
    (tmp_path / size / "config.json").write_text(json.dumps({**teacher, **shape}))
    for name, recipe in plan.plan["recipes"].items():
        run = study.Run("screen", size, name, 1e-3, 192_512, 42)
        stages = plan.configurations(run, tmp_path / "out")
        assert sum(share for share, _ in stages) == 1
        assert len(stages) == len(recipe["stages"])
        steps = sum(config.max_steps for _, config in stages)
        assert steps == pytest.approx(192_512 / 256 / stages[0][1].micro_batch_size, abs=1)
        assert all(config.learning_rate == 1e-3 for _, config in stages)
        if size == "fifth":
            assert not any(config.cosine_weight for _, config in stages)


def test_students_that_are_cut_in_other_ways_have_one_size(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYGPT2_TEST_DATA", str(shared_data))
    plan = study.Study(tmp_path, tmp_path / "results.jsonl")
    shape = SimpleNamespace(**json.loads((Path(plan.teacher) / "config.json").read_text()))
    shape.n_inner = getattr(shape, "n_inner", None)
    sizes = [
        sizes_of(TruncateStudentConfig(teacher=plan.teacher, out="o", data="d", **options), shape)
        for options in PLAN["starts"]["sizes"].values()
    ]
    assert sizes == [(128, 4, 384), (128, 4, 384), (128, 8, 384)]
    runs = list(plan.starts())
    assert [(run.size, run.seed) for run in runs[:3]] == [(size, 1) for size in PLAN["starts"]["sizes"]]
    assert {run.tokens for run in runs} == {307_200}
    assert {run.recipe for run in runs} == {PLAN["default"]}


def test_a_second_stage_goes_on_where_the_first_one_stopped(data: Path) -> None:
    packed, seed = load_packed_dataset(str(data)), 5
    count = len(packed.train)
    rest = study.later(packed, seed, 7)
    order = Shuffle(len(rest.train), seed)[0 : len(rest.train)]
    for row, place in zip(Shuffle(count, seed)[7:count], order, strict=True):
        assert np.array_equal(rest.train.row(place), packed.train.row(row))


def test_a_wider_student_gets_lower_rates_and_close_recipes_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYGPT2_TEST_DATA", str(tmp_path))
    plan = study.Study(tmp_path, tmp_path / "results.jsonl")
    losses = {4e-3: 3.0, 2e-3: 2.0, 1e-3: 2.5, 8e-3: 3.5, 1.6e-2: 4.0}
    plan.plan["recipes"] = {PLAN["default"]: {}, "far": {}}
    plan.write({"stage": "screen", "recipe": PLAN["default"], "rate": 4e-3, "loss": 3.0})
    plan.write({"stage": "screen", "recipe": "far", "rate": 8e-3, "loss": 3.1})
    first, second = plan.plan["final"]["seeds"]
    found = []
    for seed in (first, second):
        for run in plan.final(seed):
            found.append((run.seed, run.size, run.recipe, run.rate))
            plan.write({**study.asdict(run), "loss": losses[run.rate] + (run.recipe == "far")})
    default = PLAN["default"]
    assert found == [
        *((first, "half", default, rate) for rate in (4e-3, 2e-3, 1e-3)),
        *((first, "half", "far", rate) for rate in (8e-3, 4e-3, 2e-3, 1e-3)),
        (first, "fifth", default, 4e-3), (first, "fifth", "far", 8e-3),
        (second, "half", default, 2e-3), (second, "fifth", default, 4e-3),
    ]  # fmt: skip


def test_the_report_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two recipes whose losses differ by 0.5 in every group but one, where it is 0.6; the others never ran."""
    even = [4.0] * 40
    lines = [
        {"stage": "screen", "size": "fifth", "recipe": recipe, "rate": rate, "seed": 42, "loss": loss,
         "groups": [loss] * 40}
        for recipe, loss in (("kl", 4.5), ("ce", 5.0)) for rate in (5e-4, 1.5e-3)
    ]  # fmt: skip
    default = PLAN["default"]
    for recipe, groups, curve in (
        (default, even, [[1000, 4.4], [2000, 4.0]]),
        ("ce", [4.5] * 39 + [4.6], [[1000, 4.9], [2000, 4.5]]),
    ):
        own = {"size": "fifth", "recipe": recipe, "rate": 5e-4, "tokens": 2000, "parameters": 10}
        loss = float(np.mean(groups))
        lines.append({"stage": "final", **own, "seed": 1, "loss": loss, "groups": groups, "curve": curve})
        slower = {"seed": 1, "rate": 2.5e-4, "loss": loss + 1, "groups": even, "curve": curve}
        lines.append({"stage": "final", **own, **slower})  # a rate that lost, and so is not compared
        lines.append(
            {"stage": "smallest", **own, "seed": 7, "loss": loss, "groups": groups, "checks": {"novel": groups}}
        )
        if recipe == "ce":
            lines.append(
                {**lines[-3], "stage": "equal-time", "seed": 1, "tokens": 4000, "loss": 4.3, "groups": [4.3] * 40}
            )
        speed = 100.0 if recipe == default else 200.0
        lines.append({"stage": "time", "size": "fifth", "recipe": recipe, "cached": False, "tokens_per_second": speed})
    gap, error = report.paired(
        *(report.of(lines, stage="final", recipe=recipe, rate=5e-4) for recipe in (default, "ce"))
    )
    assert gap == pytest.approx(0.5025)
    assert error == pytest.approx(np.std([0.5] * 39 + [0.6], ddof=1) / math.sqrt(40))
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(sys, "argv", ["recipes_report.py", "--results", str(results)])
    (tmp_path / "plan.yaml").write_text((BENCHMARKS / "recipes" / "plan.yaml").read_text())
    report.main()
    text = (tmp_path / "report.md").read_text()
    assert "| kl-t2 | not measured | not measured | not measured |  | - |" in text
    assert "| ce | **5.000** | 5.000 | not measured |  | +0.500 +- 0.000 |" in text
    assert "| ce | 0.0005 | 0.00025: 5.502 | 4.5025 | 4.502 | 90.2 | +0.5025 +- 0.0025 | 200 | - |" in text
    assert (
        f"- {default} reaches the final loss of ce after 1,000 tokens, in at most 1.00 times the time of ce.\n" in text
    )
    assert (
        f"In the time of {default}, ce sees 4,000 tokens and reaches a loss of 4.3000: "
        f"+0.3000 +- 0.0000 above {default}.\n" in text
    )
    assert "| ce | 4.5025 | 4.5025 (+0.5025 +- 0.0025) |" in text
    assert len(list((tmp_path / "images").glob("recipes-*.png"))) == 3


def test_the_plan_names_the_default_recipe() -> None:
    (stage,) = PLAN["recipes"][PLAN["default"]]["stages"]
    wanted, ours = PLAN["base"] | stage, read_recipe("default")
    assert wanted.items() <= ours.items()
    assert not any(value for name, value in ours.items() if name.endswith("_weight") and name not in wanted)


def test_a_recipe_holds_nothing_that_distill_does_not_know() -> None:
    known = {*DistillConfig.options(), "share"}
    assert all(set(stage) <= known for recipe in PLAN["recipes"].values() for stage in recipe["stages"])
