"""LitGPT models: what is folded, merged, kept in the forward pass, and refused."""

from __future__ import annotations

import copy
from typing import Any

import litgpt.model
import pytest
import torch
from litgpt import GPT, Config
from torch import Tensor, nn

from lightning_ema_nesterov.companions.quantized import rotate_and_quantize
from lightning_ema_nesterov.companions.quantized.quantizers import FakeQuantizer

pytestmark = pytest.mark.slow


TOKENS = torch.randint(17, (2, 12), generator=torch.Generator().manual_seed(0))


def make_gpt(**options: Any) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(
        Config(
            **{
                "name": "tiny-llama",
                "block_size": 16,
                "vocab_size": 17,
                "padded_vocab_size": 17,
                "n_layer": 2,
                "n_head": 4,
                "n_query_groups": 2,
                "n_embd": 32,
                "rotary_percentage": 1.0,
                "parallel_residual": False,
                "bias": True,
                "norm_class_name": "RMSNorm",
                "mlp_class_name": "LLaMAMLP",
                "intermediate_size": 48,
                **options,
            }
        )
    ).double()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # gains that are not 1
    return gpt


@pytest.fixture
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """LitGPT computes its norms in float32; the reference needs them in float64."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = 1 + self.weight if self.add_unit_offset else self.weight
        normed: Tensor = x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt() * weight
        return normed

    monkeypatch.setattr(litgpt.model.RMSNorm, "forward", forward)


def exact(gpt: GPT, **options: Any) -> Any:
    return rotate_and_quantize(
        gpt, [TOKENS], weight_bits=None, activation_bits=None, kv_bits=None, **options
    )


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_query_groups": 4},
        {"n_query_groups": 1, "bias": False},
        {"parallel_residual": True, "shared_attention_norm": True},
        {"parallel_residual": True},
        {"rotary_percentage": 0.5, "intermediate_size": 28},
        {"mlp_class_name": "GemmaMLP", "scale_embeddings": True},
    ],
    ids=str,
)
def test_rotated_gpt_without_rounding_is_the_same_function_to_float64_rounding(
    options: dict[str, Any],
) -> None:
    gpt = make_gpt(**options)
    before = copy.deepcopy(gpt)
    expected = gpt(TOKENS)
    choices = exact(gpt, rotations="all")
    assert {choice.kind for choice in choices} == {"R1", "R2", "R3", "R4"}
    assert all(choice.is_rotated for choice in choices)
    torch.testing.assert_close(gpt(TOKENS), expected, rtol=1e-10, atol=1e-10)
    # R1 is in the weights, the others in the forward pass.
    assert float((gpt.lm_head.weight - before.lm_head.weight).detach().abs().max()) > 0.1
    for block in gpt.transformer.h:
        for switch in (block.attn.heads.key_switch, block.attn.proj.switch, block.mlp.proj.switch):
            switch.is_on = False
            torch.testing.assert_close(gpt(TOKENS), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("wide_norms")
def test_a_value_rotation_that_is_not_undone_changes_the_function() -> None:
    gpt = make_gpt()
    expected = gpt(TOKENS)
    exact(gpt, rotations="all")
    gpt.transformer.h[0].attn.proj.rotation = None
    assert float((gpt(TOKENS) - expected).detach().abs().max()) > 1e-3


@pytest.mark.usefixtures("wide_norms")
def test_r1_is_merged_only_where_it_lowers_the_error() -> None:
    """Embeddings with one large channel: R1 spreads it."""
    gpt = make_gpt()
    with torch.no_grad():
        gpt.transformer.wte.weight[:, 3] *= 200
    expected = gpt(TOKENS)
    table = gpt.transformer.wte.weight.detach().clone()
    choices = rotate_and_quantize(gpt, [TOKENS])
    residual = next(choice for choice in choices if choice.kind == "R1")
    assert residual.is_rotated
    assert residual.rotated_error < residual.error
    rotated = gpt.transformer.wte.weight.detach()
    peak = rotated.abs().max() / rotated.std()
    assert float(peak) < float(table.abs().max() / table.std()) / 2
    assert float((gpt(TOKENS) - expected).detach().abs().max()) > 1e-3  # rounded now

    plain = make_gpt()
    table = plain.transformer.wte.weight.detach().clone()
    choices = rotate_and_quantize(plain, [TOKENS], unrotated=["residual"])
    assert not choices[0].is_rotated
    assert torch.equal(plain.transformer.wte.weight, table)


def test_keys_values_and_each_linear_but_the_head_are_rounded() -> None:
    gpt = make_gpt()
    rotate_and_quantize(gpt, [TOKENS])
    seen: dict[str, Tensor] = {}

    def spy(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    for name, module in gpt.named_modules():
        if isinstance(module, FakeQuantizer):
            module.register_forward_hook(spy(name))
    gpt(TOKENS)
    assert len(seen) == 2 * (2 * 5 + 2)  # in two blocks: five layers, keys and values
    for name, output in seen.items():
        row = output.reshape(-1, output.shape[-1])[0]
        assert len(set(row.tolist())) <= 16, name
    assert type(gpt.lm_head) is nn.Linear


def test_generation_with_a_cache_matches_the_whole_sequence() -> None:
    gpt = make_gpt().eval()
    rotate_and_quantize(gpt, [TOKENS])
    with torch.no_grad():
        whole = gpt(TOKENS[:1])
        gpt.set_kv_cache(batch_size=1, dtype=torch.float64)
        parts = [gpt(TOKENS[:1, idx : idx + 1], input_pos=torch.tensor([idx])) for idx in range(12)]
    # LitGPT's norms in float32 are gone; what is left is the order of sums, which can move a
    # number over a rounding threshold only by accident.
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-8, atol=1e-8)


def tie(gpt: GPT) -> GPT:
    gpt.transformer.wte.weight = gpt.lm_head.weight
    return gpt


REFUSED: dict[str, tuple[Any, str]] = {
    "tied": (lambda: tie(make_gpt()), "lm_head and transformer.wte must not be tied.*Untie them"),
    "LayerNorm": (
        lambda: make_gpt(norm_class_name="LayerNorm"),
        "transformer.h.0 must be a block of the LLaMA kind, got the norm LayerNorm",
    ),
    "GptNeoxMLP": (
        lambda: make_gpt(mlp_class_name="GptNeoxMLP"),
        "of the LLaMA kind, got GptNeoxMLP for its MLP",
    ),
    "norms afterwards": (
        lambda: make_gpt(post_mlp_norm=True),
        "got norms after attention or MLP",
    ),
    "head size": (
        lambda: make_gpt(n_head=4, n_embd=24, n_query_groups=4, intermediate_size=48),
        r"transformer.h.0.attn.proj cannot be rotated \(R2\): no Hadamard matrix of the size 6",
    ),
    "intermediate size": (
        lambda: make_gpt(intermediate_size=172),
        r"transformer.h.0.mlp.proj cannot be rotated \(R4\).*size 172.*Pass unrotated=",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_rotated_is_refused_as_it_is(name: str) -> None:
    make, message = REFUSED[name]
    gpt = make()
    names = list(gpt.state_dict())
    with pytest.raises(ValueError, match=message):
        rotate_and_quantize(gpt, [TOKENS])
    assert list(gpt.state_dict()) == names


def test_places_named_in_unrotated_let_other_sizes_train() -> None:
    gpt = make_gpt(intermediate_size=172)
    choices = rotate_and_quantize(gpt, [TOKENS], rotations="all", unrotated=["*.mlp.proj"])
    assert {c.kind for c in choices if not c.is_rotated} == {"R4"}
    skipped = make_gpt()
    rotate_and_quantize(skipped, [TOKENS], skip=["*.mlp.fc_*"])
    assert isinstance(skipped.transformer.h[0].mlp.fc_1.weight_quantizer, nn.Identity)
    assert not isinstance(skipped.transformer.h[0].mlp.proj.weight_quantizer, nn.Identity)
