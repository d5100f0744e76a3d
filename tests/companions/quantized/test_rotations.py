"""Hadamard matrices, quantizers, and that a rotation without rounding changes no function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_ema_nesterov.companions.quantized import rotate_and_quantize
from lightning_ema_nesterov.companions.quantized.hadamard import Rotation, hadamard_factors
from lightning_ema_nesterov.companions.quantized.layers import RotatedLinear
from lightning_ema_nesterov.companions.quantized.quantizers import make_quantizer

Rotations = Literal["adaptive", "all", "none"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 8, 12, 20, 24, 28, 44, 56, 76, 148, 176, 512])
def test_factors_are_hadamard_matrices_of_the_size(size: int) -> None:
    factors = [factor.double() for factor in hadamard_factors(size)]
    assert math.prod(len(factor) for factor in factors) == size
    for factor in factors:
        assert torch.equal(factor.abs(), torch.ones_like(factor))
        assert torch.equal(factor @ factor.T, len(factor) * torch.eye(len(factor)).double())


@pytest.mark.parametrize("size", [8, 12, 56, 128])
def test_rotation_is_the_product_with_the_matrix_of_signs_and_factors(size: int) -> None:
    signs = torch.where(draw(size, seed=1) > 0, 1, -1)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in hadamard_factors(size):
        matrix = torch.kron(matrix, factor.double())
    matrix = torch.diag(signs.double()) @ matrix / math.sqrt(size)
    x = draw(3, 2 * size)  # two blocks
    expected = torch.cat([x[:, :size] @ matrix, x[:, size:] @ matrix], dim=1)
    torch.testing.assert_close(Rotation(size, signs)(x), expected, rtol=0, atol=1e-13)


def test_rotation_in_bfloat16_rounds_only_its_result() -> None:
    x = draw(4, 64).bfloat16()
    rotation = Rotation(64, torch.ones(64)).bfloat16()
    assert torch.equal(rotation(x), rotation(x.float()).bfloat16())


@pytest.mark.parametrize("size", [3, 6, 172, 344])
def test_a_size_without_a_matrix_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two times .* got {size}"):
        hadamard_factors(size)


def rounded_by_hand(row: list[float], bits: int) -> list[float]:
    low, high = min(*row, 0.0), max(*row, 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    return [(min(max(round(x / scale) + zero, 0), 2**bits - 1) - zero) * scale for x in row]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_quantizer_rounds_to_the_grid_of_its_row(shift: float, bits: int) -> None:
    x = draw(5, 16) + shift
    rounded = make_quantizer(bits)(x)
    expected = torch.tensor([rounded_by_hand(row, bits) for row in x.tolist()])
    # torchao computes in float32; a number in the middle of two steps may go either way.
    torch.testing.assert_close(rounded.float(), expected, rtol=1e-5, atol=1e-5)
    assert rounded.dtype is torch.float64
    assert float((rounded - x).abs().max()) > 1e-3


def test_gradient_passes_the_quantizer_as_if_it_were_the_identity() -> None:
    x = draw(5, 16).requires_grad_()
    slopes = draw(5, 16, seed=1)
    (gradient,) = torch.autograd.grad((make_quantizer(2)(x) * slopes).sum(), x)
    assert torch.equal(gradient, slopes)


def mlp(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    ).double()


def convert(model: nn.Module, batches: Any, *, bits: int | None, **options: Any) -> Any:
    return rotate_and_quantize(
        model, batches, weight_bits=bits, activation_bits=bits, kv_bits=bits, **options
    )


def test_rotated_mlp_without_rounding_is_the_same_function_to_float64_rounding() -> None:
    model, x = mlp(), draw(7, 8, seed=2)
    expected = model(x)
    choices = convert(model, [x], bits=None, rotations="all")
    assert all(choice.is_rotated for choice in choices)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    for layer in model:
        if isinstance(layer, RotatedLinear):
            layer.rotates_input = False  # the rotation is really there: half of it does harm
    assert float((model(x) - expected).abs().max()) > 1e-2


def test_adaptive_choice_is_that_of_errors_computed_by_hand() -> None:
    """One layer with an outlier channel, one that reads sparse positive numbers."""
    model: Any = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("outlier", "sparse")})
    model.double()
    with torch.no_grad():
        for idx, layer in enumerate(model.values()):
            layer.weight.copy_(draw(64, 64, seed=idx))
    inputs = {"outlier": draw(32, 64, seed=2), "sparse": draw(32, 64, seed=3).relu()}
    inputs["outlier"][:, 5] *= 8
    inputs["sparse"][:, 1::2] = 0
    inputs["sparse"][:, ::4] = 1.0
    inputs["sparse"] = inputs["sparse"].round()  # on a grid of few steps

    def run(model: Any, batch: dict[str, Tensor]) -> None:
        for name, layer in model.items():
            layer(batch[name])

    before = {name: layer.weight.detach().clone() for name, layer in model.items()}
    choices = convert(model, [inputs], bits=3, run=run)
    assert [(c.name, c.is_rotated) for c in choices] == [("outlier", True), ("sparse", False)]
    for choice in choices:
        rotation = model[choice.name].rotation
        errors = []
        turns: list[Callable[[Tensor], Tensor]] = [lambda t: t, rotation]
        for turn in turns:
            w, x = turn(before[choice.name]), turn(inputs[choice.name])
            w_error = (make_quantizer(3)(w) - w).square().mean()
            x_error = (make_quantizer(3)(x) - x).square().mean()
            errors.append(float(w_error + x_error))
        assert [choice.error, choice.rotated_error] == pytest.approx(errors, rel=1e-9)


@pytest.mark.parametrize("rotations", ["all", "none"])
def test_all_and_none_are_obeyed(rotations: Rotations) -> None:
    choices = convert(mlp(), [draw(7, 8)], bits=4, rotations=rotations)
    assert {choice.is_rotated for choice in choices} == {rotations == "all"}
    assert {choice.reason for choice in choices} == {f"rotations={rotations!r}"}


def test_skipped_layers_stay_and_named_ones_are_not_rotated() -> None:
    model = mlp()
    choices = convert(model, [draw(7, 8)], bits=4, rotations="all", skip=["4"], unrotated=["2"])
    assert type(model[4]) is nn.Linear
    assert [(c.name, c.is_rotated) for c in choices] == [("0", True), ("2", False)]
    assert choices[1].reason == "in unrotated"


def test_parameters_stay_the_same_objects_with_their_names() -> None:
    model = mlp()
    before = dict(model.named_parameters())
    convert(model, [draw(7, 8)], bits=4)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_modes_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    model[1].eval()
    convert(model, [draw(7, 8)], bits=4)
    assert [m.training for m in model] == [True, False, True]


def unused() -> nn.Module:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.left_out = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.used(x)
            return output

    return Unused().double()


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no such size": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)).double(),
        {},
        ValueError,
        r"1 cannot be rotated \(input\): no Hadamard matrix of the size 6.*Pass unrotated=\['1'\]",
    ),
    "bits": (mlp, {"bits": 1}, ValueError, "weight_bits must be in 2 to 8, or None, got 1"),
    "rotations": (mlp, {"rotations": "some"}, ValueError, "rotations must be 'adaptive'"),
    "no such layer": (
        mlp,
        {"skip": ["head"]},
        ValueError,
        "skip must name layers of the model, got 'head'",
    ),
    "nothing to quantize": (nn.ReLU, {}, ValueError, "must have nn.Linear layers"),
    "a layer alone": (lambda: nn.Linear(8, 2), {}, ValueError, "got a single one: wrap it"),
    "a layer that is not called": (
        unused,
        {},
        RuntimeError,
        "left_out must be called for each calibration batch, but was not",
    ),
    "no batch": (mlp, {"batches": []}, ValueError, "at least one batch, got none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name: str) -> None:
    make, options, error, message = BAD[name]
    options = {"bits": 4, "batches": [draw(7, 8)], **options}
    with pytest.raises(error, match=message):
        convert(make(), options.pop("batches"), **options)


def test_a_refused_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)).double()
    with pytest.raises(ValueError, match="cannot be rotated"):
        convert(model, [draw(7, 8)], bits=4)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    choices = convert(model, [draw(7, 8)], bits=4, rotations="all", unrotated=["1"])
    assert [choice.is_rotated for choice in choices] == [True, False]


def test_a_second_conversion_is_refused() -> None:
    model = mlp()
    convert(model, [draw(7, 8)], bits=4)
    with pytest.raises(ValueError, match="must not have been rotated and quantized before"):
        convert(model, [draw(7, 8)], bits=4)
