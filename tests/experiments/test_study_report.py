"""Tables, figures and the page of a study."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_ema_nesterov.experiments.event_files import Point
from lightning_ema_nesterov.experiments.study import report
from lightning_ema_nesterov.experiments.study.compare import run_study
from lightning_ema_nesterov.experiments.study.figures import Style, draw_curves, styles_of
from lightning_ema_nesterov.experiments.study.frontier import (
    draw_frontier,
    frontier,
    memory_points,
    memory_table,
)
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.report import write_report
from lightning_ema_nesterov.experiments.study.results import Result, read_events
from lightning_ema_nesterov.experiments.study.tables import (
    Standing,
    markdown_table,
    notes_on,
    standings,
)
from tests.experiments.toys import SGD, result, write


def test_standings_are_those_worked_by_hand() -> None:
    results = [
        *(result("none", 0.1, seed, [5.0, 2.0 + seed]) for seed in range(3)),  # mean 3
        *(result("none", 0.2, seed, [5.0, 4.0]) for seed in range(3)),
        *(result("none", 0.4, seed, [5.0, 1.0]) for seed in range(2)),  # a seed is missing
        # At 0.1 paired differences of -1, -1 and 0.5; 3.0 is reached after 20 of 30 steps.
        *(
            result("ema", 0.1, seed, [4.0, 2.5, 2.0 + seed + gap], step_size=0.5, **more)
            for seed, gap, more in (
                (0, -1.0, {"state_per_parameter": 3.0, "step_seconds": 0.15}),
                (1, -1.0, {"state_per_parameter": 3.0, "step_seconds": 0.15}),
                (2, 0.5, {"state_per_parameter": 3.0, "step_seconds": 0.15}),
            )
        ),
        *(result("ema", 0.2, seed, [9.0], is_diverged=True) for seed in range(3)),
    ]
    none, ema = standings(results, "sgd")
    assert (none.method, none.lr, none.edge) == ("none", 0.1, "smallest")
    assert (ema.method, ema.lr, ema.edge, ema.gained_lr) == ("ema", 0.1, "smallest", 0.2)
    assert ema.gained == [4.0, 4.0, 4.0]
    # Mean -0.5, standard deviation sqrt(0.75), t with 2 degrees of freedom 4.3027.
    margin = 4.302653 * math.sqrt(0.75) / math.sqrt(3)
    assert ema.difference == pytest.approx((-0.5, -0.5 - margin, -0.5 + margin))
    assert ema.steps_to_target == 20
    assert none.steps_to_target == 20
    assert ema.extra_state == 1.0
    assert ema.step_time == pytest.approx(1.5)
    row = markdown_table([none, ema]).splitlines()[-1]
    assert row == (
        "| ema | 0.1 (smallest) | 2.5000 ± 1.8028 | -0.5000 [-2.6513, +1.6513] "
        "| 4.0000 ± 0.0000 at 0.2 | 20 | 3.0 | +1.00 | 1.50 |"
    )


def test_report_is_one_page_with_all_figures(study_dir: Path) -> None:
    page = write_report(study_dir)
    html, text = page.read_text(), (page.parent / "report.md").read_text()
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(figures) == 5
    sources = re.findall(r'src="([^"]+)"', html)
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "href" not in html
    assert "6 diverged" in html
    for base in ("sgd", "adamw"):
        assert markdown_table(standings(read_events(study_dir / "runs"), base)) in text
        assert f"<h2>{base}</h2>" in html


def test_report_of_a_grid_has_a_map_for_each_method(tmp_path: Path) -> None:
    grid = {"lookahead_step_size": [0.5, 0.75], "direction_dtype": ["float32", "int8"]}
    methods = {
        "ema": {"class_path": "EMANesterov", "grid": grid},
        "snoo": {"class_path": "SNOO", "grid": {"outer_lr": [0.8, 1.0], "outer_momentum": [0.5]}},
    }
    path = write(tmp_path, methods=methods, base_optimizers={"sgd": SGD}, seeds=[0], num_steps=4)
    run_study(load_study(path), tmp_path / "out")
    text = (write_report(tmp_path / "out").parent / "report.md").read_text()
    assert re.findall(r"\((\w+\.png)\)", text) == ["sgd_ema_grid.png", "sgd_snoo_grid.png"]
    assert text.count("| ema[") == 4
    assert text.count("| snoo[") == 2


@pytest.mark.parametrize(
    ("lrs", "cell"),
    [
        ([0.1, 0.2, 0.4], "0.1 (smallest)"),
        ([0.05, 0.1, 0.2], "0.1"),
        ([0.025, 0.05, 0.1], "0.1 (largest)"),
        ([0.1], "0.1"),
    ],
)
def test_best_learning_rate_at_the_edge_of_its_grid_is_marked(lrs: list[float], cell: str) -> None:
    results = [result("none", lr, 0, [2.0 + abs(lr - 0.1)]) for lr in lrs]
    assert f"| none | {cell} |" in markdown_table(standings(results, "sgd"))


def test_a_learning_rate_that_diverged_is_one_that_was_tried() -> None:
    results = [result("none", lr, 0, [2.0]) for lr in (0.05, 0.1)]
    results += [result("none", 0.025, 0, [3.0]), result("none", 0.2, 0, [9.0], is_diverged=True)]
    [none] = standings(results, "sgd")
    assert (none.lr, none.edge) == (0.05, "")


def test_notes_say_which_learning_rates_were_not_tried_by_all() -> None:
    results = [
        *(result("none", lr, seed, [lr]) for lr in (0.1, 0.2, 0.05) for seed in range(2)),
        *(result("ema", lr, seed, [lr]) for lr in (0.1, 0.2) for seed in range(2)),
        *(result("snoo", lr, seed, [lr]) for lr in (0.1, 0.05) for seed in range(2)),
        result("snoo", 0.4, 0, [0.4]),
    ]
    assert notes_on(results, "sgd") == [
        "Not tried at 0.05, the baseline's best learning rate: ema.",
        "Not compared, for lack of seeds: snoo at 0.4.",
    ]
    alone = [r for r in results if r.run.method != "snoo"]
    assert notes_on(alone, "sgd") == [
        "Learning rates that only the baseline had: 0.05.",
        "Not tried at 0.05, the baseline's best learning rate: ema.",
    ]
    everywhere = [r for r in alone if r.run.lr != 0.05]
    assert notes_on(everywhere, "sgd") == []


def test_order_and_colours_are_those_of_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a base optimizer that not all methods are for; folders are alphabetical."""
    methods = {
        "zeta": {"class_path": "EMANesterov", "bases": ["sgd"]},
        "snoo": {"class_path": "SNOO", "init_args": {"num_inner_steps": 2}},
        "alpha": {"class_path": "EMANesterov", "init_args": {"ema_decay": 0.5}},
    }
    bases = {"sgd": SGD, "adam": {"class_path": "Adam", "lrs": [0.01]}}
    path = write(tmp_path, methods=methods, base_optimizers=bases, seeds=[0], num_steps=4)
    run_study(load_study(path), tmp_path / "out")
    drawn = []

    def record(path: Path, found: list[Standing], styles: dict[str, Style], *, title: str) -> None:
        drawn.append({standing.method: styles[standing.method] for standing in found})
        draw_curves(path, found, styles, title=title)

    monkeypatch.setattr(report, "draw_curves", record)
    text = (write_report(tmp_path / "out").parent / "report.md").read_text()
    text, _, _ = text.partition("## Optimizer memory")
    assert re.findall(r"^## (\w+)", text, re.MULTILINE) == ["sgd", "adam"]
    order = ["none", "zeta", "snoo", "alpha", "none", "snoo", "alpha"]
    assert re.findall(r"^\| (\w+) \| 0", text, re.MULTILINE) == order
    assert "* Not tried at 0.2, the baseline's best learning rate: zeta, snoo, alpha." in text
    assert "* Learning rates that only the baseline had: 0.2" in text

    styles = styles_of(["none", "zeta", "snoo", "alpha"])
    assert drawn == [styles, {name: styles[name] for name in ("none", "snoo", "alpha")}]
    grown = styles_of(["none", "zeta", "snoo", "alpha", "aaa"])
    assert {name: grown[name] for name in styles} == styles
    many = styles_of(["none", *map(str, range(30))])
    assert len({tuple(style.values()) for style in many.values()}) == 31


def test_report_of_a_base_optimizer_without_its_baseline_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, base_optimizers={"sgd": SGD}, methods={"none": None}, seeds=[0])
    run_study(load_study(path), tmp_path / "out")
    runs = tmp_path / "out/runs"
    (runs / "adam").mkdir()
    (runs / "sgd/none").rename(runs / "adam/ema")
    with_both = tmp_path / "both"
    run_study(load_study(path), with_both)
    (runs / "adam").rename(with_both / "runs/adam")
    text = (write_report(with_both).parent / "report.md").read_text()
    assert "## adam\n\nNo run of the baseline is finished yet." in text
    assert "| none | 0.1 |" in text


def picture(path: Path, results: list[Result]) -> bytes:
    draw_curves(path, standings(results, "sgd"), styles_of(["none", "ema"]), title="t")
    return path.read_bytes()


def test_picture_shades_the_steps_that_look_ahead(tmp_path: Path) -> None:
    losses = [3.0, 2.5, 2.0, 1.9, 1.8, 1.7]
    none = result("none", 0.1, 0, losses)
    plain, shaded, other = (
        picture(tmp_path / f"{idx}.png", [none, result("ema", 0.1, 0, losses, **more)])
        for idx, more in enumerate(
            ({}, {"lookahead_steps": (20, 40)}, {"lookahead_steps": (30, 50)})
        )
    )
    assert plain.startswith(b"\x89PNG")
    assert len({plain, shaded, other}) == 3


def test_picture_is_drawn_also_where_a_method_or_the_baseline_diverged(tmp_path: Path) -> None:
    good = [result(method, 0.1, 0, [3.0, 2.5, 2.0]) for method in ("none", "ema")]
    bad = [result(method, 0.1, 0, [3.0], is_diverged=True) for method in ("none", "ema")]
    cases = [[good[0], bad[1]], [bad[0], good[1]], bad]
    pictures = {picture(tmp_path / "curves.png", results) for results in cases}
    assert len(pictures) == 3


def test_frontier_holds_what_nothing_smaller_beats(tmp_path: Path) -> None:
    def point(base: str, kib: int, losses: list[float]) -> Result:
        one = result("none", 0.1, 0, losses, state_bytes=kib * 1024)
        return replace(one, run=replace(one.run, base=base))

    results = [
        point("big", 30, [1.0]),
        point("wasteful", 20, [3.0]),
        point("small", 10, [2.0]),
        point("diverged", 1, [math.inf]),
    ]
    found = {r.run.base: standings([r], r.run.base) for r in results}
    points = memory_points(found)
    assert [p.base for p in points] == ["small", "wasteful", "big"]
    assert [p.base for p in frontier(points)] == ["small", "big"]
    assert "| **small** | none | 10 | 2.0000 |\n| wasteful |" in memory_table(points)
    draw_frontier(tmp_path / "memory.png", points)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_grid_the_lowest_is_the_one_with_its_memory() -> None:
    losses = {"none": 3.0, "ema[beta=0.3]": 2.0, "ema[beta=0.5]": 1.0}
    results = [result(m, 0.1, 0, [loss], state_bytes=2048) for m, loss in losses.items()]
    points = memory_points({"sgd": standings(results, "sgd")})
    assert [p.method for p in points] == ["ema[beta=0.5]", "none"]


def test_memory_is_compared_where_all_have_the_same_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of two base optimizers; an average is another reading of a run, and keeps no more."""
    kept = [result("none", 0.1, seed, [2.0], state_bytes=2048) for seed in (0, 1)]
    kept += [replace(one, run=replace(one.run, base="adam")) for one in kept]
    ema = result("ema", 0.1, 0, [2.0], state_bytes=4096, at_average={1.0: [Point(10, 0.0, 1.5)]})
    rows = []
    for results in (kept, [*kept, ema, replace(ema, run=replace(ema.run, seed=1))], [*kept, ema]):
        monkeypatch.setattr(report, "read_events", lambda folder, found=results: found)
        text = write_report(tmp_path).with_suffix(".md").read_text()
        rows.append(re.findall(r"^\| (\S+) \|", text.partition("## Optimizer memory")[2], re.M))
    both = ["base", "**adam**", "sgd"]
    assert rows == [both, [*both, "sgd"], []]


def test_picture_has_the_lower_of_the_averages_of_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    shares = {0.5: [Point(10, 0.0, 1.0)], 1.0: [Point(10, 0.0, 2.0)]}
    results = [result("none", 0.1, 0, [3.0]), result("ema", 0.1, 0, [2.5], at_average=shares)]

    def record(path: Path, found: list[Standing], styles: dict[str, Style], *, title: str) -> None:
        drawn.extend(standing.method for standing in found)
        draw_curves(path, found, styles, title=title)

    monkeypatch.setattr(report, "read_events", lambda folder: results)
    monkeypatch.setattr(report, "draw_curves", record)
    text = write_report(tmp_path).with_suffix(".md").read_text()
    assert drawn == ["none", "ema", "ema @ 0.5"]
    assert "| ema @ 1 |" in text


def test_a_method_with_fewer_seeds_is_compared_on_those() -> None:
    results = [result("none", 0.1, seed, [5.0 - seed, 4.0 - seed]) for seed in range(3)]
    results.append(result("ema", 0.1, 0, [4.5, 3.9], step_seconds=0.3))
    _, ema = standings(results, "sgd")
    assert ema.steps_to_target == 20  # of 4.0, not of the mean of all, 3.0
    assert ema.difference.mean == pytest.approx(-0.1)
    assert ema.step_time == pytest.approx(3.0)


def test_memory_is_left_out_where_lines_do_not_know_it() -> None:
    assert memory_points({"sgd": standings([result("none", 0.1, 0, [1.0])], "sgd")}) == []
