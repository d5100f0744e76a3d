"""Which share of a training step the method takes: whole models, in bfloat16 autocast."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.experiments.benchmark.measure import (
    STEP_SIZE,
    PausableAdamW,
    peak_bytes,
    rule_of,
    timed,
)

__all__ = ["MODELS", "ModelCost", "check_models", "measure_model"]

_NUM_WARMUP_ROUNDS = 3
_GIB = 2.0**30

# What the decoders of the recipes have in common.
_COMMON: dict[str, Any] = {
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "block_size": 1024,
    "vocab_size": 32000,
    "padded_vocab_size": 32000,
    "mlp_class_name": "LLaMAMLP",
    "norm_eps": 1e-6,
    "n_layer": 24,
}
MODELS: dict[str, dict[str, Any]] = {
    "0.1M": {
        **_COMMON,
        "block_size": 64,
        "vocab_size": 256,
        "padded_vocab_size": 256,
        "mlp_class_name": "LLaMAMLP",
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 64,
        "intermediate_size": 192,
    },
    "124M": {
        **_COMMON,
        "block_size": 1024,
        "vocab_size": 50257,
        "padded_vocab_size": 50304,
        "mlp_class_name": "GptNeoxMLP",
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "intermediate_size": 3072,
    },
    "350M": {**_LLAMA, "n_head": 16, "n_embd": 1024, "intermediate_size": 2736},
    "1B": {**_LLAMA, "n_head": 32, "n_embd": 2048, "intermediate_size": 5461},
}
"""LitGPT's configurations: to try the benchmark, and those of the recipes of these sizes."""


@dataclass(frozen=True)
class ModelCost:
    """Medians over interleaved rounds: float32 parameters, AdamW, bfloat16 autocast.

    Attributes:
        model: A key of :data:`MODELS`.
        form: A key of :data:`~lightning_ema_nesterov.experiments.benchmark.measure.FORMS`.
        num_elements: Elements of all parameters.
        num_tokens: Tokens of a step. Of a step with more, the method takes a smaller share.
        is_compiled: Whether ``torch.compile`` compiled the model.
        step_ms: Time of a training step with AdamW.
        step_with_method_ms: Time of that step with the method.
        method_ms: Time of the method alone: a step of a base optimizer that does nothing.
        share: Median of the ratio of ``method_ms`` and ``step_ms``.
        state_gib: What AdamW keeps between steps.
        state_with_method_gib: What both keep.
        peak_gib: Most that is held at once in a step: parameters, states, gradients, activations.
        peak_with_method_gib: The same with the method.
    """

    model: str
    form: str
    num_elements: int
    num_tokens: int
    is_compiled: bool
    step_ms: float
    step_with_method_ms: float
    method_ms: float
    share: float
    state_gib: float
    state_with_method_gib: float
    peak_gib: float
    peak_with_method_gib: float

    def as_row(self) -> list[str]:
        """Return the cells of a table."""
        return [
            self.model,
            self.form,
            f"{self.num_elements:,}",
            f"{self.num_tokens:,}",
            f"{self.step_ms:.1f} to {self.step_with_method_ms:.1f} ms",
            f"{self.method_ms:.2f} ms",
            f"{100 * self.share:.2f} %",
            f"{self.state_gib:.2f} to {self.state_with_method_gib:.2f} GiB",
            f"{self.peak_gib:.2f} to {self.peak_with_method_gib:.2f} GiB",
        ]


def check_models(names: Sequence[str], *, batch_size: int) -> None:
    """Raise unless :func:`measure_model` can measure models.

    Raises:
        ModuleNotFoundError: If there are models and no LitGPT.
        ValueError: If a model is unknown, or ``batch_size`` below 1.
    """
    if names:
        import_module("litgpt")
    for name in names:
        if name not in MODELS:
            raise ValueError(f"models must be of {', '.join(MODELS)}, got {name!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


def measure_model(
    name: str, *, forms: Sequence[str], num_rounds: int, batch_size: int = 8, device: str = "cpu"
) -> Iterator[ModelCost]:
    """Measure all forms on one model, one after another.

    Args:
        name: A key of :data:`MODELS`.
        forms: What to measure.
        num_rounds: Rounds, in each of which everything is timed once; at least 1.
        batch_size: Windows in a step, each as long as the model reads at once.
        device: As torch names it. On a GPU the model is compiled, as LitGPT does it.
    """
    is_cuda = torch.device(device).type == "cuda"
    torch.manual_seed(0)
    model = _make_model(name, device)
    optimizer = PausableAdamW(model.parameters(), lr=1e-6, fused=is_cuda)
    if is_cuda:
        model.compile(dynamic=False)
    shape = (batch_size, MODELS[name]["block_size"] + 1)
    tokens = torch.randint(MODELS[name]["vocab_size"], shape, device=device)
    for form in forms:
        yield _measure_form(name, form, _Training(model, optimizer, tokens), num_rounds, device)


def _make_model(name: str, device: str) -> nn.Module:
    from litgpt import GPT, Config  # not needed for the other tables

    with torch.device(device):
        model: nn.Module = GPT(Config(name=name, **MODELS[name]))
    return model


class _Training:
    """One model and its optimizer in training.

    Args:
        model: Maps token ids to logits.
        optimizer: Of its parameters.
        tokens: Token ids of a batch.
    """

    def __init__(self, model: nn.Module, optimizer: PausableAdamW, tokens: Tensor) -> None:
        self.model = model
        self.optimizer = optimizer
        self.tokens = tokens

    @property
    def params(self) -> list[Tensor]:
        """The parameters."""
        return list(self.model.parameters())

    def step(self) -> None:
        """Take a step with what is attached to the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.tokens.device.type, dtype=torch.bfloat16):
            logits = self.model(self.tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Return what the optimizer keeps."""
        states = self.optimizer.state.values()
        tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        return _bytes_of(tensors)


def _measure_form(
    name: str, form: str, training: _Training, num_rounds: int, device: str
) -> ModelCost:
    optimizer = training.optimizer
    lookahead = Lookahead(rule_of(optimizer, form), LookaheadSchedule(STEP_SIZE))
    actions = _actions(training, lookahead)
    times: dict[str, list[float]] = {action: [] for action in actions}
    for round_idx in range(num_rounds + _NUM_WARMUP_ROUNDS):
        for action in actions:
            if action == "step_ms":
                lookahead.detach()
            else:
                lookahead.attach()
            with timed(device) as elapsed:
                actions[action]()
            if round_idx >= _NUM_WARMUP_ROUNDS:
                times[action].append(1e3 * elapsed[0])
    pairs = zip(times["method_ms"], times["step_ms"], strict=True)
    share = statistics.median(method / step for method, step in pairs)
    lookahead.attach()
    state, peak = _memory(training, actions["step_with_method_ms"], device)
    lookahead.detach()
    for p in training.params:
        lookahead.rule.store.drop(p)
    plain_state, plain_peak = _memory(training, actions["step_ms"], device)
    return ModelCost(
        model=name,
        form=form,
        num_elements=sum(p.numel() for p in training.params),
        num_tokens=training.tokens[:, 1:].numel(),
        is_compiled=torch.device(device).type == "cuda",
        **{action: statistics.median(values) for action, values in times.items()},
        share=share,
        state_gib=plain_state,
        state_with_method_gib=state,
        peak_gib=plain_peak,
        peak_with_method_gib=peak,
    )


def _actions(training: _Training, lookahead: Lookahead) -> dict[str, Callable[[], None]]:
    def step_with_method() -> None:
        lookahead.extrapolate()
        training.step()

    def method() -> None:
        # Gradients are there from the step before.
        training.optimizer.is_still = True
        lookahead.extrapolate()
        training.optimizer.step()
        training.optimizer.is_still = False

    return {
        "step_ms": training.step,
        # In this order: the method alone then begins as it does in a run, after a step.
        "step_with_method_ms": step_with_method,
        "method_ms": method,
    }


def _memory(training: _Training, step: Callable[[], None], device: str) -> tuple[float, float]:
    """Return what is kept between steps, and the peak of a step, both in GiB."""
    training.optimizer.zero_grad(set_to_none=True)
    state = training.state_bytes()
    held = state + _bytes_of(training.params)
    return state / _GIB, (held + peak_bytes(step, device)) / _GIB


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
