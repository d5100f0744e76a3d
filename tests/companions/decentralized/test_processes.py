"""The Trainer in several processes: against the simulation, resume, averages, a lost process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.companions.decentralized.simulate import (
    Gradients,
    disagreements,
    simulate_docom,
    simulate_sa,
    simulate_storm,
)
from lightning_ema_nesterov.companions.decentralized.topology import Topology
from tests.companions.decentralized import toy_runs
from tests.companions.decentralized.toy_runs import LR, RankBatches, flat_gradient, start_points

# float64, and a batched gradient may sum in another order than the module's.
CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}
FSPDA = {"coordinate_share": 0.3, "dual_step_size": 0.005, "consensus_step_size": 0.4, "seed": 3}
STORM = {**FSPDA, "primal_weight": 0.2, "dual_weight": 0.3}
DOCOM = {"coordinate_share": 0.2, "momentum_weight": 0.2, "consensus_step_size": 0.3}
STEPS = 8

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def rank_gradients(num_agents: int, accumulate: int = 1) -> Gradients:
    data = [RankBatches(rank, 50).data for rank in range(num_agents)]

    def gradients(points: Tensor, round_idx: int) -> Tensor:
        rows = []
        for point, batches in zip(points, data, strict=True):
            window = batches[round_idx * accumulate : (round_idx + 1) * accumulate]
            rows.append(torch.stack([flat_gradient(point, b) for b in window]).mean(0))
        return torch.stack(rows)

    return gradients


def saved(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return what each rank saved: flat weights, and the agent's tensors."""
    checkpoint = torch.load(folder / f"{name}.ckpt", weights_only=True)
    ranks: list[dict[str, Any]] = checkpoint["decentralized"]["ranks"]
    for rank in ranks:
        rank["weights"] = torch.cat([w.flatten() for w in rank["replica"]["weights"]])
    return ranks


def stack(ranks: list[dict[str, Any]], key: str) -> Tensor:
    return torch.stack([r["weights"] if key == "weights" else r["agent"][key] for r in ranks])


def test_two_processes_follow_the_simulation(tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [
        {"name": "sa", "method": "sa", "arguments": FSPDA},
        {"name": "storm", "method": "storm", "arguments": STORM},
        {"name": "accumulated", "method": "storm", "arguments": STORM, "accumulate": 2},
        {"name": "docom", "method": "docom", "arguments": DOCOM},
        {"name": "manual", "method": "docom", "arguments": DOCOM, "manual": True, "has_loss": True},
    ]
    results = dict(
        zip([c["name"] for c in configs], toy_runs.launch(tmp_path, 2, configs), strict=True)
    )
    check_against_simulation(tmp_path, 2, Topology.ring(2), results)
    storm = {**common_arguments(), "topology": Topology.ring(2), "seed": 3}
    twice = simulate_storm(
        rank_gradients(2, 2), start_points(2), **storm, primal_weight=0.2, dual_weight=0.3
    )
    torch.testing.assert_close(stack(saved(tmp_path, "accumulated"), "weights"), twice[0], **CLOSE)
    for key in ("weights", "tracker"):
        manual = stack(saved(tmp_path, "manual"), key)
        assert torch.equal(manual, stack(saved(tmp_path, "docom"), key))
    assert [r["calls"] for r in results["manual"]] == [STEPS, STEPS]
    assert [r["calls"] for r in results["storm"]] == [2 * STEPS - 1] * 2


def test_four_processes_follow_the_simulation(tmp_path: Path) -> None:
    one = {**FSPDA, "topology": "complete", "edges_per_round": "one"}
    configs: list[dict[str, Any]] = [
        {"name": "sa", "method": "sa", "arguments": one},
        {"name": "storm", "method": "storm", "arguments": {**STORM, **one}},
        {"name": "docom", "method": "docom", "arguments": DOCOM},
    ]
    results = dict(
        zip([c["name"] for c in configs], toy_runs.launch(tmp_path, 4, configs), strict=True)
    )
    topology = Topology.complete(4, one_edge_per_round=True)
    check_against_simulation(tmp_path, 4, topology, results)


def common_arguments() -> dict[str, Any]:
    return {
        "num_steps": STEPS,
        "lr": LR,
        "share": 0.3,
        "consensus_step_size": 0.4,
        "dual_step_size": 0.005,
    }


def check_against_simulation(
    folder: Path, num: int, topology: Topology, results: dict[str, list[dict[str, Any]]]
) -> None:
    gradients, start = rank_gradients(num), start_points(num)
    common = {**common_arguments(), "topology": topology, "seed": 3}
    sa = simulate_sa(gradients, start, **common)
    storm = simulate_storm(gradients, start, **common, primal_weight=0.2, dual_weight=0.3)
    docom = simulate_docom(
        gradients,
        start,
        Topology.ring(num),
        num_steps=STEPS,
        lr=LR,
        share=0.2,
        consensus_step_size=0.3,
        momentum_weight=0.2,
    )
    for name, key, expected in (
        ("sa", "duals", sa),
        ("storm", "duals", storm),
        ("docom", "tracker", docom),
    ):
        ranks = saved(folder, name)
        torch.testing.assert_close(stack(ranks, "weights"), expected[0], **CLOSE)
        torch.testing.assert_close(stack(ranks, key), expected[1], **CLOSE)
        assert float((ranks[0]["weights"] - ranks[1]["weights"]).abs().max()) > 0.01
        # Everybody's logged numbers are what all of them sent.
        sent = sum(result["sent"] for result in results[name])
        assert [sum(result["seen"]["logged"]) for result in results[name]] == [sent] * num
        assert sent > 0
        # The final model is the average, on every rank.
        for result in results[name]:
            mean = stack(ranks, "weights").mean(0)
            torch.testing.assert_close(result["final"], mean, **CLOSE)
    assert float(stack(saved(folder, "sa"), "duals").sum(0).abs().max()) < 1e-14
    assert float((sa[0] - storm[0]).abs().max()) > 1e-3


def test_second_gradient_is_on_the_same_sample_and_leaves_no_trace(tmp_path: Path) -> None:
    config = {
        "name": "dropout",
        "method": "storm",
        "arguments": STORM,
        "middle": "norm and dropout",
        "probes": True,
        "steps": 3,
    }
    (results,) = toy_runs.launch(tmp_path, 2, [config])
    for result in results:
        seen = result["seen"]
        assert torch.equal(seen["first"], seen["again"])
        assert not torch.equal(seen["first"], seen["other sample"])
        assert seen["buffers kept"]


RESUMED: list[dict[str, Any]] = [
    {"name": "sa", "method": "sa", "optimizer": "momentum", "middle": "norm", "decay": True},
    {"name": "adamw", "method": "sa", "optimizer": "adamw", "arguments": {"topology": "complete"}},
    {"name": "storm", "method": "storm", "decay": True},
    {"name": "docom", "method": "docom", "middle": "norm"},
    {"name": "ema", "method": "sa", "ema": {"ema_decay": 0.9}},
]


def test_resume_is_bitwise_and_refused_on_another_number_of_ranks(tmp_path: Path) -> None:
    whole = [{**c, "steps": 10, "save_every": 4, "val_every": 3} for c in RESUMED]
    resumed = [
        {**c, "name": c["name"] + "-resumed", "resume": f"{c['name']}-step=4.ckpt"} for c in whole
    ]
    fresh = {**whole[0], "name": "fresh", "steps": 10, "save_every": 100, "optimizer": "sgd"}
    wrong = {**whole[2], "name": "wrong", "resume": "adamw-step=4.ckpt", "fails": True}
    results = toy_runs.launch(tmp_path, 2, [*whole, *resumed, fresh, wrong])
    for config in whole:
        ends = [saved(tmp_path, config["name"] + suffix) for suffix in ("", "-resumed")]
        assert_equal(ends[0], ends[1])
        assert ends[0][0]["round_idx"] == 10
        assert not torch.equal(ends[0][0]["weights"], ends[0][1]["weights"])
    with pytest.raises(AssertionError):
        assert_equal(saved(tmp_path, "sa"), saved(tmp_path, "fresh"))
    assert "must be one of FSPDASTORM, got one of FSPDASA" in results[-1][0]["error"]

    refused = {**whole[0], "name": "refused", "resume": "sa-step=4.ckpt", "fails": True}
    (errors,) = toy_runs.launch(tmp_path, 3, [refused])
    for error in errors:
        assert "it has weights and duals of 2, got 3 processes" in error["error"]
        assert "duals of all agents sum to zero" in error["error"]


def assert_equal(first: Any, second: Any) -> None:
    """Compare nested containers bit for bit."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_equal(a, b)
    else:
        assert first == second


def test_validation_checkpoints_and_early_stopping_use_the_average(tmp_path: Path) -> None:
    config = {
        "name": "monitored",
        "method": "sa",
        "arguments": FSPDA,
        "middle": "norm",
        "steps": 40,
        "val_every": 2,
        "sanity": 1,
        "monitor": True,
        "save_every": 2,
    }
    plain = {**config, "name": "plain", "monitor": False, "val_every": None, "sanity": 0}
    results, unwatched = toy_runs.launch(tmp_path, 2, [config, plain])
    first, second = results
    assert first["stopped"]
    assert first["steps"] == second["steps"] < 40
    assert first["best"] == second["best"] == pytest.approx(min_validation(tmp_path, first))
    for step, ours, theirs in zip(
        range(0, 40, 2), first["seen"]["validated"], second["seen"]["validated"], strict=False
    ):
        assert torch.equal(ours, theirs)
        if step:  # 0 is the sanity check
            ranks = saved(tmp_path, f"monitored-step={step}")
            torch.testing.assert_close(ours, stack(ranks, "weights").mean(0), **CLOSE)
            file = torch.load(tmp_path / f"monitored-step={step}.ckpt", weights_only=True)
            state = file["state_dict"]
            names = ["hidden", "norm", "out"]
            flat = [state[f"{n}.{kind}"].flatten() for n in names for kind in ("weight", "bias")]
            assert torch.equal(torch.cat(flat), ours)
            means = torch.stack([r["replica"]["buffers"][0] for r in ranks])
            torch.testing.assert_close(state["norm.running_mean"], means.mean(0), **CLOSE)
            assert not torch.equal(means[0], means[1])
    assert all(result["has own buffers"] for result in (*results, *unwatched))
    # Nobody who looks changes the training.
    step = first["steps"]
    assert_equal(saved(tmp_path, f"monitored-step={step}"), saved(tmp_path, f"plain-step={step}"))
    assert unwatched[0]["steps"] == 40


def min_validation(folder: Path, result: dict[str, Any]) -> float:
    """Return the best validation loss, from the files that were saved."""
    module = toy_runs.Toy({"middle": "norm"}).eval()
    losses = []
    for step in range(2, result["steps"] + 1, 2):
        file = torch.load(folder / f"monitored-step={step}.ckpt", weights_only=True)
        module.load_state_dict(file["state_dict"])
        with torch.no_grad():
            losses.append(float(torch.stack([module(b) for b in RankBatches(7, 2).data]).mean()))
    return min(losses)


def test_ema_nesterov_composes(tmp_path: Path) -> None:
    """Agents keep an m of their own displacement, gossip included, and gossip at y."""
    ema = {"lookahead_step_size": 0.5, "ema_decay": 0.9}
    config = {"name": "ema", "method": "sa", "arguments": FSPDA, "ema": ema}
    storm = {"name": "storm", "method": "storm", "arguments": {**STORM}, "ema": ema}
    as_storm = {**FSPDA, "primal_weight": 1.0, "dual_weight": 1.0}
    same = {"name": "same", "method": "storm", "arguments": as_storm, "ema": ema}
    docom = {"name": "docom", "method": "docom", "arguments": DOCOM, "ema": ema}
    toy_runs.launch(tmp_path, 2, [config, storm, same, docom])
    gradients, x = rank_gradients(2), start_points(2)
    m, duals = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(STEPS):
        y = x + 0.5 * m
        (apart,) = disagreements([y], Topology.ring(2), 0.3, 3, t)
        new = y - LR * gradients(y, t) - 0.005 * duals - 0.4 * apart
        duals = duals + apart
        x, m = new, 0.9 * m + 0.1 * (new - x)
    ranks = saved(tmp_path, "ema")
    torch.testing.assert_close(stack(ranks, "weights"), x, **CLOSE)
    torch.testing.assert_close(stack(ranks, "duals"), duals, **CLOSE)
    assert float(duals.sum(0).abs().max()) < 1e-14
    torch.testing.assert_close(stack(saved(tmp_path, "same"), "weights"), x, **CLOSE)
    alone, _ = simulate_sa(
        gradients, start_points(2), Topology.ring(2), seed=3, **common_arguments()
    )
    assert float((alone - x).abs().max()) > 0.01
    check_two_gradient_methods_at_lookahead(tmp_path)


def check_two_gradient_methods_at_lookahead(folder: Path) -> None:
    """The previous point is the lookahead point of the step before."""
    gradients, x = rank_gradients(2), start_points(2)
    m, m_x, m_dual, duals, y_old = (torch.zeros_like(x) for _ in range(5))
    for t in range(STEPS):
        y = x + 0.5 * m
        apart, apart_old = disagreements([y, y_old], Topology.ring(2), 0.3, 3, t)
        pull = 0.005 * duals
        now = LR * gradients(y, t) + pull + 0.4 * apart
        old = LR * gradients(y_old, t) + pull + 0.4 * apart_old
        m_x = now + (0.8 * (m_x - old) if t else 0.0)
        m_dual = apart + (0.7 * (m_dual - apart_old) if t else 0.0)
        duals = duals + m_dual
        x, m, y_old = y - m_x, 0.9 * m + 0.1 * (y - m_x - x), y
    ranks = saved(folder, "storm")
    torch.testing.assert_close(stack(ranks, "weights"), x, **CLOSE)
    docom = saved(folder, "docom")
    trackers, estimates = stack(docom, "tracker"), stack(docom, "estimate")
    torch.testing.assert_close(trackers.mean(0), estimates.mean(0), **CLOSE)
    unaided, _ = simulate_docom(
        gradients,
        start_points(2),
        Topology.ring(2),
        num_steps=STEPS,
        lr=LR,
        share=0.2,
        consensus_step_size=0.3,
        momentum_weight=0.2,
    )
    assert float((stack(docom, "weights") - unaided).abs().max()) > 0.01


def test_uneven_batches_and_late_refusals(tmp_path: Path) -> None:
    common = {"fails": True, "steps": 4}
    configs: list[dict[str, Any]] = [
        {**common, "name": "uneven", "method": "sa", "uneven": True, "batches": 5},
        {**common, "name": "adamw", "method": "storm", "optimizer": "adamw"},
        {**common, "name": "momentum", "method": "storm", "optimizer": "momentum"},
        {**common, "name": "manual", "method": "docom", "manual": True},
        {**common, "name": "bound", "method": "sa", "arguments": {"dual_step_size": 0.3}},
        {
            **common,
            "name": "unconnected",
            "method": "sa",
            "arguments": {"topology": "erdos_renyi", "edge_probability": 1e-6},
        },
    ]
    messages = [
        "as many training batches on each process, got [5, 6]",
        "FSPDASTORM needs torch.optim.SGD, whose learning rate is its alpha, got AdamW",
        "FSPDASTORM needs SGD with momentum=0, got 0.9",
        "must have batch_loss(batch, batch_idx)",
        "dual_step_size * dual_growth must be below 0.0523",
        "edges must connect all 2 agents",
    ]
    for results, message in zip(toy_runs.launch(tmp_path, 2, configs), messages, strict=True):
        for result in results:
            assert result["error"].startswith("MisconfigurationException")
            assert message in result["error"]


def test_when_a_process_dies_the_others_end_and_the_last_checkpoint_loads(tmp_path: Path) -> None:
    config = {
        "name": "killed",
        "method": "sa",
        "arguments": FSPDA,
        "steps": 40,
        "save_every": 4,
        "die_at": 10,
    }
    start = time.monotonic()
    codes = toy_runs.codes(toy_runs.spawn(tmp_path, 3, [config]))
    # Starting takes the rest; the test fails in codes() if one were still waiting.
    assert time.monotonic() - start < toy_runs.GROUP_TIMEOUT_S + 60
    assert codes == [1, -signal.SIGKILL, 1]
    assert (tmp_path / "killed-step=8.ckpt").exists()
    assert not (tmp_path / "killed-step=12.ckpt").exists()
    resumed = {
        **config,
        "name": "resumed",
        "resume": "killed-step=8.ckpt",
        "die_at": None,
        "steps": 12,
    }
    whole = {**resumed, "name": "whole", "resume": None, "save_every": 100}
    toy_runs.launch(tmp_path, 3, [resumed, whole])
    assert_equal(saved(tmp_path, "resumed"), saved(tmp_path, "whole"))


ROOT = Path(__file__).parents[3]


def output_of(folder: Path, *command: str) -> list[str]:
    """Return the lines that a script prints, which starts its other processes itself."""
    # Trainers of earlier tests in this process may have left their address there.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=toy_runs.TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.splitlines()


def test_example_of_the_docs_runs(tmp_path: Path) -> None:
    page = ROOT / "docs" / "companions" / "decentralized.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    lines = output_of(tmp_path, "example.py")
    # 66 parameters, 7 of them in 4 bytes each in 20 rounds; printed by both processes.
    assert [line for line in lines if line == "560"] == ["560"] * 2


def test_recipe_in_the_trainer_beats_decentralized_sgd(tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "companions" / "decentralized.py")
    lines = output_of(tmp_path, recipe, "--processes", "2", "--steps", "400")
    losses = {
        name: float(line.removeprefix(name).split()[0])
        for line in lines
        for name in ("all-reduce", "decentralized SGD", "FSPDA-SA", "FSPDA-STORM", "DoCoM")
        if line.startswith(name)
    }
    # At 400 steps all three are as far as the all-reduce, to 0.02; gossip alone is behind.
    for name in ("FSPDA-SA", "FSPDA-STORM", "DoCoM"):
        assert abs(losses[name] - losses["all-reduce"]) < 0.02
        assert losses[name] < losses["decentralized SGD"] - 0.01
