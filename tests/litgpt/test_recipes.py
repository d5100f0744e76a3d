"""The shipped recipes: LitGPT's parser accepts them, their numbers agree, each runs two steps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from lightning import Fabric
from litgpt import GPT, Config, pretrain
from litgpt.utils import CLI
from torch import Tensor, nn

from lightning_ema_nesterov.litgpt import StdlibBytes, TextBytes, TokenShards

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GENERIC = RECIPES / "ema_nesterov.yaml"
SCHEDULE = "lightning_ema_nesterov.litgpt.warmup_stable_decay"
EMA_NESTEROV = "lightning_ema_nesterov.litgpt.ema_nesterov"
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
            baseline_of={"ema_nesterov": "base", "ema_nesterov_adamw": "adamw"},
        )
        for name, parameters, num_sequences, num_steps in [
            ("llama-60m", 58_073_600, 2_048, 2_500),
            ("llama-130m", 134_105_856, 4_096, 2_500),
            ("llama-350m", 367_969_280, 12_288, 2_500),
            ("llama-1b", 1_339_082_752, 16_384, 5_000),
        ]
    },
}

# What the optimizer of the hidden matrices keeps, and no other optimizer here.
STATE_OF = {
    "torch.optim.AdamW": "exp_avg_sq",
    "torch.optim.Muon": "momentum_buffer",
    "pytorch_optimizer.NorMuon": "second_momentum_buffer",
    "pytorch_optimizer.SOAP": "GG",
}

FORMS = [
    (name, form)
    for name in EXPECTED
    for form in sorted([p.stem for p in (RECIPES / name).glob("*.yaml")] + ["generic"])
]
EMA_FORMS = [(name, form) for name, expected in EXPECTED.items() for form in expected.baseline_of]


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


def in_steps(duration: int | float, num_steps: int) -> int:
    return duration if isinstance(duration, int) else round(duration * num_steps)


def test_every_file_belongs_to_a_model_that_is_tested() -> None:
    # Studies are not LitGPT's; test_study.py has them.
    paths = [path for path in RECIPES.rglob("*.yaml") if path.parent.name != "studies"]
    found = {path.relative_to(RECIPES).as_posix() for path in paths}
    forms = {f"{name}/{form}.yaml" for name, form in FORMS if form != "generic"}
    assert found == forms | {"ema_nesterov.yaml"}
    assert all(f"{name}/base.yaml" in found for name in EXPECTED)


@pytest.mark.parametrize(("name", "form"), FORMS)
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


@pytest.mark.parametrize("name", EXPECTED)
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


@pytest.mark.parametrize("name", EXPECTED)
def test_model_has_the_parameters_that_the_header_states(name: str) -> None:
    parsed = parse(*files_of(name, "base"))
    with torch.device("meta"):
        model = GPT(parsed["config"])
    if parsed["train"].tie_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    assert sum(p.numel() for p in model.parameters()) == EXPECTED[name].parameters
    header = (RECIPES / name / "base.yaml").read_text().partition("\nmodel_name:")[0]
    assert f"{EXPECTED[name].parameters:,} parameters" in header


@pytest.mark.parametrize("name", EXPECTED)
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


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("llama")])
def test_header_and_readme_install_the_same_packages_for_c4(name: str) -> None:
    header = (RECIPES / name / "base.yaml").read_text().partition("\nmodel_name:")[0]
    lines = re.findall(r"^#   (pip .*)$", header, re.MULTILINE)
    assert len(lines) == 2
    assert "\n".join(lines) in (RECIPES / "README.md").read_text()


SECONDS = {"minutes": 60.0, "hours": 3600.0, "days": 86400.0}


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


@pytest.mark.parametrize(("name", "form"), FORMS)
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


@pytest.mark.parametrize(("name", "form"), EMA_FORMS)
def test_ema_nesterov_is_added_to_the_very_optimizer_of_its_baseline(name: str, form: str) -> None:
    with_method = parse(*files_of(name, form))
    baseline = parse(*files_of(name, EXPECTED[name].baseline_of[form]))
    assert with_method["train"] == baseline["train"]
    inner, outer = layer(with_method["optimizer"], SCHEDULE), layer(baseline["optimizer"], SCHEDULE)
    method = inner["optimizer"]
    assert method["class_path"] == EMA_NESTEROV
    assert {**inner, "optimizer": method["init_args"]["base"]} == outer


# Two steps of each.


@dataclass
class Shrunk:
    """A run whose sizes are small, with the optimizer, schedule and precision of the recipe.

    Attributes:
        model: The model at the end.
        before: Its parameters before the first step.
        state: State of the optimizer for each parameter.
        num_steps: Optimizer steps that LitGPT counted.
        lrs: Learning rate in each step.
        step_sizes: Current lookahead step size in each step, 0 where it is not logged.
        losses: Training loss in each step.
    """

    model: nn.Module
    before: dict[str, Tensor]
    state: Mapping[nn.Parameter, Mapping[str, Any]]
    num_steps: int
    lrs: list[float] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


SEQUENCES, LENGTH, NUM_STEPS = 4, 16, 2


def shrunk_optimizer(spec: Any, factor: float) -> Any:
    """Scale the counts of steps; nothing else changes."""
    if not isinstance(spec, Mapping):
        return spec
    return {
        key: round(value * factor)
        if key in {"decay", "warmup", "rest"} and isinstance(value, int)
        else shrunk_optimizer(value, factor)
        for key, value in spec.items()
    }


def shrunk_model(name: str) -> Config:
    small = {
        "block_size": 2 * LENGTH,
        "vocab_size": 256,
        "padded_vocab_size": 256,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "intermediate_size": 48,
    }
    return Config(**{**read(RECIPES / name / "base.yaml")["model_config"], **small})


def write_shard(path: Path, *, seed: int) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 2_000
    tokens = np.random.default_rng(seed).integers(0, 256, 2_000).astype("<u2")
    path.write_bytes(header.tobytes() + tokens.tobytes())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_shard(folder / "train_1.bin", seed=0)
    write_shard(folder / "train_2.bin", seed=1)
    write_shard(folder / "val_1.bin", seed=2)
    (folder / "text.py").write_text("".join(f"x_{i} = {i * i}\n" for i in range(500)))
    return folder


def run_shrunk(parsed: Mapping[str, Any], name: str, text: Path, out_dir: Path) -> Shrunk:
    factor = NUM_STEPS / EXPECTED[name].num_steps
    train = parsed["train"]
    # Accumulation stays accumulation.
    is_accumulating = train.gradient_accumulation_iters(1) > 1
    small = dataclasses.replace(
        train,
        global_batch_size=SEQUENCES,
        micro_batch_size=SEQUENCES // 2 if is_accumulating else SEQUENCES,
        lr_warmup_steps=round(train.lr_warmup_steps * factor),
        max_tokens=NUM_STEPS * SEQUENCES * LENGTH,
        max_seq_length=LENGTH,
        log_interval=1,
    )
    data = (
        TextBytes(path=text / "text.py", cache_dir=text / "bytes")
        if isinstance(parsed["data"], StdlibBytes)
        else TokenShards(train=str(text / "train_*.bin"), val=str(text / "val_*.bin"))
    )
    fabric = Fabric(accelerator="cpu", devices=1, precision=read_precision(name))
    logged: list[dict[str, float]] = []
    vars(fabric)["log_dict"] = lambda metrics, step=None: logged.append(metrics)
    snapshots: list[dict[str, Tensor]] = []
    validate = pretrain.validate

    def validate_and_look(fabric: Fabric, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        snapshots.append({key: p.detach().clone() for key, p in model.named_parameters()})
        loss = validate(fabric, model, *args, **kwargs)
        assert isinstance(loss, Tensor)
        return loss

    with (
        mock.patch.object(torch, "compile", lambda model: model),
        mock.patch.object(pretrain, "save_checkpoint") as save_checkpoint,
        mock.patch.object(pretrain, "validate", validate_and_look),
    ):
        pretrain.main(
            **{
                **parsed,
                "fabric": fabric,
                "devices": 1,
                "config": shrunk_model(name),
                "data": data,
                "out_dir": out_dir,
                "tokenizer": None,
                "tokenizer_dir": None,
                "train": small,
                "eval": dataclasses.replace(parsed["eval"], max_iters=2),
                "optimizer": shrunk_optimizer(parsed["optimizer"], factor),
            }
        )
    _, end, *_ = save_checkpoint.call_args.args
    steps = [metrics for metrics in logged if "learning_rate" in metrics]
    return Shrunk(
        model=end["model"],
        before=snapshots[0],
        state=end["optimizer"].optimizer.state,
        num_steps=end["step_count"],
        lrs=[metrics["learning_rate"] for metrics in steps],
        step_sizes=[metrics.get("ema_nesterov/step_size", 0.0) for metrics in steps],
        losses=[metrics["loss"] for metrics in steps],
    )


def read_precision(name: str) -> Any:
    return read(RECIPES / name / "base.yaml")["precision"]


@pytest.fixture(scope="module")
def run_of(text: Path) -> Callable[[str, str], Shrunk]:
    @cache
    def run(name: str, form: str) -> Shrunk:
        return run_shrunk(parse(*files_of(name, form)), name, text, text / "out" / name / form)

    return run


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_two_steps_train_every_parameter_with_the_optimizer_of_its_role(
    name: str, form: str, run_of: Callable[[str, str], Shrunk]
) -> None:
    run = run_of(name, form)
    assert run.num_steps == len(run.losses) == NUM_STEPS
    assert np.isfinite(run.losses).all()
    optimizer = parse(*files_of(name, form))["optimizer"]
    specs = {args["class_path"]: args["init_args"] for args in layers_of(optimizer)}
    (plain,) = [path for path in specs if path in STATE_OF] if BY_ROLE not in specs else [""]
    roles = specs.get(BY_ROLE, {})
    hidden = roles["hidden_matrices"]["class_path"] if roles else plain
    others = roles["others"]["class_path"] if roles else plain
    assert run.lrs[0] == specs[hidden]["lr"]
    for key, p in run.model.named_parameters():
        assert not torch.equal(p, run.before[key]), key
        is_hidden = ".h." in key and p.ndim == 2
        assert STATE_OF[hidden if is_hidden else others] in run.state[p], key


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_two_steps_look_ahead_with_the_method_and_not_without(
    name: str, form: str, run_of: Callable[[str, str], Shrunk]
) -> None:
    run = run_of(name, form)
    has_direction = ["ema_nesterov_direction" in state for state in run.state.values()]
    assert len(has_direction) == len(run.before)
    if form != "generic" and form not in EXPECTED[name].baseline_of:
        assert not any(has_direction)
        assert run.step_sizes == [0.0, 0.0]
        return
    assert all(has_direction)
    optimizer = parse(*files_of(name, form))["optimizer"]
    beta = layer(optimizer, EMA_NESTEROV)["lookahead_step_size"]
    assert run.step_sizes[1] == pytest.approx(beta * run.lrs[1] / max(run.lrs))
    assert run.step_sizes[1] > 0


def test_shrinking_still_refuses_an_argument_that_an_optimizer_lacks(
    text: Path, tmp_path: Path
) -> None:
    parsed = parse(*files_of("quickstart", "base"))
    spec = yaml.safe_load(yaml.safe_dump(parsed["optimizer"]))
    spec["init_args"]["optimizer"]["init_args"]["learning_rate"] = 1
    with pytest.raises(TypeError, match="learning_rate"):
        run_shrunk({**parsed, "optimizer": spec}, "quickstart", text, tmp_path)
