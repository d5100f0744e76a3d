"""A small decoder-only language model over bytes, as a LightningModule."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from litgpt import GPT, Config
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity
from typing_extensions import override

__all__ = ["ByteDecoder"]

NUM_BYTES = 256


class ByteDecoder(LightningModule):
    """LitGPT's decoder (rotary positions, RMSNorm, gated MLP), without an optimizer.

    Args:
        window_size: Tokens that the model reads at once.
        num_layers: Transformer blocks.
        width: Size of the residual stream, a multiple of ``num_heads``.
        num_heads: Attention heads.
        vocab_size: Tokens; by default the bytes.
    """

    def __init__(
        self,
        *,
        window_size: int = 64,
        num_layers: int = 2,
        width: int = 64,
        num_heads: int = 4,
        vocab_size: int = NUM_BYTES,
    ) -> None:
        super().__init__()
        config = Config(
            name="quickstart",
            block_size=window_size,
            vocab_size=vocab_size,
            padded_vocab_size=vocab_size,
            n_layer=num_layers,
            n_head=num_heads,
            n_embd=width,
            intermediate_size=3 * width,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
        self.model = GPT(config)
        self.model.apply(_initialise)
        self.val_loss = MeanMetric()
        self.val_ppl = Perplexity()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits, targets = self._predict(batch)
        loss = _cross_entropy(logits, targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        logits, targets = self._predict(batch)
        self.val_loss(_cross_entropy(logits, targets), weight=targets.numel())
        self.val_ppl(logits, targets)
        self.log("val_loss", self.val_loss, prog_bar=True)
        self.log("val_ppl", self.val_ppl)

    def _predict(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(batch[:, :-1]), batch[:, 1:]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
