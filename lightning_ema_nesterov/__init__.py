"""EMA-Nesterov for PyTorch Lightning and LitGPT."""

from lightning_ema_nesterov.callback import EMANesterov
from lightning_ema_nesterov.version import __version__

__all__ = ["EMANesterov", "__version__"]
