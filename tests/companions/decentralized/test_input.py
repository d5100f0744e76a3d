"""What is refused before training, and the direction of imports."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import lightning_ema_nesterov
from lightning_ema_nesterov.companions.decentralized import FSPDASA, FSPDASTORM, DoCoM, Topology
from lightning_ema_nesterov.companions.decentralized.callback import DecentralizedCallback
from lightning_ema_nesterov.companions.decentralized.parameters import FlatParameters
from lightning_ema_nesterov.companions.decentralized.transport import pack, unpack

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
PACKAGE = "lightning_ema_nesterov"
ROOT = Path(lightning_ema_nesterov.__file__).parent


class Module(BoringModel):
    """Fails the test when training has begun to be set up."""

    def configure_optimizers(self) -> Any:
        raise AssertionError("too late")


@pytest.mark.parametrize("method", [FSPDASA, FSPDASTORM, DoCoM])
def test_one_process_is_refused(method: Callable[[str], Callback]) -> None:
    trainer = Trainer(devices=1, max_epochs=1, callbacks=[method("ring")], **QUIET)
    with pytest.raises(MisconfigurationException, match=r"needs at least 2 processes.*got 1"):
        trainer.fit(Module())


def refused(callback: DecentralizedCallback, **options: Any) -> str:
    """Return the message at setup of a Trainer that would start two processes."""
    chosen = {**QUIET, "devices": 2, "strategy": "ddp", **options}
    trainer = Trainer(callbacks=[callback], **chosen)
    with pytest.raises(MisconfigurationException) as caught:
        callback.setup(trainer, Module(), "fit")
    return str(caught.value)


def test_settings_that_cannot_work_are_refused() -> None:
    assert "needs DDPStrategy, where each process holds all parameters, got ModelParallel" in (
        refused(FSPDASA(), strategy=ModelParallelStrategy())
    )
    assert "needs at least 2 processes" in refused(FSPDASA(), devices=1)
    hooked = DDPStrategy(ddp_comm_hook=lambda state, bucket: None)
    assert "Remove ddp_comm_hook" in refused(FSPDASA(), strategy=hooked)
    assert "must be below 0.0523" in refused(FSPDASA(dual_step_size=0.06))
    assert "an agent for each of the 2 processes, got 3" in refused(FSPDASA(Topology.ring(3)))
    one = Topology.ring(2, one_edge_per_round=True)
    assert "must have all edges active" in refused(DoCoM(one))
    assert "not clipped" in refused(DoCoM(), gradient_clip_val=1.0)
    assert "not clipped" in refused(FSPDASTORM(), gradient_clip_val=1.0)
    assert "edges must connect all 2 agents" in refused(
        FSPDASA("erdos_renyi", edge_probability=1e-9)
    )
    trainer = Trainer(devices=2, strategy="ddp", gradient_clip_val=1.0, **QUIET)
    FSPDASA().setup(trainer, Module(), "fit")  # clips the local gradient


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinate_share": 0.0}, r"coordinate_share must be in \(0, 1\], got 0.0"),
        ({"coordinate_share": 1.5}, r"coordinate_share must be in \(0, 1\], got 1.5"),
        ({"consensus_step_size": 0.0}, "consensus_step_size must be above 0 and finite, got 0.0"),
        ({"dual_step_size": -1.0}, "dual_step_size must be at least 0, got -1.0"),
        ({"dual_growth": float("inf")}, "dual_growth must be above 0 and finite, got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    for method in (FSPDASA, FSPDASTORM):
        with pytest.raises(ValueError, match=message):
            method(**arguments)


def test_weights_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dual_weight must be in \(0, 1\], got 2"):
        FSPDASTORM(dual_weight=2)
    with pytest.raises(ValueError, match=r"momentum_weight must be in \(0, 1\], got 0.0"):
        DoCoM(momentum_weight=0.0)
    with pytest.raises(ValueError, match=r"consensus_step_size must be in \(0, 1\], got 1.1"):
        DoCoM(consensus_step_size=1.1)


def test_agent_is_refused_before_fit() -> None:
    with pytest.raises(RuntimeError, match="FSPDASA has no agent before fit"):
        _ = FSPDASA().agent


def test_parameters_must_stay_the_same() -> None:
    model = torch.nn.Linear(2, 2)
    parameters = FlatParameters(torch.optim.SGD(model.parameters(), lr=0.1))
    vector = parameters.read()
    with parameters.at(vector + 1):
        assert torch.equal(parameters.read(), vector + 1)
    assert torch.equal(parameters.read(), vector)
    model.bias.requires_grad = False
    with pytest.raises(RuntimeError, match="2 trainable parameters must stay the same"):
        parameters.read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_messages_are_exact(dtype: torch.dtype) -> None:
    values = torch.randn(5, dtype=dtype)
    indices = torch.tensor([7, 0, 2**31 - 1, 3, 9])
    message = pack(indices, values)
    assert message.numel() * message.element_size() == 5 * (4 + values.element_size())
    found = unpack(message, 5, dtype)
    assert torch.equal(found[0], indices)
    assert torch.equal(found[1], values)


def imports_of(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return names | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}


def test_nothing_imports_the_companion_and_it_imports_torch_and_lightning_only() -> None:
    own = f"{PACKAGE}.companions.decentralized"
    foreign: set[str] = set()
    for path in ROOT.rglob("*.py"):
        is_own = "companions" in path.parts and "decentralized" in path.parts
        for name in imports_of(path):
            if is_own and not name.startswith(own):
                foreign.add(name.split(".")[0])
            elif not is_own:
                assert not name.startswith(own), path
    third_party = {"torch", "lightning", "typing_extensions"}
    assert third_party <= foreign
    assert PACKAGE not in foreign
    assert foreign - third_party <= {
        "__future__", "abc", "collections", "contextlib", "dataclasses", "hashlib", "inspect",
        "typing",
    }  # fmt: skip
