"""EMA-Nesterov for PyTorch Lightning and LitGPT."""

from lightning_ema_nesterov.attach import EMANesterovHandle, attach_ema_nesterov
from lightning_ema_nesterov.callback import EMANesterov
from lightning_ema_nesterov.version import __version__

__all__ = ["EMANesterov", "EMANesterovHandle", "__version__", "attach_ema_nesterov"]
