"""Results of runs: from their event files, and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_ema_nesterov.experiments.event_files import Point, read_scalars
from lightning_ema_nesterov.experiments.study.spec import Run

__all__ = [
    "DIVERGED",
    "PEAK_MEMORY",
    "STATE_BYTES",
    "STATE_PER_PARAMETER",
    "STEP_SECONDS",
    "TOKENS_PER_SECOND",
    "Result",
    "method_of",
    "read_event_folder",
    "read_events",
    "read_lines",
    "reading_at",
    "with_averages",
    "write_line",
]

STEP_SECONDS = "study/step_seconds"
"""Tag of the median time of a training step. Unit: seconds, those of the process on a CPU."""

STATE_PER_PARAMETER = "study/state_per_parameter"
"""Tag of the elements that the optimizer keeps for each element of a parameter, at most."""

STATE_BYTES = "study/state_bytes"
"""Tag of the bytes that the optimizer keeps, at most."""

TOKENS_PER_SECOND = "study/tokens_per_second"
"""Tag of the tokens of a step over its time, where the data have ``tokens_per_batch``."""

PEAK_MEMORY = "study/peak_memory"
"""Tag of the most memory of a GPU that tensors had at once. Unit: bytes."""

DIVERGED = "study/diverged"
"""Tag of the last scalar of a run: 1 where the loss was not finite, else 0."""

_STEP_SIZE = "ema_nesterov/step_size"

_AT = " @ "

_AT_AVERAGE = "ema_nesterov/loss_at_average/share="


@dataclass(frozen=True)
class Result:
    """What came of one run.

    Attributes:
        run: The run.
        val_loss: Validation losses over steps and seconds.
        is_diverged: Whether its loss was not finite at some step.
        step_seconds: Median time of a training step; of the process alone on a CPU.
        state_per_parameter: Elements that the optimizer keeps for each element of a parameter.
        step_size: Lookahead step size that was farthest from 0.
        lookahead_steps: First and last step that is known to have looked ahead, of those that
            were logged; ``None`` if there was none.
        at_average: Validation losses at shares of the way to the average, by share.
        state_bytes: Bytes that the optimizer keeps; ``None`` in lines of former versions.
        tokens_per_second: Tokens of a step over its time; ``None`` where the data do not say.
        peak_memory: Most bytes of a GPU that tensors had at once; ``None`` on a CPU.
    """

    run: Run
    val_loss: list[Point]
    is_diverged: bool
    step_seconds: float
    state_per_parameter: float
    step_size: float
    lookahead_steps: tuple[int, int] | None = None
    at_average: dict[float, list[Point]] = field(default_factory=dict)
    state_bytes: int | None = None
    tokens_per_second: float | None = None
    peak_memory: int | None = None

    @property
    def final(self) -> float:
        """Last validation loss; infinite where the run diverged."""
        return float("inf") if self.is_diverged else self.val_loss[-1].value

    @property
    def best(self) -> float:
        """Smallest validation loss; infinite where there is none."""
        return min((point.value for point in self.val_loss), default=float("inf"))


def reading_at(method: str, share: float) -> str:
    """Return how the report names runs of a method that are evaluated at an average.

    Example:
        >>> reading_at("flat", 1.0), method_of("flat @ 1"), method_of("flat")
        ('flat @ 1', 'flat', 'flat')
    """
    return f"{method}{_AT}{share:g}"


def method_of(reading: str) -> str:
    """Return the method that was trained, of its own name or one of :func:`reading_at`."""
    return reading.partition(_AT)[0]


def with_averages(results: Iterable[Result]) -> list[Result]:
    """Return results, and those of the same runs evaluated at averages as methods of their own.

    Example:
        >>> run = Run("adamw", "flat", 0.01, seed=0)
        >>> points = {1.0: [Point(10, 0.5, 2.0)]}
        >>> result = Result(run, [Point(10, 0.5, 3.0)], False, 0.1, 2.0, 0.0, None, points)
        >>> [(r.run.method, r.final) for r in with_averages([result])]
        [('flat', 3.0), ('flat @ 1', 2.0)]
    """
    found = []
    for result in results:
        found.append(result)
        for share, points in sorted(result.at_average.items()):
            run = replace(result.run, method=reading_at(result.run.method, share))
            found.append(replace(result, run=run, val_loss=points, at_average={}))
    return found


def read_events(root: Path) -> list[Result]:
    """Read all finished runs below a folder from their event files.

    Args:
        root: Folder of the runs of a study.

    Raises:
        FileNotFoundError: If it holds no finished run.
    """
    folders = sorted({path.parent for path in root.rglob("events.out.tfevents.*")})
    found = [result for folder in folders if (result := _read_events(folder)) is not None]
    if not found:
        raise FileNotFoundError(f"{root} must hold event files of finished runs, and holds none.")
    return found


def read_event_folder(folder: Path) -> Result:
    """Read one finished run.

    Raises:
        FileNotFoundError: If it is not finished.
    """
    result = _read_events(folder)
    if result is None:
        raise FileNotFoundError(f"{folder} must hold the event file of a finished run.")
    return result


def _read_events(folder: Path) -> Result | None:
    scalars = read_scalars(folder)
    if DIVERGED not in scalars:
        return None
    step_sizes = scalars.get(_STEP_SIZE, [])
    ahead = [point.step for point in step_sizes if point.value]
    return Result(
        run=Run.of_folder(folder),
        val_loss=scalars.get("val_loss", []),
        is_diverged=bool(scalars[DIVERGED][-1].value),
        step_seconds=scalars[STEP_SECONDS][-1].value,
        state_per_parameter=scalars[STATE_PER_PARAMETER][-1].value,
        step_size=max((point.value for point in step_sizes), key=abs, default=0.0),
        lookahead_steps=(min(ahead), max(ahead)) if ahead else None,
        at_average={
            float(tag.removeprefix(_AT_AVERAGE)): points
            for tag, points in scalars.items()
            if tag.startswith(_AT_AVERAGE)
        },
        state_bytes=_last_int(scalars, STATE_BYTES),
        tokens_per_second=scalars[TOKENS_PER_SECOND][-1].value
        if TOKENS_PER_SECOND in scalars
        else None,
        peak_memory=_last_int(scalars, PEAK_MEMORY),
    )


def _last_int(scalars: Mapping[str, list[Point]], tag: str) -> int | None:
    return int(scalars[tag][-1].value) if tag in scalars else None


def write_line(path: Path, result: Result) -> None:
    """Append a result to a file of JSON lines, on a line of its own also after half a line."""
    line: dict[str, Any] = {
        **asdict(result.run),
        "is_diverged": result.is_diverged,
        "step_seconds": round(result.step_seconds, 5),
        "state_per_parameter": round(result.state_per_parameter, 3),
        "state_bytes": result.state_bytes,
        "step_size": round(result.step_size, 4),
        "lookahead_steps": result.lookahead_steps,
        "val_loss": _as_lists(result.val_loss),
    }
    if result.tokens_per_second is not None:
        line["tokens_per_second"] = round(result.tokens_per_second, 1)
    if result.peak_memory is not None:
        line["peak_memory"] = result.peak_memory
    if result.at_average:
        line["at_average"] = {f"{s:g}": _as_lists(v) for s, v in result.at_average.items()}
    is_cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * is_cut + json.dumps(line) + "\n")


def _as_lists(points: Iterable[Point]) -> list[list[float]]:
    # Every digit of float32, in which event files are: both choose the same learning rates.
    return [[p.step, round(p.seconds, 1), float(f"{p.value:.9g}")] for p in points]


def read_lines(path: Path) -> list[Result]:
    """Read a file of JSON lines; a last line that was cut off is passed over."""
    return list(_read_lines(path.read_text().splitlines())) if path.exists() else []


def _read_lines(lines: Iterable[str]) -> Iterable[Result]:
    for text in lines:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        run = Run(line["base"], line["method"], line["lr"], line["seed"])
        points = [Point(*values) for values in line["val_loss"]]
        yield Result(
            run,
            points,
            line["is_diverged"],
            line["step_seconds"],
            line["state_per_parameter"],
            line["step_size"],
            # Lines of former versions have none.
            tuple(line["lookahead_steps"]) if line.get("lookahead_steps") else None,
            {float(s): [Point(*p) for p in v] for s, v in line.get("at_average", {}).items()},
            line.get("state_bytes"),
            line.get("tokens_per_second"),
            line.get("peak_memory"),
        )
