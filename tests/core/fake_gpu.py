"""A GPU that is not there: tensors without numbers, and every wait for their numbers an error.

``FakeTensorMode`` runs each operation on shapes, dtypes and devices alone. What the host would have
to wait for has no value there. Two things it lets pass are added: a copy between the host and the
GPU, which waits too, and lists of tensors of different devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

__all__ = ["MixedDevicesError", "SynchronisationError", "fake_gpu"]

_WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_foreach_copy_")
# Kernels that work in place and have no form for tensors without numbers.
_IN_PLACE = ("aten::_fused_sgd_",)


class SynchronisationError(AssertionError):
    """The host would wait for the GPU."""


class MixedDevicesError(AssertionError):
    """An operation got a tensor of the host and one of the GPU."""


@contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """Make tensors of the device that is given in place of real ones.

    Raises:
        SynchronisationError: Inside, where the host would wait for the GPU.
        MixedDevicesError: Inside, where tensors of both are mixed.
    """
    # On the GPU the noise has a generator there, which takes a GPU to make.
    on_host = mock.patch.object(torch, "Generator", return_value=torch.Generator())
    watch = _Watch()  # type: ignore[no-untyped-call]  # torch has no types here
    with FakeTensorMode(), on_host, _WithoutGuards(), watch:
        yield torch.device("cuda", 0)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Looks at each operation before it runs."""

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_cuda for t in given) and any(tag in func.tags for tag in _WAITS):
            raise SynchronisationError(f"{name} waits for numbers of the GPU.")
        if name in _IN_PLACE:
            _check_devices(name, given)
            return None
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name in _COPIES:
            if len({t.is_cuda for t in (*given, *made)}) > 1 and not kwargs.get("non_blocking"):
                raise SynchronisationError(f"{name} waits for a copy between the host and the GPU.")
        else:
            _check_devices(name, given)
        return out


def _check_devices(name: str, tensors: list[Tensor]) -> None:
    # A kernel takes a number of the host as an argument.
    devices = {t.device for t in tensors if t.dim() or t.is_cuda}
    if len(devices) > 1:
        raise MixedDevicesError(f"{name} got tensors of {sorted(map(str, devices))}.")


class _WithoutGuards(TorchFunctionMode):
    """Calls operations in the way that a build of torch without CUDA lets through."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _item(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
        return _DIRECT.get(func, func)(*args, **(kwargs or {}))


def _item(tensor: Tensor, index: tuple[Any, ...]) -> Tensor:
    dim = 0
    for part in index:
        if part is Ellipsis:
            dim += tensor.dim() - len(index) + 1
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
        elif isinstance(part, slice) and part.step is None:
            start, stop, _ = part.indices(tensor.shape[dim])
            tensor = tensor.narrow(dim, start, stop - start)
            dim += 1
        else:
            raise NotImplementedError(f"An index of ints and slices is known here, got {index}.")
    return tensor


_DIRECT: dict[Any, Any] = {
    Tensor.__float__: Tensor.item,
    Tensor.__int__: Tensor.item,
    Tensor.copy_: torch.ops.aten.copy_.default,
    Tensor.nonzero: torch.ops.aten.nonzero.default,
}
