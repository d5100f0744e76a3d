"""EMC2: negatives of the global contrastive loss, drawn by one Markov chain per sample."""

from lightning_ema_nesterov.companions.contrastive.dataset import WithIndex
from lightning_ema_nesterov.companions.contrastive.loss import EMC2Loss
from lightning_ema_nesterov.companions.contrastive.softmax import contrastive_loss

__all__ = ["EMC2Loss", "WithIndex", "contrastive_loss"]
