"""Every public name is on a page of the API, and every page names what there is."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType

import lightning_ema_nesterov as package

API = Path(__file__).parents[2] / "docs/api"
COMMANDS = ("cli", "experiments", "version")
"""Rooms that a user calls from the command line only."""


def modules() -> list[ModuleType]:
    names = [info.name for info in walk_packages(package.__path__, f"{package.__name__}.")]
    public = [name for name in names if name.split(".")[1] not in COMMANDS]
    return [package, *map(import_module, public)]


def documented() -> set[str]:
    """Full names of what autodoc is asked for, those of a module one by one."""
    found = set()
    for page in API.glob("*.md"):
        text = page.read_text()
        found |= set(
            re.findall(r"^\.\. auto(?:class|data|function):: ([\w.]+)$", text, re.MULTILINE)
        )
        for name, options in re.findall(
            r"^\.\. automodule:: ([\w.]+)\n((?:   :.*\n)*)", text, re.MULTILINE
        ):
            left_out = re.findall(r":exclude-members: (.*)", options)
            hidden = {part.strip() for line in left_out for part in line.split(",")}
            found |= {f"{name}.{public}" for public in import_module(name).__all__} - {
                f"{name}.{public}" for public in hidden
            }
    return found


def target(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def test_every_public_name_is_on_a_page() -> None:
    names = documented()
    objects = [target(name) for name in names]
    missing = []
    for module in modules():
        for public in getattr(module, "__all__", []):
            value = getattr(module, public)
            is_text = isinstance(value, (str, int, float, tuple))  # equal ones may be others
            is_there = f"{module.__name__}.{public}" in names
            if not is_there and (is_text or not any(value is found for found in objects)):
                missing.append(f"{module.__name__}.{public}")
    missing.remove("lightning_ema_nesterov.__version__")  # in words
    assert not missing, f"put an automodule on a page of docs/api for {missing}"


def test_every_module_says_what_is_public() -> None:
    silent = [
        module.__name__
        for module in modules()
        if not hasattr(module, "__all__") and not hasattr(module, "__path__")
    ]
    assert not silent


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    callables = [(name, target(name)) for name in documented()]
    bare = [name for name, value in callables if callable(value) and not value.__doc__]
    assert not bare
