"""The studies in the recipes: they run, and their tables are those of their lines."""

from __future__ import annotations

import json
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
from lightning_ema_nesterov.experiments.study.rounds import by_lr, judged
from lightning_ema_nesterov.experiments.study.spec import ClassSpec
from lightning_ema_nesterov.experiments.study.tables import (
    Interval,
    markdown_table,
    paired_difference,
    standings,
)
from tests.experiments.shipped import MORE_SEEDS, as_text, losses_of_the_choosing_seed, text_of
from tests.experiments.toys import ROOT, STUDIES

RESULTS = sorted(path.parent for path in (STUDIES / "results").glob("*/runs.jsonl"))

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
    grown = [*study.confirming_seeds, *MORE_SEEDS.get(folder.name, [])]
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
    return ["|".join(row.split("|")[:5]) for row in found]


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
                as_text(gap),
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


def test_what_a_step_size_is_worth_is_read_off_the_curve_of_the_baseline() -> None:
    text, losses = text_of("docs/gain.md"), losses_of_the_choosing_seed("joint_noisy")
    step_sizes, low, next_lr = (0.15, 0.3, 0.5, 0.7), 0.001, 0.0014
    slope = losses[low, 0.0] - losses[next_lr, 0.0]
    shares = [(losses[low, 0.0] - losses[low, b]) / slope for b in step_sizes]
    worth = [f"{(next_lr / low) ** share:.2f}" for share in shares]
    assert f"with {worth[0]}, {worth[1]}, {worth[2]} and {worth[3]} times the rate" in text
    assert f"ends {losses[0.002, 0.0] - losses[0.002, 0.5]:.4f} lower. The quadratic would" in text
    beyond = [losses[lr, b] - losses[lr, 0.0] for lr in (0.0028, 0.004) for b in step_sizes]
    assert f"between {-min(beyond):.4f} lower and {max(beyond):.4f} higher" in text


def test_what_twice_the_best_rate_costs_is_the_same_on_each_page() -> None:
    losses = losses_of_the_choosing_seed("joint_noisy")
    assert min((loss, lr) for (lr, b), loss in losses.items() if b == 0.0)[1] == 0.002
    short, long = (_baseline_of_adamw(name, (0.004, 0.002)) for name in ("late", "longer"))
    assert min(short.low, -long.low, long.high) > 0  # level in the longer runs
    assert f"on nine seeds (`late`) by {short.mean:.3f}" in text_of("docs/gain.md")
    for name in ("README.md", "docs/results.md", "recipes/studies/README.md"):
        assert f"rate ends {short.mean:.3f} higher" in text_of(name), name


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
    assert "ended higher in six of eight studies and lower in two" in text_of("docs/tuning.md")
    behind_at = {"scope": ("all", 0.01), "noisy": ("ema_nesterov", 0.02)}
    for name, (method, lr) in behind_at.items():
        lines = read_lines(STUDIES / f"results/{name}/runs.jsonl")
        rows = {m: by_lr(lines, "muon", m)[lr] for m in ("none", method)}
        assert paired_difference(rows[method], rows["none"]).low > 0
    places = " and ".join(f"at {lr} in `{name}`" for name, (_, lr) in behind_at.items())
    assert f"behind beyond noise twice: {places}." in text_of("docs/tuning.md")


def test_what_rules_that_choose_the_step_size_did_is_said() -> None:
    lines, others = (
        read_lines(STUDIES / f"results/{name}/runs.jsonl")
        for name in ("self_chosen_noisy", "joint_noisy")
    )
    again, before = (
        {
            (r.run.base, r.run.lr, r.run.seed, r.step_size): r.final
            for r in results
            if r.run.method in ("none", "fixed", "ema[lookahead_step_size=0.5]")
        }
        for results in (lines, others)
    )
    shared = again.keys() & before.keys()
    assert len(shared) == 2 * 3 * (5 + 6)
    assert all(again[key] == before[key] for key in shared)
    adamw = {s.method: s.difference.mean for s in standings(judged(lines, range(3, 9)), "adamw")}
    assert adamw["bounded"] / adamw["fixed"] == pytest.approx(0.5, abs=0.05)
    assert 0.35 < max(r.step_size for r in lines if r.run.method == "bounded") < 0.36
    for rule in ("steadiness", "alignment"):
        assert {r.step_size for r in lines if r.run.method == rule} == {0.7}
    muon = by_lr([r for r in lines if r.run.seed > 0], "muon", "none")
    poor = paired_difference(muon[0.014], muon[0.007]).mean
    assert f"0.014 for the baseline, which ends {poor:.3f} higher than 0.007" in text_of(
        "recipes/studies/README.md"
    )


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
        assert "10 % lies between, within noise" in text_of(name), name


def test_losses_on_the_page_about_memory_are_those_of_a_table() -> None:
    table = (STUDIES / "results/lean/report/report.md").read_text()
    text = text_of("docs/memory.md")
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
