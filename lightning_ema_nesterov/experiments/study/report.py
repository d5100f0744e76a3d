"""The report of a study: Markdown, figures, and one HTML page that holds everything."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import markdown

from lightning_ema_nesterov.experiments.study.claim import read_config
from lightning_ema_nesterov.experiments.study.compare import LINES, RUNS
from lightning_ema_nesterov.experiments.study.figures import (
    draw_curves,
    draw_grids,
    draw_learning_rates,
    styles_of,
)
from lightning_ema_nesterov.experiments.study.frontier import (
    draw_frontier,
    memory_points,
    memory_table,
)
from lightning_ema_nesterov.experiments.study.maps import draw_step_sizes
from lightning_ema_nesterov.experiments.study.results import (
    Result,
    method_of,
    read_events,
    read_lines,
    with_averages,
)
from lightning_ema_nesterov.experiments.study.rounds import by_lr, judged
from lightning_ema_nesterov.experiments.study.spec import BASELINE
from lightning_ema_nesterov.experiments.study.tables import (
    CONFIDENCE,
    Standing,
    markdown_table,
    notes_on,
    paired_difference,
    standings,
)

__all__ = ["write_report"]

_HOW_TO_READ_MAPS = (
    "On the dashed line of a map a steady update is as large as the baseline's at its best "
    "learning rate. Were β only a larger learning rate, the loss would be as low all along that "
    "line, and the curves on the right of the next picture would be one."
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 88rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.8rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: 0.3rem 0.5rem; text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


def write_report(study_dir: Path) -> Path:
    """Write ``report.md``, ``report.html`` and figures of a study.

    Args:
        study_dir: Folder of the study, with event files or, where somebody passed on only what is
            small, with its ``runs.jsonl``. The report goes to its folder ``report``.

    Returns:
        The HTML page, which needs no other file.

    Raises:
        FileNotFoundError: If no run is finished.
    """
    config = read_config(study_dir) or {"methods": {}, "base_optimizers": {}}
    trained_runs = read_lines(study_dir / LINES)
    if (study_dir / RUNS).exists() or not trained_runs:
        trained_runs = read_events(study_dir / RUNS)
    confirming = config.get("confirming_seeds", [])
    results = judged(trained_runs, confirming)
    folder = study_dir / "report"
    folder.mkdir(exist_ok=True)
    methods = list(dict.fromkeys([*config["methods"], *(r.run.method for r in results)]))
    trained = {result.run.base for result in results}
    bases = dict.fromkeys([*config["base_optimizers"], *sorted(trained)])
    choosing = with_averages(r for r in trained_runs if r.run.seed not in confirming)
    sections = [_introduction(study_dir.name, config, trained_runs)]
    with_baseline = {r.run.base for r in results if r.run.method == BASELINE}
    found = {b: standings(results, b, methods, choosing) for b in bases if b in with_baseline}
    confirming_runs = with_averages(r for r in trained_runs if r.run.seed in confirming)
    confirmed = {r.run.base for r in results if r.run.seed in confirming}
    for base in (base for base in bases if base in trained):
        rows = found.get(base, [])
        said = notes_on(choosing, base, methods) if rows else []
        if confirming_runs and base not in confirmed:
            said.insert(0, "Not confirmed yet: this is of the seeds that chose.")
        said += _seeds_note(rows)
        sections.append(_section(folder, base, rows, methods, choosing, said))
        own = [r for r in confirming_runs if r.run.base == base]
        if rows and own:
            sections += _rate_by_rate(own, rows, choosing)
    if any("_map.png)" in section for section in sections):
        sections.insert(1, _HOW_TO_READ_MAPS)
    found = {base: _trained(rows) for base, rows in found.items()}
    sections += [*_memory_section(folder, found), *_speed_section(found)]
    text = "\n\n".join(sections) + "\n"
    (folder / "report.md").write_text(text)
    page = folder / "report.html"
    page.write_text(_html(study_dir.name, text, folder))
    print(f"{text}\nPage: {page}")
    return page


def _trained(found: Sequence[Standing]) -> list[Standing]:
    """Leave out averages: each is another reading of a run."""
    return [standing for standing in found if method_of(standing.method) == standing.method]


def _seeds_note(found: Sequence[Standing]) -> list[str]:
    num_seeds = len(found[0].results) if found else 0
    others = [f"{s.method} ({len(s.results)})" for s in found if len(s.results) != num_seeds]
    if not others:
        return []
    return [
        f"Not as many seeds as the {num_seeds} of the baseline: {', '.join(others)}. "
        "A difference is of the seeds that both have, and not that of the means."
    ]


def _introduction(name: str, study: Mapping[str, Any], results: Sequence[Result]) -> str:
    seeds = sorted({result.run.seed for result in results})
    num_diverged = sum(result.is_diverged for result in results)
    settings = ""
    if "model" in study:
        settings = (
            f"Model `{study['model']['class_path']}`, data `{study['data']['class_path']}` "
            f"{json.dumps(study['data'].get('init_args') or {})}, {study['num_steps']:,} steps. "
        )
    confirming = study.get("confirming_seeds", [])
    chosen = "that choice was made on the losses shown"
    if set(confirming) & set(seeds):
        chosen = (
            "that choice was made on the other seeds, for the iterate and each average, and the "
            f"tables are of the seeds {', '.join(str(s) for s in confirming if s in seeds)}, which "
            "chose nothing, unless they say otherwise"
        )
    gained = ""
    if study.get("has_gained_baseline", True):
        gained = ", so the baseline is shown at that learning rate too"
    return (
        f"# {name}\n\n{settings}{len(results)} finished runs, seeds "
        f"{', '.join(map(str, seeds))}; {num_diverged or 'none'} diverged.\n\n"
        "Each method stands at the learning rate of its smallest mean final loss, also the "
        f"baseline `none`; {chosen}. (smallest) and (largest) mark "
        "one at the edge of those tried: a better one may lie beyond. Losses are mean ± standard "
        "deviation over seeds. Differences are paired by seed, with a "
        f"{CONFIDENCE:.0%} confidence interval. β is the lookahead step size: a steady update "
        f"becomes 1 / (1 - β) times as large{gained}. Extra state is in elements per "
        "parameter; step times are relative to the baseline's."
    )


def _section(
    folder: Path,
    base: str,
    found: Sequence[Standing],
    methods: Sequence[str],
    choosing: Sequence[Result],
    notes: Sequence[str],
) -> str:
    if not found:
        return f"## {base}\n\nNo run of the baseline is finished yet."
    said = "\n".join(f"* {note}" for note in notes)
    grids = draw_grids(folder, base, found)
    step_sizes = draw_step_sizes(folder, base, choosing, found)
    if grids or step_sizes:
        table = _table_by_difference(found)
        pictures = [f"![Differences to the baseline]({path.name})" for path in grids]
        pictures += [f"![{text}]({path.name})" for path, text in step_sizes.items()]
        return "\n\n".join(filter(None, [f"## {base}", *pictures, table, said]))
    curves, rates = folder / f"{base}_curves.png", folder / f"{base}_learning_rates.png"
    shown = _without_worse_shares(found)
    styles = styles_of(methods)
    title = f"{base}: each method at its best learning rate"
    draw_curves(curves, shown, styles, title=title)
    draw_learning_rates(rates, base, choosing, {s.method: styles[s.method] for s in shown})
    pictures = [
        f"![Validation loss over steps]({curves.name})",
        f"![Final loss over learning rates]({rates.name})",
    ]
    return "\n\n".join(filter(None, [f"## {base}", markdown_table(found), said, *pictures]))


def _rate_by_rate(
    own: Sequence[Result], found: Sequence[Standing], choosing: Sequence[Result]
) -> list[str]:
    """Compare at each learning rate at which several seeds confirm the baseline.

    One seed can choose a poor rate, and what is gained there a better one may give too. At the
    baseline's own choice these are the methods that chose another.
    """
    base, chosen = own[0].run.base, found[0]
    shown = {standing.method for standing in found[1:] if standing.lr == chosen.lr}
    sections = []
    for lr, of_baseline in sorted(by_lr(own, base, BASELINE).items()):
        if len(of_baseline) < 2:
            continue
        rows = standings([r for r in own if r.run.lr == lr], base, choosing=choosing)
        which, compared = "which was not chosen", ""
        gap = paired_difference(of_baseline, chosen.results).mean
        if lr == chosen.lr:
            which = "for methods that chose another rate"
            rows = [standing for standing in rows if standing.method not in shown]
            if len(rows) == 1:
                continue
        elif math.isfinite(gap):  # else the chosen rate is not confirmed yet
            direction = "lower" if gap < 0 else "higher"
            compared = f", which ends {abs(gap):.4f} {direction} than at {chosen.lr:g}"
        notes = "".join(f"\n\n* {note}" for note in _seeds_note(rows))
        sections.append(
            f"### {base} at {lr:g}, {which}\n\nOn the seeds that confirm. Differences are to the "
            f"baseline at this learning rate{compared}.\n\n{_table_by_difference(rows)}{notes}"
        )
    return sections


def _table_by_difference(found: Sequence[Standing]) -> str:
    return markdown_table([found[0], *sorted(found[1:], key=_mean_difference)])


def _without_worse_shares(found: Sequence[Standing]) -> list[Standing]:
    """Leave the average of each method that ends lowest, so that a picture can be read."""
    best: dict[tuple[str, bool], Standing] = {}
    for standing in found:
        method = method_of(standing.method)
        key = (method, standing.method == method)
        if key not in best or mean(standing.finals) < mean(best[key].finals):
            best[key] = standing
    return list(best.values())


def _memory_section(folder: Path, found: Mapping[str, Sequence[Standing]]) -> list[str]:
    points = memory_points(found)
    seeds = {frozenset(s.results) for own in found.values() for s in own}
    if len({point.base for point in points}) < 2 or len(seeds) > 1:  # means of other seeds differ
        return []
    picture = folder / "memory.png"
    draw_frontier(picture, points)
    return [
        "## Optimizer memory\n\nBold: nothing that keeps less ends as low.\n\n"
        f"![Final loss over optimizer memory]({picture.name})\n\n{memory_table(points)}"
    ]


def _speed_section(found: Mapping[str, Sequence[Standing]]) -> list[str]:
    """Return what a GPU had to do; the CPU time of a process is only good for ratios."""
    rows = []
    for base, standing in ((b, s) for b, own in found.items() for s in own):
        runs = standing.results.values()
        memory = [r.peak_memory for r in runs if r.peak_memory is not None]
        if not memory:
            continue
        speeds = [r.tokens_per_second for r in runs if r.tokens_per_second is not None]
        rows.append(
            f"| {base} | {standing.method} | {standing.step_seconds:.4f} | "
            f"{f'{mean(speeds):,.0f}' if speeds else ''} | {max(memory) / 2**30:.2f} |"
        )
    if not rows:
        return []
    head = "| base | method | seconds a step | tokens per second | peak memory, GiB |"
    return ["\n".join(["## Speed and memory of the GPU\n", head, "|---|---|---|---|---|", *rows])]


def _mean_difference(standing: Standing) -> float:
    return standing.difference.mean


def _html(title: str, text: str, folder: Path) -> str:
    body = markdown.markdown(text, extensions=["tables"])

    def embed(match: re.Match[str]) -> str:
        content = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'

    body = re.sub(r'src="([^"]+\.png)"', embed, body)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
