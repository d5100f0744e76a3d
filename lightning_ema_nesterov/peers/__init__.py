"""The methods that EMA-Nesterov is compared with, as callbacks of the Lightning Trainer.

One-step Nesterov lookahead is ``EMANesterov(ema_decay=0)``.
"""

from lightning_ema_nesterov.peers.gpa import GPA
from lightning_ema_nesterov.peers.schedule_free import ScheduleFree
from lightning_ema_nesterov.peers.slow_weights import SNOO, Lookahead

__all__ = ["GPA", "SNOO", "Lookahead", "ScheduleFree"]
