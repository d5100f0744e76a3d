"""EMC2 as its paper states it: one anchor, one candidate at a time, in float64. Not a test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Point = tuple[int, int]  # view, sample
Vector = Sequence[float]


def cosine(a: Vector, b: Vector) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@dataclass
class Chains:
    """State and score of each chain: of a sample, or of a view of a sample."""

    temperature: float
    burn_in: float
    per_view: bool
    states: dict[Point, Point] = field(default_factory=dict)
    scores: dict[Point, float] = field(default_factory=dict)

    def visit(
        self,
        samples: Sequence[int],
        features: Mapping[Point, Vector],
        outside: Mapping[Point, Vector],
        draws: dict[Point, Sequence[float]],
    ) -> dict[Point, list[tuple[Point, bool]]]:
        """Move the chains of a batch; return the kept states, and whether they are in the batch.

        Args:
            samples: The batch.
            features: Of its points.
            outside: Of every point of the data set, as encoded for states outside the batch.
            draws: Uniform draws of each anchor, one for each point of the batch.
        """
        kept: dict[Point, list[tuple[Point, bool]]] = {}
        points = [(view, sample) for view in range(2) for sample in samples]
        in_batch: dict[int, bool] = {}
        for anchor in points:
            view, sample = anchor
            chain = (view if self.per_view else 0, sample)
            state, score = self.states.get(chain), self.scores.get(chain, -math.inf)
            is_in_batch = in_batch.get(sample, False) and not self.per_view
            if self.per_view and state is not None:
                score = cosine(features[anchor], outside[state]) / self.temperature
            visited: list[tuple[Point, bool]] = []
            for point, draw in zip(points, draws[anchor], strict=True):
                if point[1] == sample:
                    continue
                logit = cosine(features[anchor], features[point]) / self.temperature
                if draw < math.exp(min(0.0, logit - score)):
                    state, score, is_in_batch = point, logit, True
                assert state is not None
                visited.append((state, is_in_batch))
            kept[anchor] = visited[math.floor(self.burn_in * len(visited)) :]
            assert state is not None
            self.states[chain], self.scores[chain], in_batch[sample] = state, score, is_in_batch
        return kept
