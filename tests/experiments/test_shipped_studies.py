"""The studies in the recipes: they run, and their tables are those of their lines."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

from lightning_ema_nesterov.experiments.study.claim import read_config
from lightning_ema_nesterov.experiments.study.compare import run_study
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.results import (
    Result,
    read_events,
    read_lines,
    with_averages,
)
from lightning_ema_nesterov.experiments.study.rounds import by_lr, confirming_runs, judged
from lightning_ema_nesterov.experiments.study.spec import ClassSpec
from lightning_ema_nesterov.experiments.study.tables import (
    Interval,
    markdown_table,
    paired_difference,
    standings,
)
from tests.experiments.toys import ROOT, STUDIES

RESULTS = sorted(path.parent for path in (STUDIES / "results").glob("*/runs.jsonl"))

_MORE_SEEDS = {"joint": [5, 6, 7, 8]}
"""Seeds that a folder has beside those of its YAML, for what these left in doubt."""

PAGES = [
    STUDIES / "README.md",
    *(ROOT / name for name in ("README.md", "docs/results.md", "docs/gain.md", "docs/tuning.md")),
]


@pytest.fixture(autouse=True)
def classes_beside_the_yaml_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))  # as the command does


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_run_in_miniature(path: Path, tmp_path: Path) -> None:
    """The quick form of each, with ten steps, one learning rate, and a text of the test's own."""
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    raw = yaml.safe_load(path.read_text())
    raw["data"]["init_args"].update(text=str(text), batch_size=1, num_validation_windows=1)
    if "accelerator" in raw:  # one for a GPU, with a model for it
        raw["accelerator"] = "cpu"
        raw["model"]["init_args"].update(num_layers=1, width=16, num_heads=2, window_size=8)
        raw["data"]["init_args"].update(cache_dir=str(tmp_path / "tokens"), window_size=8)
    quick = {**raw["quick"], "num_steps": 10, "num_validations": 1}
    for base in raw["base_optimizers"].values():
        base["lrs"] = base["lrs"][:1]
        for other in base.get("instead", {}).values():
            other["lrs"] = other["lrs"][:1]
    quick["methods"] = {
        name: method and {**method, "grid": {k: v[:1] for k, v in method.get("grid", {}).items()}}
        for name, method in raw["methods"].items()
    }
    copy = tmp_path / path.name
    copy.write_text(yaml.safe_dump({**raw, "quick": quick}))
    study = load_study(copy, is_quick=True)
    assert set(study.base_optimizers) == set(raw["base_optimizers"])
    run_study(study, tmp_path / "out")
    results = read_events(tmp_path / "out/runs")
    assert {result.run for result in results} == set(study.runs())
    assert not any(result.is_diverged for result in results)


def test_example_in_the_readme_of_the_studies_is_a_study(tmp_path: Path) -> None:
    text = (STUDIES / "README.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my.yaml").write_text(re.sub(r"my_model\.My", "tests.experiments.toys.", example))
    study = load_study(tmp_path / "my.yaml")
    assert len(study.methods) == 3 + 4
    assert study.model == ClassSpec("tests.experiments.toys.Model")


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_reports_of_the_studies_are_those_of_their_lines(folder: Path) -> None:
    """And the lines are those of the YAML, as one would get it by the command."""
    lines, study = read_lines(folder / "runs.jsonl"), load_study(STUDIES / f"{folder.name}.yaml")
    kept, written = read_config(folder), json.loads(json.dumps(study.as_dict()))
    assert kept is not None
    confirming = kept["confirming_seeds"]
    choosing = [r for r in lines if r.run.seed not in confirming]
    assert {result.run for result in choosing} <= set(study.runs())
    grown = [*study.confirming_seeds, *_MORE_SEEDS.get(folder.name, [])]
    assert kept == {**written, "confirming_seeds": grown}
    results = judged(lines, confirming)
    text = (folder / "report/report.md").read_text()
    methods = list(dict.fromkeys([*study.methods, *(r.run.method for r in results)]))
    for base in dict.fromkeys(result.run.base for result in results):
        none, *others = standings(results, base, methods, with_averages(choosing))
        if re.search(rf"\]\({re.escape(base)}_[^)]*_(grid|map)\.png\)", text):
            others.sort(key=lambda standing: standing.difference.mean)
        assert markdown_table([none, *others]) in text, base
        for row in _rows_at_each_rate_with_several_seeds(lines, confirming, base):
            assert row in text
    for picture in re.findall(r"\]\((\S+\.png)\)", text):
        assert (folder / "report" / picture).is_file()


def _rows_at_each_rate_with_several_seeds(
    lines: list[Result], confirming: list[int], base: str
) -> list[str]:
    """Rows of a report, up to the difference to the baseline at the same rate."""
    choosing, others = (
        [r for r in with_averages(lines) if (r.run.seed in confirming) is is_confirming]
        for is_confirming in (False, True)
    )
    found = []
    for lr, seeds in by_lr(others, base, "none").items():
        at_lr = [r for r in others if r.run.lr == lr]
        if len(seeds) >= 2:
            found += markdown_table(standings(at_lr, base, choosing=choosing)).splitlines()[3:]
    return [row[: row.index("]") + 1] for row in found]


def test_table_of_convex_problems_is_that_of_the_lines() -> None:
    text = (STUDIES / "README.md").read_text()
    lines = (STUDIES / "results/convex.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert f"| {line['step_size']:.3f} |" in text
        assert f"| {line['measured']:.4f} |" in text
    assert text.count("quadratic |") + text.count("| logistic") == len(lines)


def test_results_in_the_readme_are_those_of_the_lines() -> None:
    readme = (STUDIES.parent.parent / "README.md").read_text()
    expected = []
    for name in ("late", "longer", "quiet"):
        study = load_study(STUDIES / f"{name}.yaml")
        results = read_lines(STUDIES / f"results/{name}/runs.jsonl")
        for base in study.base_optimizers:
            found = {standing.method: standing for standing in standings(results, base)}
            none, ema = found["none"], found["ema_nesterov"]
            gap = ema.difference
            cells = [
                {"adamw": "AdamW", "muon": "Muon", "soap": "SOAP"}[base],
                f"{64 * study.data.init_args['batch_size']:,} | {study.num_steps:,}",
                f"{min(none.results)} to {max(none.results)}",
                *(f"{mean(x.finals):.4f} ± {stdev(x.finals):.4f}" for x in (none, ema)),
                _as_text(gap),
            ]
            expected.append(f"| {' | '.join(cells)} |")
    rows = re.findall(r"^\| (?:AdamW|Muon|SOAP) \|.*$", readme, re.MULTILINE)
    assert rows == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_in_the_text_are_those_of_a_table(page: Path) -> None:
    """Of a study that the paragraph, the row or the heading above names, if one does."""
    reports = {path.name: (path / "report/report.md").read_text() for path in RESULTS}
    num_intervals, num_named = 0, 0
    for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE):
        heading = section.partition("\n")[0]
        for part in re.split(r"\n\n|\n(?=[*|-] )", section):
            names = {*re.findall(r"\(#(\w+)\)|`(\w+)`", part)}
            named = [name for name in (*map("".join, names), heading) if name in reports]
            text = "".join(reports[name] for name in named or reports)
            intervals = re.findall(r"[+-]\d\.\d{4}\s\[[^\]]+\]", part)
            num_intervals += len(intervals)
            num_named += bool(named) * len(intervals)
            losses = re.findall(r"\d\.\d{4}\s±\s\d\.\d{4}", part)
            for figure in intervals + losses:
                assert re.sub(r"\s+", " ", figure) in text, (named, part)
    assert num_intervals >= 10
    if page.name == "tuning.md" or page.parent == STUDIES:
        assert num_named > 0.8 * num_intervals


def _losses_of_the_choosing_seed(name: str) -> dict[tuple[float, float], float]:
    """Final losses of AdamW at each learning rate and step size."""
    study = load_study(STUDIES / f"{name}.yaml")
    return {
        (run.lr, study.methods[run.method].lookahead_step_size): result.final
        for result in read_lines(STUDIES / f"results/{name}/runs.jsonl")
        for run in [result.run]
        if run.base == "adamw" and run.seed in study.seeds
    }


def _text(name: str) -> str:
    return re.sub(r"\s+", " ", (ROOT / name).read_text())


def test_what_a_step_size_is_worth_is_read_off_the_curve_of_the_baseline() -> None:
    text, losses = _text("docs/gain.md"), _losses_of_the_choosing_seed("joint_noisy")
    step_sizes, low, next_lr = (0.15, 0.3, 0.5, 0.7), 0.001, 0.0014
    slope = losses[low, 0.0] - losses[next_lr, 0.0]
    shares = [(losses[low, 0.0] - losses[low, b]) / slope for b in step_sizes]
    worth = [f"{(next_lr / low) ** share:.2f}" for share in shares]
    assert f"with {worth[0]}, {worth[1]}, {worth[2]} and {worth[3]} times the rate" in text
    assert f"ends {losses[0.002, 0.0] - losses[0.002, 0.5]:.4f} lower. The quadratic would" in text
    beyond = [losses[lr, b] - losses[lr, 0.0] for lr in (0.0028, 0.004) for b in step_sizes]
    assert f"between {-min(beyond):.4f} lower and {max(beyond):.4f} higher" in text


def test_what_twice_the_best_rate_costs_is_the_same_on_each_page() -> None:
    losses = _losses_of_the_choosing_seed("joint_noisy")
    assert min((loss, lr) for (lr, b), loss in losses.items() if b == 0.0)[1] == 0.002
    short, long = (_baseline_of_adamw(name, (0.004, 0.002)) for name in ("late", "longer"))
    assert min(short.low, -long.low, long.high) > 0  # level in the longer runs
    assert f"on nine seeds (`late`) by {short.mean:.3f}" in _text("docs/gain.md")
    for name in ("README.md", "docs/results.md", "recipes/studies/README.md"):
        assert f"rate ends {short.mean:.3f} higher" in _text(name), name


def _baseline_of_adamw(name: str, lrs: tuple[float, float]) -> Interval:
    """How much higher AdamW alone ends at the first of two learning rates."""
    rows = by_lr(read_lines(STUDIES / f"results/{name}/runs.jsonl"), "adamw", "none")
    return paired_difference(rows[lrs[0]], rows[lrs[1]])


def test_how_often_muon_is_behind_with_small_batches_is_said() -> None:
    methods = {
        "noisy": "ema_nesterov",
        "late": "ema_nesterov",
        "quiet": "ema_nesterov",
        "scope": "all",
        "self_chosen": "fixed",
        "lean": "direction",
        "joint_noisy": "ema[lookahead_step_size=0.5]",
        "average": "decayed_lookahead",
    }
    gaps = {}
    for name, method in methods.items():
        study = load_study(STUDIES / f"{name}.yaml")
        lines = read_lines(STUDIES / f"results/{name}/runs.jsonl")
        found = standings(judged(lines, study.confirming_seeds), "muon")
        gaps[name] = next(s for s in found if s.method == method).difference
    assert all(gap.low < 0 < gap.high for gap in gaps.values())
    behind = [name for name, gap in gaps.items() if gap.mean > 0]
    assert (len(behind), len(gaps)) == (6, 8)
    assert "ended higher in six of eight studies and lower in two" in _text("docs/tuning.md")
    behind_at = {"scope": ("all", 0.01), "noisy": ("ema_nesterov", 0.02)}
    for name, (method, lr) in behind_at.items():
        lines = read_lines(STUDIES / f"results/{name}/runs.jsonl")
        rows = {m: by_lr(lines, "muon", m)[lr] for m in ("none", method)}
        assert paired_difference(rows[method], rows["none"]).low > 0
    places = " and ".join(f"at {lr} in `{name}`" for name, (_, lr) in behind_at.items())
    assert f"behind beyond noise twice: {places}." in _text("docs/tuning.md")


def test_only_a_start_at_once_is_behind_the_default_beyond_noise() -> None:
    lines = read_lines(STUDIES / "results/phases/runs.jsonl")
    found = {s.method: s for s in standings(lines, "adamw")}
    for rest in (0.0, 0.15, 0.3):
        late, soon, at_once = (
            next(s for m, s in found.items() if m == f"ema[warmup={w},rest={rest}]")
            for w in (0.3, 0.1, 0.0)
        )
        assert paired_difference(late.results, soon.results).high > 0
        if rest == 0.15:
            assert paired_difference(late.results, at_once.results).high < 0
    for name in ("docs/results.md", "docs/tuning.md", "recipes/studies/README.md"):
        assert "10 % lies between, within noise" in _text(name), name


def test_tables_of_the_joint_study_have_each_cell_that_was_trained() -> None:
    chose = load_study(STUDIES / "joint.yaml").seeds
    lines = with_averages(read_lines(STUDIES / "results/joint/runs.jsonl"))
    confirming = [r for r in lines if r.run.seed not in chose]
    table = re.compile(r"^\| (\w+) at (\S+) \|(.*)\|$", re.MULTILINE)
    text = (STUDIES / "README.md").read_text().split("\n## joint\n")[1].split("\n## ")[0]
    tables = text.split("The same runs at the average")
    step_sizes = ("-0.3", "0", "0.15", "0.3", "0.5", "0.7")
    for part, share in zip(tables, ("", " @ 1"), strict=True):
        rows = table.findall(part)
        assert len(rows) == 7
        for base, lr, cells in rows:
            for step_size, cell in zip(step_sizes, cells.split("|"), strict=True):
                method = f"ema[lookahead_step_size={step_size}]{share}"
                alone, ahead = (
                    by_lr(confirming, base.lower(), one).get(float(lr), {})
                    for one in ("none", method)
                )
                gap = paired_difference(ahead, alone)
                expected = _as_text(gap) if math.isfinite(gap.low) else ""
                assert cell.strip() == ("0" if method.endswith("=0]") else expected)


def test_that_one_seed_chose_a_poor_rate_is_said() -> None:
    losses = _losses_of_the_choosing_seed("joint")
    poor, better = 0.002, 0.008
    assert min((loss, lr) for (lr, b), loss in losses.items() if b == 0.0)[1] == poor
    by = losses[better, 0.0] - losses[poor, 0.0]
    rows = {lr: _confirmed_of_the_joint_study("adamw", lr, "none") for lr in (poor, better)}
    lost = paired_difference(rows[poor], rows[better])
    assert lost.low > 0
    said = f"ends {by:.3f} lower at 0.002 than at 0.008"
    assert f"{said} on AdamW; four other seeds end {lost.mean:.3f} higher" in _text("docs/gain.md")
    section = _joint_section()
    assert "On seed 0 AdamW " + said + f", on seeds 1 to 4 {lost.mean:.3f} higher" in section
    ahead = _confirmed_of_the_joint_study("adamw", poor, "ema[lookahead_step_size=0.5]")
    assert 2.5 < -lost.mean / paired_difference(ahead, rows[poor]).mean < 3.5
    assert "raising the rate gives three times as much" in _text("docs/tuning.md")
    assert f"a rate that ends {lost.mean:.3f} higher on four others" in _text("docs/tuning.md")


def test_that_scale_gains_at_two_rates_is_said() -> None:
    low, twice = (_confirmed_of_the_joint_study("scale", lr, "none") for lr in (0.002, 0.004))
    gap = paired_difference(twice, low)
    assert gap.low < 0 < gap.high
    section = _joint_section()
    assert f"0.004 alone ends {-gap.mean:.3f} lower than 0.002, within noise, on eight" in section
    for lr, alone in ((0.002, low), (0.004, twice)):
        ahead = _confirmed_of_the_joint_study("scale", lr, "ema[lookahead_step_size=0.3]")
        difference = paired_difference(ahead, alone)
        assert difference.high < 0
        _assert_each_page_says(difference)


def test_that_soap_gains_little_at_a_rate_that_is_level_is_said() -> None:
    chosen, other = (_confirmed_of_the_joint_study("soap", lr, "none") for lr in (0.016, 0.004))
    results = read_lines(STUDIES / "results/joint/runs.jsonl")
    on_seed_0 = [by_lr(results, "soap", "none")[lr][0].final for lr in (0.016, 0.004)]
    gap = paired_difference(other, chosen)
    assert gap.low < 0 < gap.high
    said = f"There 0.004 ends {on_seed_0[1] - on_seed_0[0]:.3f} higher, on seeds 1 to 4"
    assert f"{said} {-gap.mean:.3f} lower, within noise" in _joint_section()
    ahead = _confirmed_of_the_joint_study("soap", 0.004, "ema[lookahead_step_size=0.5]")
    gain = paired_difference(ahead, other)
    assert gain.high < 0
    _assert_each_page_says(gain)


def test_what_the_average_gives_alone_is_said() -> None:
    section = _joint_section()
    for base, lr, step_size, said in (
        ("adamw", 0.008, 0.5, "lookahead itself adds {:.4f} there, within noise"),
        ("soap", 0.016, 0.7, "lookahead itself adds {:.4f}, within noise"),
        ("scale", 0.002, 0.3, "0.3 adds {:.4f} to that, within noise"),
    ):
        ahead, alone = (f"ema[lookahead_step_size={b}] @ 1" for b in (step_size, 0))
        gaps = _gaps_of_the_joint_study(base, lr, ahead, alone)
        rows = [_confirmed_of_the_joint_study(base, lr, method) for method in (ahead, alone)]
        found = paired_difference(*rows)
        assert found.low < 0 < found.high
        assert said.format(mean(gaps)) in section


def test_what_is_finished_of_the_joint_study_is_said() -> None:
    study = load_study(STUDIES / "joint.yaml")
    results = read_lines(STUDIES / "results/joint/runs.jsonl")
    section = _joint_section()
    finished, confirming = {r.run for r in results}, confirming_runs(study, results)
    assert finished >= {*study.runs(), *confirming}
    more = [run for run in finished if run.seed not in (*study.seeds, *study.confirming_seeds)]
    other = len(finished) - len(study.runs()) - len(confirming) - len(more)
    assert f"all {len(study.runs())} runs of seed 0 and the {len(confirming)} that" in section
    assert f"There are {other} more of seeds 1 to 4 and {len(more)} of seeds 5 to 8" in section
    for base, lr, step_size in (("muon", 0.02, 0.5), ("scale", 0.002, 0.7), ("scale", 0.004, 0.5)):
        gaps = _gaps_of_the_joint_study(base, lr, f"ema[lookahead_step_size={step_size}]", "none")
        halves = [_in_words(mean(half)) for half in (gaps[:4], gaps[4:])]
        assert f"first four seeds had {step_size} at {halves[0]} and the next four, " in section
        assert f"which were added for that, at {halves[1]}" in section


_CELLS = {"adamw": (0.008, 0.5), "muon": (0.02, 0.5), "soap": (0.016, 0.3), "scale": (0.002, 0.7)}
"""Learning rate and step size of the cell that has a longer memory too."""


def test_what_a_longer_memory_gives_in_the_joint_study_is_said() -> None:
    section, gaps = _joint_section(), {}
    for base, (lr, step_size) in _CELLS.items():
        longer, shorter, alone = (
            _confirmed_of_the_joint_study(base, lr, method)
            for method in (f"longer_{base}", f"ema[lookahead_step_size={step_size}]", "none")
        )
        found = paired_difference(longer, alone)
        assert _as_text(found) in section.split("A longer memory")[1]
        against = paired_difference(longer, shorter)
        assert against.low < 0 < against.high
        gaps[base] = against.mean
    assert gaps["adamw"] < gaps["muon"] < gaps["scale"]
    said = f"the first three end {gaps['adamw']:.3f} to {gaps['scale']:.3f} lower"
    assert f"{said}, and SOAP {-gaps['soap']:.3f} higher, all within noise" in section
    own = _gaps_of_the_joint_study("soap", 0.016, "longer_soap", "none")
    first, second = (_in_words(mean(half)) for half in (own[:4], own[4:]))
    assert f"first four seeds had it at {first} and the next four, " in section
    assert f"which were added for that, at {second}" in section


def test_that_a_step_size_below_0_ends_higher_is_said() -> None:
    found = []
    for base, (lr, _) in _CELLS.items():
        backward, alone = (
            _confirmed_of_the_joint_study(base, lr, method)
            for method in ("ema[lookahead_step_size=-0.3]", "none")
        )
        found.append(paired_difference(backward, alone))
    assert all(one.low < 0 < one.mean for one in found)
    means = [one.mean for one in found]
    assert f"by {min(means):.4f} to {max(means):.4f}, within noise" in _joint_section()


def _assert_each_page_says(found: Interval) -> None:
    for name in ("docs/gain.md", "docs/tuning.md", "recipes/studies/README.md"):
        assert _as_text(found) in _text(name), name


def _as_text(found: Interval) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _joint_section() -> str:
    return _text("recipes/studies/README.md").split("## joint ")[1].split("## ")[0]


def _confirmed_of_the_joint_study(base: str, lr: float, method: str) -> dict[int, Result]:
    chose = load_study(STUDIES / "joint.yaml").seeds
    lines = with_averages(read_lines(STUDIES / "results/joint/runs.jsonl"))
    return by_lr([r for r in lines if r.run.seed not in chose], base, method)[lr]


def _gaps_of_the_joint_study(base: str, lr: float, method: str, other: str) -> list[float]:
    found, others = (_confirmed_of_the_joint_study(base, lr, m) for m in (method, other))
    return [found[seed].final - others[seed].final for seed in sorted(found.keys() & others.keys())]


def _in_words(gap: float) -> str:
    return f"{abs(gap):.3f} {'below' if gap < 0 else 'above'} the baseline"


def test_losses_on_the_page_about_memory_are_those_of_a_table() -> None:
    table = (STUDIES / "results/lean/report/report.md").read_text()
    text = _text("docs/memory.md")
    losses = re.findall(r"\d\.\d{4} ± \d\.\d{4}", text)
    intervals = re.findall(r"[+-]\d\.\d{4} \[[^\]]+\]", text)
    assert len(losses) >= 9
    assert len(intervals) == 2
    for found in losses + intervals:
        assert found in table


def test_pictures_and_links_of_the_page_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", (STUDIES / "README.md").read_text())
    assert len(targets) > 20
    for target in targets:
        assert (STUDIES / target).exists(), target
