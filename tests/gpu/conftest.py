"""On which device the tests of this folder run: on a GPU, and in the slow lane on the CPU too.

What runs on both shows on the CPU that the test itself is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="There is no GPU that torch can use."))


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=(pytest.mark.slow, pytest.mark.no_cover)),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU and the GPU, one after the other."""
    return torch.device(request.param)


@pytest.fixture
def gpu() -> torch.device:
    """The GPU, for what the CPU does not have."""
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _float32_products() -> Iterator[None]:
    """Products of float32 matrices are not rounded to TF32, which keeps 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
