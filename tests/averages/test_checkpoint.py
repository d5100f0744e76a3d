"""Checkpoints to averaged weights, against an average of the iterates that is kept by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.averages import average_checkpoint
from tests.toys import Toy, ema_nesterov, loader, make_trainer

DECAY = 0.9
# Of the distance to the iterate, which is small beside the weights: their rounding in float32 is
# 1e-7 of them. int8 cuts a direction to 0.4 % of the largest in a block, bfloat16 to 0.4 % of each.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2}


class Net(nn.Module):
    """Tied weights, a frozen layer, a parameter that never gets a gradient, and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 64)
        self.hidden = nn.Linear(64, 64)
        self.frozen = nn.Linear(64, 64)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(self.embedding(tokens)))
        out: Tensor = self.head(x + self.frozen(x))
        return out


TOKENS = torch.arange(96).view(8, 12)


def groups_of(net: Net) -> list[dict[str, Any]]:
    matrices = [net.embedding.weight, net.hidden.weight]
    return [{"params": matrices}, {"params": [net.hidden.bias, net.unused], "lr": 1e-3}]


def train(net: Net, optimizer: Any, num_steps: int = 12) -> dict[str, Tensor]:
    """Train, and return the average of the iterates in float64."""
    average = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    for _ in range(num_steps):
        optimizer.zero_grad()
        net(TOKENS).float().square().mean().backward()
        optimizer.step()
        for name, p in net.named_parameters():
            average[name] = DECAY * average[name] + (1 - DECAY) * p.detach().double()
    average["head.weight"] = average["embedding.weight"]
    return average


def moved(found: dict[str, Tensor], expected: dict[str, Tensor], net: Net) -> float:
    """Largest error of an average, relative to its distance from the iterate."""
    state = net.state_dict()
    errors = []
    for name in ("embedding.weight", "hidden.weight", "hidden.bias", "head.weight"):
        distance = (expected[name] - state[name].double()).norm()
        assert distance > 0
        errors.append(float((found[name].double() - expected[name]).norm() / distance))
    return max(errors)


def check(found: dict[str, Tensor], expected: dict[str, Tensor], net: Net, bound: float) -> None:
    assert list(found) == list(net.state_dict())
    assert moved(found, expected, net) < bound
    for name in ("frozen.weight", "unused", "count"):
        assert torch.equal(found[name], net.state_dict()[name])
    assert found["head.weight"].data_ptr() == found["embedding.weight"].data_ptr()
    Net().load_state_dict(found)


@pytest.mark.parametrize("direction_dtype", TOLERANCE)
@pytest.mark.parametrize("weights", ["model", "weights"])
def test_file_of_a_loop_of_one_s_own(tmp_path: Path, direction_dtype: str, weights: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD(groups_of(net), lr=0.5)
    attach_ema_nesterov(
        optimizer, net, ema_decay=DECAY, warmup=0, rest=0, direction_dtype=direction_dtype
    )
    expected = train(net, optimizer)
    torch.save({weights: net.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "a.pt")
    average_checkpoint(tmp_path / "a.pt", tmp_path / "new" / "b.pt")
    made = torch.load(tmp_path / "new" / "b.pt", weights_only=True)
    found = made["model"] if weights == "model" else made
    check(found, expected, net, TOLERANCE[direction_dtype])


def test_share_goes_a_part_of_the_way(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(groups_of(net), lr=0.5)
    attach_ema_nesterov(optimizer, net, ema_decay=DECAY, warmup=0, rest=0)
    expected = train(net, optimizer)
    torch.save({"w": net.state_dict(), "o": optimizer.state_dict()}, tmp_path / "a.pt")
    for share in (0.0, 0.25):
        average_checkpoint(tmp_path / "a.pt", tmp_path / f"{share}.pt", share=share)
        found = torch.load(tmp_path / f"{share}.pt")["hidden.weight"].double()
        x = net.hidden.weight.detach().double()
        part = x + share * (expected["hidden.weight"] - x)
        torch.testing.assert_close(found, part, rtol=1e-5, atol=1e-7)


def test_bfloat16_weights_are_rounded_once(tmp_path: Path) -> None:
    net = Net(torch.bfloat16)
    optimizer = torch.optim.SGD(groups_of(net), lr=0.5)
    handle = attach_ema_nesterov(optimizer, net, ema_decay=DECAY, warmup=0, rest=0)
    train(net, optimizer)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    average_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt")["model"]["hidden.weight"]
    m = optimizer.state[net.hidden.weight]["ema_nesterov_direction"]
    exact = net.hidden.weight.detach().double() - DECAY / (1 - DECAY) * m.double()
    assert torch.equal(found, exact.float().bfloat16())
    with handle.at_average():
        assert torch.equal(net.hidden.weight, found)


def test_file_of_fabric(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(groups_of(net), lr=0.5))
    attach_ema_nesterov(optimizer, model, ema_decay=DECAY, warmup=0, rest=0)
    expected = train(net, _Through(model, optimizer))
    (tmp_path / "model_config.yaml").write_text("n_layer: 1")
    fabric.save(tmp_path / "lit_model.pth", {"model": model, "optimizer": optimizer, "iter": 3})
    average_checkpoint(tmp_path / "lit_model.pth", tmp_path / "average" / "lit_model.pth")
    made = torch.load(tmp_path / "average" / "lit_model.pth", weights_only=True)
    assert set(made) == {"model"}
    check(made["model"], expected, net, TOLERANCE["float32"])
    assert (tmp_path / "average" / "model_config.yaml").read_text() == "n_layer: 1"


class _Through:
    """Has each step go through the module that Fabric wraps."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(TOKENS).float().square().mean().backward()
        self.optimizer.step()


class Configured(Toy):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lambda params: torch.optim.AdamW(params, lr=lr))
        self.save_hyperparameters()


def test_file_of_the_trainer_loads_as_a_module(tmp_path: Path) -> None:
    module = Configured(lr=2e-2)
    callback = ema_nesterov(evaluate_at="average")
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    trainer = make_trainer([callback, checkpoint], max_epochs=1, enable_checkpointing=True)
    trainer.fit(module, loader(12), loader(2))
    target = tmp_path / "average.ckpt"
    average_checkpoint(tmp_path / "last.ckpt", target)
    loaded = Configured.load_from_checkpoint(target, weights_only=False)
    assert loaded.hparams["lr"] == 2e-2
    [found] = make_trainer().validate(loaded, loader(2), verbose=False)
    assert found["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-6)
    [at_x] = make_trainer().validate(module, loader(2), verbose=False)
    assert abs(at_x["val_loss"] - found["val_loss"]) > 1e-3


def test_a_file_with_more_in_it(tmp_path: Path) -> None:
    """Tensors that are no weights, a list of two optimizers with decays of their own, and DDP."""
    net = Net()
    first = torch.optim.SGD([net.embedding.weight], lr=0.5)
    second = torch.optim.SGD([net.hidden.weight, net.hidden.bias], lr=0.5)
    attach_ema_nesterov(first, net, ema_decay=DECAY, warmup=0, rest=0)
    attach_ema_nesterov(second, net, ema_decay=0.5, warmup=0, rest=0)
    iterates = [snapshot_of(net)]
    for _ in range(8):
        net(TOKENS).float().square().mean().backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        iterates.append(snapshot_of(net))
    weights = {f"module.{name}": x for name, x in net.state_dict().items()}
    checkpoint = {
        "rng": {"cpu": torch.get_rng_state()},
        "net": weights,
        "optimizers": {"all": [first.state_dict(), second.state_dict()]},
    }
    torch.save(checkpoint, tmp_path / "a.pt")
    average_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    made = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(made) == list(weights)
    for name, decay in (("embedding.weight", DECAY), ("hidden.weight", 0.5)):
        exact = iterates[0][name].double()
        for iterate in iterates[1:]:
            exact = decay * exact + (1 - decay) * iterate[name].double()
        torch.testing.assert_close(made[f"module.{name}"].double(), exact, rtol=1e-5, atol=1e-6)
        assert (exact - net.state_dict()[name]).norm() > 1e-2 * exact.norm()
    torch.save({**checkpoint, "copy": weights}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="has both 'net' and 'copy'"):
        average_checkpoint(tmp_path / "two.pt", tmp_path / "c.pt")


def snapshot_of(net: Net) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in net.named_parameters()}


class Stateful(nn.Module):
    """A part whose name is that of a part of an optimizer's state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.state = nn.Linear(4, 4)
        self.frozen = nn.ModuleDict({"state": nn.Linear(4, 4)})
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen["state"](torch.tanh(self.state(x)))
        return out


@pytest.mark.parametrize("place", ["", "state.", "optimizer."])
@pytest.mark.parametrize("is_flat", [False, True])
def test_folder_of_a_loop_of_one_s_own(tmp_path: Path, place: str, is_flat: bool) -> None:
    """Saved by torch alone on one process, under names that could be those of weights."""
    net = Stateful()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-1)
    attach_ema_nesterov(optimizer, net, ema_decay=DECAY, warmup=0, rest=0)
    average = {name: x.double() for name, x in net.state_dict().items()}
    for _ in range(8):
        net(torch.eye(4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, x in net.state_dict().items():
            average[name] = DECAY * average[name] + (1 - DECAY) * x.double()
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    weights, state = get_state_dict(net, optimizer, options=options)
    part = {place.removesuffix("."): state} if place else state
    save({"weights": weights, **part}, checkpoint_id=tmp_path / "saved", no_dist=True)
    average_checkpoint(tmp_path / "saved", tmp_path / "average.pt")
    made = torch.load(tmp_path / "average.pt", weights_only=True)
    assert (average["state.weight"] - weights["state.weight"]).norm() > 0.1
    for name, exact in average.items():
        torch.testing.assert_close(made[name].double(), exact, rtol=1e-5, atol=1e-6)
    net.load_state_dict(made)


@pytest.mark.slow
def test_memory_is_that_of_one_copy_of_the_weights(tmp_path: Path) -> None:
    """Also where a frozen part has the shapes of what moves, and could be tied to it."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(24)))
    net[12:].requires_grad_(False)
    optimizer = torch.optim.SGD(net[:12].parameters(), lr=1e-2)
    attach_ema_nesterov(optimizer, net, ema_decay=DECAY, warmup=0, rest=0)
    for _ in range(2):
        net(torch.ones(1, 512)).sum().backward()
        optimizer.step()
    weights, state = get_state_dict(net, optimizer)
    save({"weights": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    # In a process of its own, whose tensors are counted as they come and go.
    script = f"""
import gc, torch
from lightning_ema_nesterov.averages import average_checkpoint, checkpoint
largest = 0
read = checkpoint._moved
def counted(*args):
    global largest
    made = read(*args)
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and not t.is_meta]
    storages = {{t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}}
    largest = max(largest, sum(storages.values()))
    return made
checkpoint._moved = counted
average_checkpoint({str(tmp_path / "saved")!r}, {str(tmp_path / "average.pt")!r})
print(largest)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    one = 512 * 512 * 4
    assert int(done.stdout) < (12 + 5) * one  # what moves, and some of it twice for a moment
    assert len(torch.load(tmp_path / "average.pt")) == 24


def test_wrong_sources_and_targets_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(groups_of(net), lr=0.5)
    optimizer.state[net.hidden.weight]["momentum_buffer"] = torch.zeros(1)
    plain, cut, other = (tmp_path / name for name in ("plain.pt", "cut.pt", "other.pt"))
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, plain)
    cut.write_bytes(plain.read_bytes()[:1000])
    torch.save([1, 2], other)
    (tmp_path / "folder").mkdir()
    target = tmp_path / "target.pt"
    attach_ema_nesterov(optimizer, net, warmup=0, rest=0).extrapolate()
    torch.autograd.backward([p.sum() for p in net.parameters() if p.requires_grad])
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "bare.pt")
    cases: list[tuple[Path, type[Exception], str]] = [
        (tmp_path / "bare.pt", ValueError, "one set of weights beside the optimizer"),
        (plain, ValueError, "must be made with EMA-Nesterov"),
        (cut, ValueError, "source must be a whole checkpoint"),
        (other, ValueError, "source must be a checkpoint"),
        (tmp_path / "folder", ValueError, "no .metadata: it may be incomplete"),
        (tmp_path / "nowhere", FileNotFoundError, "does not exist"),
    ]
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            average_checkpoint(source, target)
    with pytest.raises(FileExistsError, match="target must not exist"):
        average_checkpoint(plain, other)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        average_checkpoint(plain, target, share=2.0)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"plain.pt", "bare.pt", "cut.pt", "other.pt", "folder"}
