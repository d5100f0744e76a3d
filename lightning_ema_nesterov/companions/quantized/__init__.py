"""RoSTE: fine-tuning through fake quantizers, with a rotation where it lowers their error."""

from lightning_ema_nesterov.companions.quantized.callback import RotatedQAT
from lightning_ema_nesterov.companions.quantized.choose import Choice, as_table
from lightning_ema_nesterov.companions.quantized.convert import rotate_and_quantize

__all__ = ["Choice", "RotatedQAT", "as_table", "rotate_and_quantize"]
