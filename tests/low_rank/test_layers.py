"""Low-rank layers: what they compute, how a model gets them and loses them again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_ema_nesterov.low_rank import LowRankLinear, to_dense_, to_low_rank_
from lightning_ema_nesterov.optimizers import groups_by_role
from tests.low_rank.toy import LowRankToy, loss_of
from tests.optimizers.tiny import TinyLM


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_forward_and_gradients_are_those_of_the_dense_weight(sparsity: float) -> None:
    layer = LowRankLinear(5, 7, rank=3, alpha=12.0, sparsity=sparsity).double()
    nn.init.normal_(layer.B)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    weight = (4.0 * layer.B @ layer.A).detach()  # alpha / r
    if layer.sparse_values is not None and layer.sparse_indices is not None:
        dense = torch.zeros(35, dtype=torch.float64)
        dense[layer.sparse_indices] = layer.sparse_values.detach()
        weight = weight + dense.view(7, 5)
    weight.requires_grad_()
    assert layer.bias is not None
    expected = functional.linear(x, weight, layer.bias.detach())
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # another order of sums
    expected.square().sum().backward()  # type: ignore[no-untyped-call]  # of torch
    found.square().sum().backward()
    assert weight.grad is not None
    grads = {
        layer.B: 4.0 * weight.grad @ layer.A.detach().mT,
        layer.A: 4.0 * layer.B.detach().mT @ weight.grad,
    }
    if layer.sparse_values is not None and layer.sparse_indices is not None:
        grads[layer.sparse_values] = weight.grad.flatten()[layer.sparse_indices]
    for p, grad in grads.items():
        torch.testing.assert_close(p.grad, grad, rtol=1e-11, atol=1e-11)
        assert grad.norm() > 0


def test_start_is_the_published_one() -> None:
    torch.manual_seed(0)
    plain = LowRankLinear(4000, 3000, rank=100)
    for factor in (plain.B, plain.A):
        bound = 1 / math.sqrt(factor.shape[1])
        # Kaiming's bound with a = sqrt(5): a uniform distribution on +- the root of 1 / columns.
        assert 0.99 * bound < float(factor.detach().abs().max()) <= bound
        assert float(factor.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    sparse = LowRankLinear(400, 300, rank=10, sparsity=0.01)
    assert not sparse.B.any()
    assert sparse.A.any()
    assert sparse.sparse_values is not None
    assert sparse.sparse_indices is not None
    assert sparse.sparse_values.numel() == 1200
    assert len(set(sparse.sparse_indices.tolist())) == 1200
    assert float(sparse.sparse_values.detach().abs().max()) <= 1 / math.sqrt(400)
    other = LowRankLinear(400, 300, rank=10, sparsity=0.01).sparse_indices
    assert other is not None
    assert not torch.equal(sparse.sparse_indices, other)


def test_parameters_are_counted() -> None:
    layer = LowRankLinear(40, 30, rank=5, sparsity=0.1, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 70 * 5 + 120
    assert sum(p.numel() for p in LowRankLinear(40, 30, rank=5, bias=False).parameters()) == 350


def test_language_model_keeps_embedding_head_and_norms() -> None:
    model = TinyLM()
    bias = model.up.bias
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "w" in name}
    assert to_low_rank_(model, rank=3, sparsity=0.1) == ["up", "down"]
    assert isinstance(model.up, LowRankLinear)
    assert model.up.bias is bias
    assert type(model.lm_head) is nn.Linear
    after = dict(model.named_parameters())
    assert torch.equal(after["wte.weight"], kept["wte.weight"])
    assert torch.equal(after["lm_head.weight"], kept["lm_head.weight"])
    groups = groups_by_role(model)
    names = {g["role"]: names for g, names in zip(groups, groups.names, strict=True)}
    assert names["hidden"] == ["up.B", "up.A", "down.B", "down.A"]
    assert {"up.sparse_values", "down.sparse_values", "up.bias"} <= set(names["other"])


def test_model_without_embedding_and_named_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    assert to_low_rank_(model, rank=2) == ["0", "2"]
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    assert to_low_rank_(model, rank=2, layers=["2"]) == ["2"]
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (
            nn.Sequential(nn.Linear(6, 4)),
            {"rank": 5},
            r"'0': rank must be .* 4 for \(4, 6\), got 5",
        ),
        (nn.Sequential(nn.Linear(6, 4)), {"rank": 0}, "got 0"),
        (nn.Sequential(nn.Linear(6, 4)), {"rank": True}, "got True"),
        (
            nn.Sequential(nn.Linear(6, 4)),
            {"rank": 2, "sparsity": 1.0},
            r"sparsity must be in \[0, ",
        ),
        (nn.Sequential(nn.Linear(6, 4)), {"rank": 2, "alpha": 0.0}, "alpha must be above 0"),
        (nn.Sequential(nn.ReLU()), {"rank": 2}, "must have an nn.Linear besides its head"),
        (nn.Sequential(nn.Linear(6, 4)), {"rank": 2, "layers": ["1"]}, "got '1'"),
        (nn.Sequential(nn.Linear(6, 4)), {"rank": 2, "layers": []}, "got 'none'"),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), {"rank": 2}, "The head must be one"),
    ],
)
def test_bad_input_is_one_error_and_changes_nothing(
    model: nn.Module, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_low_rank_(model, **kwargs)
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())


def test_one_layer_that_is_too_small_leaves_all_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"'1': rank must be"):
        to_low_rank_(model, rank=4)
    assert type(model[0]) is nn.Linear


def test_shared_weights_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"must not share its weight, and 2 of 2 layers"):
        to_low_rank_(model, rank=2)


@pytest.mark.parametrize("sparsity", [0.0, 0.2])
def test_dense_model_computes_the_same(sparsity: float) -> None:
    model = LowRankToy(sparsity=sparsity)
    expected = loss_of(model, 0)
    assert to_dense_(model) == ["first", "second"]
    assert isinstance(model.get_submodule("first"), nn.Linear)
    torch.testing.assert_close(loss_of(model, 0), expected, rtol=1e-12, atol=0)  # order of sums


def test_state_dict_holds_everything() -> None:
    model, other = LowRankToy(sparsity=0.2), LowRankToy(sparsity=0.2, seed=1)
    assert not torch.equal(loss_of(model, 0), loss_of(other, 0))
    other.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(model, 0), loss_of(other, 0))


def test_autocast_and_bfloat16_train() -> None:
    for sparsity in (0.0, 0.2):
        model = LowRankToy(dtype=torch.bfloat16, sparsity=sparsity)
        loss_of(model, 0).backward()  # type: ignore[no-untyped-call]  # of torch
        model = LowRankToy(dtype=torch.float32, sparsity=sparsity)
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(model, 0).backward()  # type: ignore[no-untyped-call]  # of torch
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
