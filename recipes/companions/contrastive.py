"""EMC2 on scikit-learn's digits: how biased are gradients, and who trains best?

    pip install -c constraints.txt -e . scikit-learn
    python recipes/companions/contrastive.py

First two encoders are trained alike, one with EMC2 and one with the in-batch softmax. Then an
encoder is frozen, each method's gradient of the negatives is averaged over batches, and compared
with that of the softmax over the whole data set. A minute and a half on one core.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # has no types
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from lightning_ema_nesterov.companions.contrastive import EMC2Loss, WithIndex, contrastive_loss

NUM_IMAGES = 300


def make_views(num_images: int = NUM_IMAGES, seed: int = 0) -> Tensor:
    """Return two fixed augmentations of each image: moved by up to a pixel, and noise.

    Returns:
        Shape ``(2, num_images, 64)``.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.tensor(load_digits().images[:num_images], dtype=torch.float32) / 16
    views = torch.empty(2, num_images, 8, 8)
    for view in range(2):
        moves = torch.randint(-1, 2, (num_images, 2), generator=generator).tolist()
        for idx, move in enumerate(moves):
            views[view, idx] = images[idx].roll(move, dims=(0, 1))
    views += 0.1 * torch.randn(views.shape, generator=generator)
    return views.flatten(2)


class Contrastive(LightningModule):
    """An MLP trained on pairs of views, with EMC2 or the in-batch softmax."""

    views: Tensor

    def __init__(self, views: Tensor, method: str, temperature: float, num_steps: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.register_buffer("views", views, persistent=False)
        self.method, self.temperature, self.num_steps = method, temperature, num_steps
        self.loss = EMC2Loss(views.shape[1], temperature, burn_in=0.5, chains="view")

    def encode(self, samples: Tensor, views: Tensor) -> Tensor:
        """Return the features of views of samples."""
        features: Tensor = self.encoder(self.views[views, samples])
        return features

    def encode_all(self) -> Tensor:
        """Return the features of both views of all samples, shape ``(2, num_images, 32)``."""
        features: Tensor = self.encoder(self.views)
        return features

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return a value whose gradient estimates that of the loss."""
        (view0, view1), indices = batch
        out0, out1 = self.encoder(view0), self.encoder(view1)
        if self.method == "emc2":
            value: Tensor = self.loss(out0, out1, indices, self.encode)
            return value
        return contrastive_loss(out0, out1, self.temperature, positive_in_sum=True)

    def on_train_start(self) -> None:
        """Check that each sample has its chain."""
        batches: Any = self.trainer.train_dataloader
        self.loss.check_dataset(batches.dataset)

    def configure_optimizers(self) -> Any:
        """Return SGD with a learning rate that falls to 0."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.num_steps)
        return [optimizer], [{"scheduler": decay, "interval": "step"}]


def loader(views: Tensor, batch_size: int, seed: int) -> DataLoader[Any]:
    """Return batches of ``((view0, view1), index)``."""
    return DataLoader(
        WithIndex(TensorDataset(*views)),
        batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )


def train(
    views: Tensor, method: str, *, temperature: float, batch_size: int, num_steps: int, seed: int
) -> Contrastive:
    """Return a module trained with SGD."""
    seed_everything(seed, verbose=False)
    module = Contrastive(views, method, temperature, num_steps)
    trainer = Trainer(
        max_steps=num_steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(views, batch_size, seed))
    return module


def softmax_of_negatives(features: Tensor, temperature: float, *, positive_in_sum: bool) -> Tensor:
    """Return what has the gradient of the negatives under a softmax over ``features``.

    Args:
        features: Of both views, shape ``(2, B, d)``.
        temperature: Above 0.
        positive_in_sum: Whether the other view takes its part of the probability.
    """
    num_samples = features.shape[1]
    flat = normalize(features.flatten(0, 1), dim=1)
    logits = flat @ flat.T / temperature
    is_own = torch.eye(num_samples, dtype=torch.bool).repeat(2, 2)
    is_out = torch.eye(2 * num_samples, dtype=torch.bool) if positive_in_sum else is_own
    shares = logits.detach().masked_fill(is_out, -torch.inf).softmax(dim=1)
    return (shares * logits.masked_fill(is_own, 0.0)).sum(dim=1).mean()


def gradient(value: Tensor, module: nn.Module) -> Tensor:
    """Return the gradient of a value in all parameters, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])


def measure_bias(
    encoder: Contrastive, method: str, *, temperature: float, batch_size: int, num_steps: int
) -> tuple[float, float]:
    """Compare a method's mean gradient of the negatives with the exact one, encoder frozen.

    Two averages with noise of their own are taken. Chains run for a fifth of the steps before.

    Returns:
        Relative error of the mean of both, which is bias and noise, and the relative bias: the root
        of the product of their two errors, in which noise cancels; 0 for a product below 0.
    """
    exact = gradient(
        softmax_of_negatives(encoder.encode_all(), temperature, positive_in_sum=False),
        encoder.encoder,
    )
    errors = [
        mean_gradient(encoder, method, temperature, batch_size, num_steps // 2, seed) - exact
        for seed in range(2)
    ]
    error = (errors[0] + errors[1]).norm() / 2
    bias = errors[0].dot(errors[1]).clamp(min=0.0).sqrt()
    return float(error / exact.norm()), float(bias / exact.norm())


def mean_gradient(
    encoder: Contrastive,
    method: str,
    temperature: float,
    batch_size: int,
    num_steps: int,
    seed: int,
) -> Tensor:
    """Return a method's gradient of the negatives, averaged over batches.

    The encoder stands still: features are computed once, gradients in them are summed over all
    batches, and go back through the encoder at the end.
    """
    loss = EMC2Loss(encoder.views.shape[1], temperature, burn_in=0.5, chains="view", seed=seed)
    outputs = encoder.encode_all()
    features = outputs.detach().requires_grad_()
    total = torch.zeros_like(features)
    order = torch.Generator().manual_seed(seed)
    num_samples = features.shape[1]
    num_batches = num_samples // batch_size
    num_passes = -(-num_steps // num_batches)
    num_dropped = num_passes // 5
    for pass_idx in range(num_passes):
        values = []
        permutation = torch.randperm(num_samples, generator=order)
        for indices in permutation[: num_batches * batch_size].chunk(num_batches):
            batch = features[:, indices]
            if method == "emc2":
                first, second = normalize(batch, dim=2)
                positives = (first * second).sum(dim=1).mean() / temperature
                value = loss(batch[0], batch[1], indices, lambda i, view: features[view, i])
                values.append(value + positives)
            else:
                values.append(
                    softmax_of_negatives(batch, temperature, positive_in_sum=method == "softmax")
                )
        if pass_idx >= num_dropped:
            total += torch.autograd.grad(torch.stack(values).sum(), features)[0]
    mean = total / ((num_passes - num_dropped) * num_batches)
    return gradient((outputs * mean).sum(), encoder.encoder)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, and print both tables."""
    parser = argparse.ArgumentParser(description="EMC2 on scikit-learn's digits.")
    parser.add_argument("--train-steps", type=int, default=4000)
    parser.add_argument("--bias-steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    views = make_views(seed=options.seed)
    settings: dict[str, Any] = {"temperature": 0.2, "batch_size": 16, "seed": options.seed}
    print("Loss over all negatives after training, batch 16, temperature 0.2")
    for method in ("emc2", "softmax"):
        encoder = train(views, method, num_steps=options.train_steps, **settings)
        with torch.no_grad():
            out0, out1 = encoder.encode_all()
            print(f"  {method:8} {contrastive_loss(out0, out1, 0.2):.3f}", flush=True)
    encoder = train(views, "softmax", num_steps=options.train_steps // 4, **settings)
    print("Mean gradient of the negatives against the exact one: relative error, bias in it")
    print("  (softmax: positive in the sum, as in SimCLR; negatives: without)")
    for temperature in (0.2, 0.07):
        for batch_size in (4, 16):
            for method in ("softmax", "negatives", "emc2"):
                error, bias = measure_bias(
                    encoder,
                    method,
                    temperature=temperature,
                    batch_size=batch_size,
                    num_steps=options.bias_steps if method == "emc2" else options.bias_steps // 4,
                )
                print(
                    f"  temperature {temperature:4}, batch {batch_size:2}  {method:9} "
                    f"{error:.2f}, {bias:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
