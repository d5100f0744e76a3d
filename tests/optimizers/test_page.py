"""The documentation's page on the optimizers: its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_ema_nesterov.optimizers import __all__ as public

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert "hidden: 1 parameters, 256 elements" in capsys.readouterr().out
    optimizer = names["optimizer"]
    assert optimizer.state  # type: ignore[attr-defined]


def test_every_optimizer_is_on_the_page() -> None:
    text = PAGE.read_text()
    assert all(f"`{name}" in text for name in public)
