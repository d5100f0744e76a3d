"""FSPDA-SA, FSPDA-STORM and DoCoM: training where neighbours exchange small messages.

Torch and Lightning only. ``methods`` holds the callbacks; ``fspda`` and ``docom`` the equations;
``simulate`` runs all agents in one process.
"""

from lightning_ema_nesterov.companions.decentralized.methods import FSPDASA, FSPDASTORM, DoCoM
from lightning_ema_nesterov.companions.decentralized.topology import Topology

__all__ = ["FSPDASA", "FSPDASTORM", "DoCoM", "Topology"]
