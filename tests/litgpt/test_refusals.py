"""What contradicts a run of LitGPT is refused before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.litgpt.runs import (
    ACCUMULATE,
    ADAMW,
    BY_ROLE,
    MICRO_BATCH,
    MUON,
    WINDOW,
    Run,
    flat,
    with_lookahead,
)


@pytest.mark.parametrize(
    ("optimizer", "train", "message"),
    [
        (with_lookahead(total_steps=30), {}, "total_steps is 30, and train.max_tokens = 2560"),
        (
            flat(with_lookahead({**BY_ROLE, "init_args": {"hidden_matrices": MUON, "others": 3}})),
            {},
            "optimizer.init_args.optimizer.init_args.base.init_args.others must be a name",
        ),
        (with_lookahead(flat(ADAMW)), {}, "init_args.base names warmup_stable_decay, which must"),
        (with_lookahead(with_lookahead()), {}, "init_args.base names ema_nesterov, which must"),
        (
            {**BY_ROLE, "init_args": {"hidden_matrices": with_lookahead(MUON), "others": ADAMW}},
            {},
            "init_args.hidden_matrices names ema_nesterov, which must be",
        ),
        (with_lookahead(), {"max_tokens": 100}, "train.max_tokens must allow one optimizer step"),
        (flat(ADAMW, decay="0.3 "), {}, "optimizer.init_args.decay must be a number of steps"),
        (flat(ADAMW, decay=1.5), {}, r"decay must be in \[0, 1\] as a fraction"),
        (with_lookahead(warmup=15, rest=10), {}, "warmup \\+ rest must not be longer"),
        (with_lookahead(lookahead_step_size=1.5), {}, "lookahead_step_size must be in"),
        (
            flat(ADAMW, decay=18),
            {},
            "train.lr_warmup_steps and optimizer.init_args.decay: .* must not be longer",
        ),
        (flat(ADAMW), {"min_lr": 0.1}, r"train.min_lr, .* min_lr must be in \[0, 0.01\]"),
        (
            flat(ADAMW, shape="exponential"),
            {"min_lr": 0.0},
            "train.min_lr, .* min_lr must be above 0",
        ),
        (flat(ADAMW, shape="step"), {}, "shape must be linear or exponential"),
        (
            flat(ADAMW),
            {"lr_warmup_steps": None, "lr_warmup_fraction": 0.1},
            "Set train.lr_warmup_steps",
        ),
    ],
)
def test_what_contradicts_the_run_is_refused_before_the_first_step(
    optimizer: dict[str, Any], train: dict[str, Any], message: str, run: Run, folder: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        run(optimizer=optimizer, train=train)
    assert not list(folder.rglob("*.pth"))


def test_tokens_that_the_model_does_not_have_are_refused(run: Run, folder: Path) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 200
    for largest in (255, 256):
        tokens = np.full(200, largest, dtype="<u2")
        (folder / f"{largest}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    path = "lightning_ema_nesterov.litgpt.TokenShards"
    one_step = {"max_tokens": ACCUMULATE * MICRO_BATCH * WINDOW, "lr_warmup_steps": 0}
    run(
        data={"class_path": path, "init_args": {"train": "255.bin", "val": "255.bin"}},
        train=one_step,
    )
    with pytest.raises(
        ValueError, match=r"data.init_args.val: 256.bin holds the token id 256, and"
    ):
        run(data={"class_path": path, "init_args": {"train": "255.bin", "val": "256.bin"}})
