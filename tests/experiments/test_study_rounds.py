"""A study in two rounds, and runs that are evaluated at averages as well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_ema_nesterov.experiments.event_files import read_scalars
from lightning_ema_nesterov.experiments.study import report
from lightning_ema_nesterov.experiments.study.claim import claim
from lightning_ema_nesterov.experiments.study.compare import run_study
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.report import write_report
from lightning_ema_nesterov.experiments.study.results import (
    Result,
    read_events,
    read_lines,
    write_line,
)
from lightning_ema_nesterov.experiments.study.rounds import confirming_runs, judged
from lightning_ema_nesterov.experiments.study.spec import Run
from lightning_ema_nesterov.experiments.study.tables import standings
from tests.experiments.toys import Model, result, write


def report_of(
    results: list[Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    confirming_seeds: list[int],
) -> str:
    """The report of a study in which seed 0 chooses."""
    study = load_study(write(tmp_path, seeds=[0], confirming_seeds=confirming_seeds))
    claim(study, tmp_path / "out")
    monkeypatch.setattr(report, "read_events", lambda folder: results)
    return write_report(tmp_path / "out").with_suffix(".md").read_text()


@pytest.mark.slow
def test_second_round_trains_only_what_the_first_chose(tmp_path: Path) -> None:
    """Also the learning rate that is best at an average only."""
    flat = {"class_path": "EMANesterov", "init_args": {"ema_decay": 0.9}, "lr_decay": 0.0}
    monitor = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    path = write(
        tmp_path,
        seeds=[0],
        confirming_seeds=[1, 2],
        average_shares=[0.0, 1.0],
        base_optimizers={
            "sgd": {"class_path": "SGD", "lrs": [0.01, 0.05, 1e30], "callbacks": [monitor]}
        },
        methods={"flat": flat},
    )
    study, out = load_study(path), tmp_path / "out"
    run_study(study, out)
    results = read_lines(out / "runs.jsonl")
    first, second = results[:6], results[6:]
    assert {r.run.seed for r in first} == {0}
    assert {r.run.seed for r in second} == {1, 2}
    assert 4 <= len(second) <= 6  # two methods, and perhaps another rate at an average
    for r in second:
        at_same_rate = [f for f in first if (f.run.method, f.run.lr) == (r.run.method, r.run.lr)]
        rivals = [f for f in first if f.run.method == r.run.method]
        assert any(
            _reading(at_same_rate[0], share) == min(_reading(f, share) for f in rivals)
            for share in (None, *r.at_average)
        )
    num_bytes = 4 * sum(p.numel() for p in Model().parameters())
    for r in results:
        # SGD without momentum keeps nothing, and the direction is one float32 for each parameter.
        assert r.state_bytes == (num_bytes if r.run.method == "flat" else 0)
        tags = read_scalars(out / "runs" / r.run.folder)
        assert "lr-SGD" in tags  # by the callback of the base optimizer
        assert set(r.at_average) == ({0.0, 1.0} if r.run.method == "flat" else set())
        if r.at_average and not r.is_diverged:
            # The toy's validation loss is that of its training step.
            assert r.at_average[0.0][-1].value == pytest.approx(r.final, abs=1e-5)
            assert abs(r.at_average[1.0][-1].value - r.final) > 1e-4
    assert {r.run for r in read_events(out / "runs")} == {r.run for r in results}
    text = write_report(out).with_suffix(".md").read_text()
    assert "| flat @ 1 |" in text
    assert "the tables are of the seeds 1, 2, which chose nothing" in text
    run_study(study, out)
    assert read_lines(out / "runs.jsonl") == results


def _reading(one: Result, share: float | None) -> float:
    if one.is_diverged:
        return float("inf")
    return one.final if share is None else one.at_average[share][-1].value


def test_method_that_was_taken_out_is_not_confirmed(tmp_path: Path) -> None:
    sgd, ema = {"class_path": "SGD", "lrs": [0.05]}, {"class_path": "EMANesterov"}
    both = {"base_optimizers": {"sgd": sgd}, "seeds": [0], "confirming_seeds": [1]}
    claim(load_study(write(tmp_path, methods={"none": None, "ema": ema}, **both)), tmp_path / "out")
    for method in ("none", "ema"):
        write_line(tmp_path / "out/runs.jsonl", result(method, 0.05, 0, [1.0]))
    run_study(load_study(write(tmp_path, methods={"none": None}, **both)), tmp_path / "out")
    found = [(r.run.method, r.run.seed) for r in read_lines(tmp_path / "out/runs.jsonl")]
    assert found == [("none", 0), ("ema", 0), ("none", 1)]


def test_rates_close_to_the_best_are_confirmed_after_it(tmp_path: Path) -> None:
    """Close for the method itself, and the best of all seeds comes first."""
    lrs = {0.1: 1.00, 0.2: 1.01, 0.4: 1.03, 0.8: float("nan")}
    finished = [
        result("none", lr, 0, [loss], is_diverged=lr == 0.8) for lr, loss in lrs.items()
    ] + [result("ema", lr, 0, [2.0 - loss]) for lr, loss in lrs.items() if lr < 0.8]
    settings = {
        "base_optimizers": {"sgd": {"class_path": "SGD", "lrs": list(lrs)}},
        "methods": {"ema": {"class_path": "EMANesterov"}},
        "seeds": [0],
        "confirming_seeds": [1, 2],
    }

    def confirmed(margin: float) -> list[tuple[str, float, int]]:
        study = load_study(write(tmp_path, **settings, confirming_margin=margin))
        return [(r.method, r.lr, r.seed) for r in confirming_runs(study, finished)]

    best = [("none", 0.1, 1), ("ema", 0.4, 1), ("none", 0.1, 2), ("ema", 0.4, 2)]
    assert confirmed(0.0) == best
    assert confirmed(0.0201) == [
        *best,
        ("none", 0.2, 1),
        ("ema", 0.2, 1),
        ("none", 0.2, 2),
        ("ema", 0.2, 2),
    ]
    for nonsense in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="confirming_margin must be at least 0"):
            confirmed(nonsense)


def test_confirming_seeds_are_judged_at_the_rate_that_the_others_chose() -> None:
    """Also where another would have been better on them."""
    results = [
        result("none", 0.1, 0, [1.0]),
        result("none", 0.2, 0, [2.0]),
        result("none", 0.1, 1, [3.0]),
        result("none", 0.2, 1, [0.5]),
    ]
    assert [r.final for r in judged(results, [1])] == [3.0]
    assert judged(results, []) == results
    assert judged(results, [7]) == results


def test_base_without_confirming_runs_is_shown_with_those_that_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study that was stopped in its second round."""
    confirmed = [result("none", 0.1, 0, [1.0]), result("none", 0.1, 1, [3.0])]
    waiting = replace(result("none", 0.2, 0, [2.0]), run=Run("muon", "none", 0.2, 0))
    both = [*confirmed, waiting]
    assert [(r.run.base, r.final) for r in judged(both, [1])] == [("sgd", 3.0), ("muon", 2.0)]
    text = report_of(both, tmp_path, monkeypatch, confirming_seeds=[1])
    _, *sections = text.split("\n## ")
    assert {section.split()[0] for section in sections} >= {"sgd", "muon"}
    for section in sections:
        is_waiting = "this is of the seeds that chose" in section
        assert is_waiting is section.startswith("muon"), section


def test_chosen_rate_that_waits_for_its_confirming_seeds_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rate is confirmed already, as after a change of the grid."""
    every = [
        result("none", 0.1, 0, [2.0]),
        result("none", 0.2, 0, [1.0]),
        *(result(m, 0.1, seed, [3.0 + seed]) for m in ("none", "ema") for seed in (1, 2)),
    ]
    assert judged(every, [1, 2]) == every[:2]
    text = report_of(every, tmp_path, monkeypatch, confirming_seeds=[1, 2])
    chosen, other = text.split("### sgd at 0.1, which was not chosen")
    assert "| none | 0.2 (largest) | 1.0000 |" in chosen
    assert "Not confirmed yet: this is of the seeds that chose." in chosen
    assert "Differences are to the baseline at this learning rate.\n" in other
    assert "| ema | 0.1 | 4.5000 ± 0.7071 | +0.0000" in other


def test_methods_with_fewer_seeds_than_the_baseline_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [
        ("none", 0, 1.0),
        ("none", 1, 3.0),
        ("late", 1, 2.5),
        ("both", 0, 1.0),
        ("both", 1, 2.0),
    ]
    every = [result(method, 0.1, seed, [loss]) for method, seed, loss in losses]
    monkeypatch.setattr(report, "read_events", lambda folder: every)
    text = write_report(tmp_path).with_suffix(".md").read_text()
    assert "* Not as many seeds as the 2 of the baseline: late (1). A difference is of the" in text
    assert "| late | 0.1 | 2.5000 | -0.5000 |" in text


def test_edge_is_that_of_the_rates_that_the_choosing_seeds_had() -> None:
    """The confirming seeds have one rate only."""
    results = [
        result("none", lr, 0, [loss]) for lr, loss in ((0.1, 3.0), (0.2, 2.0), (0.4, 1.0))
    ] + [result("none", 0.4, 1, [1.0]), result("none", 0.4, 2, [1.0])]
    choosing = [r for r in results if r.run.seed == 0]
    [none] = standings(judged(results, [1, 2]), "sgd", [], choosing)
    assert (none.lr, none.edge, none.finals) == (0.4, "largest", [1.0, 1.0])
    [none] = standings(judged(results, [1, 2]), "sgd")
    assert none.edge == ""


def test_another_rate_that_was_confirmed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed that chose took 0.1, and the others end lower at 0.2."""
    losses = {
        ("none", 0.1): (1.0, 3.0, 3.2),
        ("ema", 0.1): (0.9, 2.5, 2.6),
        ("none", 0.2): (1.1, 2.0, 2.4),
        ("ema", 0.2): (1.1, 2.1, 2.3),
        ("late", 0.1): (1.2, 2.9, 3.4),
        ("late", 0.2): (1.1, 2.2, 2.4),
    }
    every = [
        result(method, lr, seed, [loss])
        for (method, lr), of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    every.append(result("none", 0.4, 1, [1.0]))  # one seed has no interval
    every += [result("none", 0.3, seed, [3.5]) for seed in (1, 2)]  # and no method
    text = report_of(every, tmp_path, monkeypatch, confirming_seeds=[1, 2])
    chosen, left, other, alone = text.split("### sgd at ")
    assert "| none | 0.1 (smallest) | 3.1000 ± 0.1414 |" in chosen
    assert "| ema | 0.1 (smallest) | 2.5500 ± 0.0707 | -0.5500 [-1.1853, +0.0853] |" in chosen
    assert "| late | 0.2 (largest) | 2.3000 ± 0.1414 | -0.8000 [-0.8000, -0.8000] |" in chosen
    assert other.startswith("0.2, which was not chosen")
    assert "which ends 0.9000 lower than at 0.1." in other
    assert "| ema | 0.2 (largest) | 2.2000 ± 0.1414 | +0.0000 [-1.2706, +1.2706] |" in other
    assert left.startswith("0.1, for methods that chose another rate")
    assert "| late | 0.1 (smallest) | 3.1500 ± 0.3536 | +0.0500 [-1.8559, +1.9559] |" in left
    assert "| ema |" not in left
    assert alone.startswith("0.3, which was not chosen")
    assert "which ends 0.4000 higher than at 0.1." in alone
    assert alone.count("\n| ") == 3  # the head, the line below it and the baseline
