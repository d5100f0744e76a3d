"""The claims on scikit-learn's digits sorted by class, with the recipe's code and another seed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.no_cover]


RECIPE = Path(__file__).parents[3] / "recipes" / "companions" / "decentralized_simulated.py"
SEED = 1


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decentralized_simulated", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(recipe: ModuleType) -> Any:
    return recipe.SortedDigits()


def test_sa_arrives_where_decentralized_sgd_does_not(recipe: ModuleType, digits: Any) -> None:
    points, duals = recipe.run(digits, "sa", None, SEED)
    mean, worst = digits.gaps(points)
    assert mean < 1e-4
    assert worst < 1e-4
    # Duals of up to 7 and 20,000 roundings of each.
    assert float(duals.sum(0).abs().max()) < 1e-12
    assert float(duals.abs().max()) > 1.0
    points, _ = recipe.run(digits, "dsgd", None, SEED)
    assert digits.gaps(points)[0] > 0.2


def test_storm_reduces_the_noise_of_small_batches(recipe: ModuleType, digits: Any) -> None:
    sa = digits.gaps(recipe.run(digits, "sa", 8, SEED)[0])
    points, duals = recipe.run(digits, "storm", 8, SEED)
    storm = digits.gaps(points)
    assert storm[0] < 4e-4
    assert storm[1] < 1e-3
    assert storm[1] < 0.6 * sa[1]
    assert float(duals.sum(0).abs().max()) < 1e-12


def test_docom_arrives_with_a_twentieth_of_the_entries(recipe: ModuleType, digits: Any) -> None:
    mean, worst = digits.gaps(recipe.run(digits, "docom", 8, SEED)[0])
    assert mean < 2e-3
    assert worst < 2e-3
    start = torch.zeros(recipe.NUM_AGENTS, recipe.SIZE, dtype=torch.float64)
    assert digits.gaps(start)[0] > 2.0
