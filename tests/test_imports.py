"""Imports run one way, and the core needs torch and lightning only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_ema_nesterov

PACKAGE = "lightning_ema_nesterov"
ROOT = Path(lightning_ema_nesterov.__file__).parent

# Each module, and what of this package it may import.
LAYERS: dict[str, set[str]] = {
    "version": set(),
    "functional": set(),
    "schedule": set(),
    "metrics": set(),
    "report": set(),
    "sharding": set(),
    "stage": set(),
    "step_hooks": set(),
    "codecs": set(),
    "method": {"functional", "metrics", "sharding"},
    "direction": {"codecs", "functional", "method", "metrics", "schedule", "sharding"},
    "one_pass": {"direction", "functional", "method", "metrics", "sharding"},
    "compressed": {
        "codecs",
        "direction",
        "functional",
        "method",
        "metrics",
        "schedule",
        "sharding",
    },
    "variants": {"codecs", "compressed", "direction", "method", "one_pass"},
    "lookahead": {"method", "metrics", "schedule", "sharding", "stage", "step_hooks"},
    "cost": {"lookahead", "schedule", "variants"},
    "benchmark": {"cost", "report"},
    "attach": {"lookahead", "metrics", "schedule", "variants"},
    "trainer": {"schedule", "sharding"},
    "checkpoints": {"trainer"},
    "diagnostics": {"callback", "lookahead", "sharding"},
    "peers": {"peers.gpa", "peers.schedule_free", "peers.slow_weights"},
    "peers.gpa": {"lookahead", "method", "placement", "schedule", "sharding"},
    "peers.schedule_free": {"trainer"},
    "peers.slow_weights": {"lookahead", "method", "placement", "schedule", "sharding"},
    "placement": {"checkpoints", "lookahead", "trainer"},
    "callback": {"lookahead", "metrics", "placement", "schedule", "trainer", "variants"},
    "litgpt": {"litgpt.data", "litgpt.factory", "litgpt.roles", "litgpt.schedule"},
    "litgpt.build": set(),
    "litgpt.data": {"litgpt.run", "litgpt.windows", "quickstart.corpus"},
    "litgpt.factory": {"attach", "litgpt.build", "litgpt.run"},
    "litgpt.launch": {"litgpt.run"},
    "litgpt.roles": {"litgpt.build", "litgpt.run"},
    "litgpt.run": set(),
    "litgpt.schedule": {"litgpt.build", "litgpt.run", "schedule"},
    "litgpt.windows": set(),
    "quickstart": set(),
    "quickstart.corpus": set(),
    "quickstart.model": set(),
    "quickstart.experiment": {
        "callback",
        "quickstart.corpus",
        "quickstart.model",
        "quiet",
        "report",
    },
    "quiet": set(),
    "study": set(),
    "study.compare": {"study.results", "study.spec", "study.train"},
    "study.convex": {"direction", "lookahead", "report", "schedule"},
    "study.data": {"quickstart.corpus"},
    "study.figures": {"study.results", "study.spec", "study.tables"},
    "study.report": {"study.compare", "study.figures", "study.results", "study.tables"},
    "study.results": {"report", "study.spec"},
    "study.load": {"litgpt.build", "study.spec"},
    "study.spec": {""},
    "study.tables": {"study.results", "study.spec"},
    "study.train": {
        "litgpt.build",
        "quickstart.model",
        "quiet",
        "study.results",
        "study.spec",
    },
    "cli": {
        "benchmark",
        "litgpt.launch",
        "quickstart.experiment",
        "study.compare",
        "study.convex",
        "study.load",
        "study.report",
    },
    "": {"attach", "callback", "version"},
}
MAY_IMPORT_LIGHTNING = {
    "callback",
    "diagnostics",
    "checkpoints",
    "litgpt.launch",
    "litgpt.roles",
    "litgpt.run",
    "peers.gpa",
    "peers.schedule_free",
    "peers.slow_weights",
    "placement",
    "quickstart.experiment",
    "quickstart.model",
    "study.data",
    "study.train",
    "trainer",
}
MAY_IMPORT_LITGPT = {"litgpt.data", "litgpt.launch", "litgpt.run", "quickstart.model"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def test_every_module_has_its_layer() -> None:
    assert set(MODULES) == set(LAYERS)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_imports_run_one_way(name: str) -> None:
    imports = imports_of(MODULES[name])
    own = {i[len(PACKAGE) + 1 :] for i in imports if i.split(".")[0] == PACKAGE}
    assert own <= LAYERS[name]
    roots = {i.split(".")[0] for i in imports}
    assert "lightning" not in roots or name in MAY_IMPORT_LIGHTNING
    assert "litgpt" not in roots or name in MAY_IMPORT_LITGPT


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_modules_and_functions_stay_short(name: str) -> None:
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert length <= 40, node.name


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
    assert "pip install 'lightning-ema-nesterov[quickstart]'" in result.stderr
    assert "Traceback" not in result.stderr
