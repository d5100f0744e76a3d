"""A study that was trained to its end, for all tests that only read it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_ema_nesterov.experiments.study.compare import run_study
from lightning_ema_nesterov.experiments.study.load import load_study
from tests.experiments.toys import ROOT, write


@pytest.fixture(autouse=True)
def _find_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="session")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was trained to its end."""
    sys.path.insert(0, str(ROOT))
    folder = tmp_path_factory.mktemp("study")
    run_study(load_study(write(folder)), folder / "out")
    return folder / "out"
