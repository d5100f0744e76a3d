"""The contrastive loss over a whole data set, with negatives from chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import Self, override

from lightning_ema_nesterov.companions.contrastive.chains import ChainRun, log_draws, run_chains
from lightning_ema_nesterov.companions.contrastive.dataset import check_indexed
from lightning_ema_nesterov.companions.contrastive.gather import gather, gather_with_gradient
from lightning_ema_nesterov.companions.contrastive.softmax import check_temperature, check_views

__all__ = ["EMC2Loss"]

Encode = Callable[[Tensor, Tensor], Tensor]
_NUM_CHAINS = {"image": 1, "view": 2}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class EMC2Loss(nn.Module):
    r"""EMC2: the gradient of the contrastive loss over all negatives of the data set.

    The loss of an anchor :math:`x` with its positive :math:`y` is :math:`-s(x, y) / \tau + \log
    \sum_z \exp(s(x, z) / \tau)`, the sum over both views of all other samples. Its gradient needs
    negatives from :math:`p_x(z) \propto \exp(s(x, z) / \tau)`. A Metropolis-Hastings chain that
    belongs to the sample and lives across epochs draws them, with the batch as its candidates.

    .. math:: \nabla L \approx \tfrac{1}{\tau} \operatorname{mean}_x \big[
        \operatorname{mean}_{z \in \text{kept states}} \nabla s(x, z) - \nabla s(x, y) \big]

    What is returned has this gradient. Its value is a difference of similarities, not :math:`L`:
    follow :func:`contrastive_loss` of a data set or a fixed part of it instead.

    States and step count are buffers: they are in checkpoints, move with the module, and a run that
    goes on from a checkpoint draws what it would have drawn. With a process group, candidates come
    from all processes, which need batches of the same size, and each process knows all states: a
    sampler may give a sample to another process in the next epoch.

    Args:
        num_samples: Samples in the data set, at least 2.
        temperature: :math:`\tau`, above 0. Chains accept less at a low one (with a small trained
            network .45 of the candidates at .2, .05 at .07).
        burn_in: Share of the candidates of a visit, in [0, 1), that only move a chain.
        chains: ``"image"``: one chain per sample, which the second view continues from the first,
            for augmentations that are new each time. The score of a state is the one from when it
            was accepted. ``"view"``: one per sample and view, for two fixed views; a state's score
            is computed again at each visit, with the weights of now.
        seed: Of the draws.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> images = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
        >>> loss = EMC2Loss(num_samples=8, temperature=0.5)
        >>> encode = lambda samples, views: images[samples]
        >>> indices = torch.tensor([2, 5, 7])
        >>> value = loss(images[indices], images[indices], indices, encode)
        >>> (loss.points >= 0).sum(dim=1)  # three chains have begun
        tensor([3])

    References:
        Yau, Wai, Raman, Sarkar, Hong, *EMC2: Efficient MCMC negative sampling for contrastive
        learning with global convergence*, ICML 2024. https://arxiv.org/abs/2404.10575
    """

    points: Tensor
    log_scores: Tensor
    num_steps: Tensor

    def __init__(
        self,
        num_samples: int,
        temperature: float = 0.07,
        burn_in: float = 0.5,
        *,
        chains: Literal["image", "view"] = "image",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}.")
        check_temperature(temperature)
        if not 0.0 <= burn_in < 1.0:
            raise ValueError(f"burn_in must be in [0, 1), got {burn_in}.")
        if chains not in _NUM_CHAINS:
            raise ValueError(f"chains must be 'image' or 'view', got {chains!r}.")
        self.num_samples = num_samples
        self.temperature = temperature
        self.burn_in = burn_in
        self.chains = chains
        self.seed = seed
        shape = (_NUM_CHAINS[chains], num_samples)
        # A state is a point, view * num_samples + sample; -1 before the first visit.
        self.register_buffer("points", torch.full(shape, -1))
        self.register_buffer("log_scores", torch.full(shape, -torch.inf))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))

    def check_dataset(self, dataset: Any) -> None:
        """Raise unless each item of a data set ends in its index and has a chain.

        Call it before training, for instance in ``on_train_start``.

        Args:
            dataset: With a length and items by index, such as :class:`WithIndex`. Two are read.

        Raises:
            TypeError: If there is no length, no item by index, or no index in an item.
            ValueError: If there are more samples than chains, or none.
        """
        check_indexed(dataset, self.num_samples)

    @override
    def forward(self, out0: Tensor, out1: Tensor, indices: Tensor, encode: Encode) -> Tensor:
        """Return a scalar whose gradient estimates that of the loss, and move the chains.

        Args:
            out0: Features of the first views of a batch, shape ``(B, d)``; normalized here.
            out1: Features of the second views, likewise.
            indices: The samples' indices in the data set, integers in ``[0, num_samples)``, shape
                ``(B,)``.
            encode: Called as ``encode(samples, views)`` with indices of shape ``(n,)``, returns
                features of shape ``(n, d)`` with their gradient. Asked for states that are not in
                the batch. With ``chains="image"``, ``views`` may be ignored and the image without
                augmentation encoded.

        Raises:
            RuntimeError: In evaluation mode, since chains belong to training.
            TypeError: If ``indices`` are no integers.
            ValueError: If a shape or an index does not fit, or there is no negative.
        """
        self._check_inputs(out0, out1, indices)
        dtype = torch.promote_types(out0.dtype, torch.float32)
        views = normalize(torch.stack([out0, out1]).to(dtype), dim=2)  # (2, B, d)
        samples = indices.long()
        all_samples = gather(samples).flatten()
        # All first views, then all second ones: the order does not tell how the batch was cut.
        candidates = gather_with_gradient(views).transpose(0, 1).reshape(-1, views.shape[-1])
        is_candidate = samples.repeat(2).unsqueeze(1) != all_samples.repeat(2)
        self._check_samples(all_samples, is_candidate)

        anchors = views.flatten(0, 1)
        logits = anchors @ candidates.T / self.temperature
        own_points = torch.cat([samples, samples + self.num_samples])
        draws = log_draws(own_points, logits.shape[1], self.num_steps + self.seed * 2**32)
        run_all = self._run_per_view if self.chains == "view" else self._run_per_image
        run, old_logits = run_all(logits, is_candidate, draws.to(dtype), anchors, samples, encode)
        self._store(run, samples, all_samples)
        negatives = (run.weights[:, :-1] * logits).sum(dim=1) + run.weights[:, -1] * old_logits
        positives = (views[0] * views[1]).sum(dim=1) / self.temperature
        return negatives.mean() - positives.mean()

    def _run_per_view(
        self,
        logits: Tensor,
        is_candidate: Tensor,
        draws: Tensor,
        anchors: Tensor,
        samples: Tensor,
        encode: Encode,
    ) -> tuple[ChainRun, Tensor]:
        """Return the run of a chain for each anchor, and the logits of its state from before."""
        points = self.points[:, samples].flatten()
        old_logits = self._encode_logits(anchors, points, points >= 0, encode)
        scores = torch.where(points >= 0, old_logits.detach(), -torch.inf)
        columns = torch.full_like(points, logits.shape[1])
        run = run_chains(
            logits.detach(), is_candidate, columns, scores, draws, burn_in=self.burn_in
        )
        return run, old_logits

    def _run_per_image(
        self,
        logits: Tensor,
        is_candidate: Tensor,
        draws: Tensor,
        anchors: Tensor,
        samples: Tensor,
        encode: Encode,
    ) -> tuple[ChainRun, Tensor]:
        """Return the run of a chain over both views, and logits of kept states from before."""
        points = self.points[0, samples]
        columns = torch.full_like(points, logits.shape[1])
        scores = self.log_scores[0, samples].to(logits.dtype)
        weights = []
        for part in torch.arange(len(anchors), device=points.device).chunk(2):
            run = run_chains(
                logits[part].detach(),
                is_candidate[part],
                columns,
                scores,
                draws[part],
                burn_in=self.burn_in,
            )
            columns, scores = run.columns, run.log_scores
            weights.append(run.weights)
        run = ChainRun(torch.cat(weights), columns, scores)
        is_kept = run.weights[:, -1] > 0
        return run, self._encode_logits(anchors, points.repeat(2), is_kept, encode)

    def _encode_logits(
        self, anchors: Tensor, points: Tensor, is_needed: Tensor, encode: Encode
    ) -> Tensor:
        """Return the logits of anchors and states outside the batch, 0 where none is needed."""
        if not is_needed.any():
            return anchors.new_zeros(len(anchors))
        unique, inverse = torch.unique(points[is_needed], return_inverse=True)
        features = encode(unique % self.num_samples, unique // self.num_samples)
        if features.shape != (len(unique), anchors.shape[1]):
            raise ValueError(
                "encode must return one row of features for each sample that it is asked for, "
                f"({len(unique)}, {anchors.shape[1]}), got {tuple(features.shape)}."
            )
        features = normalize(features.to(anchors.dtype), dim=1)[inverse]
        values = (anchors[is_needed] * features).sum(dim=1) / self.temperature
        return anchors.new_zeros(len(anchors)).masked_scatter(is_needed, values)

    @torch.no_grad()
    def _store(self, run: ChainRun, samples: Tensor, all_samples: Tensor) -> None:
        """Write the last states of all processes' chains; count the step."""
        num_chains = len(self.points)
        in_batch = torch.cat([all_samples, all_samples + self.num_samples])
        has_moved = run.columns < len(in_batch)
        points = torch.where(
            has_moved,
            in_batch[run.columns.clamp(max=len(in_batch) - 1)],
            self.points[:, samples].flatten(),
        )
        # A sampler may fill up with samples given before: the last occurrence is the one kept.
        is_same = all_samples.unsqueeze(1) == all_samples
        last = len(all_samples) - 1 - is_same.flip(1).int().argmax(dim=1)
        for buffer, values in ((self.points, points), (self.log_scores, run.log_scores)):
            gathered = gather(values.reshape(num_chains, -1)).transpose(0, 1).flatten(1)
            buffer[:, all_samples] = gathered[:, last].to(buffer.dtype)
        self.num_steps += 1

    def _check_inputs(self, out0: Tensor, out1: Tensor, indices: Any) -> None:
        if not self.training:
            raise RuntimeError(
                "EMC2Loss must be in training mode: it moves the chains of training samples. "
                "Use contrastive_loss for evaluation."
            )
        check_views(out0, out1)
        if not isinstance(indices, Tensor) or indices.dtype in (torch.bool, *_FLOATS):
            got = f"a tensor of {indices.dtype}" if isinstance(indices, Tensor) else repr(indices)
            raise TypeError(
                "indices must be a tensor of integers, the samples' indices in the data set, got "
                f"{got}. Wrap the data set in WithIndex."
            )
        if indices.shape != (len(out0),):
            raise ValueError(
                f"indices must have one entry for each of {len(out0)} samples, got shape "
                f"{tuple(indices.shape)}."
            )

    def _check_samples(self, all_samples: Tensor, is_candidate: Tensor) -> None:
        low, high = (int(end) for end in all_samples.aminmax())
        if low < 0 or high >= self.num_samples:
            raise ValueError(
                f"indices must be in [0, num_samples={self.num_samples}), got "
                f"{low if low < 0 else high}. Pass num_samples=len(dataset)."
            )
        if not bool(is_candidate.any(dim=1).all()):
            raise ValueError(
                f"A batch must hold at least 2 different samples, got sample {low} only: the "
                "negatives of a sample are the others. Use a larger batch, and drop_last=True."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert; scores stay in float32 or wider."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # bfloat16 would change a stored score by up to .03 at temperature .07.
        self.log_scores = self.log_scores.to(
            torch.promote_types(self.log_scores.dtype, torch.float32)
        )
        return self
