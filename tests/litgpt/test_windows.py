"""Windows of tokens: their numbers, their order, and how it goes on from a checkpoint."""

from __future__ import annotations

import io
from collections import Counter
from itertools import islice
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning import Fabric
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ema_nesterov.litgpt.data import windows
from lightning_ema_nesterov.litgpt.data.windows import (
    RandomWindows,
    TokenArray,
    WindowLoader,
    Windows,
    fixed_windows,
)

PARTS: list[TokenArray] = [np.arange(0, 21, dtype=np.uint16), np.arange(100, 133, dtype=np.uint16)]
# Windows of 4 tokens and a target: 5 in the first part, 8 in the second.
STARTS = [*range(0, 20, 4), *range(100, 132, 4)]


def test_a_window_is_what_stands_at_its_number() -> None:
    found = Windows(PARTS, 4)
    assert len(found) == 17 + 29
    whole = [found[idx] for idx in range(len(found))]
    assert [int(window[0]) for window in whole] == [*range(17), *range(100, 129)]
    for window in whole:
        assert window.dtype == torch.int64
        assert torch.equal(window, window[0] + torch.arange(5))
    firsts = [int(found[idx][0]) for part in range(2) for idx in found.side_by_side(part)]
    assert firsts == STARTS


def test_parts_that_are_too_short_have_no_window() -> None:
    found = Windows([PARTS[0][:4], PARTS[0], PARTS[0][:0], PARTS[1]], 4)
    assert len(found) == len(Windows(PARTS, 4))
    assert [len(found.side_by_side(part)) for part in range(4)] == [0, 5, 0, 8]
    assert [int(found[idx][0]) for idx in (0, 16, 17)] == [0, 16, 100]
    for idx in (-1, len(found)):
        with pytest.raises(IndexError, match=rf"must be in \[0, 46\), got {idx}"):
            found[idx]
    assert len(Windows([], 4)) == 0


def test_random_windows_have_no_end_and_are_the_same_again() -> None:
    order = RandomWindows(Windows(PARTS, 4), seed=0)
    taken = list(islice(order, 1000))
    assert set(taken) == set(range(46))
    assert list(islice(order, 1000)) == taken
    assert list(islice(RandomWindows(Windows(PARTS, 4), seed=1), 1000)) != taken


def test_fabric_leaves_the_order_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two processes it gives a loader a sampler of its own, and tells it the epoch."""
    pretend_rank(monkeypatch, 1, 2)
    fabric = Fabric(accelerator="cpu", devices=1)
    sharding = {"num_replicas": 2, "rank": 1}
    monkeypatch.setattr(
        type(fabric.strategy), "distributed_sampler_kwargs", sharding, raising=False
    )

    def set_up(loader: DataLoader[Tensor]) -> DataLoader[Tensor]:
        return cast("DataLoader[Tensor]", fabric.setup_dataloaders(loader))

    def resumed() -> WindowLoader:
        loader = make_loader()
        loader.load_state_dict({**loader.state_dict(), "epoch": 4})
        return loader

    fixed = fixed_windows(PARTS, window_size=4, batch_size=2)
    for loader, expected in ((set_up(resumed()), resumed()), (set_up(fixed), fixed)):
        for _ in range(3):  # epochs
            assert torch.equal(torch.cat(list(loader)), torch.cat(list(expected)))
    replaced = set_up(DataLoader(fixed.dataset, batch_size=2))
    assert len(torch.cat(list(replaced))) == len(torch.cat(list(fixed))) / 2


def test_length_is_that_of_an_epoch_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(make_loader()) == len(list(make_loader())) == 6
    pretend_rank(monkeypatch, 0, 2)
    assert len(make_loader()) == len(list(make_loader())) == 3


def make_loader(batch_size: int = 2, seed: int = 0, window_size: int = 4) -> WindowLoader:
    return WindowLoader(PARTS, window_size=window_size, batch_size=batch_size, seed=seed)


def pretend_rank(monkeypatch: pytest.MonkeyPatch, rank: int, num_ranks: int) -> None:
    monkeypatch.setattr(windows, "_rank", lambda: (rank, num_ranks))


def through_bytes(state: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.load`` gives that allows nothing but numbers and tensors."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert buffer.tell() < 2000
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_an_epoch_has_every_window_once_in_an_order_of_its_own() -> None:
    loader = make_loader(batch_size=1)
    epochs = [torch.cat(list(loader)) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == STARTS
        assert torch.equal(epoch - epoch[:, :1], torch.arange(5).expand(13, 5))
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0], torch.cat(list(make_loader(batch_size=1))))
    assert not torch.equal(epochs[0], torch.cat(list(make_loader(batch_size=1, seed=1))))


def test_processes_share_the_windows_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(make_loader(batch_size=4))
    pretend_rank(monkeypatch, 0, 2)
    first = list(make_loader())
    pretend_rank(monkeypatch, 1, 2)
    second = list(make_loader())
    assert len(first) == len(second) == 3
    for batch, *halves in zip(whole, first, second, strict=True):
        assert torch.equal(batch, torch.cat(halves))


@pytest.mark.parametrize("num_taken", [2, 6, 7])
def test_order_continues_exactly_from_a_state(num_taken: int) -> None:
    """In an epoch, at its end, and in the next one."""

    def endless(loader: WindowLoader) -> Any:
        while True:
            yield from loader

    whole = make_loader()
    batches = endless(whole)
    for _ in range(num_taken):
        next(batches)
    resumed = make_loader()
    resumed.load_state_dict(through_bytes(whole.state_dict()))
    expected = [next(batches) for _ in range(9)]
    found = endless(resumed)
    assert torch.equal(torch.stack([next(found) for _ in range(9)]), torch.stack(expected))


def test_other_number_of_processes_continues_with_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = make_loader()
    taken = [batch for _, batch in zip(range(3), one, strict=False)]
    state = one.state_dict()
    rest = []
    for rank in range(3):
        pretend_rank(monkeypatch, rank, 3)
        loader = make_loader()
        loader.load_state_dict(state)
        rest += list(loader)
    seen = Counter(torch.cat([*taken, *rest])[:, 0].tolist())
    assert set(seen.values()) == {1}
    assert len(seen) == 12


def test_another_text_is_refused() -> None:
    state = make_loader().state_dict()
    for other in (make_loader(seed=1), make_loader(window_size=5)):
        with pytest.raises(ValueError, match="The checkpoint was made with the text"):
            other.load_state_dict(state)


def test_validation_is_the_same_on_every_process_and_in_every_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = fixed_windows(PARTS, window_size=4, batch_size=4)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [4, 4, 4]  # 13 windows: one is left out
    starts = torch.cat(batches)[:, 0].tolist()
    assert len(set(starts)) == 12
    assert set(starts) <= set(STARTS)
    assert starts != sorted(starts)
    pretend_rank(monkeypatch, 1, 2)
    assert torch.equal(torch.cat(list(loader)), torch.cat(batches))
    assert [len(b) for b in fixed_windows(PARTS, window_size=4, batch_size=20)] == [13]


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"data: the training text must hold 20 windows of 4 tokens.* and holds 13"
    ):
        make_loader(batch_size=20)
    with pytest.raises(
        ValueError, match="data: the validation text must hold one window of 40 tokens"
    ):
        fixed_windows(PARTS, window_size=40, batch_size=1)
