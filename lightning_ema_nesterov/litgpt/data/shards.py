"""Shards of token ids, as text comes that was tokenized before."""

from __future__ import annotations

from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np
from typing_extensions import override

from lightning_ema_nesterov.litgpt.data.base import WindowData
from lightning_ema_nesterov.litgpt.data.windows import TokenArray
from lightning_ema_nesterov.litgpt.run import LitGPTRun

__all__ = ["TokenShards"]

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
_HEADER_LENGTH = 256
_NUM_CHECKED = 1_000_000
"""So many tokens of each shard are compared with the vocabulary, and not read as a whole."""


@dataclass(kw_only=True)
class TokenShards(WindowData):
    """Token ids in binary shards, as the FineWeb shards for GPT-2 come.

    A shard is a header of 256 ``int32`` (20240520, 1, the number of tokens, zeros) and the tokens
    as ``uint16``. Each shard is one part: no window crosses from one to the next.

    Args:
        train: Pattern of the shards to train on, such as ``data/fineweb10B/fineweb_train_*.bin``.
        val: Pattern of the shards to validate on.
        seed: Seed of the order of the windows, at least 0.

    Raises:
        FileNotFoundError: If no file matches a pattern.
        ValueError: If a shard has another header, or not the length that its header tells, or
            begins with token ids that the model does not have.
    """

    train: str
    val: str

    @override
    def setup(self, stage: str = "") -> None:
        """Map the shards into memory."""
        self.train_parts = _open_shards(self.train, "train")
        self.val_parts = _open_shards(self.val, "val")


def _open_shards(pattern: str, key: str) -> list[TokenArray]:
    paths = sorted(map(Path, glob(pattern, recursive=True)))
    if not paths:
        raise FileNotFoundError(f"data.init_args.{key}: no file matches {pattern}.")
    parts = [_open_shard(path, key) for path in paths]
    run = LitGPTRun.find()
    for path, part in zip(paths, parts, strict=True):
        largest = int(part[:_NUM_CHECKED].max(initial=0))
        # On a GPU the lookup would end in an assertion that names neither.
        if run is not None and largest >= run.vocab_size:
            raise ValueError(
                f"data.init_args.{key}: {path} holds the token id {largest}, and the model has "
                f"{run.vocab_size}. Give shards of its tokenizer, or set model_config.vocab_size."
            )
    return parts


def _open_shard(path: Path, key: str) -> TokenArray:
    header = np.fromfile(path, dtype="<i4", count=_HEADER_LENGTH)
    if len(header) < _HEADER_LENGTH or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(
            f"data.init_args.{key}: {path} does not begin with the header {SHARD_MAGIC}, "
            f"{SHARD_VERSION} of a token shard, got {header[:2].tolist()}."
        )
    num_tokens = int(header[2])
    expected = 4 * _HEADER_LENGTH + 2 * num_tokens
    if path.stat().st_size != expected:
        raise ValueError(
            f"data.init_args.{key}: {path} must have {expected} bytes for the {num_tokens} tokens "
            f"that its header tells, and has {path.stat().st_size}. Download it again."
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * _HEADER_LENGTH)
