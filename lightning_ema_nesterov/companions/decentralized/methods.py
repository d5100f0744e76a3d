"""FSPDA-SA, FSPDA-STORM and DoCoM as callbacks of the Lightning Trainer."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.companions.decentralized.agents import DoCoMAgent, SAAgent, StormAgent
from lightning_ema_nesterov.companions.decentralized.callback import DecentralizedCallback
from lightning_ema_nesterov.companions.decentralized.checks import check_range
from lightning_ema_nesterov.companions.decentralized.stability import check_stability
from lightning_ema_nesterov.companions.decentralized.topology import Topology
from lightning_ema_nesterov.companions.decentralized.transport import PeerTransport

__all__ = ["FSPDASA", "FSPDASTORM", "DoCoM"]


class FSPDASA(DecentralizedCallback):
    r"""Train with FSPDA-SA: local gradients, a few coordinates to a neighbour, and a dual.

    .. math::

        x_i &\leftarrow A(x_i; \nabla f_i(x_i; \xi_i)) - \eta \lambda_i - \gamma [L x]_i \\
        \lambda_i &\leftarrow \lambda_i + \beta [L x]_i

    A is the module's optimizer, plain SGD in the paper. L is the Laplacian of the edges that are
    active in the round, on the coordinates drawn for each: neighbours draw the same ones from
    (seed, round), so only values travel. The duals sum to zero over the agents, and become each
    agent's gradient at the common solution: data that differ between agents leave no bias.

    :math:`\eta` follows the learning rate, with which the duals must stay in proportion.

    Args:
        topology: ``"ring"``, ``"complete"``, ``"erdos_renyi"``, or a
            :class:`~.topology.Topology` with an agent for each process.
        edges_per_round: ``"all"`` edges are active in every round, or ``"one"`` that is drawn.
        edge_probability: Of each edge of ``"erdos_renyi"``, in (0, 1].
        coordinate_share: Share of the parameters that an active edge exchanges, in (0, 1].
        consensus_step_size: :math:`\gamma`, above 0; 0.5 moves two neighbours to their mean.
        dual_step_size: :math:`\eta`, at least 0, at the highest learning rate. Refused from
            :func:`~.stability.dual_product_bound` on, where agents drift apart. 0 is decentralized
            SGD, which agents with different data bias.
        dual_growth: :math:`\beta`, above 0.
        seed: Of the graph, of edges and coordinates; the same on all processes.

    Raises:
        ValueError: If a number is out of its range.
        MisconfigurationException: When fit starts: for one process, for another strategy than
            ``DDPStrategy``, a graph that is not connected, a dual step size above the bound, not
            exactly one optimizer, and processes with different numbers of batches.

    Example:
        >>> callback = FSPDASA("ring", dual_step_size=1e-3)
        >>> callback.coordinate_share
        0.1

    References:
        Yau, Wai, *Fully Stochastic Primal-dual Gradient Algorithm for Non-convex Optimization on
        Random Graphs*, 2024. https://arxiv.org/abs/2410.18774
    """

    def __init__(
        self,
        topology: str | Topology = "ring",
        *,
        edges_per_round: str = "all",
        edge_probability: float = 0.5,
        coordinate_share: float = 0.1,
        consensus_step_size: float = 0.5,
        dual_step_size: float = 1e-3,
        dual_growth: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_range("coordinate_share", coordinate_share, high=1.0)
        check_range("consensus_step_size", consensus_step_size)
        if not dual_step_size >= 0.0:
            raise ValueError(f"dual_step_size must be at least 0, got {dual_step_size}.")
        check_range("dual_growth", dual_growth)
        super().__init__(
            topology,
            edges_per_round=edges_per_round,
            edge_probability=edge_probability,
            share=coordinate_share,
            seed=seed,
        )
        self.coordinate_share = coordinate_share
        self.consensus_step_size = consensus_step_size
        self.dual_step_size = dual_step_size
        self.dual_growth = dual_growth

    @override
    def check(self, topology: Topology) -> None:
        check_stability(
            topology,
            consensus_step_size=self.consensus_step_size,
            dual_step_size=self.dual_step_size,
            dual_growth=self.dual_growth,
            share=self.share,
        )

    @override
    def make_agent(self, point: Tensor, topology: Topology) -> SAAgent:
        return SAAgent(
            point,
            topology,
            PeerTransport(),
            self.share,
            self.seed,
            consensus_step_size=self.consensus_step_size,
            dual_step_size=self.dual_step_size,
            dual_growth=self.dual_growth,
        )


class FSPDASTORM(FSPDASA):
    r"""Train with FSPDA-STORM: FSPDA-SA with recursive variance reduction of both updates.

    Each step takes a second gradient, on the same batch at the point of the step before, and
    sends twice the values; see :func:`~.fspda.storm_displacement_` for the rule. The second
    gradient calls ``training_step`` again with the same random numbers, and drops what it logs. A
    module with the method ``batch_loss(batch, batch_idx)`` has that called instead, which manual
    optimization requires.

    The module's optimizer must be ``torch.optim.SGD`` without momentum and weight decay: its
    learning rate is :math:`\alpha`.

    Args:
        topology: As of :class:`FSPDASA`, like the next six.
        edges_per_round: See there.
        edge_probability: See there.
        coordinate_share: See there.
        consensus_step_size: See there.
        dual_step_size: See there.
        dual_growth: See there.
        primal_weight: Weight :math:`a_x` of the new sample, in (0, 1]; with both weights 1 this is
            FSPDA-SA.
        dual_weight: Weight :math:`a_\lambda` of the new graph, in (0, 1].
        seed: See there.

    Raises:
        ValueError: If a number is out of its range.
        MisconfigurationException: When fit starts: where :class:`FSPDASA` raises, for another
            optimizer, with gradient clipping, and in manual optimization without ``batch_loss``.

    Example:
        >>> FSPDASTORM("complete", primal_weight=0.0)
        Traceback (most recent call last):
        ...
        ValueError: primal_weight must be in (0, 1], got 0.0.

    References:
        As of :class:`FSPDASA`.
    """

    needs_second_gradient = True
    needs_plain_sgd = True

    def __init__(
        self,
        topology: str | Topology = "ring",
        *,
        edges_per_round: str = "all",
        edge_probability: float = 0.5,
        coordinate_share: float = 0.1,
        consensus_step_size: float = 0.5,
        dual_step_size: float = 1e-3,
        dual_growth: float = 1.0,
        primal_weight: float = 0.01,
        dual_weight: float = 0.01,
        seed: int = 0,
    ) -> None:
        check_range("primal_weight", primal_weight, high=1.0)
        check_range("dual_weight", dual_weight, high=1.0)
        super().__init__(
            topology,
            edges_per_round=edges_per_round,
            edge_probability=edge_probability,
            coordinate_share=coordinate_share,
            consensus_step_size=consensus_step_size,
            dual_step_size=dual_step_size,
            dual_growth=dual_growth,
            seed=seed,
        )
        self.primal_weight = primal_weight
        self.dual_weight = dual_weight

    @override
    def make_agent(self, point: Tensor, topology: Topology) -> StormAgent:  # type: ignore[override]
        return StormAgent(
            point,
            topology,
            PeerTransport(),
            self.share,
            self.seed,
            consensus_step_size=self.consensus_step_size,
            dual_step_size=self.dual_step_size,
            dual_growth=self.dual_growth,
            primal_weight=self.primal_weight,
            dual_weight=self.dual_weight,
        )


class DoCoM(DecentralizedCallback):
    r"""Train with DoCoM: momentum-based gradient tracking, and top-k messages for both vectors.

    See :class:`~.agents.DoCoMAgent` for the rule. The optimizer steps along the tracked gradient
    in place of its own; plain SGD is the paper's. The second gradient on each batch is taken as
    :class:`FSPDASTORM` takes it, in automatic and in manual optimization. Seven vectors are kept
    besides the weights, and two messages go to each neighbour in every step: values with their
    indices.

    Args:
        topology: As of :class:`FSPDASA`; all edges are active in every round, with Metropolis
            weights.
        edge_probability: Of each edge of ``"erdos_renyi"``, in (0, 1].
        coordinate_share: Share of the entries in a message, in (0, 1].
        consensus_step_size: :math:`\gamma`, in (0, 1]. Smaller shares need a smaller one.
        momentum_weight: Weight :math:`\beta` of the new sample, in (0, 1]. It should fall with the
            learning rate.
        seed: Of the graph.

    Raises:
        ValueError: If a number is out of its range.
        MisconfigurationException: When fit starts: for one process, for another strategy than
            ``DDPStrategy``, a graph that is not connected, gradient clipping, not exactly one
            optimizer, processes with different numbers of batches, and in manual optimization
            without ``batch_loss``.

    Example:
        >>> DoCoM("ring", momentum_weight=0.01).needs_second_gradient
        True

    References:
        Yau, Wai, *DoCoM: Compressed Decentralized Optimization with Near-Optimal Sample
        Complexity*, TMLR 2023. https://arxiv.org/abs/2202.00255
    """

    needs_second_gradient = True

    def __init__(
        self,
        topology: str | Topology = "ring",
        *,
        edge_probability: float = 0.5,
        coordinate_share: float = 0.05,
        consensus_step_size: float = 0.2,
        momentum_weight: float = 0.01,
        seed: int = 0,
    ) -> None:
        check_range("coordinate_share", coordinate_share, high=1.0)
        check_range("consensus_step_size", consensus_step_size, high=1.0)
        check_range("momentum_weight", momentum_weight, high=1.0)
        super().__init__(
            topology,
            edges_per_round="all",
            edge_probability=edge_probability,
            share=coordinate_share,
            seed=seed,
        )
        self.coordinate_share = coordinate_share
        self.consensus_step_size = consensus_step_size
        self.momentum_weight = momentum_weight

    @override
    def check(self, topology: Topology) -> None:
        if topology.one_edge_per_round:
            raise ValueError(
                "topology must have all edges active in every round, got one with "
                "one_edge_per_round: the sums that agents keep of their neighbours would be wrong."
            )

    @override
    def make_agent(self, point: Tensor, topology: Topology) -> DoCoMAgent:
        return DoCoMAgent(
            point,
            topology,
            PeerTransport(),
            self.share,
            self.seed,
            consensus_step_size=self.consensus_step_size,
            momentum_weight=self.momentum_weight,
        )
