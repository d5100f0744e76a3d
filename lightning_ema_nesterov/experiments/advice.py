"""Keep Lightning's advice out of the output of our commands."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_advice"]

_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    # It reports at each checkpoint that weights_only has its default.
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)


@contextmanager
def without_advice() -> Iterator[None]:
    """Silence Lightning's advice on hardware, loggers, checkpoints and data loader workers."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        # A run that diverged ends early, and its event file says so.
        warnings.filterwarnings("ignore", "EMANesterov did not look ahead.*")
        for name in levels:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
