"""Figures of a study of learning rate and step size together."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ema_nesterov.experiments.study import report
from lightning_ema_nesterov.experiments.study.maps import draw_step_sizes
from lightning_ema_nesterov.experiments.study.results import Result, with_averages
from lightning_ema_nesterov.experiments.study.rounds import judged
from lightning_ema_nesterov.experiments.study.tables import standings
from tests.experiments.toys import result

STEP_SIZES = (-0.3, 0.0, 0.15, 0.3, 0.5, 0.7)
LRS = (0.002, 0.004, 0.008, 0.016)


def synthetic_loss(step_size: float, lr: float, seed: int) -> float:
    """A valley along lr / (1 - step_size) = 0.006, a little deeper at 0.3."""
    drift = math.log2(lr / (1.0 - step_size) / 0.006)
    noise = 0.004 * math.sin(37 * seed) + 0.002 * math.sin(1000 * lr + 17 * step_size + seed)
    return 1.42 + 0.02 * drift**2 + 0.05 * (step_size - 0.3) ** 2 + noise


def synthetic(seeds: range) -> list[Result]:
    found = []
    for seed in seeds:
        for step_size in STEP_SIZES:
            for lr in LRS:
                name = f"ema[lookahead_step_size={step_size}]" if step_size else "none"
                loss = synthetic_loss(step_size, lr, seed)
                is_diverged = step_size == 0.7 and lr == 0.016
                averages = {1.0: [loss - 0.002]} if step_size else {}
                one = result(name, lr, seed, [2.0, loss], is_diverged=is_diverged)
                for share, losses in averages.items():
                    points = result(name, lr, seed, losses).val_loss
                    one.at_average[share] = points
                found.append(one)
    return found


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures by the names of their files, as they are saved."""
    saved: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(figure: Figure, path: Path, *, dpi: float) -> None:
        saved[path.stem] = figure
        save(figure, path, dpi=dpi)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def draw(folder: Path) -> list[Path]:
    choosing, every = synthetic(range(1)), synthetic(range(5))
    found = standings(judged(every, [1, 2, 3, 4]), "sgd")
    return list(draw_step_sizes(folder, "sgd", choosing, found))


def test_map_shows_every_loss_and_the_line_of_equal_steps(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    files = [path.stem for path in draw(tmp_path)]
    assert files == ["sgd_ema_map", "sgd_ema_rates", "sgd_ema_best"]
    axes: Axes = figures["sgd_ema_map"].axes[0]
    shown = {(text.get_position()[0], text.get_position()[1]): text for text in axes.texts}
    for row, step_size in enumerate(STEP_SIZES):
        losses = {lr: synthetic_loss(step_size, lr, 0) for lr in LRS}
        for column, (lr, loss) in enumerate(losses.items()):
            text = shown[column, row]
            is_diverged = step_size == 0.7 and lr == 0.016
            assert text.get_text() == ("diverged" if is_diverged else f"{loss:.4f}")
            assert (text.get_fontweight() == "bold") is (loss == min(losses.values()))
    assert axes.get_title().startswith("sgd, ema (seed 0): ")
    colours = np.asarray(axes.images[0].get_array())  # against the best of the baseline
    assert min(colours[STEP_SIZES.index(0.0)]) == pytest.approx(0.0)
    [line] = axes.get_lines()
    best_lr = min(LRS, key=lambda lr: synthetic_loss(0.0, lr, 0))
    for x, y in np.asarray(line.get_data(), dtype=float).T:
        below = int(min(y, len(STEP_SIZES) - 2))
        beta = STEP_SIZES[below] + (y - below) * (STEP_SIZES[below + 1] - STEP_SIZES[below])
        assert LRS[0] * 2.0**x == pytest.approx(best_lr * (1.0 - beta))


def test_rates_that_only_the_baseline_had_do_not_crowd_the_map(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    """The baseline is also trained at lr / (1 - step size), here 20 % above another rate."""
    every = synthetic(range(1))
    every += [result("none", lr, 0, [2.0, synthetic_loss(0.0, lr, 0)]) for lr in (0.0048, 0.03)]
    every = [r for r in every if (r.run.method, r.run.lr) != ("none", 0.008)]
    draw_step_sizes(tmp_path, "sgd", every, standings(with_averages(every), "sgd"))
    rates = [0.002, 0.004, 0.0048, 0.008, 0.016, 0.03]
    axes: Axes = figures["sgd_ema_map"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"{r:.3g}" for r in rates]
    assert list(axes.get_xticks()) == list(range(len(rates)))
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    for column, lr in enumerate(rates):
        expected = f"{synthetic_loss(0.0, lr, 0):.4f}"
        assert (((column, 1), expected) in written) is (lr != 0.008)
    [line] = axes.get_lines()  # through the baseline's best rate
    xs, ys = np.asarray(line.get_data(), dtype=float)
    best_lr = min((lr for lr in rates if lr != 0.008), key=lambda lr: synthetic_loss(0.0, lr, 0))
    assert np.interp(1.0, ys, xs) == pytest.approx(rates.index(best_lr), abs=0.05)
    assert list(figures["sgd_ema_rates"].axes[0].get_xticks()) == list(LRS)


def test_curves_are_over_the_learning_rate_and_over_that_of_steady_steps(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    draw(tmp_path)
    left, right = figures["sgd_ema_rates"].axes
    for axes, is_gained in ((left, False), (right, True)):
        for line, step_size in zip(axes.get_lines(), STEP_SIZES, strict=True):
            assert line.get_label() == f"{step_size:g}"
            lrs = [lr for lr in LRS if step_size < 0.7 or lr < 0.016]  # the other one diverged
            gain = 1.0 / (1.0 - step_size) if is_gained else 1.0
            shown = np.asarray(line.get_data(), dtype=float)
            assert shown[0] == pytest.approx([lr * gain for lr in lrs])
            assert shown[1] == pytest.approx([synthetic_loss(step_size, lr, 0) for lr in lrs])


def test_best_of_each_step_size_has_the_interval_of_the_table(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    draw(tmp_path)
    axes: Axes = figures["sgd_ema_best"].axes[0]
    every = synthetic(range(5))
    found = {s.method: s for s in standings(judged(every, [1, 2, 3, 4]), "sgd")}
    curves = {str(c.get_label()): c for c in axes.containers}
    assert set(curves) == {"iterate", "average, share 1"}
    line, _, [bars] = curves["iterate"]
    values = np.asarray(line.get_ydata(), dtype=float)
    assert len(values) == len(STEP_SIZES)
    averages = np.asarray(curves["average, share 1"][0].get_ydata(), dtype=float)
    # The baseline has no average: the line is broken there.
    assert [math.isnan(value) for value in averages] == [not s for s in STEP_SIZES]
    names = [f"ema[lookahead_step_size={s}]" if s else "none" for s in STEP_SIZES]
    for value, segment, name in zip(values, bars.get_segments(), names, strict=True):
        gap = found[name].difference
        assert value == pytest.approx(gap.mean)
        assert segment[:, 1] == pytest.approx([gap.low, gap.high])
    assert "4 seeds, intervals of 95%" in axes.get_title()
    assert [text.get_text() for text in axes.texts] == [f"η {found[name].lr:g}" for name in names]


def test_average_without_lookahead_is_shown_where_the_grid_has_0(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    every = synthetic(range(3))
    for one in [one for one in every if one.run.method == "none"]:
        zero = result("ema[lookahead_step_size=0]", one.run.lr, one.run.seed, [2.0, one.final])
        lower = result("ema", one.run.lr, one.run.seed, [2.0, one.final - 0.003])
        zero.at_average[1.0] = lower.val_loss
        every.append(zero)
    every = [r for r in every if r.run.method != "ema[lookahead_step_size=0.7]" or r.run.seed < 2]
    draw_step_sizes(tmp_path, "sgd", every, standings(with_averages(every), "sgd"))
    curves = {str(c.get_label()): c for c in figures["sgd_ema_best"].axes[0].containers}
    for reading, gap in (("iterate", 0.0), ("average, share 1", -0.003)):
        values = np.asarray(curves[reading][0].get_ydata(), dtype=float)
        assert len(values) == len(STEP_SIZES)
        assert values[STEP_SIZES.index(0.0)] == pytest.approx(gap)
    assert "(2 to 3 seeds," in figures["sgd_ema_best"].axes[0].get_title()


def test_rate_of_an_average_is_named_where_it_is_another(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    """At the largest rate the average of 0.3 is made to be far lower than everything else."""
    every = synthetic(range(2))
    for one in every:
        if one.run.method == "ema[lookahead_step_size=0.3]" and one.run.lr == LRS[-1]:
            one.at_average[1.0] = result("ema", one.run.lr, one.run.seed, [1.0]).val_loss
    draw_step_sizes(tmp_path, "sgd", every, standings(with_averages(every), "sgd"))
    texts = figures["sgd_ema_best"].axes[0].texts
    assert len(texts) == len(STEP_SIZES) + 1
    assert texts[-1].get_text() == f"η {LRS[-1]:g}"


def test_there_is_no_map_without_two_rates_and_two_step_sizes(tmp_path: Path) -> None:
    every = with_averages(synthetic(range(1)))
    for kept in (
        [r for r in every if r.run.lr == 0.004],
        [r for r in every if r.run.method == "none"],
    ):
        assert draw_step_sizes(tmp_path, "sgd", kept, standings(kept, "sgd")) == {}
    assert not list(tmp_path.iterdir())


def test_report_shows_all_three_and_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "read_events", lambda folder: synthetic(range(2)))
    text = report.write_report(tmp_path).with_suffix(".md").read_text()
    for name in ("sgd_ema_map.png", "sgd_ema_rates.png", "sgd_ema_best.png"):
        assert f"]({name})" in text
        assert (tmp_path / "report" / name).exists()
    assert "| ema[lookahead_step_size=0.3] @ 1 |" in text
    assert text.count("dashed line") == 1
