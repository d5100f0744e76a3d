"""The shipped recipes: LitGPT's parser accepts them, and their numbers agree."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT

from tests.litgpt.recipe_files import (
    EMA_FORMS,
    EMA_NESTEROV,
    EXPECTED,
    FORMS,
    RECIPES,
    SCHEDULE,
    cases,
    files_of,
    layer,
    parse,
    read,
)


def in_steps(duration: int | float, num_steps: int) -> int:
    return duration if isinstance(duration, int) else round(duration * num_steps)


def test_every_file_belongs_to_a_model_that_is_tested() -> None:
    paths = {path.relative_to(RECIPES) for path in RECIPES.rglob("*.yaml")}
    # Studies are not LitGPT's: tests/experiments has them.
    found = {path.as_posix() for path in paths if path.parts[0] != "studies"}
    forms = {f"{name}/{form}.yaml" for name, form in FORMS if form != "generic"}
    assert found == forms | {"ema_nesterov.yaml"}
    assert all(f"{name}/base.yaml" in found for name in EXPECTED)


@pytest.mark.parametrize(("name", "form"), cases(*FORMS))
def test_litgpt_parses_it_and_an_overlay_changes_no_more_than_it_names(
    name: str, form: str
) -> None:
    base, parsed = parse(*files_of(name, "base")), parse(*files_of(name, form))
    overlay = read(files_of(name, form)[-1])
    assert parsed["optimizer"] == overlay["optimizer"]
    if form == "base":
        assert overlay["num_nodes"] == 1
        return
    assert {"optimizer"} <= set(overlay) <= {"optimizer", "out_dir", "train"}
    train = dataclasses.replace(base["train"], **overlay.get("train", {}))
    assert parsed["train"] == train
    unchanged = set(base) - {"fabric", "optimizer", "train", "out_dir", "data", "tokenizer"}
    assert {key: parsed[key] for key in unchanged} == {key: base[key] for key in unchanged}
    assert type(parsed["data"]) is type(base["data"])
    assert (parsed["out_dir"] == base["out_dir"]) == (form == "generic")


@pytest.mark.parametrize("name", cases(*((name,) for name in EXPECTED)))
def test_runs_of_a_model_write_side_by_side(name: str) -> None:
    forms = [form for model, form in FORMS if model == name and form != "generic"]
    folders = {parse(*files_of(name, form))["out_dir"] for form in forms}
    assert {folder.parent for folder in folders} == {Path("out") / name}
    assert len(folders) == len(forms)


def test_parser_refuses_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = read(RECIPES / "quickstart" / "base.yaml")
    wrong["train"]["max_token"] = 1
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(SystemExit):
        parse(tmp_path / "wrong.yaml")
    assert "max_token" in capsys.readouterr().err


@pytest.mark.parametrize("name", cases(*((name,) for name in EXPECTED)))
def test_model_has_the_parameters_that_the_header_states(name: str) -> None:
    parsed = parse(*files_of(name, "base"))
    with torch.device("meta"):
        model = GPT(parsed["config"])
    if parsed["train"].tie_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    assert sum(p.numel() for p in model.parameters()) == EXPECTED[name].parameters
    header = (RECIPES / name / "base.yaml").read_text().partition("\nmodel_name:")[0]
    assert f"{EXPECTED[name].parameters:,} parameters" in header


@pytest.mark.parametrize("name", cases(*((name,) for name in EXPECTED)))
def test_run_has_the_tokens_and_steps_that_the_header_states(name: str) -> None:
    train = parse(*files_of(name, "base"))["train"]
    expected = EXPECTED[name]
    assert train.global_batch_size * train.max_seq_length == expected.tokens_per_step
    for num_devices in (1, 2, 8):
        # As LitGPT counts: micro-batches of one device, over those that make a step. The batch of
        # the quickstart is one micro-batch.
        num_ranks = 1 if name == "quickstart" else num_devices
        accumulated = train.gradient_accumulation_iters(num_ranks)
        micro_batch = train.micro_batch_size * train.max_seq_length
        assert accumulated * num_ranks * micro_batch == expected.tokens_per_step
        assert train.max_tokens // num_ranks // micro_batch // accumulated == expected.num_steps
    header = (RECIPES / name / "base.yaml").read_text().partition("\nmodel_name:")[0]
    assert f"{train.max_tokens:,}" in header
    assert f"{expected.num_steps:,} steps of {train.global_batch_size:,} sequences" in header


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("llama")])
def test_header_and_readme_install_the_same_packages_for_c4(name: str) -> None:
    header = (RECIPES / name / "base.yaml").read_text().partition("\nmodel_name:")[0]
    lines = re.findall(r"^#   (pip .*)$", header, re.MULTILINE)
    assert len(lines) == 2
    assert "\n".join(lines) in (RECIPES / "README.md").read_text()


SECONDS = {"minutes": 60.0, "hours": 3600.0, "days": 86400.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "quickstart"])
def test_estimates_in_the_header_add_up(name: str) -> None:
    """Operations: 6 per parameter and token, and the attention's; time: at 30 % of 989e12 per s."""
    parsed = parse(*files_of(name, "base"))
    config, train = parsed["config"], parsed["train"]
    embedding = 0 if train.tie_embeddings else config.padded_vocab_size * config.n_embd
    parameters = EXPECTED[name].parameters - embedding
    attention = 12 * config.n_layer * config.n_embd * train.max_seq_length
    operations = (6 * parameters + attention) * train.max_tokens
    text = (RECIPES / name / "base.yaml").read_text()
    header = " ".join(text.partition("\nmodel_name:")[0].replace("#", " ").split())
    factors = f"12 x {config.n_layer} x {config.n_embd:,} x {train.max_seq_length:,} operations"
    assert f"6 x {parameters / 1e6:,.1f}M + {factors}" in header
    assert f" are {operations:.1e}".replace("e+", "e") + " in all" in header
    stated = re.findall(r"([\d.]+) (minutes|hours|days) on (one|eight)", header)
    assert [devices for *_, devices in stated] == ["one", "eight"]
    for number, unit, devices in stated:
        seconds = operations / (0.3 * 989e12) / {"one": 1, "eight": 8}[devices]
        digits = len(number.replace(".", ""))
        assert float(f"{seconds / SECONDS[unit]:.{digits}g}") == float(number)


@pytest.mark.parametrize(("name", "form"), cases(*FORMS))
def test_phases_fit_into_the_run(name: str, form: str) -> None:
    parsed, num_steps = parse(*files_of(name, form)), EXPECTED[name].num_steps
    schedule = layer(parsed["optimizer"], SCHEDULE)
    decay = in_steps(schedule["decay"], num_steps)
    assert 0 < decay < num_steps - parsed["train"].lr_warmup_steps
    if "ema_nesterov" in form or form == "generic":
        method = layer(parsed["optimizer"], EMA_NESTEROV)
        warmup, rest = (in_steps(method[key], num_steps) for key in ("warmup", "rest"))
        # Long enough to fill half of the average, and in the decay when it ends.
        assert method["ema_decay"] ** warmup < 0.5
        assert 0 < rest < num_steps / 2
        assert warmup + rest < num_steps


@pytest.mark.parametrize(("name", "form"), cases(*EMA_FORMS))
def test_ema_nesterov_is_added_to_the_very_optimizer_of_its_baseline(name: str, form: str) -> None:
    with_method = parse(*files_of(name, form))
    baseline = parse(*files_of(name, EXPECTED[name].baseline_of[form]))
    assert with_method["train"] == baseline["train"]
    inner, outer = layer(with_method["optimizer"], SCHEDULE), layer(baseline["optimizer"], SCHEDULE)
    method = inner["optimizer"]
    assert method["class_path"] == EMA_NESTEROV
    assert {**inner, "optimizer": method["init_args"]["base"]} == outer
