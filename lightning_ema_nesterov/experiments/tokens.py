"""Windows of byte-pair tokens of text that a machine has: no download."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.experiments.data import TextWindows
from lightning_ema_nesterov.litgpt.data.corpus import Corpus, load_corpus

__all__ = ["TokenWindows"]

_TOKENIZER_BYTES = 16_000_000
"""Bytes at the start of the text that the tokenizer is trained on."""

_PIECE_BYTES = 1_000_000
"""Bytes that are encoded at once; a token does not cross from one piece to the next."""


class TokenWindows(TextWindows):
    """Random windows of tokens of a byte-level BPE tokenizer that is trained on the text.

    Tokens are kept in a folder, so that each text is encoded once.

    Args:
        text: A file, a folder of text files, or ``"installed"``: the text files of the installed
            Python packages. ``None``: the running Python's standard library.
        vocab_size: Tokens, from 257 to 65,536.
        cache_dir: Where tokens are kept.
        window_size: Inputs in a window. One token more is returned: the last target.
        batch_size: Windows in a batch, at least 1.
        num_validation_windows: Windows to validate on, at most.

    Raises:
        ValueError: If ``vocab_size`` is out of its range; in training, if the text is too short.
    """

    def __init__(
        self,
        text: str | None = "installed",
        *,
        vocab_size: int = 8192,
        cache_dir: str = "out/tokens",
        window_size: int = 256,
        batch_size: int = 32,
        num_validation_windows: int = 512,
    ) -> None:
        if not 257 <= vocab_size <= 2**16:
            raise ValueError(f"vocab_size must be in [257, 65536], got {vocab_size}.")
        super().__init__(
            sysconfig.get_path("purelib") if text == "installed" else text,
            window_size=window_size,
            batch_size=batch_size,
            num_validation_windows=num_validation_windows,
        )
        self.vocab_size = vocab_size
        self.cache_dir = Path(cache_dir)

    @override
    def setup(self, stage: str) -> None:
        """Read and split the text, and encode it unless that was done before."""
        corpus = load_corpus(self.text, window_size=self.window_size)
        digests = corpus.split["train_sha256"] + corpus.split["validation_sha256"]
        key = hashlib.sha256(f"{digests} {self.vocab_size}".encode()).hexdigest()[:16]
        path = self.cache_dir / f"{key}.npz"
        if not path.exists():
            _write_tokens(path, corpus, self.vocab_size)
        with np.load(path) as tokens:
            self.corpus = replace(
                corpus,
                train=torch.from_numpy(tokens["train"]),
                validation=torch.from_numpy(tokens["validation"]),
            )
        fewest = min(len(self.corpus.train), len(self.corpus.validation))
        if fewest <= self.window_size:
            raise ValueError(
                f"text must be longer than one window of {self.window_size} tokens in both parts, "
                f"and one has {fewest}. Give a longer text."
            )


def _write_tokens(path: Path, corpus: Corpus, vocab_size: int) -> None:
    tokenizer = ByteLevelBPETokenizer()
    pieces = _pieces(corpus.train[:_TOKENIZER_BYTES])
    tokenizer.train_from_iterator(pieces, vocab_size=vocab_size, show_progress=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}-{os.getpid()}.npz")  # other runs may write it too
    np.savez(
        unfinished,
        train=_encode(tokenizer, corpus.train),
        validation=_encode(tokenizer, corpus.validation),
    )
    unfinished.replace(path)


def _pieces(data: Tensor) -> list[str]:
    found = bytes(data.numpy())
    starts = range(0, len(found), _PIECE_BYTES)
    return [found[at : at + _PIECE_BYTES].decode(errors="replace") for at in starts]


def _encode(tokenizer: ByteLevelBPETokenizer, data: Tensor) -> npt.NDArray[np.uint16]:
    encoded = tokenizer.encode_batch(_pieces(data))
    return np.concatenate([np.array(piece.ids, dtype=np.uint16) for piece in encoded])
