"""NpyTokens reads every token once, continues from a state, and names a wrong file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_ema_nesterov.litgpt.data.npy_tokens import NpyTokens


def make(folder: Path) -> NpyTokens:
    np.save(folder / "train.npy", np.arange(41, dtype=np.uint16))
    np.save(folder / "val.npy", np.arange(100, 109, dtype=np.uint16))
    data = NpyTokens(train=folder / "train.npy", val=folder / "val.npy")
    data.connect(batch_size=2, max_seq_length=4)
    data.prepare_data()
    data.setup()
    return data


def test_an_epoch_has_every_window_once(tmp_path: Path) -> None:
    batches = list(make(tmp_path).train_dataloader())
    assert sorted(torch.cat(batches)[:, 0].tolist()) == list(range(0, 40, 4))
    assert torch.cat(list(make(tmp_path).val_dataloader())).min() == 100


def test_the_order_continues_from_a_state(tmp_path: Path) -> None:
    loader, other = make(tmp_path).train_dataloader(), make(tmp_path).train_dataloader()
    batches = iter(loader)
    next(batches)
    other.load_state_dict(loader.state_dict())  # type: ignore[attr-defined]  # a WindowLoader
    assert torch.equal(next(batches), next(iter(other)))


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    data = make(tmp_path)
    np.save(data.train, np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"data.init_args.train: .*train.npy must hold one dim"):
        data.setup()
    data.val.unlink()
    np.save(data.train, np.zeros(4, dtype=np.uint8))
    with pytest.raises(FileNotFoundError, match=r"data.init_args.val: there is no file"):
        data.setup()
