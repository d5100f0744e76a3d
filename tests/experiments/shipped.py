"""What the tests of shipped studies share: where the text is, and how it writes an interval."""

from __future__ import annotations

import re

from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.results import read_lines
from lightning_ema_nesterov.experiments.study.tables import Interval
from tests.experiments.toys import ROOT, STUDIES

MORE_SEEDS = {"joint": [5, 6, 7, 8]}
"""Seeds that a folder has beside those of its YAML, for what these left in doubt."""


def losses_of_the_choosing_seed(name: str) -> dict[tuple[float, float], float]:
    """Final losses of AdamW at each learning rate and step size."""
    study = load_study(STUDIES / f"{name}.yaml")
    return {
        (run.lr, study.methods[run.method].lookahead_step_size): result.final
        for result in read_lines(STUDIES / f"results/{name}/runs.jsonl")
        for run in [result.run]
        if run.base == "adamw" and run.seed in study.seeds
    }


def text_of(name: str) -> str:
    return re.sub(r"\s+", " ", (ROOT / name).read_text())


def as_text(found: Interval) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
