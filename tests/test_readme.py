"""What the README says is what the code does."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys import Toy, adamw, loader

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.metrics import StepMetrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in blocks("python"):
        exec(code, namespace)
    assert namespace["trainer"].global_step == 100  # type: ignore[attr-defined]
    assert list(tmp_path.rglob("*.ckpt"))


def test_yaml_block_builds_the_callback() -> None:
    [config] = blocks("yaml")
    [entry] = yaml.safe_load(config)["trainer"]["callbacks"]
    assert entry["class_path"] == "lightning_ema_nesterov.EMANesterov"
    EMANesterov(**entry["init_args"])


def test_table_of_arguments_has_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| `?([\w.]+)`? \|", README, re.MULTILINE)
    parameters = inspect.signature(EMANesterov).parameters
    assert dict(rows) == {name: str(p.default) for name, p in parameters.items()}


def test_table_of_tags_is_complete() -> None:
    tags = re.findall(r"^\| `(ema_nesterov/\w+)` \|", README, re.MULTILINE)
    assert tags == list(StepMetrics(0.0, 0.0, 0.0, 0.0).as_scalars())


def test_the_two_commands_are_one_line_each_and_use_the_constraints() -> None:
    lines = [block.strip() for block in blocks("bash")][:2]
    for line, end in zip(lines, ("ema-nesterov quickstart", "pytest"), strict=True):
        assert "\n" not in line
        assert "-c constraints.txt" in line
        assert line.endswith(f".venv/bin/{end}")


def test_files_that_the_readme_links_to_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_nothing_large_is_committed() -> None:
    result = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    for name in result.stdout.splitlines():
        assert not (ROOT / name).exists() or (ROOT / name).stat().st_size <= 250_000, name


def test_results_in_the_readme_are_those_of_the_stored_runs() -> None:
    """Each row of the table is recomputed from the JSON files that the quickstart wrote."""
    import json
    from statistics import mean, stdev

    runs = [json.loads(p.read_text()) for p in (ROOT / "recipes/quickstart/results").glob("*.json")]
    rows = re.findall(r"^\| (\d+) \| ([\d.]+e-\d) \|(.*)\|$", README, re.MULTILINE)

    def key(run: dict[str, Any]) -> tuple[int, float]:
        return run["settings"]["batch_size"], run["settings"]["lr"]

    assert {(int(batch), float(lr)) for batch, lr, _ in rows} == {key(run) for run in runs}
    for batch, lr, cells in rows:
        chosen = [run["comparison"] for run in runs if key(run) == (int(batch), float(lr))]
        base = [c["baseline_final"] for c in chosen]
        treated = [c["final"] for c in chosen]
        gaps = [b - a for a, b in zip(base, treated, strict=True)]
        assert len(chosen) >= 3
        expected = [
            *(f"{mean(v):.3f} ± {stdev(v):.3f}" for v in (base, treated)),
            f"{mean(gaps):+.3f} ± {stdev(gaps):.3f}",
        ]
        assert [cell.strip() for cell in cells.split("|")][:3] == expected


@pytest.mark.filterwarnings("ignore")
def test_default_callback_trains_a_run_of_any_length(tmp_path: Path) -> None:
    from toys import make_trainer

    for num_steps in (1, 2, 7):
        trainer = make_trainer(EMANesterov(), max_steps=num_steps, default_root_dir=tmp_path)
        trainer.fit(Toy(adamw), loader(num_steps))
        assert trainer.global_step == num_steps
