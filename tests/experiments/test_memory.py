"""The table of optimizer states: measured, counted by hand, and printed in the docs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from lightning_ema_nesterov.cli import main
from lightning_ema_nesterov.experiments.benchmark import memory
from lightning_ema_nesterov.experiments.benchmark.memory import as_markdown, measure_state
from lightning_ema_nesterov.experiments.benchmark.optimizers import (
    OPTIMIZERS,
    SIZES,
    Size,
    make_model,
)
from tests.litgpt.recipe_files import EXPECTED, RECIPES, read

PAGE = Path(__file__).parents[2] / "docs/memory_tables.md"
VOCAB = 32_000
TINY = Size(2, 2, 128, 192, 32, 32)


def shapes_of(size: Size) -> list[tuple[int, int]]:
    """The hidden matrices of LitGPT's LLaMA."""
    d, f = size.width, size.mlp_width
    return [(3 * d, d), (d, d), (f, d), (f, d), (d, f)] * size.num_layers


def counted(name: str, size: Size) -> float:
    """Numbers in the state, from the rules, without counts, norms and seeds."""
    d = size.width
    hidden = sum(p * q for p, q in shapes_of(size))
    embedding = head = VOCAB * d
    norms = (2 * size.num_layers + 1) * d
    rest = 2 * (embedding + head + norms)
    galore, apollo = size.galore_rank, size.apollo_rank

    def thin(side: Callable[[int, int], int], rank: int) -> int:
        return sum(side(p, q) * rank for p, q in shapes_of(size))

    both = sum(p + q for p, q in shapes_of(size))
    # pytorch_optimizer leaves sides above 10,000 without a basis.
    squares = sum(side**2 for shape in shapes_of(size) for side in shape if side <= 10_000)
    return {
        "AdamW": 2 * hidden + rest,
        "AdamW8bit": 2 * hidden + rest,
        "Muon": hidden + rest,
        "GaLore": 2 * thin(max, galore) + thin(min, galore) + rest,
        "Fira": 2 * thin(max, galore) + thin(min, galore) + rest,
        "APOLLO": 2 * thin(max, apollo) + rest,
        "APOLLO-Mini": 2 * thin(max, 1) + rest,
        "SCALE": head + 2 * norms,
        "ClippedSGD": hidden + embedding + head + norms,
        "LoRAPre": 2 * both * size.lora_pre_rank + rest,
        "low rank": 2 * both * size.low_rank + rest,
        "SOAP": 2 * hidden + 2 * squares + rest,
    }[name]


measured = cache(measure_state)
QUICK = [("SCALE", "60M"), ("GaLore", "60M"), ("APOLLO", "60M"), ("low rank", "60M")]


def repeated(size: str) -> list[pytest.MarkDecorator]:
    """Marks of a case that repeats others; the smallest size has each optimizer's lines."""
    return [pytest.mark.slow, *([] if size == "60M" else [pytest.mark.no_cover])]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[] if (name, size) in QUICK else repeated(size))
        for name in OPTIMIZERS
        for size in SIZES
    ],
)
def test_numbers_are_those_that_the_rules_keep(name: str, size: str) -> None:
    found = measured(name, size)
    expected = counted(name, SIZES[size]) / found.num_parameters
    # A step count, norm and seed for each of a few hundred tensors.
    assert found.elements == pytest.approx(expected, abs=1e-4)
    assert found.direction_bytes["float32"] == 2 * found.direction_bytes["bfloat16"]


def test_sizes_are_those_of_the_recipes() -> None:
    for size, numbers in SIZES.items():
        model = make_model(numbers, "meta")
        count = sum(p.numel() for p in model.parameters())
        if size == "7B":
            assert count == pytest.approx(6738.42e6, abs=5e3)
            continue
        name = f"llama-{size.lower()}"
        assert count == EXPECTED[name].parameters
        ranks = read(RECIPES / name / "low_rank.yaml")["optimizer"]["init_args"]["rank"]
        assert ranks == numbers.low_rank
        spec = read(RECIPES / name / "apollo.yaml")["optimizer"]["init_args"]["optimizer"]
        assert spec["init_args"]["rank"] == numbers.apollo_rank


@pytest.mark.parametrize("name", ["AdamW", "SCALE", "GaLore", "APOLLO", "LoRAPre", "low rank"])
def test_meta_device_gives_what_a_real_step_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SIZES", {"tiny": TINY})
    monkeypatch.setattr(memory, "make_model", make_small)
    assert measure_state(name, "tiny", device="meta") == measure_state(name, "tiny", device="cpu")


def make_small(size: Size, device: str) -> torch.nn.Module:
    model = make_model(size, device)
    model.lm_head = torch.nn.Linear(size.width, 64, bias=False, device=device)
    transformer = model.get_submodule("transformer")
    transformer.wte = torch.nn.Embedding(64, size.width, device=device)
    return model


@pytest.mark.parametrize("size", [pytest.param(size, marks=repeated(size)) for size in SIZES])
def test_page_prints_what_is_measured(size: str) -> None:
    text = PAGE.read_text()
    rows = [memory._HEADER, *(measured(name, size).as_row() for name in OPTIMIZERS)]
    assert f"## LLaMA {size}\n\n{as_markdown(rows)}\n" in text


def test_row_of_the_page_is_what_is_measured() -> None:
    [row, *_] = as_markdown([measure_state("SCALE", "60M").as_row()]).splitlines()
    assert f"{row}\n" in PAGE.read_text()


def test_page_on_memory_repeats_the_rows_of_the_largest_recipe() -> None:
    section = PAGE.read_text().partition("## LLaMA 1B\n")[2].partition("\n## ")[0]
    rows = [
        line
        for line in section.splitlines()
        if line.startswith(tuple(f"| {n} |" for n in OPTIMIZERS))
    ]
    repeated = (PAGE.parent / "memory.md").read_text()
    assert len(rows) == len(OPTIMIZERS)
    for row in rows:
        assert f"\n{row} " in repeated


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", *arguments])
    main()


def test_commands_print_a_table_and_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "memory", "--sizes", "60M", "--optimizers", "[SCALE, APOLLO]")
    text = (tmp_path / "out/memory.md").read_text()
    assert "| SCALE | 0.282 | 1.13 | 5.13 | 3.13 | 2.16 |" in text
    assert "Tables: out/memory.md" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmark_times_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "benchmark", "--optimizers", "[SCALE, AdamW]", "--num_rounds", "1")
    figures = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert [row["optimizer"] for row in figures["steps"]] == ["SCALE", "AdamW"]
    assert all(row["step_ms"] > 0 for row in figures["steps"])
    assert f"{figures['steps'][0]['over_adamw']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory", "--sizes", "[70B]"], "sizes must be all or of 60M, 130M, 350M, 1B, 7B, got"),
        (["memory", "--optimizers", "[Adam]"], "optimizers must be all or of AdamW, Muon, SOAP"),
        (["benchmark", "--optimizers", "[Adam]"], "optimizers must be all or of AdamW, Muon"),
        (["benchmark", "--optimizers", "all", "--num_rounds", "0"], "num_rounds must be at least"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert str(end.value).startswith(f"ema-nesterov: {message}")
    assert not list(tmp_path.iterdir())
