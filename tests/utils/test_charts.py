"""Charts as data, as PNG, and as parts of a web page that is parsed again."""

from __future__ import annotations

import builtins
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tinygpt2.utils import plotting, progress
from tinygpt2.utils.charts import Chart, Series, short_number, thinned, ticks
from tinygpt2.utils.html_report import (
    chart_section,
    link_section,
    paragraphs,
    settings_section,
    table_section,
    text_section,
    without_folders,
    write_page,
)
from tinygpt2.utils.plotting import draw

VOID = {"meta", "br", "img", "link", "input", "hr"}
EVIL = "<script>alert('1')</script>\"&<b>"


class Page(HTMLParser):
    """A page: its elements (name, attributes), their texts, and whether every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def chart(**changes: object) -> Chart:
    points = [(0.0, 5.0), (1000.0, 4.5), (2000.0, 4.25)]
    values = {"title": "held out", "x": "tokens", "y": "nats", "series": [Series("student", points, [0.1, None, 0.2])]}
    return Chart(**{**values, "levels": {"teacher": 4.0}, **changes})


@pytest.mark.parametrize(
    ("ends", "log", "expected"),
    [
        ((0, 100), False, [0, 20, 40, 60, 80, 100]),
        ((4.2, 4.98), False, [4.2, 4.4, 4.6, 4.8]),
        ((90, 150), True, [100, 120, 140]),
        ((3, 2e5), True, [10, 100, 1000, 10000, 100000]),
        ((80, 2000), True, [100, 200, 500, 1000, 2000]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(ends: tuple[float, float], log: bool, expected: list[float]) -> None:
    assert ticks(ends, log=log) == pytest.approx(expected)


@pytest.mark.parametrize("log", [False, True])
def test_every_axis_has_at_least_two_ticks(log: bool) -> None:
    for low in (1e-7, 0.003, 1, 95.3, 4.2e6):
        for ratio in (1.001, 1.2, 3, 5.9, 6.1, 50, 1e5):
            found = ticks((low, low * ratio), log=log)
            assert 2 <= len(found) <= 11, (low, ratio, found)
            assert all(low * 0.999999 <= tick <= low * ratio * 1.000001 for tick in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (99.5, "99.5"), (1500, "1,500"), (25_000, "25k"), (1.5e6, "1.5M"), (3e9, "3B"), (0.00025, "2.5e-4"),
     (0.001, "0.001"), (-2.5, "-2.5"), (999_990, "1M"), (1e-5, "1e-5")],
)  # fmt: skip
def test_numbers_are_short_and_without_powers_of_ten(value: float, text: str) -> None:
    assert short_number(value) == text


def test_thinning_keeps_both_ends() -> None:
    points = [(float(n), 0.0) for n in range(1003)]
    kept = thinned(points, 400)
    assert (kept[0], kept[-1]) == (0, 1002)
    assert len(kept) <= 400
    assert thinned(points[:5], 400) == [0, 1, 2, 3, 4]


def test_axes_hold_points_errors_and_levels() -> None:
    low, high = chart().y_range()
    assert low < 4.0
    assert high > 5.1
    assert Chart("", "", "", [Series("one", [(2.0, 3.0)])]).y_range() == pytest.approx((2.7, 3.3))
    assert Chart("", "", "", [Series("none", [])]).x_range() == (0.0, 1.0)


def test_a_page_shows_what_it_is_given_and_escapes_it(tmp_path: Path) -> None:
    charts = [chart(title=EVIL, series=[Series(EVIL, [(0.0, 1.0), (1.0, 2.0)])], levels={EVIL: 1.5})]
    write_page(tmp_path / "a.html", EVIL, [
        paragraphs(EVIL),
        chart_section(EVIL, charts),
        table_section(EVIL, ["a", EVIL], [[EVIL, "1"]], EVIL),
        text_section("texts", EVIL, {EVIL: EVIL + "\n\n\n\n\nend \ud800"}),
        settings_section("settings", {EVIL: EVIL, "on": True, "none": None, "empty": []}),
        link_section("links", {EVIL: "a b/report.html"}),
    ])  # fmt: skip
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1
    assert page.all("b") == [{}]  # of the prompt, and no other
    assert EVIL in page.said("h1")
    assert {"yes", EVIL} <= set(page.said("td"))
    assert "none" not in page.said("th")
    assert any("\n\nend" in said and "\n\n\n" not in said for said in page.said("p"))
    assert page.all("a") == [{"href": "a%20b/report.html"}]
    assert "://" not in text  # nothing is fetched
    policy = next(one["content"] for one in page.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'")
    write_page(tmp_path / "b.html", "again", [])
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".html"]


def test_a_chart_carries_its_values_for_the_pointer() -> None:
    page = Page(chart_section("Curves", [chart(), chart(joined=False, log=True, levels={}, series=chart().series[:0])]))
    figures = page.all("figure")
    assert [one["id"] for one in figures] == ["curves-1", "curves-2"]
    data = json.loads(figures[0]["data-chart"])
    assert [point[2:] for point in data["series"][0]["points"]] == [
        ["0", "5 ± 0.1"], ["1,000", "4.5"], ["2,000", "4.25 ± 0.2"]
    ]  # fmt: skip
    assert data["levels"] == [["teacher", "4"]]
    drawing = next(one for one in page.all("svg") if one.get("role") == "img")
    assert "student: from 5 to 4.25" in drawing["aria-label"]
    assert "teacher: 4" in drawing["aria-label"]
    width, height = map(int, drawing["viewbox"].split()[2:])
    points = [point[:2] for point in data["series"][0]["points"]]
    assert all(0 < x < width and 0 < y < height for x, y in points)
    assert points == sorted(points)  # from left to right, and here downwards


def test_the_same_chart_gives_the_same_page(tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write_page(tmp_path / name, "title", [chart_section("Curves", [chart()])])
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_nothing_makes_no_section() -> None:
    assert chart_section("Curves", []) == table_section("T", ["a"], []) == settings_section("S", {"a": None}) == ""


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/me/data", "data"),
        (r"C:\Users\me\data", "data"),
        ("data/here", "data/here"),
        ("gpt2", "gpt2"),
        ("/", "/"),
    ],
)
def test_a_page_does_not_tell_the_folders_of_a_machine(given: str, shown: str) -> None:
    assert without_folders(given) == shown


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_pictures_of_any_number_of_charts(tmp_path: Path, count: int) -> None:
    assert draw([chart(title=f"$x$ _{n} 日本") for n in range(count)], tmp_path / "a.png", "_$5 to $6")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    scattered = [Series(f"_model {n}", [(1e6 * (n + 1), 99.5 - n)]) for n in range(9)]
    assert draw([chart(series=scattered, joined=False, log=True)] * count, tmp_path / "b.png")
    assert not draw([], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_without_matplotlib_pictures_are_skipped_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, imported = plotting.find_spec, builtins.__import__

    def refuse(name: str, *rest: object, **more: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(plotting, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(progress, "_mode", "plain")
    plotting.plots_available.cache_clear()
    try:
        assert not draw([chart()], tmp_path / "a.png")
        assert not draw([chart()], tmp_path / "a.png")
    finally:
        plotting.plots_available.cache_clear()
    assert capsys.readouterr().err == "pictures are skipped: pip install 'tinygpt2[plots]'\n"
    assert list(tmp_path.iterdir()) == []
