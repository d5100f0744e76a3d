"""Runs of the Trainer in several processes: what a process does, and how a test starts them."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.companions.decentralized import FSPDASA, FSPDASTORM, DoCoM
from lightning_ema_nesterov.companions.decentralized.callback import DecentralizedCallback
from tests.processes import environments_of, fork, measure_first_process_only

METHODS: dict[str, Callable[..., DecentralizedCallback]] = {
    "sa": FSPDASA,
    "storm": FSPDASTORM,
    "docom": DoCoM,
}
LR = 0.1
TIMEOUT_S = 300.0  # of a whole run; tests fail by it
GROUP_TIMEOUT_S = 20.0


class RankBatches(Dataset[Tensor]):
    """Batches of four inputs and two targets, other ones on each rank."""

    def __init__(self, rank: int, num: int) -> None:
        generator = torch.Generator().manual_seed(100 + rank)
        self.data = torch.randn(num, 8, 6, generator=generator, dtype=torch.float64)
        self.data[..., 4:] += rank

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, idx: int) -> Tensor:
        return self.data[idx]


class Stream:
    """A loader that resumes in the middle of an epoch."""

    def __init__(self, data: RankBatches) -> None:
        self.data = data
        self.position = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self.data):
            self.position += 1
            yield self.data[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Toy(LightningModule):
    """Two layers; normalization and dropout between them where a run asks for them."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        torch.manual_seed(0)
        self.hidden = nn.Linear(4, 8)
        middle = options.get("middle")
        self.norm = nn.BatchNorm1d(8) if middle in ("norm", "norm and dropout") else nn.Identity()
        self.dropout = nn.Dropout(0.5) if middle == "norm and dropout" else nn.Identity()
        self.out = nn.Linear(8, 2)
        self.double()
        self.num_training_steps = 0
        self.last_buffers: list[Tensor] | None = None
        self.has_own_buffers = True
        if options.get("manual"):
            self.automatic_optimization = False

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(torch.tanh(self.hidden(batch[:, :4]))))
        loss: Tensor = (self.out(hidden) - batch[:, 4:]).square().mean()
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.num_training_steps += 1
        if self.last_buffers is not None:
            pairs = zip(self.buffers(), self.last_buffers, strict=True)
            self.has_own_buffers &= all(torch.equal(a, b) for a, b in pairs)
        loss: Tensor = self(batch)
        self.last_buffers = [b.clone() for b in self.buffers()]
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        if self.global_step == self.options.get("die_at") and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.options.get("manual"):
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        name = self.options.get("optimizer", "sgd")
        if name == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        else:
            momentum = 0.9 if name == "momentum" else 0.0
            lr = LR / 4 if momentum else LR
            optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=momentum)
        if not self.options.get("decay"):
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class ToyWithLoss(Toy):
    """The same, with the loss alone for the second gradient."""

    def batch_loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        return loss


class Recorder(Callback):
    """Note what others can see: bytes, weights in validation, and a gradient taken twice."""

    def __init__(self, method: DecentralizedCallback, *, probes: bool) -> None:
        self.method = method
        self.probes = probes
        self.seen: dict[str, Any] = {"logged": [], "validated": []}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        second = self.method._current.second
        if second is None or not self.probes or "first" in self.seen:
            return
        buffers = [b.clone() for b in pl_module.buffers()]
        parameters = self.method._current._parameters
        point = parameters.read()
        assert second._random_states is not None
        again = second._take(point)
        first_states = second._random_states
        second._random_states = (torch.Generator().manual_seed(99).get_state(), None)
        other = second._take(point)
        second._random_states = first_states
        self.seen["first"] = parameters.read_gradients()[0]
        self.seen["again"] = parameters.scale_gradients(again)[0]
        self.seen["other sample"] = parameters.scale_gradients(other)[0]
        self.seen["buffers kept"] = all(
            torch.equal(a, b) for a, b in zip(buffers, pl_module.buffers(), strict=True)
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        value = trainer.callback_metrics.get("decentralized/bytes_sent")
        if value is not None:
            self.seen["logged"].append(float(value))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        self.seen["validated"].append(weights)


def make_trainer(folder: Path, options: dict[str, Any], callbacks: list[Callback]) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=options.get("processes", int(os.environ.get("WORLD_SIZE", "1"))),
        strategy=DDPStrategy(timeout=timedelta(seconds=GROUP_TIMEOUT_S)),
        max_steps=options.get("steps", 8),
        max_epochs=options.get("epochs", -1),
        accumulate_grad_batches=options.get("accumulate", 1),
        val_check_interval=options.get("val_every"),
        limit_val_batches=None if options.get("val_every") else 0,
        callbacks=callbacks,
        use_distributed_sampler=False,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=options.get("sanity", 0),
        default_root_dir=folder,
    )


def make_callbacks(folder: Path, options: dict[str, Any]) -> list[Callback]:
    method = METHODS[options["method"]](**options.get("arguments", {}))
    callbacks: list[Callback] = [method, Recorder(method, probes=bool(options.get("probes")))]
    if "ema" in options:
        callbacks.append(EMANesterov(warmup=0, rest=0, **options["ema"]))
    if "save_every" in options:
        callbacks.append(
            ModelCheckpoint(
                folder,
                filename=options["name"] + "-{step}",
                every_n_train_steps=options["save_every"],
                save_top_k=-1,
            )
        )
    if options.get("monitor"):
        best = ModelCheckpoint(folder, filename=options["name"] + "-best", monitor="val_loss")
        callbacks += [best, EarlyStopping("val_loss", patience=2)]
    return callbacks


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train once; return what this process saw and holds."""
    callbacks = make_callbacks(folder, options)
    method, recorder = callbacks[0], callbacks[1]
    assert isinstance(method, DecentralizedCallback)
    assert isinstance(recorder, Recorder)
    trainer = make_trainer(folder, options, callbacks)
    module = (ToyWithLoss if options.get("has_loss") else Toy)(options)
    rank = trainer.global_rank
    num = options.get("batches", 50) + (rank if options.get("uneven") else 0)
    loader = Stream(RankBatches(rank, num))
    val_loader = DataLoader(RankBatches(7, 2), batch_size=None)
    path = options.get("resume")
    result: dict[str, Any] = {}
    try:
        loaders = (loader, val_loader if options.get("val_every") else None)
        trainer.fit(module, *loaders, ckpt_path=None if path is None else folder / path)
    except Exception as error:
        if not options.get("fails"):
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    trainer.save_checkpoint(folder / f"{options['name']}.ckpt")
    result["metrics"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
    result["seen"] = recorder.seen
    result["sent"] = method.agent.transport.bytes_sent
    result["steps"] = trainer.global_step
    result["has own buffers"] = module.has_own_buffers
    result["calls"] = module.num_training_steps
    result["final"] = torch.cat([p.detach().flatten() for p in module.parameters()])
    if options.get("monitor"):
        (best,) = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        assert best.best_model_score is not None
        result["best"] = float(best.best_model_score)
        result["stopped"] = trainer.should_stop
    return result


def spawn(
    folder: Path, num_processes: int, configs: list[dict[str, Any]]
) -> list[ForkServerProcess]:
    """Start processes as ``torchrun`` would, without its agent: nobody ends the others for them."""
    return [fork(main, folder, own, configs) for own in environments_of(num_processes)]


def codes(processes: list[ForkServerProcess]) -> list[int | None]:
    """Return their exit codes, ``None`` after the timeout; none may be left waiting."""
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for p in processes:
            p.join(max(0.0, deadline - time.monotonic()))
        return [p.exitcode for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.join()


def launch(
    folder: Path, num_processes: int, configs: list[dict[str, Any]]
) -> list[list[dict[str, Any]]]:
    """Run configurations one after another in the same processes.

    Returns:
        For each configuration, what each process returned.
    """
    ranks = range(num_processes)
    failed = any(code != 0 for code in codes(spawn(folder, num_processes, configs)))
    logs = [(folder / f"{rank}.log").read_text(errors="replace")[-4000:] for rank in ranks]
    assert not failed, "\n".join(logs)
    return [
        [torch.load(folder / f"{config['name']}.{rank}.pt", weights_only=False) for rank in ranks]
        for config in configs
    ]


def flat_gradient(vector: Tensor, batch: Tensor) -> Tensor:
    """Return the toy's gradient at a vector of all its parameters: for oracles, in float64."""
    module = Toy({})
    named = dict(module.named_parameters())
    with torch.enable_grad():
        vector = vector.detach().clone().requires_grad_()
        pieces = torch.split(vector, [p.numel() for p in named.values()])
        values = {k: v.view(p.shape) for (k, p), v in zip(named.items(), pieces, strict=True)}
        (gradient,) = torch.autograd.grad(functional_call(module, values, (batch,)), vector)
    return gradient


def start_points(num_agents: int) -> Tensor:
    """Return the toy's parameters at the start, once for each agent."""
    vector = torch.cat([p.detach().flatten() for p in Toy({}).parameters()])
    return vector.repeat(num_agents, 1)


def main(folder: Path, environment: dict[str, str], configs: list[dict[str, Any]]) -> None:
    """Be one process: do the runs, and leave what each returned in the folder."""
    rank = environment["RANK"]
    with (folder / f"{rank}.log").open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    torch.set_num_threads(1)
    measure_first_process_only(int(rank))
    code = 0
    try:
        for options in configs:
            torch.manual_seed(int(rank))
            torch.save(run(folder, options), folder / f"{options['name']}.{rank}.pt")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Without waiting for the others: one of them may be gone.
    os._exit(code)
