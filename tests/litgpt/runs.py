"""A run of LitGPT that is small: its configuration, its start, and what it leaves behind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonargparse
import litgpt.__main__
import torch
import torch._dynamo
import yaml
from litgpt import GPT, Config, pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.utils import CLI, chunked_cross_entropy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_ema_nesterov.litgpt import TextBytes
from lightning_ema_nesterov.litgpt.data.base import WindowData
from tests.processes import TIMEOUT_S, Forked

ACCUMULATE, MICRO_BATCH, WINDOW, NUM_STEPS = 2, 4, 16, 20
TWO_FILES = ("--config", "config.yaml", "--config", "ema_nesterov.yaml")
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}}
MUON = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.02, "weight_decay": 0.0}}
BY_ROLE = {
    "class_path": "lightning_ema_nesterov.litgpt.by_role",
    "init_args": {"hidden_matrices": MUON, "others": ADAMW},
}


def with_lookahead(base: Mapping[str, Any] = ADAMW, **kwargs: Any) -> dict[str, Any]:
    init_args = {"base": dict(base), "ema_decay": 0.9, **kwargs}
    return {"class_path": "lightning_ema_nesterov.litgpt.ema_nesterov", "init_args": init_args}


def flat(optimizer: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    init_args = {"optimizer": optimizer, **kwargs}
    path = "lightning_ema_nesterov.litgpt.warmup_stable_decay"
    return {"class_path": path, "init_args": init_args}


def config_of(folder: Path) -> dict[str, Any]:
    """A run of 20 steps with two micro-batches in each."""
    return {
        "model_name": "tiny",
        "model_config": {
            "name": "tiny",
            "block_size": WINDOW,
            "vocab_size": 256,
            "padded_vocab_size": 256,
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 16,
            "intermediate_size": 32,
            "rotary_percentage": 1.0,
            "parallel_residual": False,
            "bias": False,
            "norm_class_name": "RMSNorm",
            "mlp_class_name": "LLaMAMLP",
        },
        "out_dir": "out",
        "precision": "32-true",
        "data": {
            "class_path": "lightning_ema_nesterov.litgpt.TextBytes",
            "init_args": {"path": str(folder / "text")},
        },
        "train": {
            "save_interval": 5,
            "log_interval": 1,
            "global_batch_size": ACCUMULATE * MICRO_BATCH,
            "micro_batch_size": MICRO_BATCH,
            "lr_warmup_steps": 4,
            "max_tokens": NUM_STEPS * ACCUMULATE * MICRO_BATCH * WINDOW,
            "max_norm": 1.0,
            "min_lr": 0.001,
        },
        "eval": {"interval": 5, "max_iters": 3, "final_validation": True},
        "optimizer": ADAMW,
        "devices": 1,
    }


def write_text(folder: Path) -> Path:
    text = folder / "text"
    text.mkdir()
    for idx in range(20):
        (text / f"{idx}.txt").write_text(f"chapter {idx}: the quick brown fox jumps. " * 20)
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(changed(folder, **changes)))
    return path


def changed(folder: Path, **changes: Any) -> dict[str, Any]:
    # LitGPT writes into the block of the optimizer.
    config = copy.deepcopy(config_of(folder))
    for key, value in copy.deepcopy(changes).items():
        is_block = isinstance(value, dict) and key in ("train", "eval", "model_config")
        config[key] = {**config[key], **value} if is_block else value
    return config


def make_data(class_path: str, init_args: Mapping[str, str]) -> WindowData:
    module, _, name = class_path.rpartition(".")
    typed = {key: Path(value) if key == "path" else value for key, value in init_args.items()}
    data: WindowData = getattr(import_module(module), name)(**typed)
    return data


@dataclass(frozen=True)
class Run:
    """Trains in this process.

    Attributes:
        folder: Where it is called, and the text is.
    """

    folder: Path

    def __call__(self, *arguments: str, out_dir: str = "out", **changes: Any) -> Path:
        """Train, and return ``out_dir``.

        Args:
            arguments: Of the command line of LitGPT, which then reads the configuration.
            out_dir: Where the run writes.
            changes: To the configuration.
        """
        if arguments:
            path = write_config(self.folder, out_dir=out_dir, **changes)
            sys.argv[1:] = ["--config", str(path), *arguments]
            CLI(pretrain.setup)
        else:  # what the command line makes of it, half a second sooner
            config = changed(self.folder, out_dir=Path(out_dir), **changes)
            config["data"] = make_data(**config["data"])
            kinds = {"model_config": Config, "train": TrainArgs, "eval": EvalArgs}
            config |= {key: kind(**config[key]) for key, kind in kinds.items()}
            pretrain.setup(**config)
        return self.folder / out_dir


def start(*arguments: str, folder: Path) -> Forked:
    """The stock command in a process of its own, without a compiler and help on attributes."""
    log = folder / f"{'-'.join(arguments).replace('/', '-')}.log"
    return Forked(_pretrain, folder, arguments, log=log)


def _pretrain(folder: Path, arguments: Sequence[str]) -> None:
    torch._dynamo.config.disable = True
    os.chdir(folder)
    for module in (jsonargparse, litgpt.__main__):
        vars(module)["set_docstring_parse_options"] = lambda **kwargs: None
    sys.argv = ["litgpt", "pretrain", *arguments]
    litgpt.__main__.main()


def pretrain_on_two(*arguments: str, folder: Path) -> None:
    """Our command with two devices, of which Lightning starts the second with the same command."""
    command = [sys.executable, "-m", "lightning_ema_nesterov.cli", "pretrain", *arguments]
    result = subprocess.run(
        [*command, "--devices", "2"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path / "lit_model.pth", weights_only=True)
    return loaded


def weights(path: Path) -> list[Tensor]:
    model = load(path)["model"]
    return [model[name] for name in sorted(model)]


def scalars(out_dir: Path, tag: str) -> dict[int, float]:
    """What was logged in all runs of a folder, by its place on the x axis."""
    found: dict[int, float] = {}
    for folder in sorted((out_dir / "logs" / "tensorboard").iterdir()):
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        if tag in accumulator.Tags()["scalars"]:
            found |= {event.step: event.value for event in accumulator.Scalars(tag)}
    return found


def loss_at(tensors: dict[str, Tensor], folder: Path) -> float:
    """LitGPT's validation loss of a state dict."""
    model = GPT(Config(**config_of(folder)["model_config"]))
    model.load_state_dict(tensors)
    data = text_of(folder)
    losses = []
    with torch.no_grad():
        for _, batch in zip(range(3), data.val_dataloader(), strict=False):
            losses.append(chunked_cross_entropy(model(batch[:, :-1]), batch[:, 1:]))
    return float(torch.stack(losses).mean())


def text_of(folder: Path) -> TextBytes:
    data = TextBytes(path=folder / "text", cache_dir=folder / "data/bytes")
    data.connect(batch_size=MICRO_BATCH, max_seq_length=WINDOW)
    data.prepare_data()
    data.setup()
    return data
