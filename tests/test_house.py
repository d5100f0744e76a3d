"""Modules and functions stay short, and the core needs torch and lightning only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_ema_nesterov

PACKAGE = "lightning_ema_nesterov"
ROOT = Path(lightning_ema_nesterov.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_and_functions_stay_short(name: str) -> None:
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert length <= 40, node.name


@pytest.mark.slow
def test_core_imports_without_the_extras() -> None:
    """In a process where LitGPT and the other extras cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('litgpt', 'tensorboard', 'jsonargparse'):\n"
        "    sys.modules[name] = None\n"
        "import lightning_ema_nesterov\n"
        "lightning_ema_nesterov.EMANesterov()\n"
        "from lightning_ema_nesterov.cli import main\n"
        "main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "pip install -c constraints.txt -e '.[quickstart]'" in result.stderr
    assert "Traceback" not in result.stderr
