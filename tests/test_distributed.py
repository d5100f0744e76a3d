"""Two and three CPU processes equal one; sharded checkpoints continue on another number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ema_nesterov.direction import DIRECTION_KEY

WORKER = Path(__file__).parent / "distributed_worker.py"
Result = dict[str, Any]

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
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp1": {"strategy": "fsdp1"},
    "fsdp1-flat": {"strategy": "fsdp1", "use_orig_params": False},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2-full": {"strategy": "fsdp2", "distributed_checkpoint": False},
}
BASES = ("adamw", "sgd", "momentum")


def launch(folder: Path, num_processes: int, configs: list[dict[str, Any]]) -> dict[str, Result]:
    """Run configurations one after another in the same processes."""
    result = start(folder, num_processes, configs)
    assert result.returncode == 0, result.stderr[-4000:]
    return {c["name"]: torch.load(folder / f"{c['name']}.pt", weights_only=False) for c in configs}


def start(
    folder: Path, num_processes: int, configs: list[dict[str, Any]]
) -> subprocess.CompletedProcess[str]:
    file = folder / f"{configs[0]['name']}-{num_processes}.json"
    file.write_text(json.dumps(configs))
    command = [sys.executable]
    if "one" not in {config.get("strategy") for config in configs}:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={num_processes}",
        ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(WORKER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    return subprocess.run(
        [*command, str(WORKER), str(folder), file.name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def difference(result: Result, expected: Result, prefix: str = "") -> float:
    """Largest relative difference over weights, base state and directions."""
    a, b = result["tensors"], expected["tensors"]
    keys = [key for key in b if key.startswith(prefix)]
    assert keys
    assert set(keys) <= set(a), set(keys) - set(a)  # FSDP1 lists tied weights twice
    # A direction that never moved is zero.
    return max(
        float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp(min=1e-30))
        for k in keys
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one_process(folder: Path) -> dict[str, Result]:
    configs: list[dict[str, Any]] = [
        {"name": "one-plain", "strategy": "one", "plain": True},
        {"name": "one-accumulate", "strategy": "one", "accumulate": 2},
        *({"name": f"one-{base}", "strategy": "one", "optimizer": base} for base in BASES),
    ]
    return launch(folder, 1, configs)


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
    for result in launch(folder, 2, configs).values():
        assert difference(result, one_process["one-adamw"], "weight") > 1e-3


ATTACHED: dict[str, dict[str, Any]] = {
    "ddp": {"attach": "ddp"},
    "fsdp1": {"attach": "fsdp1"},
    "fsdp1-grad-op": {"attach": "fsdp1", "sharding": "SHARD_GRAD_OP"},
    "fsdp2": {"attach": "fsdp2"},
    "fabric-ddp": {"attach": "fabric-ddp"},
    "fabric-fsdp2": {"attach": "fabric-fsdp2"},
}


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


def test_two_dimensional_mesh_of_data_and_tensor_parallelism(
    folder: Path, one_process: dict[str, Result]
) -> None:
    configs: list[dict[str, Any]] = [
        {"name": "attached-tp", "attach": "tp"},
        {"name": "attached-tp-accumulate", "attach": "tp", "accumulate": 2},
    ]
    results = launch(folder, 4, configs)
    for name, kind in (("attached-tp", "adamw"), ("attached-tp-accumulate", "accumulate")):
        assert difference(results[name], one_process[f"one-{kind}"], "weight") < 1e-5


def test_logged_norms_are_those_of_the_whole_model(folder: Path) -> None:
    one = launch(folder, 1, [{"name": "one-measured", "strategy": "one", "measure": True}])
    configs = [{"name": f"m-{name}", "measure": True, **STRATEGIES[name]} for name in STRATEGIES]
    for name, result in launch(folder, 2, configs).items():
        assert len(result["metrics"]) == 8
        pairs = zip(result["metrics"], one["one-measured"]["metrics"], strict=True)
        for measured, expected in pairs:
            assert measured == pytest.approx(expected, rel=1e-3, abs=1e-6), name
    assert one["one-measured"]["metrics"][-2]["ema_nesterov/alignment"] > 0.1
    assert list(one["one-measured"]["metrics"][-1]) == ["ema_nesterov/step_size"]  # it rests


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Result]:
    """Runs of 8 steps, and runs that save after 4, with the method and without."""
    configs: list[dict[str, Any]] = []
    for name, options in CHECKPOINTS.items():
        for base in BASES:
            tag = f"{name}-{base}"
            common = {"optimizer": base, **options}
            configs.append({"name": f"whole-{tag}", **common})
            configs.append(
                {"name": f"saved-{tag}", "num_steps": 4, "save": str(folder / tag), **common}
            )
        configs.append(
            {
                "name": f"plain-{name}",
                "plain": True,
                "num_steps": 4,
                "save": str(folder / f"plain-{name}"),
                **options,
            }
        )
    return launch(folder, 2, configs)


def resume(folder: Path, num_processes: int) -> dict[str, Result]:
    configs: list[dict[str, Any]] = []
    for name, options in CHECKPOINTS.items():
        for base in BASES:
            common = {"optimizer": base, "load": str(folder / f"{name}-{base}"), **options}
            configs.append({"name": f"on{num_processes}-{name}-{base}", **common})
            configs.append(
                {"name": f"loaded{num_processes}-{name}-{base}", "num_steps": 4, **common}
            )
        configs.append(
            {
                "name": f"enabled{num_processes}-{name}",
                "load": str(folder / f"plain-{name}"),
                **options,
            }
        )
    return launch(folder, num_processes, configs)


def test_muon_and_unused_parameters_resume_bitwise(folder: Path) -> None:
    """Muon where parameters keep their shape; and a parameter that never gets a gradient."""
    cases: dict[str, dict[str, Any]] = {
        "muon-ddp": {"optimizer": "muon", **CHECKPOINTS["ddp"]},
        "muon-fsdp2": {"optimizer": "muon", **CHECKPOINTS["fsdp2"]},
        "unused-fsdp1": {"optimizer": "sgd", "unused": True, **CHECKPOINTS["fsdp1"]},
        "unused-fsdp2": {"optimizer": "sgd", "unused": True, **CHECKPOINTS["fsdp2"]},
    }
    configs: list[dict[str, Any]] = []
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
    unused = results["whole-unused-fsdp2"]["tensors"]["weight.unused"]
    assert torch.equal(unused, torch.ones(3, 2))


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
    cases = {(name, base): CHECKPOINTS[name] for name in CHECKPOINTS for base in ("adamw", "sgd")}
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


def test_step_skipped_by_the_scaler_changes_nothing_on_any_process(folder: Path) -> None:
    configs: list[dict[str, Any]] = [
        {"name": f"skip-{name}", "strategy": name, "precision": "16-mixed", "overflow_batch": 5}
        for name in ("ddp", "fsdp1")
    ]
    for result in launch(folder, 2, configs).values():
        # The fifth batch is the fourth change. Its x comes back from y, so to one last place.
        for idx, (of_params, of_directions) in enumerate(result["changes"][0]):
            assert (of_params < 1e-7) == (idx == 3)
            assert (of_directions == 0.0) == (idx == 3)
        assert len(result["changes"][0]) == 7


def test_what_cannot_be_saved_is_refused_before_training(folder: Path) -> None:
    configs: list[dict[str, Any]] = [
        {"name": "bf16", "strategy": "fsdp1", "precision": "bf16-true", "may_fail": True},
        {"name": "full", "strategy": "fsdp1", "state_dict_type": "full", "may_fail": True},
        {"name": "int8", "strategy": "fsdp1", "direction_dtype": "int8", "may_fail": True},
    ]
    results = launch(folder, 2, configs)
    assert "use precision='bf16-mixed' or use_orig_params=False" in results["bf16"]["error"]
    assert "state_dict_type='sharded'" in results["full"]["error"]
    assert "FSDP2 (ModelParallelStrategy), or 'float32'" in results["int8"]["error"]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("base", BASES)
def test_every_base_optimizer_on_two_processes_equals_one(
    name: str, base: str, one_process: dict[str, Result], saved: dict[str, Result]
) -> None:
    assert difference(saved[f"whole-{name}-{base}"], one_process[f"one-{base}"]) < 1e-5


@pytest.mark.parametrize("fault", ["kill", "raise", "terminate"])
def test_run_that_a_fault_ended_continues_bitwise(
    fault: str, folder: Path, saved: dict[str, Result]
) -> None:
    """One process dies or raises, or all are told to end, in the sixth step."""
    for name in ("ddp", "fsdp2"):
        checkpoints = folder / f"{fault}-{name}"
        options = {"checkpoints": str(checkpoints), **CHECKPOINTS[name]}
        faulty = {"name": f"{fault}-{name}", "fault": fault, "fault_batch": 5, **options}
        result = start(folder, 2, [faulty])
        assert (result.returncode != 0) == (fault != "terminate")  # SIGTERM is a clean exit
        assert not (folder / f"{fault}-{name}.pt").exists()
        path = checkpoints / "step=4.ckpt"
        resumed = launch(
            folder, 2, [{"name": f"{fault}-{name}-resumed", "load": str(path), **CHECKPOINTS[name]}]
        )
        whole = saved[f"whole-{name}-adamw"]
        assert difference(resumed[f"{fault}-{name}-resumed"], whole) == 0.0


def test_processes_that_are_told_to_end_in_a_window_save_the_iterate(folder: Path) -> None:
    checkpoints = folder / "terminated"
    common: dict[str, Any] = {"strategy": "ddp", "accumulate": 4}
    stopped = {"name": "stopped", "fault": "terminate", "fault_batch": 9, **common}
    start(folder, 2, [{"checkpoints": str(checkpoints), **stopped}])
    assert not (folder / "stopped.pt").exists()
    whole = launch(folder, 2, [{"name": "two-steps", "num_steps": 2, **common}])["two-steps"]
    [path] = checkpoints.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["global_step"] == 2
    for name, weight in checkpoint["state_dict"].items():
        # x comes back from y, up to one unit in the last place
        expected = whole["tensors"].get(f"weight.{name}", weight)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)
    assert any("exp_avg" in state for state in checkpoint["optimizer_states"][0]["state"].values())


def test_truncated_checkpoint_is_refused(folder: Path, saved: dict[str, Result]) -> None:
    path = folder / "truncated.ckpt"
    path.write_bytes((folder / "ddp-adamw").read_bytes()[:-1000])
    result = start(folder, 1, [{"name": "truncated", "strategy": "one", "load": str(path)}])
    assert result.returncode != 0
    assert "torch/serialization.py" in result.stderr  # reading it is what failed
    assert not (folder / "truncated.pt").exists()


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_resume_on_one_two_and_three_processes(
    num_processes: int, folder: Path, saved: dict[str, Result]
) -> None:
    resumed = resume(folder, num_processes)
    for name in CHECKPOINTS:
        for base in BASES:
            tag = f"{name}-{base}"
            loaded = resumed[f"loaded{num_processes}-{tag}"]
            assert difference(loaded, saved[f"saved-{tag}"]) == 0.0, tag  # nothing is dropped
            assert loaded["group"] == saved[f"saved-{tag}"]["group"]
            whole, again = saved[f"whole-{tag}"], resumed[f"on{num_processes}-{tag}"]
            # Bitwise on the same number of processes, else the rounding of the batch's sums.
            assert difference(again, whole) <= (0.0 if num_processes == 2 else 1e-5), tag
            assert difference(saved[f"saved-{tag}"], whole, "weight") > 1e-3
        enabled = resumed[f"enabled{num_processes}-{name}"]
        assert enabled["group"]["ema_nesterov_step"] == 8, name  # it goes on where the run is
        assert difference(enabled, saved[f"whole-{name}-adamw"], "weight") > 1e-4
