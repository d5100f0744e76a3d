"""The pages build without a warning, and every public name is on one of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType

import pytest

import lightning_ema_nesterov as package

ROOT = Path(__file__).parents[2]
COMMANDS = ("cli", "experiments", "version")
"""Rooms that a user calls from the command line only."""


def modules() -> list[ModuleType]:
    names = [info.name for info in walk_packages(package.__path__, f"{package.__name__}.")]
    public = [name for name in names if name.split(".")[1] not in COMMANDS]
    return [package, *map(import_module, public)]


def public_names() -> dict[str, object]:
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in modules()
        for name in getattr(module, "__all__", [])
        if name != "__version__"
    }


def test_every_room_has_a_page() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    rooms = {module.__name__.split(".")[1] for module in modules() if "." in module.__name__}
    missing = [
        room
        for room in rooms - {"attach", "callback"}  # on the first page
        if f"\n<!-- modules of {package.__name__}.{room} -->\n" not in pages
    ]
    assert not missing, "write docs/api/ROOM.md like docs/api/core.md"


def test_every_module_says_what_is_public() -> None:
    silent = [
        module.__name__
        for module in modules()
        if not hasattr(module, "__all__") and not hasattr(module, "__path__")
    ]
    assert not silent


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    bare = [
        name
        for name, value in public_names().items()
        if isinstance(value, type) and not vars(value).get("__doc__")
    ]
    assert not bare


@pytest.mark.slow
@pytest.mark.no_cover
def test_pages_build_and_every_public_name_is_on_one(tmp_path: Path) -> None:
    sphinx = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    result = subprocess.run(
        [*sphinx, str(ROOT / "docs"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = inventory(tmp_path / "objects.inv")
    values = {id(value) for name, value in public_names().items() if name in found}
    missing = [
        name
        for name, value in public_names().items()
        if name not in found and not (callable(value) and id(value) in values)
    ]
    assert not missing, "\n".join(missing)
    assert "lightning_ema_nesterov.EMANesterov.extrapolate" in found  # inherited


def inventory(path: Path) -> set[str]:
    """Names of Python objects that the built pages describe."""
    body = path.read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(body).decode().splitlines()
    return {line.split()[0] for line in lines if re.match(r"\S+ py:", line)}
