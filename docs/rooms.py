"""List the modules of a room of the package on its page: `<!-- modules of PACKAGE -->`.

So a new file is on its page without another line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType

from sphinx.application import Sphinx

PLACE = re.compile(r"^<!-- modules of (\S+) -->$", re.MULTILINE)


def modules_of(package: str) -> list[ModuleType]:
    """Return a package and all modules below it."""
    top = import_module(package)
    below = walk_packages(top.__path__, f"{package}.")
    return [top, *(import_module(info.name) for info in below)]


def new_names(package: str) -> Iterator[tuple[ModuleType, list[str], list[str]]]:
    """Yield each module, its public names, and those of them that a module above has too."""
    seen: set[int] = set()
    for module in modules_of(package):
        names = list(getattr(module, "__all__", []))
        values = {name: getattr(module, name) for name in names}
        again = [name for name in names if callable(values[name]) and id(values[name]) in seen]
        seen |= {id(value) for value in values.values()}
        yield module, names, again


def sections(package: str) -> str:
    """Return a section for each module that has something new to say."""
    parts = []
    for module, names, again in new_names(package):
        if len(again) == len(names):
            continue
        title = module.__name__.removeprefix(f"{package}.")
        if title != package:
            parts.append(f"## {title}")
        options = f"\n   :exclude-members: {', '.join(again)}" if again else ""
        parts.append(f"```{{eval-rst}}\n.. automodule:: {module.__name__}{options}\n```")
    return "\n\n".join(parts)


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the sections in their place."""
    source[0] = PLACE.sub(lambda found: sections(found[1]), source[0])


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.connect("source-read", fill)
