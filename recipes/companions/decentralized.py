"""Train on scikit-learn's digits, sorted by class over the processes, with the Lightning Trainer.

    pip install 'lightning-ema-nesterov[companions]'
    python recipes/companions/decentralized.py --processes 2

Each process has other classes. The table shows the mean loss over all images, at the average of
the processes' weights: with DDP's all-reduce, with neighbours' messages alone (decentralized SGD),
and with the three methods. On a CPU it starts gloo processes by itself.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_ema_nesterov.companions.decentralized import FSPDASA, FSPDASTORM, DoCoM

BATCH_SIZE, WEIGHT_DECAY = 32, 1e-3


class Classifier(LightningModule):
    """Softmax regression on 8 x 8 pixels; its loss contains the weight decay."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss; methods with two gradients call this twice for a batch."""
        images, labels = batch
        decay = sum(p.square().sum() for p in self.parameters())
        return functional.cross_entropy(self.linear(images), labels) + WEIGHT_DECAY / 2 * decay

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss without decay, and the accuracy, over all images."""
        images, labels = batch
        logits = self.linear(images)
        self.log("loss", functional.cross_entropy(logits, labels), sync_dist=True)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, as in the papers."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class CountBytes(Callback):
    """Add up what the method logs."""

    total = 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Read the last step's number."""
        self.total += float(trainer.callback_metrics.get("decentralized/bytes_sent", 0.0))


def images_of(rank: int, num_ranks: int) -> TensorDataset:
    """Return the digits of a rank's classes: 0 to 4 and 5 to 9 for two ranks."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    is_own = labels * num_ranks // 10 == rank
    return TensorDataset(images[is_own], labels[is_own])


def train(method: Callback | None, *, processes: int, lr: float, steps: int) -> str:
    """Train once, and return a row of the table."""
    seed_everything(0, verbose=False)
    counter = CountBytes()
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=DDPStrategy(timeout=timedelta(seconds=60)),
        max_steps=steps,
        limit_train_batches=350 // BATCH_SIZE,  # the same on each process
        limit_val_batches=1,
        check_val_every_n_epoch=1_000,
        callbacks=[counter] if method is None else [method, counter],
        use_distributed_sampler=False,  # each process reads its own images
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = Classifier(lr)
    generator = torch.Generator().manual_seed(trainer.global_rank)
    own = images_of(trainer.global_rank, processes)
    loader = DataLoader(own, BATCH_SIZE, shuffle=True, generator=generator, drop_last=True)
    start = time.monotonic()
    trainer.fit(model, loader)
    seconds = time.monotonic() - start
    everything = DataLoader(images_of(0, 1), batch_size=2_000)
    metrics = trainer.validate(model, everything, verbose=False)[0]
    sent = "-" if method is None else f"{counter.total / processes / 1e6:.2f}"
    return f"{metrics['loss']:.4f}  {metrics['accuracy']:8.3f}  {sent:>14}  {seconds:7.0f}"


def main() -> None:
    """Train with each method, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1_500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    common: dict[str, Any] = {"coordinate_share": 0.1, "seed": 0}
    methods: list[tuple[str, Callback | None]] = [
        ("all-reduce", None),
        ("decentralized SGD", FSPDASA("ring", dual_step_size=0.0, **common)),
        ("FSPDA-SA", FSPDASA("ring", dual_step_size=0.01, **common)),
        ("FSPDA-STORM", FSPDASTORM("ring", dual_step_size=0.01, **common)),
        ("DoCoM", DoCoM("ring")),
    ]
    rows = []
    for name, method in methods:
        row = train(method, processes=options.processes, lr=0.1, steps=options.steps)
        rows.append(f"{name:18} {row}")
    if not torch.distributed.get_rank():
        print(f"{'method':18}   loss  accuracy  MB per process  seconds")
        print("\n".join(rows))


if __name__ == "__main__":
    main()
