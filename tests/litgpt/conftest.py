"""Folders with text, and runs of LitGPT in them."""

from __future__ import annotations

import sys
from pathlib import Path

import jsonargparse
import litgpt.__main__
import pytest
import torch
import yaml
from litgpt import pretrain

from tests.litgpt import litgpt_sharded
from tests.litgpt.runs import (
    BY_ROLE,
    TWO_FILES,
    Run,
    flat,
    start,
    with_lookahead,
    write_config,
    write_text,
)
from tests.ports import free_port
from tests.processes import start_processes


@pytest.fixture(autouse=True)
def _no_help_on_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """LitGPT has its parser read the sources of all classes for its help: most of the time."""
    for module in (jsonargparse, litgpt.__main__):
        monkeypatch.setattr(module, "set_docstring_parse_options", lambda **kwargs: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train in this process, with the command line of LitGPT if there are arguments for it."""
    monkeypatch.setattr(torch, "compile", lambda module: module)
    # It parses the command line again, half a second for each checkpoint.
    monkeypatch.setattr(pretrain, "save_hyperparameters", lambda *args: None)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["litgpt"])
    return Run(folder)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run by the stock command, from a base file and an overlay, in ``whole``."""
    folder = write_text(tmp_path_factory.mktemp("stock"))
    write_config(folder)
    optimizer = flat(with_lookahead(BY_ROLE, warmup=3), decay=0.25)
    (folder / "ema_nesterov.yaml").write_text(yaml.safe_dump({"optimizer": optimizer}))
    start(*TWO_FILES, "--out_dir", "whole", folder=folder).finish()
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of litgpt_sharded.py."""
    folder = write_text(tmp_path_factory.mktemp("sharded"))
    for name, optimizer in (
        ("adamw", with_lookahead(warmup=2)),
        ("muon", flat(with_lookahead(BY_ROLE))),
    ):
        write_config(folder, optimizer=optimizer, devices=2).rename(folder / f"{name}.yaml")
    start_processes(litgpt_sharded.work, 2, folder, free_port())
    return folder
