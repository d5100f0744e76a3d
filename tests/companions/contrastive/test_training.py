"""In the Trainer: digits, resume, several processes, EMA-Nesterov, and input that cannot train."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_ema_nesterov.companions.contrastive as package
from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.companions.contrastive import EMC2Loss, WithIndex
from tests.companions.contrastive import gathering_worker
from tests.processes import start_processes

pytestmark = pytest.mark.slow


HERE = Path(__file__).parent


def load_recipe() -> ModuleType:
    path = HERE.parents[2] / "recipes" / "companions" / "contrastive.py"
    spec = importlib.util.spec_from_file_location("contrastive_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()


def digits_module(num_images: int = 60, num_steps: int = 60, kind: Any = None) -> Any:
    torch.manual_seed(0)
    views = recipe.make_views(num_images)
    return (kind or recipe.Contrastive)(views, "emc2", 0.2, num_steps)


def batches(module: Any, batch_size: int = 6) -> DataLoader[Any]:
    return DataLoader(WithIndex(TensorDataset(*module.views)), batch_size)


def make_trainer(max_steps: int, callbacks: list[Callback], **options: Any) -> Trainer:
    return Trainer(
        max_steps=max_steps,
        callbacks=callbacks,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


def state_of(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class InOrder(recipe.Contrastive):  # type: ignore[name-defined, misc]  # loaded from its file
    """Takes the batch that belongs to a step: Lightning starts an epoch's data again on resume."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        samples = torch.randperm(self.views.shape[1], generator=generator)[:6]
        value: Tensor = super().training_step((self.views[:, samples], samples), batch_idx)
        return value


def test_training_on_digits_resumes_with_its_chains_bitwise(tmp_path: Path) -> None:
    whole = digits_module(kind=InOrder)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=14, save_top_k=-1)
    trainer = make_trainer(33, [saver], enable_checkpointing=True)
    trainer.fit(whole, batches(whole))

    second = digits_module(kind=InOrder)
    make_trainer(33, []).fit(second, batches(second), ckpt_path=str(tmp_path / "step=14.ckpt"))
    assert int(second.loss.num_steps) == 33
    for name, value in state_of(whole).items():
        assert torch.equal(second.state_dict()[name], value), name

    # Without the chains, the run goes elsewhere.
    file = torch.load(tmp_path / "step=14.ckpt", weights_only=True)
    file["state_dict"]["loss.points"].fill_(-1)
    torch.save(file, tmp_path / "b.ckpt")
    third = digits_module(kind=InOrder)
    make_trainer(33, []).fit(third, batches(third), ckpt_path=str(tmp_path / "b.ckpt"))
    assert not torch.equal(third.encoder[0].weight, whole.encoder[0].weight)


def test_training_on_digits_lowers_the_loss_over_all_negatives() -> None:
    module = digits_module(num_steps=400)

    def loss_of_all() -> float:
        with torch.no_grad():
            out0, out1 = module.encode_all()
            return float(package.contrastive_loss(out0, out1, 0.2))

    before = loss_of_all()
    make_trainer(400, []).fit(module, batches(module))
    assert loss_of_all() < before - 1.0


def test_two_processes_move_the_chains_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    start_processes(gathering_worker.main, 2, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for chains in ("image", "view"):
        whole = gathering_worker.steps(chains, 0, 1)
        for result in results:
            assert torch.equal(result[chains]["points"], whole["points"])
            assert torch.equal(result[chains]["num_steps"], whole["num_steps"])
            # Sums in another order.
            for name in ("gradient", "log_scores"):
                torch.testing.assert_close(
                    result[chains][name], whole[name], rtol=1e-11, atol=1e-12
                )
        alone = gathering_worker.steps(chains, 0, 2, gathers=False)
        assert not torch.equal(alone["points"], whole["points"])


class ScoresAtTheLookahead(Callback):
    """Computes the last batch's scores again, at the point that its gradient was taken at."""

    def __init__(self) -> None:
        self.at_lookahead: list[Tensor] = []
        self.at_iterate: list[Tensor] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self.at_lookahead.append(errors_of_scores(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.at_iterate.append(errors_of_scores(pl_module))


@torch.no_grad()
def errors_of_scores(module: Any) -> Tensor:
    """Largest error of a stored score, if it were of the weights of now. All 8 are in a batch."""
    features = torch.nn.functional.normalize(module.encode_all(), dim=2)
    points = module.loss.points
    states = features[points // 8, points % 8]
    scores = (features * states).sum(dim=2) / module.temperature
    errors: Tensor = (scores - module.loss.log_scores).abs().max()
    return errors


def test_scores_are_refreshed_at_the_lookahead_point() -> None:
    module = digits_module(num_images=8, num_steps=30)
    scores = ScoresAtTheLookahead()
    method = EMANesterov(lookahead_step_size=0.5, ema_decay=0.9, warmup=0, rest=0)
    make_trainer(30, [method, scores]).fit(module, batches(module, batch_size=8))
    # Rounding in float32 of logits up to 5.
    assert max(scores.at_lookahead) < 1e-5
    assert min(scores.at_iterate[1:]) > 1e-4
    plain = digits_module(num_images=8, num_steps=30)
    make_trainer(30, []).fit(plain, batches(plain, batch_size=8))
    assert not torch.equal(plain.encoder[0].weight, module.encoder[0].weight)


def test_scores_stay_wide_and_states_exact_when_the_module_is_converted() -> None:
    loss = EMC2Loss(300, 0.07)
    loss.points[0, :] = torch.arange(300)
    loss.bfloat16()
    assert loss.log_scores.dtype is torch.float32
    assert loss.points[0].tolist() == list(range(300))
    assert loss.double().log_scores.dtype is torch.float64


def encode_nothing(samples: Tensor, views: Tensor) -> Tensor:
    raise AssertionError("nothing is outside the batch")


class Streaming(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


OUT = torch.eye(3)
PAIRS = [(torch.zeros(2), 7), (torch.zeros(2), 7), (torch.zeros(2), 7)]
BAD_INPUT: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "one sample": (lambda: EMC2Loss(1), ValueError, "num_samples must be at least 2, got 1"),
    "temperature": (lambda: EMC2Loss(9, 0.0), ValueError, "temperature must be above 0"),
    "burn-in": (lambda: EMC2Loss(9, 0.1, 1.0), ValueError, r"burn_in must be in \[0, 1\), got 1"),
    "chains": (
        lambda: EMC2Loss(9, chains="batch"),  # type: ignore[arg-type]  # the error is the test
        ValueError,
        "chains must be 'image' or 'view', got 'batch'",
    ),
    "index outside": (
        lambda: EMC2Loss(9)(OUT, OUT, torch.tensor([0, 1, 9]), encode_nothing),
        ValueError,
        r"indices must be in \[0, num_samples=9\), got 9",
    ),
    "index below 0": (
        lambda: EMC2Loss(9)(OUT, OUT, torch.tensor([0, -1, 9]), encode_nothing),
        ValueError,
        r"got -1. Pass num_samples=len\(dataset\)",
    ),
    "no index": (
        lambda: EMC2Loss(9)(OUT, OUT, None, encode_nothing),
        TypeError,
        "indices must be a tensor of integers.*got None. Wrap the data set in WithIndex",
    ),
    "labels in floats": (
        lambda: EMC2Loss(9)(OUT, OUT, torch.zeros(3), encode_nothing),
        TypeError,
        "got a tensor of torch.float32",
    ),
    "two indices": (
        lambda: EMC2Loss(9)(OUT, OUT, torch.tensor([0, 1]), encode_nothing),
        ValueError,
        "indices must have one entry for each of 3 samples",
    ),
    "views of two shapes": (
        lambda: EMC2Loss(9)(OUT, OUT[:2], torch.arange(3), encode_nothing),
        ValueError,
        "out0 and out1 must be matrices of the same shape",
    ),
    "no negative": (
        lambda: EMC2Loss(9)(OUT, OUT, torch.tensor([4, 4, 4]), encode_nothing),
        ValueError,
        "at least 2 different samples, got sample 4 only",
    ),
    "evaluation": (
        lambda: EMC2Loss(9).eval()(OUT, OUT, torch.arange(3), encode_nothing),
        RuntimeError,
        "must be in training mode.*Use contrastive_loss",
    ),
    "in-batch of one": (
        lambda: package.contrastive_loss(OUT[:1], OUT[:1]),
        ValueError,
        "at least 2 samples, got 1",
    ),
    "data without index": (
        lambda: EMC2Loss(9).check_dataset(TensorDataset(OUT)),
        TypeError,
        r"dataset\[0\] must end in its index, 0, got Tensor.*Wrap the data set in WithIndex",
    ),
    "data with labels": (
        lambda: EMC2Loss(9).check_dataset(PAIRS),
        TypeError,
        r"dataset\[0\] must end in its index, 0, got 7",
    ),
    "more data than chains": (
        lambda: EMC2Loss(2).check_dataset(WithIndex(PAIRS)),
        ValueError,
        "between 1 and num_samples=2 samples, got 3.*Pass num_samples",
    ),
    "a stream": (
        lambda: WithIndex(Streaming()),
        TypeError,
        "must have a length and items by index, got Streaming",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_in_one_sentence(name: str) -> None:
    act, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message):
        act()


def test_chains_do_not_move_on_a_refused_batch() -> None:
    loss = EMC2Loss(9)
    with pytest.raises(ValueError, match="indices must be in"):
        loss(OUT, OUT, torch.tensor([0, 1, 9]), encode_nothing)
    assert int(loss.num_steps) == 0
    assert (loss.points == -1).all()


def test_features_of_another_shape_are_refused() -> None:
    loss = EMC2Loss(9, chains="view")
    loss(OUT, OUT, torch.arange(3), encode_nothing)
    with pytest.raises(ValueError, match="encode must return one row of features"):
        loss(OUT, OUT, torch.arange(3), lambda samples, views: torch.zeros(1, 2))


def test_a_data_set_without_index_is_refused_before_the_first_step() -> None:
    module = digits_module()
    weight = module.encoder[0].weight.clone()
    pairs = list(zip(*module.views, strict=True))
    with pytest.raises(TypeError, match="Wrap the data set in WithIndex"):
        make_trainer(5, []).fit(module, DataLoader(pairs, 6))  # type: ignore[arg-type]  # a list
    assert torch.equal(module.encoder[0].weight, weight)


def test_nothing_else_of_the_project_is_imported() -> None:
    assert package.__file__ is not None
    for file in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                root = name.split(".")[0]
                is_own = name.startswith(package.__name__)
                standard = root in sys.stdlib_module_names
                assert is_own or standard or root in {"torch", "typing_extensions"}, name


def test_recipe_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["--train-steps", "40", "--bias-steps", "160"])
    output = capsys.readouterr().out
    assert output.count("temperature 0.07, batch 16") == 3


@pytest.mark.no_cover
def test_bias_at_a_frozen_encoder_of_digits() -> None:
    views = recipe.make_views()
    encoder = recipe.train(views, "softmax", temperature=0.2, batch_size=16, num_steps=1000, seed=0)
    for temperature, low in ((0.2, 0.5), (0.07, 0.8)):
        settings = {"temperature": temperature, "batch_size": 16}
        _, in_batch = recipe.measure_bias(encoder, "softmax", num_steps=1500, **settings)
        _, emc2 = recipe.measure_bias(encoder, "emc2", num_steps=3000, **settings)
        assert emc2 < 0.25
        assert in_batch > low
