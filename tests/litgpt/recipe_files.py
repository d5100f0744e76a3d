"""The shipped recipes: their files, and what LitGPT's parser makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from litgpt import pretrain
from litgpt.utils import CLI

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GENERIC = RECIPES / "ema_nesterov.yaml"
SCHEDULE = "lightning_ema_nesterov.litgpt.warmup_stable_decay"
EMA_NESTEROV = "lightning_ema_nesterov.litgpt.ema_nesterov"
LOW_RANK = "lightning_ema_nesterov.litgpt.low_rank"
BY_ROLE = "lightning_ema_nesterov.litgpt.by_role"


@dataclass(frozen=True)
class Expected:
    parameters: int
    tokens_per_step: int
    num_steps: int
    baseline_of: Mapping[str, str]


EXPECTED = {
    "quickstart": Expected(
        parameters=918_656,
        tokens_per_step=8 * 128,
        num_steps=1_000,
        baseline_of={"ema_nesterov": "base", "ema_nesterov_muon": "muon"},
    ),
    "gpt2-124m": Expected(
        parameters=123_587_328,
        tokens_per_step=524_288,
        num_steps=6_200,
        baseline_of={
            "ema_nesterov_adamw": "base",
            "ema_nesterov_muon": "muon",
            "ema_nesterov_normuon": "normuon",
            "ema_nesterov_soap": "soap",
        },
    ),
    **{
        name: Expected(
            parameters=parameters,
            tokens_per_step=256 * num_sequences,
            num_steps=num_steps,
            baseline_of={
                "ema_nesterov": "base",
                "ema_nesterov_adamw": "adamw",
                "ema_nesterov_scale": "scale",
            },
        )
        for name, parameters, num_sequences, num_steps in [
            ("llama-60m", 58_073_600, 2_048, 2_500),
            ("llama-130m", 134_105_856, 4_096, 2_500),
            ("llama-350m", 367_969_280, 12_288, 2_500),
            ("llama-1b", 1_339_082_752, 16_384, 5_000),
        ]
    },
}

FORMS = [
    (name, form)
    for name in EXPECTED
    for form in sorted([p.stem for p in (RECIPES / name).glob("*.yaml")] + ["generic"])
]
EMA_FORMS = [(name, form) for name, expected in EXPECTED.items() for form in expected.baseline_of]


def cases(*names: tuple[str, ...]) -> list[Any]:
    """Return cases by the name of a model; the quick lane has those of the quickstart."""
    repeated = [pytest.mark.slow, pytest.mark.no_cover]
    return [
        pytest.param(*case, marks=[] if case[0] == "quickstart" else repeated) for case in names
    ]


def files_of(name: str, form: str) -> tuple[Path, ...]:
    base = RECIPES / name / "base.yaml"
    if form == "base":
        return (base,)
    return base, GENERIC if form == "generic" else RECIPES / name / f"{form}.yaml"


@cache
def parse(*files: Path) -> Mapping[str, Any]:
    """Return what LitGPT's own command line makes of the files: the arguments of its main."""
    arguments = [word for file in files for word in ("--config", str(file))]
    with (
        mock.patch("sys.argv", ["litgpt", *arguments]),
        mock.patch.object(pretrain, "main") as main,
        mock.patch.object(pretrain, "Tokenizer"),
        mock.patch.object(pretrain, "choose_logger"),
    ):
        CLI(pretrain.setup)
    main.assert_called_once()
    return dict(main.call_args.kwargs)


def read(file: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(file.read_text())
    assert isinstance(loaded, dict)
    return loaded


def layers_of(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield an optimizer block and the blocks nested in it, outermost first."""
    yield spec
    for value in spec["init_args"].values():
        if isinstance(value, Mapping):
            yield from layers_of(value)


def layer(spec: Mapping[str, Any], class_path: str) -> Mapping[str, Any]:
    (found,) = [args for args in layers_of(spec) if args["class_path"] == class_path]
    init_args = found["init_args"]
    assert isinstance(init_args, dict)
    return init_args
