"""The walk through *Extending* works as it stands: its files, put where they belong, pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ROOT / "docs/extending"
PACKAGE = "lightning_ema_nesterov"
FILES = sorted(path.relative_to(CODE) for path in CODE.rglob("*.py"))


def run(*command: str, folder: Path) -> str:
    # The root of the package comes from the folder, not from where this project is installed.
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the files of the page in their places."""
    folder = tmp_path_factory.mktemp("extended")
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_ema_nesterov", folder / PACKAGE, ignore=unwanted)
    for path in FILES:
        assert not (ROOT / path).exists(), "the page adds files, it replaces none"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CODE / path, folder / path)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.slow
@pytest.mark.no_cover
def test_the_added_files_pass_their_tests_and_doctests(extended: Path) -> None:
    added = [str(path) for path in FILES]
    output = run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *added, folder=extended)
    for path in FILES:
        if path.parts[0] == "tests":
            assert (extended / path).read_text().count("\ndef test_") >= 2
    assert int(re.findall(r"(\d+) passed", output)[0]) >= 13


@pytest.mark.slow
@pytest.mark.no_cover
def test_a_broken_rule_is_noticed_by_its_test(extended: Path, tmp_path: Path) -> None:
    """So the tests of the page are none that pass empty."""
    folder = tmp_path / "broken"
    shutil.copytree(extended, folder)
    rule = folder / PACKAGE / "rules/last_displacement.py"
    text = rule.read_text()
    assert "alpha=-step_size" in text
    rule.write_text(text.replace("alpha=-step_size", "alpha=step_size"))
    with pytest.raises(AssertionError, match="failed"):
        run("-m", "pytest", "-q", "-n", "0", "tests/rules/test_last_displacement.py", folder=folder)


def test_the_added_files_keep_to_the_direction_of_imports(extended: Path) -> None:
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    output = run("-c", code, folder=extended)
    assert re.search(r"Contracts: \d+ kept, 0 broken", output)


def test_every_file_is_on_the_page() -> None:
    page = (ROOT / "docs/extending.md").read_text()
    for path in FILES:
        assert f"```{{literalinclude}} extending/{path}\n" in page
        assert f":caption: {path}\n" in page
