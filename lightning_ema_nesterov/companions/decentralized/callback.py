"""What the callbacks of decentralized methods share: DDP without its all-reduce, and the rest."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.companions.decentralized.agent import Agent
from lightning_ema_nesterov.companions.decentralized.checks import (
    check_plain_sgd,
    check_range,
    check_strategy,
    only_optimizer,
    wrapped_model,
)
from lightning_ema_nesterov.companions.decentralized.parameters import FlatParameters
from lightning_ema_nesterov.companions.decentralized.replicas import (
    CHECKPOINT_KEY,
    Replica,
    gather_ranks,
    payload_of_rank,
)
from lightning_ema_nesterov.companions.decentralized.run import Run
from lightning_ema_nesterov.companions.decentralized.second_gradient import SecondGradient
from lightning_ema_nesterov.companions.decentralized.topology import Topology, make_topology

__all__ = ["DecentralizedCallback"]


class DecentralizedCallback(Callback):
    """Train one model per process that agrees with its neighbours' by messages; no all-reduce.

    A subclass says which method. Each process has weights of its own. Validation, the checkpoint's
    ``state_dict`` and the model after fit are the average over processes; every process's weights,
    buffers, optimizer state and vectors of the method are in the checkpoint too, and fit resumes
    from them bitwise on the same number of processes.

    Args:
        topology: ``"ring"``, ``"complete"``, ``"erdos_renyi"``, or a graph.
        edges_per_round: Whether ``"all"`` edges are active in a round, or ``"one"`` drawn for it.
        edge_probability: Of each edge of ``"erdos_renyi"``, in (0, 1].
        share: Share of the coordinates in a message, in (0, 1].
        seed: Of the graph, of edges and coordinates; the same on all processes.
    """

    needs_second_gradient = False
    needs_plain_sgd = False

    def __init__(
        self,
        topology: str | Topology,
        *,
        edges_per_round: str,
        edge_probability: float,
        share: float,
        seed: int,
    ) -> None:
        super().__init__()
        check_range("coordinate_share", share, high=1.0)
        self.topology = topology
        self.edges_per_round = edges_per_round
        self.edge_probability = edge_probability
        self.share = share
        self.seed = seed
        self._run: Run | None = None
        self._loaded: dict[str, Any] | None = None

    @abstractmethod
    def check(self, topology: Topology) -> None:
        """Raise ``ValueError`` where the method does not work on a graph."""

    @abstractmethod
    def make_agent(self, point: Tensor, topology: Topology) -> Agent:
        """Return this process's agent."""

    @property
    def agent(self) -> Agent:
        """This process's agent, from the start of fit on.

        Raises:
            RuntimeError: Before fit.
        """
        return self._current.agent

    @property
    def _current(self) -> Run:
        if self._run is None:
            raise RuntimeError(f"{type(self).__name__} has no agent before fit has started.")
        return self._run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is built."""
        if stage != "fit":
            return
        self._close()
        self._run = self._loaded = None
        name = type(self).__name__
        check_strategy(trainer, name)
        try:
            self.check(self._make_topology(trainer.world_size))
        except ValueError as error:
            raise MisconfigurationException(f"{name}: {error}") from error
        if self.needs_second_gradient:
            SecondGradient.check(pl_module, name)
            if trainer.gradient_clip_val is not None:
                raise MisconfigurationException(
                    f"{name} needs gradients that are not clipped, whose differences it averages, "
                    f"got gradient_clip_val={trainer.gradient_clip_val}."
                )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the all-reduce off, make the agent, and take the checkpoint's part of it."""
        name = type(self).__name__
        optimizer = only_optimizer(trainer, name)
        if self.needs_plain_sgd:
            check_plain_sgd(optimizer, name)
        parameters = FlatParameters(optimizer)
        self._run = run = Run(
            optimizer,
            parameters,
            Replica(parameters, pl_module),
            self.make_agent(parameters.read(), self._make_topology(trainer.world_size)),
            SecondGradient(trainer, pl_module, parameters) if self.needs_second_gradient else None,
        )
        # Lightning ignores DDPStrategy(ddp_comm_hook=...) on a CPU.
        wrapped_model(trainer).register_comm_hook(None, noop_hook)
        # Otherwise rank 0's buffers overwrite the others' in every forward pass.
        wrapped_model(trainer).broadcast_buffers = False
        self._average_saved_weights(trainer, pl_module)
        if self._loaded is not None:
            run.load(self._loaded)
            self._loaded = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all processes take the same steps, and go first after the optimizer's step."""
        counts: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(counts, trainer.num_training_batches)
        if len(set(counts)) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} needs as many training batches on each process, got "
                f"{counts}: the others would wait. Use limit_train_batches={min(counts)}."
            )
        self._current.hook()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch for the second gradient."""
        if (second := self._current.second) is not None:
            second.start_batch(batch, batch_idx)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the second gradient, while the batch is at hand."""
        is_automatic = pl_module.automatic_optimization
        self._current.add_second_gradient(
            1.0 / (trainer.accumulate_grad_batches if is_automatic else 1)
        )

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Exchange with the neighbours at the point where the gradient was taken."""
        self._current.begin_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the bytes that all agents together sent in the step."""
        run = self._current
        if run.bytes_sent is not None:
            pl_module.log("decentralized/bytes_sent", float(run.bytes_sent), on_step=True)
            run.bytes_sent = None

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the average; other callbacks have put their weights in order by now."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._current.replica.move_to_average()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the process's own weights."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._current.replica.move_back()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average as the final model."""
        self._current.replica.move_to_average()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Go back to the process's own weights; the others may be gone."""
        if self._run is not None:
            self._run.cancel()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything off again."""
        self._close()

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Collect every process's part; the file is rank 0's."""
        if self._run is None:
            return
        states = {"optimizer_states": checkpoint["optimizer_states"]}
        ranks = gather_ranks({**self._run.save(), **states})
        checkpoint[CHECKPOINT_KEY] = {"method": type(self).__name__, "ranks": ranks}

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take this process's part; Lightning loads its optimizer state from the dictionary."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._loaded = payload_of_rank(checkpoint, type(self).__name__)
        if self._loaded is not None:
            checkpoint["optimizer_states"] = self._loaded["optimizer_states"]

    def _close(self) -> None:
        if self._run is not None:
            self._run.detach.close()

    def _make_topology(self, num_agents: int) -> Topology:
        if isinstance(self.topology, Topology):
            if self.topology.num_agents != num_agents:
                raise ValueError(
                    f"topology must have an agent for each of the {num_agents} processes, got "
                    f"{self.topology.num_agents}."
                )
            return self.topology
        return make_topology(
            self.topology,
            num_agents,
            edges_per_round=self.edges_per_round,
            edge_probability=self.edge_probability,
            seed=self.seed,
        )

    def _average_saved_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the first thing that a save asks for, the state_dict, be the average."""
        run, strategy = self._current, trainer.strategy

        def averaged_state_dict() -> dict[str, Any]:
            with run.replica.at_average():
                state = pl_module.state_dict()
                return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}

        strategy.__dict__["lightning_module_state_dict"] = averaged_state_dict
        run.detach.callback(strategy.__dict__.pop, "lightning_module_state_dict", None)
