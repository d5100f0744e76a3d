"""Two and three CPU processes equal one; sharded checkpoints continue on another number."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core import reference
from tests.distributed.processes import Result, difference, launch
from tests.distributed.worker import Model, Tokens

# What is trained, and how. The oracle is one process with the whole batch.
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp1": {"strategy": "fsdp1"},
    "fsdp1-grad-op": {"strategy": "fsdp1", "sharding": "SHARD_GRAD_OP"},
    "fsdp1-flat": {"strategy": "fsdp1", "use_orig_params": False},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2-no-reshard": {"strategy": "fsdp2", "reshard_after_forward": False},
    "tensor-parallel": {"strategy": "fsdp2", "tensor_parallel": True},
    "ddp-compile": {"strategy": "ddp", "compile": True},
    "fsdp1-compile": {"strategy": "fsdp1", "compile": True},
    "fsdp2-compile": {"strategy": "fsdp2", "compile": True},
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp1": {"strategy": "fsdp1"},
    "fsdp1-flat": {"strategy": "fsdp1", "use_orig_params": False},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2-full": {"strategy": "fsdp2", "distributed_checkpoint": False},
    "fsdp1-full": {"strategy": "fsdp1", "state_dict_type": "full-after-check"},
    "fsdp1-grad-op": STRATEGIES["fsdp1-grad-op"],
    "fsdp2-no-reshard": STRATEGIES["fsdp2-no-reshard"],
    "tensor-parallel": STRATEGIES["tensor-parallel"],
}
BASES = ("adamw", "sgd", "momentum")
# Every base optimizer where the formats differ; where only the schedule of gathering does, one.
SAVED = [
    (name, base)
    for name in CHECKPOINTS
    for base in BASES
    if base == "adamw" or name in ("ddp", "fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-full")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one_process(folder: Path) -> dict[str, Result]:
    configs: list[dict[str, Any]] = [
        {"name": "one-plain", "strategy": "one", "plain": True},
        {"name": "one-accumulate", "strategy": "one", "accumulate": 2},
        *(
            {"name": f"one-{base}", "strategy": "one", "optimizer": base}
            for base in (*BASES, "muon")
        ),
        {"name": "one-muon-alone", "strategy": "one", "optimizer": "muon", "plain": True},
    ]
    return launch(folder, 1, configs)


@pytest.mark.parametrize(("name", "accumulate"), [("one-adamw", 1), ("one-accumulate", 2)])
def test_one_process_equals_the_reference(
    name: str, accumulate: int, one_process: dict[str, Result]
) -> None:
    """What the runs on several processes are compared with, in float64 and without our code."""
    model = Model({"strategy": "one"}).double()
    names = [name for name, _ in model.named_parameters()]
    tokens = Tokens(2 * accumulate)

    def gradients(params: list[Tensor], step_idx: int) -> Sequence[Tensor]:
        named = dict(zip(names, params, strict=True))
        window = range(step_idx * accumulate, (step_idx + 1) * accumulate)
        with torch.enable_grad():
            losses = [functional_call(model, named, tokens[i % len(tokens)]) for i in window]
            return torch.autograd.grad(torch.stack(losses).mean(), params)

    trajectory, directions = reference.train(
        [p.detach() for p in model.parameters()],
        gradients,
        lambda params: torch.optim.AdamW(params, lr=1e-2),
        num_steps=8,
        ema_decay=0.9,
        step_size=lambda t: 0.5 if t else 0.0,
    )
    expected = {f"weight.{n}": x for n, x in zip(names, trajectory[-1], strict=True)}
    expected |= {f"{DIRECTION_KEY}.{n}": m for n, m in zip(names, directions, strict=True)}
    assert difference(one_process[name], {"tensors": expected}) < 1e-5  # float32 rounding
    assert difference(one_process["one-plain"], {"tensors": expected}, "weight") > 1e-2


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> dict[str, Result]:
    """Each strategy with a validation in every epoch, and with one inside accumulation windows."""
    configs: list[dict[str, Any]] = []
    for name, options in STRATEGIES.items():
        configs.append({"name": name, "validate": True, "count": True, **options})
        configs.append(
            {
                "name": f"{name}-accumulate",
                "validate": True,
                "val_check_interval": 3,
                "accumulate": 2,
                **options,
            }
        )
    return launch(folder, 2, configs)


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_equal_one(
    name: str, one_process: dict[str, Result], two_processes: dict[str, Result]
) -> None:
    # float32 rounding of the sums over two halves of the batch, after 8 steps of AdamW.
    assert difference(two_processes[name], one_process["one-adamw"]) < 1e-5
    accumulated = two_processes[f"{name}-accumulate"]
    assert difference(accumulated, one_process["one-accumulate"]) < 1e-5
    plain = one_process["one-plain"]
    assert difference(one_process["one-adamw"], plain, "weight") > 1e-2


@pytest.mark.parametrize("name", STRATEGIES)
def test_moves_and_updates_do_not_communicate(name: str, two_processes: dict[str, Result]) -> None:
    counts = two_processes[name]["counts"]
    assert len(counts) > 20
    assert set(counts) == {0}


def test_without_resharding_the_run_differs(folder: Path, one_process: dict[str, Result]) -> None:
    """The trap is real: a validation leaves gathered parameters that the next step would use."""
    configs: list[dict[str, Any]] = [
        {
            "name": f"stale-{name}",
            "validate": True,
            "never_reshard": True,
            **STRATEGIES[name],
        }
        for name in ("fsdp1", "fsdp1-grad-op", "fsdp2", "fsdp2-no-reshard")
    ]
    for name in ("fsdp1", "fsdp1-grad-op", "fsdp2", "fsdp2-no-reshard"):
        options = {"evaluate_after_step": True, "never_reshard": True, **ATTACHED[name]}
        configs.append({"name": f"stale-attached-{name}", **options})
    for result in launch(folder, 2, configs).values():
        assert difference(result, one_process["one-adamw"], "weight") > 1e-3


ATTACHED: dict[str, dict[str, Any]] = {
    "ddp": {"attach": "ddp"},
    "fsdp1": {"attach": "fsdp1"},
    "fsdp1-grad-op": {"attach": "fsdp1", "sharding": "SHARD_GRAD_OP"},
    "fsdp1-flat": {"attach": "fsdp1", "use_orig_params": False},
    "fsdp2": {"attach": "fsdp2"},
    "fsdp2-no-reshard": {"attach": "fsdp2", "reshard_after_forward": False},
    "fabric-ddp": {"attach": "fabric-ddp"},
    "fabric-fsdp1": {"attach": "fabric-fsdp1"},
    "fabric-fsdp2": {"attach": "fabric-fsdp2"},
}


# torch.distributed.checkpoint without Fabric, which fails for FSDP (1) alone too, and Fabric.
ATTACHED_SAVED = ("ddp", "fsdp2", "fabric-ddp", "fabric-fsdp1", "fabric-fsdp2")


def test_attached_to_a_loop_of_ones_own(folder: Path, one_process: dict[str, Result]) -> None:
    """Evaluation after every micro-batch; no_sync in the windows where there is one."""
    configs: list[dict[str, Any]] = []
    for name, options in ATTACHED.items():
        configs.append({"name": f"attached-{name}", **options})
        configs.append({"name": f"attached-{name}-accumulate", "accumulate": 2, **options})
        # torch.compile fails for FSDP1 in evaluation while it holds gradients, with or without us.
        if "fabric" not in name:
            compiled = {"compile": True, "evaluate_after_step": True, **options}
            configs.append({"name": f"attached-{name}-compile", **compiled})
        configs.append({"name": f"attached-{name}-ac", "activation_checkpointing": True, **options})
    for name, result in launch(folder, 2, configs).items():
        kind = "accumulate" if name.endswith("accumulate") else "adamw"
        assert difference(result, one_process[f"one-{kind}"], "weight") < 1e-5, name


def test_two_dimensional_meshes(folder: Path, one_process: dict[str, Result]) -> None:
    """Data beside tensor parallelism, and shards that are replicated, on four processes."""
    kinds = {"tp": "tp", "fsdp1-hybrid": "fsdp1-hybrid", "fsdp2-hybrid": "fsdp2"}
    configs: list[dict[str, Any]] = []
    for name, kind in kinds.items():
        sharding = {"sharding": "HYBRID_SHARD"} if kind == "fsdp1-hybrid" else {}
        configs.append({"name": f"four-{name}", "attach": kind, **sharding})
        configs.append(
            {"name": f"four-{name}-accumulate", "attach": kind, "accumulate": 2, **sharding}
        )
    trained: dict[str, Any] = {"strategy": "fsdp2", "tensor_parallel": 2}
    path = str(folder / "four-trainer")
    configs += [
        {"name": "four-trainer", "validate": True, **trained},
        {"name": "four-saved", "num_steps": 4, "save": path, **trained},
        {"name": "four-resumed", "load": path, **trained},
        {"name": "four-measured", "measure": True, **trained},
    ]
    results = launch(folder, 4, configs)
    for name in kinds:
        accumulated = results[f"four-{name}-accumulate"]
        assert difference(results[f"four-{name}"], one_process["one-adamw"], "weight") < 1e-5, name
        assert difference(accumulated, one_process["one-accumulate"], "weight") < 1e-5, name
    assert difference(results["four-trainer"], one_process["one-adamw"]) < 1e-5
    assert difference(results["four-resumed"], results["four-trainer"]) == 0.0
    assert difference(results["four-saved"], results["four-trainer"], "weight") > 1e-3


def test_logged_norms_are_those_of_the_whole_model(folder: Path) -> None:
    measured = {"strategy": "one", "measure": True}
    alone = [{"name": "one-measured", **measured}, {"name": "one-resting", "rest": 1, **measured}]
    one = launch(folder, 1, alone)
    configs = [{"name": f"m-{name}", "measure": True, **STRATEGIES[name]} for name in STRATEGIES]
    for name, result in launch(folder, 2, configs).items():
        assert len(result["metrics"]) == 8
        pairs = zip(result["metrics"], one["one-measured"]["metrics"], strict=True)
        for found, expected in pairs:
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), name
    assert one["one-measured"]["metrics"][-1]["ema_nesterov/alignment"] > 0.1
    assert list(one["one-resting"]["metrics"][-1]) == ["ema_nesterov/step_size"]


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Result]:
    """Runs of 8 steps, and runs that save after 4, with the method and without."""
    configs: list[dict[str, Any]] = []
    for name, base in SAVED:
        tag, common = f"{name}-{base}", {"optimizer": base, **CHECKPOINTS[name]}
        configs.append({"name": f"whole-{tag}", **common})
        configs.append(
            {"name": f"saved-{tag}", "num_steps": 4, "save": str(folder / tag), **common}
        )
    for name, options in CHECKPOINTS.items():
        configs.append(
            {
                "name": f"plain-{name}",
                "plain": True,
                "num_steps": 4,
                "save": str(folder / f"plain-{name}"),
                **options,
            }
        )
    # FSDP alone is stale after an evaluation between backward pass and step.
    plain = {"plain": True, "evaluate_after_step": True}
    for name in ATTACHED_SAVED:
        whole: dict[str, Any] = {"attach": ATTACHED[name]["attach"]}
        four = {"num_steps": 4, **whole}
        window = {"accumulate": 2, "save_batch": 8, "save_in_window": str(folder / f"in-{name}")}
        configs += [
            {"name": f"attached-whole-{name}", **whole},
            {"name": f"attached-saved-{name}", "save": str(folder / f"at-{name}"), **four},
            {"name": f"attached-plain-{name}", "save": str(folder / f"no-{name}"), **plain, **four},
            {"name": f"attached-window-{name}", **whole, **window},
            {"name": f"attached-four-{name}", "accumulate": 2, **four},
        ]
    return launch(folder, 2, configs)


@pytest.fixture(scope="module", params=[1, 2, 3])
def resumed(
    request: pytest.FixtureRequest, folder: Path, saved: dict[str, Result]
) -> tuple[int, dict[str, Result]]:
    num_processes: int = request.param
    configs: list[dict[str, Any]] = []
    for name, base in SAVED:
        tag = f"{name}-{base}"
        common = {"optimizer": base, "load": str(folder / tag), **CHECKPOINTS[name]}
        configs.append({"name": f"on-{tag}", **common})
        configs.append({"name": f"loaded-{tag}", "num_steps": 4, **common})
    for name, options in CHECKPOINTS.items():
        plain = {"load": str(folder / f"plain-{name}"), **options}
        configs.append({"name": f"enabled-{name}", **plain})
        configs.append({"name": f"zero-{name}", "num_steps": 4, **plain})
        disabled = {"plain": True, "load": str(folder / f"{name}-adamw"), **options}
        configs.append({"name": f"disabled-{name}", **disabled})
    for name in ATTACHED_SAVED:
        four = {"attach": ATTACHED[name]["attach"], "start": 4}
        at, in_window, no = (str(folder / f"{kind}-{name}") for kind in ("at", "in", "no"))
        configs += [
            {"name": f"attached-on-{name}", "load": at, **four},
            {"name": f"attached-at-{name}", "load": at, "num_steps": 4, **four},
            {"name": f"attached-in-{name}", "load": in_window, "num_steps": 4, **four},
            {"name": f"attached-enabled-{name}", "load_first": no, **four},
        ]
    return num_processes, launch(folder, num_processes, configs)


def test_muon_and_unused_parameters_resume_bitwise(
    folder: Path, one_process: dict[str, Result]
) -> None:
    """Muon where parameters keep their shape; and a parameter that never gets a gradient."""
    cases: dict[str, dict[str, Any]] = {
        "muon-ddp": {"optimizer": "muon", **CHECKPOINTS["ddp"]},
        "muon-fsdp2": {"optimizer": "muon", **CHECKPOINTS["fsdp2"]},
        "unused-fsdp1": {"optimizer": "sgd", "unused": True, **CHECKPOINTS["fsdp1"]},
        "unused-fsdp2": {"optimizer": "sgd", "unused": True, **CHECKPOINTS["fsdp2"]},
    }
    configs: list[dict[str, Any]] = [
        {"name": "muon-alone", "optimizer": "muon", "plain": True, **CHECKPOINTS["fsdp2"]}
    ]
    for name, options in cases.items():
        path = str(folder / name)
        configs.append({"name": f"whole-{name}", **options})
        configs.append({"name": f"saved-{name}", "num_steps": 4, "save": path, **options})
        configs.append({"name": f"on-{name}", "load": path, **options})
    results = launch(folder, 2, configs)
    for name in cases:
        whole = results[f"whole-{name}"]
        assert difference(results[f"on-{name}"], whole) == 0.0, name
        assert difference(results[f"saved-{name}"], whole, "weight") > 1e-3
    assert difference(results["whole-muon-ddp"], one_process["one-muon"]) < 1e-5
    # FSDP2 has Muon sum products of shards in bfloat16: alone it differs from one process as much.
    alone = difference(results["muon-alone"], one_process["one-muon-alone"], "weight")
    ours = difference(results["whole-muon-fsdp2"], one_process["one-muon"], "weight")
    assert ours < 1.5 * alone < 1e-2
    assert difference(one_process["one-muon"], one_process["one-muon-alone"], "weight") > 1e-2
    unused = results["whole-unused-fsdp2"]["tensors"]["weight.unused"]
    assert torch.equal(unused, torch.ones(3, 2))


def test_peers_equal_one_process_and_resume_bitwise(
    folder: Path, one_process: dict[str, Result]
) -> None:
    """With validations between the steps; the outer steps of SNOO are the third and the sixth."""
    alone = [{"name": peer, "peer": peer, "strategy": "ddp"} for peer in ("gpa", "snoo")]
    expected = launch(folder, 1, alone)
    configs: list[dict[str, Any]] = []
    names = ("ddp", "fsdp1", "fsdp2", "fsdp2-full")
    for peer, name in itertools.product(expected, names):
        tag, path = f"{peer}-{name}", str(folder / f"{peer}-{name}")
        common = {"peer": peer, "validate": True, **CHECKPOINTS[name]}
        configs.append({"name": f"whole-{tag}", **common})
        configs.append({"name": f"saved-{tag}", "num_steps": 4, "save": path, **common})
        configs.append({"name": f"on-{tag}", "load": path, **common})
    results = launch(folder, 2, configs)
    for peer, name in itertools.product(expected, names):
        whole = results[f"whole-{peer}-{name}"]
        assert difference(whole, expected[peer]) < 1e-5, (peer, name)
        assert difference(results[f"on-{peer}-{name}"], whole) == 0.0, (peer, name)
        assert difference(results[f"saved-{peer}-{name}"], whole, "weight") > 1e-3
        for other in (one_process["one-plain"], one_process["one-adamw"]):
            assert difference(whole, other, "weight") > 1e-3


def test_compiled_kernel_works_on_shards(folder: Path, one_process: dict[str, Result]) -> None:
    names = ("ddp", "fsdp1", "fsdp1-flat", "fsdp2")
    configs = [
        {"name": f"joined-{name}", "compile_method": True, "validate": True, **STRATEGIES[name]}
        for name in names
    ]
    for name, result in launch(folder, 2, configs).items():
        assert difference(result, one_process["one-adamw"]) < 1e-5
        assert len(result["kernel_calls"]) >= 6, name  # steps with lookahead
    assert one_process["one-adamw"]["kernel_calls"] == []


@pytest.fixture(scope="module")
def compressed(folder: Path) -> dict[str, Result]:
    configs: list[dict[str, Any]] = []
    for tag in ("bfloat16-ddp", "bfloat16-fsdp2", "int8-ddp", "int8-fsdp2", "int8-fsdp2-full"):
        dtype, _, name = tag.partition("-")
        common = {"direction_dtype": dtype, **CHECKPOINTS[name]}
        path = str(folder / tag)
        configs.append({"name": f"whole-{tag}", **common})
        configs.append({"name": f"saved-{tag}", "num_steps": 4, "save": path, **common})
    return launch(folder, 2, configs)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_compressed_directions_resume_and_reshard(
    num_processes: int, folder: Path, compressed: dict[str, Result], one_process: dict[str, Result]
) -> None:
    tags = [name.removeprefix("whole-") for name in compressed if name.startswith("whole-")]
    configs: list[dict[str, Any]] = []
    for tag in tags:
        dtype, _, name = tag.partition("-")
        common = {"direction_dtype": dtype, "load": str(folder / tag), **CHECKPOINTS[name]}
        configs.append({"name": f"on{num_processes}-{tag}", **common})
        configs.append({"name": f"loaded{num_processes}-{tag}", "num_steps": 4, **common})
    results = launch(folder, num_processes, configs)
    for tag in tags:
        loaded, again = (results[f"{kind}{num_processes}-{tag}"] for kind in ("loaded", "on"))
        assert difference(loaded, compressed[f"saved-{tag}"]) == 0.0, tag  # nothing is dropped
        whole = compressed[f"whole-{tag}"]
        found = {t.dtype for key, t in loaded["tensors"].items() if key.startswith(DIRECTION_KEY)}
        assert tag.startswith("bfloat16") or torch.int8 in found
        if num_processes == 2:
            assert difference(again, whole) == 0.0, tag
        # Noise is drawn by position in a shard. It moves the weights by a part of the lookahead.
        assert difference(again, whole, "weight") < 1e-3, tag
        assert difference(one_process["one-plain"], whole, "weight") > 1e-2, tag


def test_checkpoints_made_in_the_rest_have_no_direction_and_resume(folder: Path) -> None:
    """Steps 3 to 7 rest; the checkpoint is of step 4. A longer run then has a direction again."""
    formats = ("ddp", "fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-full")
    cases = {(name, base): CHECKPOINTS[name] for name in formats for base in ("adamw", "sgd")}
    configs: list[dict[str, Any]] = []
    for (name, base), options in cases.items():
        path = str(folder / f"rest-{name}-{base}")
        common = {"optimizer": base, "rest": 5, **options}
        configs.append({"name": f"rest-whole-{name}-{base}", **common})
        configs.append(
            {"name": f"rest-saved-{name}-{base}", "num_steps": 4, "save": path, **common}
        )
        configs.append({"name": f"rest-on-{name}-{base}", "load": path, **common})
        if base == "adamw":
            configs.append({"name": f"rest-longer-{name}", "load": path, **common, "rest": 0})
    results = launch(folder, 2, configs)
    for name, base in cases:
        whole, again = (results[f"rest-{kind}-{name}-{base}"] for kind in ("whole", "on"))
        assert difference(again, whole) == 0.0, (name, base)
        saved = results[f"rest-saved-{name}-{base}"]
        assert difference(saved, whole, "weight") > 1e-3
        # SGD keeps nothing of its own, and FSDP cannot load an empty state: zeros stay there.
        kept = [t.abs().max() for key, t in saved["tensors"].items() if DIRECTION_KEY in key]
        assert max(kept, default=0) == 0, name
        assert not kept or base == "sgd"
        assert again["group"] == whole["group"]
        if base == "adamw":
            longer = results[f"rest-longer-{name}"]
            assert difference(longer, whole, "weight") > 1e-4
            assert any(DIRECTION_KEY in key for key in longer["tensors"])


def test_another_format_in_a_sharded_checkpoint_is_refused(
    folder: Path, compressed: dict[str, Result]
) -> None:
    configs: list[dict[str, Any]] = [
        {"load": str(folder / f"{made}-fsdp2"), "direction_dtype": asked, **CHECKPOINTS["fsdp2"]}
        for made, asked in (("int8", "float32"), ("int8", "bfloat16"), ("bfloat16", "int8"))
    ]
    names = ["int8-as-float32", "int8-as-bfloat16", "bfloat16-as-int8"]
    configs = [
        {"name": name, "may_fail": True, **config}
        for name, config in zip(names, configs, strict=True)
    ]
    for name, result in launch(folder, 2, configs).items():
        assert "direction_dtype must be" in result["error"], name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_resume_in_low_precision_is_bitwise(precision: str, folder: Path) -> None:
    configs: list[dict[str, Any]] = []
    for name in ("ddp", "fsdp1-flat", "fsdp2", "fsdp2-full"):
        tag = f"{precision}-{name}"
        common = {"precision": precision, **CHECKPOINTS[name]}
        path = str(folder / tag)
        configs.append({"name": f"whole-{tag}", **common})
        configs.append({"name": f"saved-{tag}", "num_steps": 4, "save": path, **common})
        configs.append({"name": f"on-{tag}", "load": path, **common})
    results = launch(folder, 2, configs)
    for name in ("ddp", "fsdp1-flat", "fsdp2", "fsdp2-full"):
        whole = results[f"whole-{precision}-{name}"]
        assert difference(results[f"on-{precision}-{name}"], whole) == 0.0, name
        assert difference(results[f"saved-{precision}-{name}"], whole, "weight") > 1e-3
        tensors = results[f"saved-{precision}-{name}"]["tensors"]
        dtypes = {t.dtype for key, t in tensors.items() if DIRECTION_KEY in key}
        assert dtypes == {torch.float32}


def test_every_step_follows_the_equations_also_those_that_the_scaler_skips(folder: Path) -> None:
    """What each of two processes holds, step by step, in the precisions that leave float32."""
    configs: list[dict[str, Any]] = [
        {"strategy": name, "optimizer": base, "precision": "16-mixed", "overflow_batch": 5}
        for name in ("ddp", "fsdp1")
        for base in ("adamw", "fused")
    ]
    for name in ("ddp", "fsdp1", "fsdp2"):
        configs.append({"strategy": name, "precision": "bf16-mixed"})
    configs.append({"strategy": "fsdp2", "optimizer": "muon"})
    configs = [
        {"name": f"steps-{idx}", "record": True, **options} for idx, options in enumerate(configs)
    ]
    results = launch(folder, 2, configs)
    for options in configs:
        [(points, held)] = results[options["name"]]["steps"]
        assert len(points) == len(held) == 8
        for idx in range(1, 8):
            (x, m), (x_next, m_next) = held[idx - 1], held[idx]
            x, m, y = x.double(), m.double(), points[idx].double()
            # float32 rounding of a parameter near 1, in directions near 1e-3
            torch.testing.assert_close(y, x + 0.5 * m, rtol=0, atol=2e-7)
            if idx + 1 == options.get("overflow_batch"):
                torch.testing.assert_close(x_next.double(), x, rtol=0, atol=2e-7)
                torch.testing.assert_close(m_next.double(), m, rtol=0, atol=0)
                continue
            expected = 0.9 * m + 0.1 * (x_next - x)
            torch.testing.assert_close(m_next.double(), expected, rtol=0, atol=2e-7)
            assert (x_next - x).abs().max() > 1e-3
            assert (m_next - m).abs().max() > 1e-4


def test_what_cannot_be_saved_is_refused_before_training(folder: Path) -> None:
    configs: list[dict[str, Any]] = [
        {"name": "bf16", "strategy": "fsdp1", "precision": "bf16-true", "may_fail": True},
        {"name": "bf16-attached", "attach": "fsdp1", "dtype": "bfloat16", "may_fail": True},
        {"name": "full", "strategy": "fsdp1", "state_dict_type": "full", "may_fail": True},
        {"name": "int8", "strategy": "fsdp1", "direction_dtype": "int8", "may_fail": True},
    ]
    results = launch(folder, 2, configs)
    for name in ("bf16", "bf16-attached"):
        assert "use precision='bf16-mixed' or use_orig_params=False" in results[name]["error"]
    assert "state_dict_type='sharded'" in results["full"]["error"]
    assert "FSDP2 (ModelParallelStrategy), or 'float32'" in results["int8"]["error"]


@pytest.mark.parametrize(("name", "base"), SAVED)
def test_every_base_optimizer_on_two_processes_equals_one(
    name: str, base: str, one_process: dict[str, Result], saved: dict[str, Result]
) -> None:
    assert difference(saved[f"whole-{name}-{base}"], one_process[f"one-{base}"]) < 1e-5


@pytest.fixture(scope="module")
def switched(folder: Path, saved: dict[str, Result]) -> dict[str, Result]:
    """One process that goes on with the method after 4 steps, or without it."""
    one = {"strategy": "one"}
    configs: list[dict[str, Any]] = [
        {"name": "one-enabled", "load": str(folder / "plain-ddp"), **one},
        {"name": "one-disabled", "plain": True, "load": str(folder / "ddp-adamw"), **one},
    ]
    return launch(folder, 1, configs)


def test_resume_on_one_two_and_three_processes(
    resumed: tuple[int, dict[str, Result]], saved: dict[str, Result]
) -> None:
    num_processes, results = resumed
    for name, base in SAVED:
        tag = f"{name}-{base}"
        loaded = results[f"loaded-{tag}"]
        assert difference(loaded, saved[f"saved-{tag}"]) == 0.0, tag  # nothing is dropped
        assert loaded["group"] == saved[f"saved-{tag}"]["group"]
        whole, again = saved[f"whole-{tag}"], results[f"on-{tag}"]
        # Bitwise on the same number of processes, else the rounding of the batch's sums.
        assert difference(again, whole) <= (0.0 if num_processes == 2 else 1e-5), tag
        assert difference(saved[f"saved-{tag}"], whole, "weight") > 1e-3
    state = {key.split(".")[0] for key in saved["saved-fsdp2-adamw"]["tensors"]}
    assert state == {"weight", "exp_avg", "exp_avg_sq", "step", DIRECTION_KEY}


def test_method_can_be_switched_on_and_off_at_a_checkpoint(
    resumed: tuple[int, dict[str, Result]],
    saved: dict[str, Result],
    switched: dict[str, Result],
) -> None:
    _, results = resumed
    for name in CHECKPOINTS:
        enabled, zero = results[f"enabled-{name}"], results[f"zero-{name}"]
        assert enabled["group"]["ema_nesterov_step"] == 8, name  # it goes on where the run is
        assert difference(enabled, switched["one-enabled"]) < 1e-5, name
        assert difference(zero, saved[f"plain-{name}"]) == 0.0, name
        disabled = results[f"disabled-{name}"]
        assert difference(disabled, switched["one-disabled"], "weight") < 1e-5, name
    for result in switched.values():
        assert difference(result, saved["whole-ddp-adamw"], "weight") > 1e-3
    assert difference(switched["one-enabled"], switched["one-disabled"], "weight") > 1e-3


def test_loop_of_ones_own_resumes_on_one_two_and_three_processes(
    resumed: tuple[int, dict[str, Result]],
    saved: dict[str, Result],
    switched: dict[str, Result],
) -> None:
    num_processes, results = resumed
    for name in ATTACHED_SAVED:
        whole, four = saved[f"attached-whole-{name}"], saved[f"attached-saved-{name}"]
        again = results[f"attached-on-{name}"]
        assert difference(again, whole) <= (0.0 if num_processes == 2 else 1e-5), name
        assert difference(results[f"attached-at-{name}"], four) == 0.0, name
        assert difference(four, whole) > 1e-3
        # In a window x comes back from y, up to one unit in the last place.
        in_window = results[f"attached-in-{name}"]
        assert difference(in_window, saved[f"attached-four-{name}"]) < 1e-6, name
        enabled = results[f"attached-enabled-{name}"]
        assert difference(enabled, switched["one-enabled"], "weight") < 1e-5, name
