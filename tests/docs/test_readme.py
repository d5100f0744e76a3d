"""What the README says is what the code does."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from lightning_ema_nesterov import EMANesterov, attach_ema_nesterov, litgpt
from lightning_ema_nesterov.core.metrics import StepMetrics
from tests.toys import Toy, adamw, loader

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("made_by", [EMANesterov, attach_ema_nesterov, litgpt.ema_nesterov])
def test_table_of_arguments_has_their_defaults(made_by: Callable[..., object]) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| `?([\w.]+)`? \|", README, re.MULTILINE))
    assert set(rows) == set(inspect.signature(EMANesterov).parameters)
    parameters = inspect.signature(made_by).parameters
    assert rows == {name: str(parameters[name].default) for name in rows}


def test_table_of_tags_is_complete() -> None:
    text = (ROOT / "docs/diagnostics.md").read_text()
    tags = re.findall(r"^\| `(ema_nesterov/\w+)` \|", text, re.MULTILINE)
    assert tags == list(StepMetrics(0.0, 0.0, 0.0, 0.0).as_scalars())


def test_the_two_commands_are_one_line_each_and_use_the_constraints() -> None:
    lines = [block.strip() for block in blocks("bash")][:2]
    for line, end in zip(lines, ("ema-nesterov quickstart", "pytest"), strict=True):
        assert "\n" not in line
        assert "-c constraints.txt" in line
        assert line.endswith(f".venv/bin/{end}")


@pytest.mark.parametrize(
    "folder", ["recipes", "recipes/gpu", "recipes/quickstart", "recipes/studies", ".github"]
)
def test_linked_files_exist(folder: str) -> None:
    [page] = [*(ROOT / folder).glob("README.md"), *(ROOT / folder).glob("CONTRIBUTING.md")]
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert links
    assert all("://" in link or (ROOT / folder / link).exists() for link in links)


def test_readme_is_read_in_one_go() -> None:
    lines = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(README.splitlines()) <= 130


def test_nothing_large_is_committed() -> None:
    result = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    for name in result.stdout.splitlines():
        assert not (ROOT / name).exists() or (ROOT / name).stat().st_size <= 400_000, name


def stored_runs() -> dict[tuple[int, float], list[dict[str, Any]]]:
    """The comparisons that the quickstart wrote, by batch size and learning rate."""
    runs: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for path in sorted((ROOT / "recipes/quickstart/results").glob("*.json")):
        run = json.loads(path.read_text())
        key = run["settings"]["batch_size"], run["settings"]["lr"]
        runs.setdefault(key, []).append(run["comparison"])
    return runs


def spread(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.3f} ± {stdev(values):.3f}"


def test_table_of_results_is_that_of_the_stored_runs() -> None:
    text = (ROOT / "recipes/quickstart/README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+e-\d) \|(.*)\|$", text, re.MULTILINE)
    runs = stored_runs()
    assert {(int(batch), float(lr)) for batch, lr, _ in rows} == set(runs)
    for batch, lr, cells in rows:
        chosen = runs[int(batch), float(lr)]
        base = [c["baseline_final"] for c in chosen]
        treated = [c["final"] for c in chosen]
        gaps = [b - a for a, b in zip(base, treated, strict=True)]
        assert len(chosen) >= 3
        expected = [spread(base), spread(treated), spread(gaps, "+")]
        assert [cell.strip() for cell in cells.split("|")][:3] == expected


def test_best_against_best_is_that_of_the_stored_runs() -> None:
    text = (ROOT / "recipes/quickstart/README.md").read_text()
    runs = stored_runs()
    stated = re.findall(r"best against best by (\d\.\d{3})", text)
    batches = sorted({batch for batch, _ in runs})
    assert len(stated) == len(batches)
    for gap, batch in zip(stated, batches, strict=True):
        tried = [chosen for (size, _), chosen in runs.items() if size == batch]
        base, treated = (
            min(mean(c[key] for c in chosen) for chosen in tried)
            for key in ("baseline_final", "final")
        )
        assert gap == f"{base - treated:.3f}"


@pytest.mark.filterwarnings("ignore")
def test_default_callback_trains_a_run_of_any_length(tmp_path: Path) -> None:
    from tests.toys import make_trainer

    for num_steps in (1, 2, 7):
        trainer = make_trainer(EMANesterov(), max_steps=num_steps, default_root_dir=tmp_path)
        trainer.fit(Toy(adamw), loader(num_steps))
        assert trainer.global_step == num_steps
