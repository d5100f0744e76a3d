"""Commands as one types them, for messages: also where the environment is not activated."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["typed_command"]


def typed_command(*words: str | Path) -> str:
    """Return a command line that runs a program of the running Python's environment.

    Args:
        words: Name of the program, and its arguments.

    Returns:
        The line. The program's path is left out where the shell finds the same program by its name,
        and is relative below the current folder, as ``.venv/bin/tensorboard``.
    """
    name, *arguments = map(str, words)
    path = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not path.exists() or (found is not None and Path(found).parent == path.parent):
        program = name
    elif path.is_relative_to(Path.cwd()):
        program = str(path.relative_to(Path.cwd()))
    else:
        program = str(path)
    return shlex.join([program, *arguments])
