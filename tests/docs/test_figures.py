"""The figures show what their script draws, and that is what the text says."""

from __future__ import annotations

import math
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs/figures"


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = spec_from_file_location("draw", FIGURES / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["draw"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", path.read_text())


def test_committed_figures_are_those_of_the_script(draw: ModuleType, tmp_path: Path) -> None:
    """By their texts: another version of matplotlib draws other lines."""
    drawn = draw.draw_all(tmp_path)
    assert {path.name for path in drawn} == {path.name for path in FIGURES.glob("*.svg")}
    for path in drawn:
        assert texts(path) == texts(FIGURES / path.name)
        assert len(texts(path)) >= 5


def test_every_row_of_the_readme_is_in_the_picture(draw: ModuleType) -> None:
    rows = draw.ROW.findall((ROOT / "README.md").read_text())
    labels = [text for text in texts(FIGURES / "results.svg") if " seeds" in text]
    assert len(rows) == len(labels) == 7


def test_the_run_follows_the_equations_and_the_average_is_in_m(draw: ModuleType) -> None:
    decay = 0.8
    found = draw.run(decay=decay)
    x, y, beta = found.iterates, found.lookaheads, found.step_sizes
    average, m = x[0], 0.0
    for step in range(len(y)):
        assert math.isclose(y[step], x[step] + beta[step] * m, abs_tol=1e-12)
        m = decay * m + (1 - decay) * (x[step + 1] - x[step])
        average = decay * average + (1 - decay) * x[step + 1]
        assert math.isclose(found.averages[step], average, abs_tol=1e-12)
    assert any(beta)
    assert beta[0] == beta[-1] == 0
