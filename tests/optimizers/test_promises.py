"""What holds for every optimizer: state, resuming, dtypes, closures, gradients that are missing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ema_nesterov import EMANesterov, attach_ema_nesterov
from lightning_ema_nesterov.optimizers import groups_by_role
from tests.optimizers.tiny import OPTIMIZERS, TinyLM, loss_of, started, train
from tests.toys import equal, largest_difference, snapshot, through_a_file

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
WITH_RANK = [name for name in OPTIMIZERS if name not in ("scale", "clipped_sgd")]


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    return [
        t
        for group in optimizer.param_groups
        for p in group["params"]
        for t in optimizer.state[p].values()
    ]


@every_optimizer
def test_it_learns(name: str) -> None:
    model, optimizer = started(name)
    before = float(loss_of(model, 0).detach())
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(loss_of(model, 0).detach()) < before - 0.05


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_at_every_step(name: str, dtype: torch.dtype) -> None:
    whole, optimizer = started(name, dtype=dtype)
    expected = train(whole, optimizer, 8)
    # Projections are refreshed before the steps 0, 3 and 6.
    for num_before in range(1, 8):
        first, before = started(name, dtype=dtype)
        train(first, before, num_before)
        second, after = started(name, dtype=dtype, seed=1)
        second.load_state_dict(first.state_dict())
        after.load_state_dict(through_a_file(before.state_dict()))
        kinds = [(t.dtype, t.shape) for t in state_tensors(before)]
        assert kinds == [(t.dtype, t.shape) for t in state_tensors(after)]
        assert equal(train(second, after, 8 - num_before, start=num_before), expected)
        if num_before == 4:
            fresh, new = started(name, dtype=dtype, seed=1)
            fresh.load_state_dict(first.state_dict())
            assert not equal(train(fresh, new, 4, start=4), expected)  # the state matters


@every_optimizer
def test_resume_through_distributed_checkpoints_state(name: str) -> None:
    whole, optimizer = started(name)
    expected = train(whole, optimizer, 6)
    first, before = started(name)
    train(first, before, 4)
    second, after = started(name, seed=1)
    second.load_state_dict(first.state_dict())
    set_optimizer_state_dict(second, after, get_optimizer_state_dict(first, before))
    assert equal(train(second, after, 2, start=4), expected)


@every_optimizer
def test_state_holds_tensors_only(name: str) -> None:
    model, optimizer = started(name)
    train(model, optimizer, 4)
    assert all(isinstance(t, Tensor) for t in state_tensors(optimizer))
    # No tensor is a view that keeps a larger one alive, and would be saved with it.
    for t in state_tensors(optimizer):
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


@every_optimizer
def test_bfloat16_parameters_train(name: str) -> None:
    model, optimizer = started(name, dtype=torch.bfloat16)
    before = snapshot(model)
    after = train(model, optimizer, 5)
    assert not equal(before, after)
    assert all(p.isfinite().all() for p in after)
    exact, reference = started(name)
    expected = [p.bfloat16() for p in train(exact, reference, 5)]
    # Weights near 1 are rounded by 2^-8; five updates of at most about 0.05 in all.
    assert largest_difference(after, expected) < 0.1


@every_optimizer
def test_closure_runs_with_gradients_and_its_loss_is_returned(name: str) -> None:
    model, optimizer = started(name)
    other, plain = started(name)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    assert float(optimizer.step(closure)) == float(loss_of(other, 0).detach())
    assert equal(snapshot(model), train(other, plain, 1))


@every_optimizer
def test_group_may_be_added_later(name: str) -> None:
    model = TinyLM()
    groups = groups_by_role(model)
    later = groups.pop(0)
    optimizer = OPTIMIZERS[name](groups)
    train(model, optimizer, 4)
    before = model.up.weight.detach().clone()
    optimizer.add_param_group(later)
    after = train(model, optimizer, 4, start=4)
    assert not torch.equal(before, model.up.weight)
    assert all(p.isfinite().all() for p in after)
    through_a_file(optimizer.state_dict())


@every_optimizer
def test_bad_group_is_not_added(name: str) -> None:
    model, optimizer = started(name)
    num_groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"Parameter group 4 \(role None\) must have a role"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
    assert len(optimizer.param_groups) == num_groups
    train(model, optimizer, 1)


@every_optimizer
def test_parameter_without_gradient_rests_and_goes_on(name: str) -> None:
    model, optimizer = started(name)
    frozen = [model.up.weight, model.norm.weight, model.wte.weight, model.lm_head.weight]
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in frozen]
    for step_idx in range(20):
        optimizer.zero_grad()
        loss_of(model, step_idx).backward()  # type: ignore[no-untyped-call]
        for p in frozen:
            p.grad = None
        optimizer.step()
    assert equal(before, frozen)
    assert all(p.isfinite().all() for p in train(model, optimizer, 4))
    assert not any(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_give_no_nan_and_no_standstill(name: str, dtype: torch.dtype) -> None:
    model, optimizer = started(name, dtype=dtype)
    for _ in range(7):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    before = snapshot(model)
    assert all(p.isfinite().all() for p in before)
    after = train(model, optimizer, 4)
    assert all(p.isfinite().all() for p in after)
    moved = [float((a - b).float().norm()) for a, b in zip(after, before, strict=True)]
    other, fresh = started(name, dtype=dtype)
    other.load_state_dict(dict(zip(other.state_dict(), before, strict=True)))
    expected = train(other, fresh, 4)
    usual = [float((a - b).float().norm()) for a, b in zip(expected, before, strict=True)]
    # The moments' correction for the start is over after zeros, so that first steps are smaller.
    assert all(m > 0.02 * u for m, u in zip(moved, usual, strict=True))


@every_optimizer
def test_no_gradient_at_all_does_nothing(name: str) -> None:
    model, optimizer = started(name)
    before = snapshot(model)
    optimizer.step()
    assert equal(before, snapshot(model))


@pytest.mark.parametrize("name", ["scale", "clipped_sgd"])
@pytest.mark.parametrize("shape", [(0, 8), (13, 0)])
def test_empty_shards_are_left_alone(name: str, shape: tuple[int, int]) -> None:
    model = TinyLM()
    groups = groups_by_role(model)
    empty = [nn.Parameter(torch.zeros(shape)) for _ in groups]
    for group, p in zip(groups, empty, strict=True):
        group["params"] = [*group["params"], p]
    optimizer = OPTIMIZERS[name](groups)
    for p in empty:
        p.grad = torch.zeros_like(p)
    for step_idx in range(3):
        loss_of(model, step_idx).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@every_optimizer
def test_flat_shards_are_refused_before_the_first_step(name: str) -> None:
    model = TinyLM()
    groups = groups_by_role(model)
    groups[0]["params"] = [nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(0))]
    match = r"Parameter group 0 \(role 'hidden'\) must hold matrices, and 2 of 2 .*FSDP1.*ddp"
    with pytest.raises(ValueError, match=match):
        OPTIMIZERS[name](groups)


@every_optimizer
def test_flat_shards_are_refused_where_they_come_after_the_optimizer(name: str) -> None:
    model, optimizer = started(name)
    # As FSDP1 does to the parameters of an optimizer that exists.
    model.wte.weight.data = model.wte.weight.data.flatten()[:20]
    with pytest.raises(ValueError, match=r"role 'embedding'\) must hold matrices"):
        optimizer.step()


@every_optimizer
@pytest.mark.parametrize("role", [None, "body"])
def test_group_without_role_is_an_error(name: str, role: str | None) -> None:
    group = {"params": TinyLM().parameters(), **({} if role is None else {"role": role})}
    with pytest.raises(ValueError, match=r"group 0 \(role .*must have a role.*groups_by_role"):
        OPTIMIZERS[name]([group])
    with pytest.raises(ValueError, match="must have a role"):
        OPTIMIZERS[name](TinyLM().parameters())


@pytest.mark.parametrize("name", WITH_RANK)
def test_rank_above_the_smaller_side_is_an_error(name: str) -> None:
    groups = groups_by_role(TinyLM())
    groups[0]["rank"] = 9
    match = r"rank of Parameter group 0 \(role 'hidden'\) must be at most .* 9, and 2 of 2"
    with pytest.raises(ValueError, match=match):
        OPTIMIZERS[name](groups)
    groups[0]["rank"] = 8
    model = TinyLM()
    groups = groups_by_role(model)
    groups[0]["rank"] = 8
    assert all(p.isfinite().all() for p in train(model, OPTIMIZERS[name](groups), 4))


@pytest.mark.parametrize("name", WITH_RANK)
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_rank_must_be_a_whole_number(name: str, value: Any) -> None:
    groups = groups_by_role(TinyLM())
    groups[0]["rank"] = value
    with pytest.raises(ValueError, match=r"rank of parameter group 0 .* must be a whole number"):
        OPTIMIZERS[name](groups)


@every_optimizer
def test_sparse_gradients_are_an_error(name: str) -> None:
    model = TinyLM()
    model.wte.sparse = True
    optimizer = OPTIMIZERS[name](groups_by_role(model))
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"must be dense, got a sparse one.*sparse=False"):
        optimizer.step()


@every_optimizer
def test_one_rate_in_all_groups_moves_all(name: str) -> None:
    model, optimizer = started(name)
    rate = optimizer.defaults["lr"]
    assert {group["lr"] for group in optimizer.param_groups} == {rate}
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    before = snapshot(model)
    assert equal(before, train(model, optimizer, 2))


@every_optimizer
def test_rate_may_be_a_tensor(name: str) -> None:
    model, optimizer = started(name)
    other, twin = started(name)
    for group in twin.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    expected = train(model, optimizer, 3)
    assert largest_difference(train(other, twin, 3), expected) < 1e-6
    assert all(torch.is_tensor(group["lr"]) for group in twin.param_groups)


@every_optimizer
def test_copied_optimizer_goes_on_bitwise(name: str) -> None:
    model, optimizer = started(name)
    train(model, optimizer, 2)
    other, twin = copy.deepcopy((model, optimizer))
    assert equal(train(other, twin, 3, start=2), train(model, optimizer, 3, start=2))


@pytest.mark.slow
@pytest.mark.no_cover
@every_optimizer
def test_compiled_step_agrees(name: str) -> None:
    model, optimizer = started(name)
    other, compiled = started(name)
    step = torch.compile(compiled.step, backend="eager")
    for step_idx in range(4):
        train(model, optimizer, 1, start=step_idx)
        compiled.zero_grad()
        loss_of(other, step_idx).backward()  # type: ignore[no-untyped-call]
        step()
    # Tracing may compute a factor in another order.
    assert largest_difference(snapshot(model), snapshot(other)) < 1e-6


@every_optimizer
def test_ema_nesterov_attaches(name: str) -> None:
    model, optimizer = started(name)
    other, plain = started(name)
    handle = attach_ema_nesterov(optimizer, model, ema_decay=0.9, warmup=2, rest=0)
    for num_steps, is_equal in ((2, True), (4, False)):
        train(model, optimizer, num_steps)
        train(other, plain, num_steps)
        with handle.at_iterate():
            assert equal(snapshot(model), snapshot(other)) == is_equal
    assert all("ema_nesterov_direction" in optimizer.state[p] for p in model.parameters())
    handle.detach()
    saved = through_a_file(optimizer.state_dict())
    assert saved["state"]


class LitTiny(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name_of_optimizer = name
        self.model = TinyLM()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.model, self.global_step)  # a resumed loader starts over

    @override
    def configure_optimizers(self) -> Optimizer:
        return OPTIMIZERS[self.name_of_optimizer](groups_by_role(self))


def fit(module: LitTiny, num_steps: int, path: Any = None, **kwargs: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[EMANesterov(ema_decay=0.9, warmup=0, rest=0)],
        max_steps=num_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = DataLoader(torch.arange(8).tolist(), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module, data, ckpt_path=path, **kwargs)
    return trainer


@every_optimizer
def test_trainer_runs_and_resumes_bitwise_with_the_callback(name: str, tmp_path: Any) -> None:
    whole = LitTiny(name)
    fit(whole, 8)
    first = LitTiny(name)
    fit(first, 5).save_checkpoint(tmp_path / "five.ckpt")
    second = LitTiny(name)
    fit(second, 8, tmp_path / "five.ckpt", weights_only=True)
    assert equal(snapshot(second), snapshot(whole))
    assert not equal(snapshot(first), snapshot(whole))
