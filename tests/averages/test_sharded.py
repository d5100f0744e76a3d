"""The average on several processes, against one of the recorded iterates in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.averages import average_checkpoint
from lightning_ema_nesterov.averages.folder import Folder
from tests.distributed.cases import (
    DDP,
    EMA,
    FSDP1,
    FSDP2,
    AttachedRun,
    Checkpoints,
    Strategy,
    TrainerRun,
)
from tests.distributed.models import Net, Tokens
from tests.distributed.processes import Result, Results, difference, launch
from tests.distributed.runs import STRATEGIES
from tests.distributed.trainer_run import small_kernels

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

AVERAGE = EMA(evaluate_at="average")
KINDS: dict[str, Strategy] = {
    name: STRATEGIES[name]
    for name in ("ddp", "fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-no-reshard", "tensor-parallel")
}
# Of float32: rounding of the direction, collected over 10 steps.
RTOL = 1e-5


def average_of(iterates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The exponential average with decay 0.9, which starts at the first iterate, in float64."""
    average = {name: x.double() for name, x in iterates[0].items()}
    for iterate in iterates[1:]:
        average = {name: 0.9 * a + 0.1 * iterate[name].double() for name, a in average.items()}
    return average


def error_of(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Largest relative error; the names of a tied weight may be one or two."""
    assert set(exact) <= set(found)
    return max(float((found[n].double() - a).norm() / a.norm()) for n, a in exact.items())


def loss_at(weights: Mapping[str, Tensor], tokens: Tensor) -> float:
    net = Net(dtype=torch.float64)
    net.load_state_dict({**weights, "head.weight": weights["embedding.weight"]})
    with torch.no_grad():
        return float(net(tokens))


def saved_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of the Trainer."""
    if path.is_file():
        weights: dict[str, Tensor] = torch.load(path, weights_only=False)["state_dict"]
        return weights
    folder = Folder(path)
    keys = [key for key in folder.entries if key.partition(".")[0] in ("model", "state_dict")]
    return {key.partition(".")[2]: x for key, x in folder.load(keys).items()}


def check_evaluations(result: Result, rank: int, strategy: Strategy, num_shares: int = 2) -> None:
    """Each validation ran where the average is, and far from the iterate."""
    [(iterates, seen)] = result["evaluations"]
    is_split = strategy == KINDS["tensor-parallel"]
    tokens = (Tokens(1) if is_split else Tokens(1, rank, num_shares))[0]
    assert [step for step, _ in seen] == [2, 4, 6, 8]
    for (step, weights), loss in zip(seen, result["losses"], strict=True):
        exact, iterate = average_of(iterates[: step + 1]), iterates[step]
        assert error_of(weights, exact) < RTOL
        assert error_of(iterate, exact) > 1e-3
        assert loss == pytest.approx(loss_at(exact, tokens), rel=RTOL)
        at_iterate = loss_at({n: x.double() for n, x in iterate.items()}, tokens)
        assert abs(loss / at_iterate - 1) > 1e-3


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(kind)


@pytest.fixture(scope="module")
def results(kind: str, folder: Path) -> Results:
    run = TrainerRun(
        name="seen",
        strategy=KINDS[kind],
        rule=AVERAGE,
        val_check_interval=1.0,
        observe="evaluations",
    )
    average = replace(run, name="average", observe="collectives")
    saving = replace(
        run,
        name="saving",
        observe="nothing",
        checkpoints=Checkpoints(folder=folder / "every"),
        saves_in_validation=folder / "in-validation",
    )
    iterate = replace(average, name="iterate", rule=EMA())
    four = replace(iterate, name="four", observe="nothing", num_steps=4)
    resumed = replace(run, observe="nothing", load=folder / "every/step=4.ckpt")
    return launch(
        folder,
        2,
        [
            run,
            average,
            iterate,
            four,
            saving,
            replace(resumed, name="resumed"),
            replace(resumed, name="loaded", num_steps=4, val_check_interval=None),
        ],
    )


def test_validation_sees_the_average(kind: str, results: Results) -> None:
    for rank in (0, 1):
        check_evaluations(results.of_process("seen", rank), rank, KINDS[kind])


def test_training_and_its_communication_are_the_same(results: Results) -> None:
    for name in ("seen", "average", "saving"):
        assert difference(results[name], results["iterate"]) == 0.0
    collectives = results["iterate"]["collectives"]
    assert sum(collectives.values()) > 20
    assert results["average"]["collectives"] == collectives
    assert results["average"]["losses"] != results["iterate"]["losses"]


def test_checkpoints_hold_the_iterate_and_continue_bitwise(folder: Path, results: Results) -> None:
    assert difference(results["loaded"], results["four"]) == 0.0
    assert difference(results["resumed"], results["iterate"]) == 0.0
    of_validation = saved_weights(folder / "in-validation")
    for name, x in results["iterate"]["tensors"].items():
        if name.startswith("weight."):
            assert torch.equal(of_validation[name.removeprefix("weight.")], x)
    assert difference(results["four"], results["iterate"], "weight") > 1e-3


def test_average_of_the_checkpoint_loads_in_the_plain_model(
    kind: str, folder: Path, results: Results
) -> None:
    [(iterates, _)] = results["seen"]["evaluations"]
    exact, source = average_of(iterates[:5]), folder / "every/step=4.ckpt"
    assert source.is_dir() is (kind != "ddp")
    average_checkpoint(source, folder / "average.ckpt")
    made = torch.load(folder / "average.ckpt", weights_only=True)
    assert made["global_step"] == 4
    Net().load_state_dict(made["state_dict"])
    assert error_of(made["state_dict"], exact) < RTOL
    assert error_of(iterates[4], exact) > 1e-3
    tied = made["state_dict"]["head.weight"]
    assert torch.equal(tied, made["state_dict"]["embedding.weight"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2-no-reshard", "tensor-parallel"])
def test_validate_and_test_see_the_average(kind: str, tmp_path: Path) -> None:
    """That of a checkpoint, and after fit; what one leaves behind does not change the next."""
    run = TrainerRun(
        name="fit",
        strategy=KINDS[kind],
        rule=AVERAGE,
        observe="evaluations",
        save=tmp_path / "saved",
        then_evaluates=True,
    )
    loaded = replace(run, name="loaded", save=None, load=tmp_path / "saved")
    results = launch(tmp_path, 2, [run, loaded])
    [(iterates, after_fit)] = results["fit"]["evaluations"]
    [(_, of_checkpoint)] = results["loaded"]["evaluations"]
    exact, iterate = average_of(iterates), iterates[-1]
    assert error_of(iterate, exact) > 1e-3
    for seen in (after_fit, of_checkpoint):
        assert len(seen) == 3
        for _, weights in seen:
            assert error_of(weights, exact) < RTOL
    tokens = (Tokens(1) if kind == "tensor-parallel" else Tokens(1, 0, 2))[0]
    for name in ("fit", "loaded"):
        assert results[name]["losses"] == pytest.approx([loss_at(exact, tokens)] * 3, rel=RTOL)
        for key, value in iterate.items():
            assert torch.equal(results[name]["tensors"][f"weight.{key}"], value)


def test_data_beside_tensor_parallelism(tmp_path: Path) -> None:
    """2 x 2 processes: validation in fit, of the folder, and its average as weights."""
    run = TrainerRun(
        name="fit",
        strategy=FSDP2(tensor_parallel=2),
        rule=AVERAGE,
        val_check_interval=1.0,
        observe="evaluations",
        save=tmp_path / "saved",
    )
    again = replace(run, name="again", save=None, load=tmp_path / "saved", then_evaluates=True)
    results = launch(tmp_path, 4, [run, again])
    for rank in range(4):
        check_evaluations(results.of_process("fit", rank), rank // 2, run.strategy)
    [(iterates, _)] = results["fit"]["evaluations"]
    [(_, seen)] = results["again"]["evaluations"]
    average_checkpoint(tmp_path / "saved", tmp_path / "average.ckpt")
    made = torch.load(tmp_path / "average.ckpt", weights_only=True)["state_dict"]
    for weights in (made, *(weights for _, weights in seen)):
        assert error_of(weights, average_of(iterates)) < RTOL


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_compressed_directions_in_shards(dtype: str, tmp_path: Path) -> None:
    rule = EMA(evaluate_at="average", direction_dtype="int8" if dtype == "int8" else "bfloat16")
    run = TrainerRun(
        name="seen",
        strategy=FSDP2(),
        rule=rule,
        val_check_interval=1.0,
        observe="evaluations",
        save=tmp_path / "saved",
    )
    result = launch(tmp_path, 2, [run])["seen"]
    [(iterates, seen)] = result["evaluations"]
    exact, iterate = average_of(iterates), iterates[-1]
    with small_kernels():  # blocks as small as in the run
        average_checkpoint(tmp_path / "saved", tmp_path / "average.ckpt")
    made = torch.load(tmp_path / "average.ckpt", weights_only=True)["state_dict"]
    for weights in (seen[-1][1], made):
        for name, a in exact.items():
            # Blocks of 4 numbers in 8 bits, rounded at random in each of 8 steps.
            distance = (iterate[name].double() - a).norm()
            assert (weights[name].double() - a).norm() < 0.1 * distance, name
    # What validation sees is what is saved, up to rounding.
    assert error_of(made, {name: w.double() for name, w in seen[-1][1].items()}) < 1e-6


LOOPS = {
    **{kind: AttachedRun(name=kind, strategy=KINDS[kind]) for kind in ("ddp", "fsdp2")},
    **{
        f"fabric-{kind}": AttachedRun(name=f"fabric-{kind}", strategy=KINDS[kind], uses_fabric=True)
        for kind in ("ddp", "fsdp1", "fsdp2")
    },
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_one_s_own(name: str, tmp_path: Path) -> None:
    """Evaluations in the middle of each window see the average, and so does the checkpoint."""
    run = replace(
        LOOPS[name],
        evaluate_at="average",
        notes_evaluations=True,
        accumulate=2,
        save=tmp_path / "saved",
    )
    results = launch(tmp_path, 2, [run, replace(run, name="iterate", evaluate_at="iterate")])
    assert difference(results[name], results["iterate"]) == 0.0
    iterates = [
        {key.removeprefix("weight."): x for key, x in iterate.items()}
        for iterate in results[name]["iterates"]
    ]
    data = Tokens(4, 0, 2)
    for idx, loss in enumerate(results[name]["losses"]):
        exact = average_of(iterates[: idx // 2 + 1])
        assert loss == pytest.approx(loss_at(exact, data[idx % 4]), rel=RTOL)
        if idx > 3:
            assert abs(loss / results["iterate"]["losses"][idx] - 1) > 1e-4
    average_checkpoint(tmp_path / "saved", tmp_path / "average.pt")
    made = torch.load(tmp_path / "average.pt", weights_only=True)
    made = made.get("model", made)
    Net().load_state_dict(made)
    assert error_of(made, average_of(iterates)) < RTOL


def test_a_folder_that_lacks_something_is_refused(tmp_path: Path) -> None:
    folders = {}
    runs = []
    for strategy in (FSDP1(), FSDP2(), DDP()):
        name = type(strategy).__name__
        folders[name] = tmp_path / name
        run = TrainerRun(name=name, strategy=strategy, num_steps=2, save=folders[name])
        runs.append(run)
    plain = replace(runs[1], name="plain", rule=None, save=tmp_path / "plain")
    launch(tmp_path, 2, [*runs, plain])
    target = tmp_path / "target.ckpt"
    with pytest.raises(ValueError, match="must be made with EMA-Nesterov"):
        average_checkpoint(tmp_path / "plain", target)
    (folders["FSDP1"] / "meta.pt").unlink()
    with pytest.raises(ValueError, match=r"no meta\.pt of the Trainer"):
        average_checkpoint(folders["FSDP1"], target)
    shard = folders["FSDP2"] / "__1_0.distcp"
    whole = shard.read_bytes()
    for left in (whole[:100], None):
        if left is None:
            shard.unlink()
        else:
            shard.write_bytes(left)
        with pytest.raises(ValueError, match="must be a whole checkpoint") as caught:
            average_checkpoint(folders["FSDP2"], target)
        assert "\n" not in str(caught.value)
    (folders["FSDP2"] / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="must be a whole checkpoint"):
        Folder(folders["FSDP2"])
    assert not target.exists()
    assert not list(tmp_path.glob("*.incomplete"))
