"""LoRA-Pre: Adam or Muon with moments that are products of thin factors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_ema_nesterov.optimizers.adam import adam_, count_steps_, step_sizes
from lightning_ema_nesterov.optimizers.base import (
    Group,
    LeanOptimizer,
    check_at_least,
    check_betas,
    check_rank,
    check_whole,
)
from lightning_ema_nesterov.optimizers.factors import new_factors, product, update_factors_
from lightning_ema_nesterov.optimizers.shards import local, local_gradient

__all__ = ["LoRAPre"]

_KEYS = {"first": ("first_left", "first_right"), "second": ("second_left", "second_right")}
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's quintic; five steps
_NUM_NEWTON_SCHULZ = 5


class LoRAPre(LeanOptimizer):
    r"""Keep the moments of each hidden matrix as products of rank r.

    The average of the gradients is the product :math:`B A` of a tall and a wide factor, each moved
    by one Newton step of a least-squares problem (see the module ``factors``); that of their
    absolute values is :math:`V_B V_A`. The gradient at hand enters each moment itself, so that it
    counts even where the factors do not reach. From the factors of the last step:

    .. math::

        m = \beta_1 B A + (1 - \beta_1) G, \quad
        v = \beta_2 (V_B V_A)^{\circ 2} + (1 - \beta_2) G^{\circ 2}, \quad
        W \leftarrow (1 - \eta\lambda) W - \eta_t \frac{m}{\sqrt{v} + \epsilon}

    with :math:`\eta_t = \eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`, then the factors are moved
    with decays :math:`\beta_1` and :math:`\sqrt{\beta_2}`. ``form="muon"`` keeps the first moment
    only, and moves by its orthogonalized :math:`m` (Muon's quintic Newton-Schulz
    iteration, five steps) times :math:`\eta \sqrt{\max(1, p / q)}`. Embedding, head and other
    parameters are trained by AdamW with the same betas.

    **Which form this is.** The authors have not published code. This is the form of their formulas
    with both factors moved from the old ones, which follows from the derivation: then the product
    is the same under (B R, R^{-1} A), and inside both subspaces it is the moving average up to
    (1 - sqrt(beta))^2. A second form in circulation moves A with the new B and steps along the
    product alone; it is not this one. What follows from the derivation: a component that
    only one of the two subspaces contains is taken up at half the average's rate, and one outside
    both is lost until the subspaces turn. The factors start at 0 and at orthonormal rows. As the
    average of absolute values is squared after its start, v is too small by about
    (1 - s) / (1 + s), s = beta_2^(t / 2), in the first 1 / (1 - beta_2) steps: warm the rate up,
    and rather use 0.95 than 0.999.

    State of a matrix (p, q): (p + q) r numbers for each moment, in at least float32 (steps of
    1 - sqrt(beta) vanish in bfloat16), and a step count. Matrices must be whole on each process:
    train with DDP; shards are refused.

    Args:
        params: Groups of :func:`groups_by_role`.
        lr: Learning rate :math:`\eta`, at least 0.
        rank: Rank r, from 1 to the smaller side of each hidden matrix. The authors speak of an
            eighth of GaLore's.
        form: ``"adam"`` or ``"muon"``.
        betas: Decays of the moments, in [0, 1). Muon usually has 0.95 for the first.
        eps: Summand of the denominator, at least 0.
        weight_decay: Decoupled weight decay :math:`\lambda`, at least 0.

    Raises:
        ValueError: If an argument is out of its range or a group does not fit.

    Example:
        >>> from lightning_ema_nesterov.optimizers import groups_by_role
        >>> layers = [torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 8)]
        >>> model = torch.nn.Sequential(*layers)
        >>> optimizer = LoRAPre(groups_by_role(model), rank=2)
        >>> model(torch.tensor([1, 2])).sum().backward()
        >>> optimizer.step()
    """

    exact_keys: ClassVar[tuple[str, ...]] = (*_KEYS["first"], *_KEYS["second"])
    needs_whole_matrices: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        rank: int = 16,
        form: str = "adam",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "form": form,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @override
    def _check_options(self, options: Group, of: str) -> None:
        super()._check_options(options, of)
        check_whole(f"rank{of}", options["rank"])
        if options["form"] not in ("adam", "muon"):
            raise ValueError(f"form{of} must be 'adam' or 'muon', got {options['form']!r}.")
        check_betas(f"betas{of}", options["betas"])
        check_at_least(f"eps{of}", options["eps"], 0.0)

    @override
    def _check_group(self, group: Group, idx: int) -> None:
        super()._check_group(group, idx)
        check_rank(group, idx)

    @override
    def _update(self) -> None:
        for group, params in self._with_gradient("hidden", "embedding", "head", "other"):
            self._decay_(group, params, group["lr"])
        every = [p for group in self.param_groups for p in group["params"]]
        places = {p: place for place, p in enumerate(every, start=1)}
        for group, params in self._with_gradient("hidden"):
            steps = count_steps_(params, self.state)
            sizes = step_sizes(steps, lr=group["lr"], betas=group["betas"])
            for p, size in zip(params, sizes, strict=True):
                if group["form"] == "adam":
                    self._adam_step(group, p, size, places[p])
                else:
                    self._muon_step(group, p, places[p])
        for group, params in self._with_gradient("embedding", "head", "other"):
            adam_(params, self.state, lr=group["lr"], betas=group["betas"], eps=group["eps"])

    def _adam_step(self, group: Group, p: Tensor, size: float, place: int) -> None:
        beta1, beta2 = group["betas"]
        grad = _wide(local_gradient(p))
        m = self._fold("first", group, p, grad, decay=beta1, seed=2 * place)
        m.mul_(beta1).add_(grad, alpha=1.0 - beta1)
        magnitude = self._fold("second", group, p, grad.abs(), decay=beta2**0.5, seed=2 * place + 1)
        v = magnitude.square_().mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        local(p).sub_(m.div_(v.sqrt_().add_(group["eps"])).mul_(size).to(p.dtype))

    def _muon_step(self, group: Group, p: Tensor, place: int) -> None:
        beta = group["betas"][0]
        grad = _wide(local_gradient(p))
        m = self._fold("first", group, p, grad, decay=beta, seed=2 * place)
        m.mul_(beta).add_(grad, alpha=1.0 - beta)
        ratio = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
        local(p).sub_(_orthogonalized(m).mul_(group["lr"] * ratio).to(p.dtype))

    def _fold(
        self, moment: str, group: Group, p: Tensor, matrix: Tensor, *, decay: float, seed: int
    ) -> Tensor:
        """Return the average before this step, and fold a matrix into it."""
        state, keys = self.state[p], _KEYS[moment]
        if keys[0] not in state:
            made = new_factors(p.shape, group["rank"], seed=seed, like=matrix)
            state.update(zip(keys, made, strict=True))
        left, right = (state[key] for key in keys)
        average = product(left, right)
        update_factors_(left, right, matrix, decay=decay)
        return average


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _orthogonalized(matrix: Tensor) -> Tensor:
    """Return a matrix with the singular vectors of another one, and singular values near 1."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp(min=1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NUM_NEWTON_SCHULZ):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
