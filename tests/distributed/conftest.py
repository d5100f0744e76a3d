"""Runs on one process, which those on several are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import EMA, OneProcess, TrainerRun
from tests.distributed.processes import Results, launch
from tests.distributed.runs import BASES


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What one process computes from whole batches; ``plain`` ones without the method."""
    one = OneProcess()
    return launch(
        tmp_path_factory.mktemp("one_process"),
        1,
        [
            TrainerRun(name="plain", strategy=one, rule=None),
            TrainerRun(name="accumulated", strategy=one, accumulate=2),
            TrainerRun(name="measured", strategy=one, logs=True),
            TrainerRun(name="resting", strategy=one, logs=True, rule=EMA(rest=1)),
            *(TrainerRun(name=base, strategy=one, optimizer=base) for base in BASES),
            *(
                TrainerRun(
                    name=name,
                    strategy=one,
                    rule=rule,
                    optimizer="exact-muon",
                    model_dtype="float64",
                )
                for name, rule in (("muon", EMA()), ("muon-plain", None))
            ),
        ],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of one file."""
    return tmp_path_factory.mktemp("runs")
