"""The text about the joint study says what its lines say."""

from __future__ import annotations

import math
import re
from functools import cache
from statistics import mean

from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.results import Result, read_lines, with_averages
from lightning_ema_nesterov.experiments.study.rounds import by_lr, confirming_runs
from lightning_ema_nesterov.experiments.study.tables import Interval, paired_difference
from tests.experiments.shipped import MORE_SEEDS, as_text, losses_of_the_choosing_seed, text_of
from tests.experiments.toys import STUDIES


def test_tables_have_each_cell_that_was_trained() -> None:
    table = re.compile(r"^\| (\w+) at (\S+) \|(.*)\|$", re.MULTILINE)
    text = (STUDIES / "README.md").read_text().split("\n## joint\n")[1].split("\n## ")[0]
    tables = text.split("The same runs at the average")
    step_sizes = ("-0.3", "0", "0.15", "0.3", "0.5", "0.7")
    for part, share in zip(tables, ("", " @ 1"), strict=True):
        rows = table.findall(part)
        assert len(rows) == 8
        for base, lr, cells in rows:
            for step_size, cell in zip(step_sizes, cells.split("|"), strict=True):
                method = _ahead(step_size) + share
                alone, ahead = (
                    by_lr(_confirming_lines(), base.lower(), one).get(float(lr), {})
                    for one in ("none", method)
                )
                gap = paired_difference(ahead, alone)
                expected = as_text(gap) if math.isfinite(gap.low) else ""
                assert cell.strip() == ("0" if method.endswith("=0]") else expected)


def test_that_one_seed_chose_a_poor_rate_is_said() -> None:
    losses = losses_of_the_choosing_seed("joint")
    poor, better = 0.002, 0.008
    assert min((loss, lr) for (lr, b), loss in losses.items() if b == 0.0)[1] == poor
    by = losses[better, 0.0] - losses[poor, 0.0]
    lost = paired_difference(*(_confirmed("adamw", lr, "none") for lr in (poor, better)))
    assert lost.low > 0
    said = f"ends {by:.3f} lower at 0.002 than at 0.008"
    assert f"{said} on AdamW; four other seeds end {lost.mean:.3f} higher" in text_of(
        "docs/gain.md"
    )
    section = _section()
    assert "On seed 0 AdamW " + said + f", on seeds 1 to 4 {lost.mean:.3f} higher" in section
    assert 2.5 < -lost.mean / _difference("adamw", poor, _ahead(0.5)).mean < 3.5
    assert "raising the rate gives three times as much" in text_of("docs/tuning.md")
    assert f"a rate that ends {lost.mean:.3f} higher on four others" in text_of("docs/tuning.md")


def test_that_adamw_is_level_at_two_rates_is_said() -> None:
    gap = paired_difference(*(_confirmed("adamw", lr, "none") for lr in (0.004, 0.008)))
    assert gap.low < 0 < gap.high
    assert f"0.004 alone ends {gap.mean:.3f} higher than 0.008, within noise" in _section()
    for lr, step_sizes in ((0.004, (0.3, 0.5)), (0.008, (0.15, 0.3, 0.5, 0.7))):
        for step_size in step_sizes:
            difference = _difference("adamw", lr, _ahead(step_size))
            assert difference.mean < 0 < difference.high
            if step_size == 0.5:
                _assert_each_page_says(difference)


def test_that_scale_gains_at_two_rates_is_said() -> None:
    gap = paired_difference(*(_confirmed("scale", lr, "none") for lr in (0.004, 0.002)))
    assert gap.low < 0 < gap.high
    section = _section()
    assert f"0.004 alone ends {-gap.mean:.3f} lower than 0.002, within noise, on eight" in section
    for lr in (0.002, 0.004):
        difference = _difference("scale", lr, _ahead(0.3))
        assert difference.high < 0
        _assert_each_page_says(difference)


def test_what_soap_gains_at_each_rate_is_said() -> None:
    alone = {lr: _confirmed("soap", lr, "none") for lr in (0.004, 0.008, 0.016)}
    results = read_lines(STUDIES / "results/joint/runs.jsonl")
    on_seed_0 = [by_lr(results, "soap", "none")[lr][0].final for lr in (0.016, 0.004)]
    gap, middle = (paired_difference(alone[0.004], alone[lr]) for lr in (0.016, 0.008))
    assert gap.low < 0 < gap.high
    assert middle.low < 0 < middle.high
    said = f"There 0.004 ends {on_seed_0[1] - on_seed_0[0]:.3f} higher, on seeds 1 to 4"
    said += f" {-gap.mean:.3f} lower, within noise, and 0.008 ends {-middle.mean:.3f} above 0.004"
    assert said in _section()
    gains = {
        (lr, step_size): _difference("soap", lr, _ahead(step_size))
        for lr in (0.004, 0.016)
        for step_size in (0.15, 0.3, 0.5, 0.7)
    }
    beyond_noise = [cell for cell, found in gains.items() if found.high < 0]
    assert beyond_noise == [(0.004, 0.3), (0.004, 0.5)]
    assert not [cell for cell, found in gains.items() if found.low > 0]
    for cell in beyond_noise:
        _assert_each_page_says(gains[cell])


def test_what_the_average_gives_alone_is_said() -> None:
    section = _section()
    for base, lr, step_size, said in (
        ("adamw", 0.008, 0.5, "lookahead itself adds {:.4f} there, within noise"),
        ("soap", 0.016, 0.7, "lookahead itself adds {:.4f}, within noise"),
        ("scale", 0.002, 0.3, "0.3 adds {:.4f} to that, within noise"),
    ):
        found = _difference(base, lr, *(f"{_ahead(b)} @ 1" for b in (step_size, 0)))
        assert found.low < 0 < found.high
        assert said.format(found.mean) in section


def test_what_is_finished_is_said() -> None:
    study = load_study(STUDIES / "joint.yaml")
    results = read_lines(STUDIES / "results/joint/runs.jsonl")
    section = _section()
    finished, confirming = {r.run for r in results}, confirming_runs(study, results)
    assert finished >= {*study.runs(), *confirming}
    more = [run for run in finished if run.seed not in (*study.seeds, *study.confirming_seeds)]
    other = len(finished) - len(study.runs()) - len(confirming) - len(more)
    assert f"all {len(study.runs())} runs of seed 0 and the {len(confirming)} that" in section
    assert f"There are {other} more of seeds 1 to 4 and {len(more)} of seeds 5 to 8" in section


def test_what_four_more_seeds_found_is_said() -> None:
    lines = read_lines(STUDIES / "results/joint/runs.jsonl")
    expected = {
        (r.run.base, r.run.lr, r.run.method)
        for r in lines
        if r.run.seed in MORE_SEEDS["joint"] and r.step_size != 0.0
    }
    rows = re.findall(
        r"\| (\w+) at (\S+), (\S+)( with \S+ = 0.995\S)? \| (\S+) \| (\S+) \|", _section()
    )
    for name, lr, step_size, is_longer, *halves in rows:
        base = name.lower()
        method = f"longer_{base}" if is_longer else _ahead(step_size)
        expected.remove((base, float(lr), method))
        ahead, alone = (_confirmed(base, float(lr), one) for one in (method, "none"))
        gaps = [ahead[seed].final - alone[seed].final for seed in sorted(ahead)]
        assert halves == [f"{mean(half):+.3f}" for half in (gaps[:4], gaps[4:])]
    assert not expected


_CELLS = {"adamw": (0.008, 0.5), "muon": (0.02, 0.5), "soap": (0.016, 0.3), "scale": (0.002, 0.7)}
"""Learning rate and step size of the cell that has a longer memory too."""


def test_what_a_longer_memory_gives_is_said() -> None:
    section, gaps = _section(), {}
    for base, (lr, step_size) in _CELLS.items():
        longer = f"longer_{base}"
        found = _difference(base, lr, longer)
        assert as_text(found) in section.split("A longer memory")[1]
        against = _difference(base, lr, longer, _ahead(step_size))
        assert against.low < 0 < against.high
        gaps[base] = against.mean
    assert gaps["adamw"] < gaps["muon"] < gaps["scale"]
    said = f"the first three end {gaps['adamw']:.3f} to {gaps['scale']:.3f} lower"
    assert f"{said}, and SOAP {-gaps['soap']:.3f} higher, all within noise" in section


def test_that_a_step_size_below_0_ends_higher_is_said() -> None:
    found = [_difference(base, lr, _ahead(-0.3)) for base, (lr, _) in _CELLS.items()]
    assert all(one.low < 0 < one.mean for one in found)
    means = [one.mean for one in found]
    said = f"by {min(means):.4f} to {max(means):.4f}, within noise; on AdamW at 0.002 beyond noise"
    lost = _difference("adamw", 0.002, _ahead(-0.3))
    assert lost.low > 0
    assert f"{said}, {as_text(lost)}." in _section()


def _assert_each_page_says(found: Interval) -> None:
    for name in ("docs/gain.md", "docs/tuning.md", "recipes/studies/README.md"):
        assert as_text(found) in text_of(name), name


def _section() -> str:
    return text_of("recipes/studies/README.md").split("## joint ")[1].split("## ")[0]


def _ahead(step_size: float | str) -> str:
    return f"ema[lookahead_step_size={step_size}]"


@cache
def _confirming_lines() -> list[Result]:
    chose = load_study(STUDIES / "joint.yaml").seeds
    lines = with_averages(read_lines(STUDIES / "results/joint/runs.jsonl"))
    return [r for r in lines if r.run.seed not in chose]


def _confirmed(base: str, lr: float, method: str) -> dict[int, Result]:
    return by_lr(_confirming_lines(), base, method)[lr]


def _difference(base: str, lr: float, method: str, other: str = "none") -> Interval:
    return paired_difference(*(_confirmed(base, lr, one) for one in (method, other)))
