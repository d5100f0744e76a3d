"""Parameters that FSDP or tensor parallelism spread over processes.

The arithmetic of EMA-Nesterov is elementwise, so each process moves its own shard and none has to
talk. Two things are not local. After a forward pass FSDP may keep the gathered parameters and
reuse them in the next one: it has to be told that the shards behind them changed. And a norm of the
whole model is a sum over processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["Sharding", "local"]


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that this process holds, sharing their memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


class Sharding:
    """The sharded modules of one model, and who shares the parameters of one optimizer.

    Args:
        root: The outermost module, wrapped by FSDP or not. ``None``: nothing is sharded by FSDP.
        base_optimizer: The optimizer of its parameters.
    """

    def __init__(self, root: nn.Module | None, base_optimizer: Optimizer) -> None:
        modules = [] if root is None else list(root.modules())
        fsdp1 = [m for m in modules if isinstance(m, FullyShardedDataParallel)]
        handles = [(m, m._handle) for m in fsdp1]
        self._fsdp1 = [(m, h) for m, h in handles if h is not None and h.uses_sharded_strategy]
        self._fsdp2 = [m for m in modules if isinstance(m, FSDPModule)]
        self._uses_orig_params = any(h is not None and h._use_orig_params for _, h in handles)
        self._base_optimizer = base_optimizer

    def check_can_save(self) -> None:
        """Raise where FSDP (1) saves no state that is wider than its parameter.

        Raises:
            ValueError: For parameters narrower than float32 with ``use_orig_params=True``.
        """
        groups = self._base_optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        narrow = [p.dtype for p in params if torch.promote_types(p.dtype, torch.float32) != p.dtype]
        if self._uses_orig_params and narrow:
            raise ValueError(
                f"The method keeps float32 tensors, and {len(narrow)} of {len(params)} "
                f"parameters are {narrow[0]}: FSDP with use_orig_params=True saves states of one "
                "dtype only. For checkpoints, use precision='bf16-mixed' or use_orig_params=False."
            )

    @torch.no_grad()
    def drop_copies(self) -> None:
        """Drop copies of parameters that others keep, before the parameters are changed.

        Without it the next forward pass runs at the point from before the change: in a group of
        FSDP that stayed gathered (the root after a validation; every group with
        ``reshard_after_forward=False`` or SHARD_GRAD_OP), or in a region of ``torch.autocast``,
        which casts each parameter once. To gather and to cast is left to that forward pass.
        """
        torch.clear_autocast_cache()
        for fsdp2 in self._fsdp2:
            fsdp2.reshard()
        for fsdp1, handle in self._fsdp1:
            # Before the first forward pass there is no shard, and the parameter is what it holds.
            if hasattr(handle.flat_param, "_local_shard"):
                _reshard(fsdp1, handle, True)

    def sum_over_shards(self, params: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Add rows that belong to parameters, over parameters and the processes that share them.

        One small collective for each set of processes. All of them must call it.

        Args:
            params: Parameters of the base optimizer.
            rows: One row for each of them, of shape ``(len(params), num_columns)``.

        Returns:
            Their sum over the whole model, of shape ``(num_columns,)``.
        """
        owners = self._groups_of_fsdp1()
        own = {p: row.to(p.device) for p, row in zip(params, rows, strict=True)}
        totals: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
        # A process may hold an empty shard of a parameter and so no row of it: every process goes
        # through all parameters, so that all reduce the same sets in the same order.
        for group in self._base_optimizer.param_groups:
            for p in group["params"]:
                key = owners.get(p, _groups_of_dtensor(p))
                row = own.get(p, torch.zeros(rows.shape[1], device=p.device))
                totals[key] = totals[key] + row.to(totals[key].device) if key in totals else row
        for key, total in totals.items():
            for process_group in key:
                dist.all_reduce(total, group=process_group)
        return torch.stack([total.cpu() for total in totals.values()]).sum(dim=0)

    def _groups_of_fsdp1(self) -> dict[Tensor, tuple[dist.ProcessGroup, ...]]:
        owners: dict[Tensor, tuple[dist.ProcessGroup, ...]] = {}
        for _, handle in self._fsdp1:
            for p in (handle.flat_param, *(handle.flat_param._params or ())):
                owners[p] = (handle.process_group,)
        return owners


def _groups_of_dtensor(p: Tensor) -> tuple[dist.ProcessGroup, ...]:
    if not isinstance(p, DTensor):
        return ()
    mesh, placements = p.device_mesh, p.placements
    return tuple(
        mesh.get_group(dim) for dim, place in enumerate(placements) if not place.is_replicate()
    )
