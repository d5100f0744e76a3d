"""RoSTE on scikit-learn's digits with weights and activations of 3 bits, and on a tiny LLaMA.

    pip install -c constraints.txt -e '.[quantized,litgpt]' scikit-learn
    python recipes/companions/quantized.py

A network is trained in float, given hidden channels that are outliers as in a language model, and
fine-tuned on turned images through 3-bit quantizers: without rotations, with all, and with those
that lower the rounding error. Then a small LitGPT model is fine-tuned with 4 bits. A minute and a
half on one core.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
from textwrap import indent
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # has no types
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_ema_nesterov.companions.quantized import RotatedQAT, as_table

NUM_TRAIN = 1300
VOCABULARY = 17  # gray levels of a pixel


class Classifier(LightningModule):
    """A model of tensors, trained with AdamW on the cross-entropy of its last dimension."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.model(inputs)
        return logits

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return cross_entropy(self(inputs).flatten(0, -2), targets.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(*batch)

    def configure_optimizers(self) -> Any:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(
    module: Classifier, data: TensorDataset, num_steps: int, seed: int, callbacks: list[Callback]
) -> None:
    """Train for a number of steps on batches of 64."""
    generator = torch.Generator().manual_seed(seed)
    # Whole batches are taken from the tensors, not one image after another.
    batches = BatchSampler(RandomSampler(data, generator=generator), 64, drop_last=False)
    trainer = Trainer(
        max_steps=num_steps,
        callbacks=callbacks,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, None, sampler=batches, generator=generator))


def digits(*, is_turned: bool) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test data, upright or turned by a quarter."""
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    images = images.rot90(dims=(1, 2)) if is_turned else images
    labels = torch.tensor(load_digits().target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = images.flatten(1)[order], labels[order]
    return (
        TensorDataset(pixels[:NUM_TRAIN], labels[:NUM_TRAIN]),
        TensorDataset(pixels[NUM_TRAIN:], labels[NUM_TRAIN:]),
    )


@torch.no_grad()
def add_outliers(model: nn.Sequential, seed: int) -> None:
    """Make six hidden channels 25 times larger and what reads them smaller: the same function."""
    first: Any = model[0]
    second: Any = model[2]
    channels = torch.randperm(256, generator=torch.Generator().manual_seed(seed))[:6]
    first.weight[channels] *= 25
    first.bias[channels] *= 25
    second.weight[:, channels] /= 25


def pretrained(seed: int, num_steps: int) -> nn.Sequential:
    """Return a network trained on upright digits, with outliers."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    fit(Classifier(model, lr=1e-3), digits(is_turned=False)[0], num_steps, seed, [])
    add_outliers(model, seed)
    return model


def fine_tune_digits(
    model: nn.Sequential, rotations: Any, bits: int | None, num_steps: int, seed: int
) -> tuple[float, float, RotatedQAT]:
    """Return loss and accuracy on turned test images, and the callback with its choices."""
    train, test = digits(is_turned=True)
    module = Classifier(copy.deepcopy(model), lr=3e-4)
    qat = RotatedQAT(
        [train.tensors[0][:128]], weight_bits=bits, activation_bits=bits, rotations=rotations
    )
    fit(module, train, num_steps, seed, [qat])
    with torch.no_grad():
        logits = module(test.tensors[0])
    labels = test.tensors[1]
    accuracy = (logits.argmax(dim=1) == labels).double().mean()
    return float(cross_entropy(logits, labels)), float(accuracy), qat


def compare_on_digits(num_seeds: int, num_steps: int) -> dict[str, list[float]]:
    """Print and return the test losses for each way to choose rotations."""
    losses: dict[str, list[float]] = {}
    for seed in range(num_seeds):
        model = pretrained(seed, num_steps=1000)
        for name, rotations, bits in (
            ("float", "none", None),
            ("none", "none", 3),
            ("all", "all", 3),
            ("adaptive", "adaptive", 3),
        ):
            loss, accuracy, qat = fine_tune_digits(model, rotations, bits, num_steps, seed)
            losses.setdefault(name, []).append(loss)
            print(f"  seed {seed}  {name:9} loss {loss:.3f}, accuracy {accuracy:.3f}", flush=True)
            if name == "adaptive" and seed == 0:
                print(indent(as_table(qat.choices), "    "))
    return losses


def make_llama(seed: int) -> Any:
    """Return a LitGPT model of two blocks of the LLaMA kind over gray levels."""
    from litgpt import GPT, Config  # in a function: the digits run without LitGPT

    torch.manual_seed(seed)
    config = Config(
        name="tiny-llama",
        block_size=64,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        n_layer=2,
        n_head=4,
        n_query_groups=2,
        n_embd=64,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=176,
    )
    return GPT(config)


def lines(*, is_turned: bool) -> tuple[TensorDataset, TensorDataset]:
    """Return images as sequences of gray levels, to be continued pixel by pixel."""
    train, test = ((data.tensors[0] * 16).round().long() for data in digits(is_turned=is_turned))
    return TensorDataset(train[:, :-1], train[:, 1:]), TensorDataset(test[:, :-1], test[:, 1:])


def compare_on_llama(num_steps: int) -> dict[str, float]:
    """Print and return test losses of a small language model in float and with 4 bits."""
    model = make_llama(0)
    fit(Classifier(model, lr=2e-3), lines(is_turned=False)[0], 3 * num_steps, 0, [])
    train, test = lines(is_turned=True)
    losses: dict[str, float] = {}
    ways: list[tuple[str, Any, int | None]] = [
        ("float", "none", None),
        ("none", "none", 4),
        ("all", "all", 4),
        ("adaptive", "adaptive", 4),
    ]
    for name, rotations, bits in ways:
        module = Classifier(copy.deepcopy(model), lr=5e-4)
        qat = RotatedQAT(
            [train.tensors[0][:128]],
            weight_bits=bits,
            activation_bits=bits,
            kv_bits=bits,
            rotations=rotations,
        )
        fit(module, train, num_steps, 0, [qat])
        with torch.no_grad():
            losses[name] = float(module.loss(*test.tensors))
        print(f"  {name:9} loss {losses[name]:.3f}", flush=True)
        if name == "adaptive":
            print(indent(as_table(qat.choices), "    "))
    return losses


def main(arguments: list[str] | None = None) -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description="RoSTE on scikit-learn's digits.")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--llama-steps", type=int, default=60)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("Digits, an MLP with outlier channels, weights and activations of 3 bits")
    losses = compare_on_digits(options.seeds, options.steps)
    for name, values in losses.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"  {name:9} mean loss {statistics.mean(values):.3f}, spread {spread:.3f}")
    print("A LitGPT model, weights, activations, keys and values of 4 bits")
    compare_on_llama(options.llama_steps)


if __name__ == "__main__":
    main()
