"""``ema-nesterov average``, which needs no package that an extra installs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from lightning_ema_nesterov.averages.checkpoint import average_checkpoint

__all__ = ["average", "run_average"]


def average(source: Path, target: Path, *, share: float = 1.0) -> None:
    """Write the average of the weights that a checkpoint made with EMA-Nesterov holds.

    Args:
        source: A .ckpt file or a distributed folder of the Trainer, a lit_model.pth of LitGPT, or a
            file or a distributed folder of a loop of your own. It is unpickled: trust it.
        target: File to write. It loads where the source's weights load.
        share: Share of the way from the last weights to their average, in [0, 1].
    """
    average_checkpoint(source, target, share)


def run_average(arguments: list[str]) -> None:
    """Run :func:`average` with arguments of the command line.

    Args:
        arguments: Those behind the name of the command.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"ema-nesterov: {message}\nOptions: {self.prog} --help\n")

    summary, _, described = (average.__doc__ or "").partition("Args:")
    texts = dict(re.findall(r"(\w+): ((?:.|\n {12})+)", described))
    parser = Parser(prog="ema-nesterov average", description=summary)
    for name, kind in (("source", Path), ("target", Path)):
        parser.add_argument(name, type=kind, help=" ".join(texts[name].split()))
    parser.add_argument(
        "--share", type=float, default=1.0, help=" ".join(texts["share"].split()) + " (default: 1)"
    )
    average(**vars(parser.parse_args(arguments)))
