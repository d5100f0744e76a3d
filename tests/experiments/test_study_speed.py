"""What a study notes of speed and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import Optimizer

from lightning_ema_nesterov.experiments.event_files import read_scalars
from lightning_ema_nesterov.experiments.study.report import write_report
from lightning_ema_nesterov.experiments.study.results import read_lines, write_line
from lightning_ema_nesterov.experiments.study.watch import Watch
from tests.experiments.toys import Data, Model, result


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class TimedData(Data):
    tokens_per_batch = 7


class TimedModel(Model):
    """A batch takes 1 second, and a step of the optimizer 10 more."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.clock.seconds += 1.0
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Optimizer:
        def pass_time(*args: object) -> None:
            self.clock.seconds += 10.0

        optimizer = SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(pass_time)
        return optimizer


@pytest.mark.parametrize(("num_batches", "seconds"), [(1, 11.0), (4, 14.0)])
def test_time_of_a_step_is_that_of_its_batches_and_of_the_optimizer(
    num_batches: int, seconds: float, tmp_path: Path
) -> None:
    clock = Clock()
    watch = Watch(clock)
    trainer = Trainer(
        max_steps=5,
        log_every_n_steps=1,
        accumulate_grad_batches=num_batches,
        callbacks=[watch],
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TimedModel(clock), datamodule=TimedData())
    assert watch.seconds == [seconds] * 5
    watch.write(trainer, {})
    [rate] = read_scalars(Path(trainer.log_dir or ""))["study/tokens_per_second"]
    assert rate.value == pytest.approx(7 * num_batches / seconds)


def test_memory_is_that_of_the_run_also_where_it_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: dict[str, Any] = {"most": 900, "resets": 0}

    def reset(device: object) -> None:
        gpu["most"], gpu["resets"] = 0, gpu["resets"] + 1

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    trainer: Any = SimpleNamespace(global_step=0, optimizers=[SGD([torch.zeros(1)], lr=0.1)])
    module: Any = SimpleNamespace(device=torch.device("cuda"))
    first, second = Watch(Clock()), Watch(Clock())
    first.on_train_start(trainer, module)
    gpu["most"] = 500  # not 900, which was that of another run in this process
    first.on_validation_start(trainer, module)
    second.load_state_dict(first.state_dict())
    second.on_train_start(trainer, module)
    gpu["most"] = 300
    second.on_train_end(trainer, module)
    assert (first.peak_memory, second.peak_memory, gpu["resets"]) == (500, 500, 2)


def test_report_has_speed_and_memory_of_a_gpu(tmp_path: Path) -> None:
    for method, memory in (("none", 2**30), ("ema", 3 * 2**29)):
        for seed in (0, 1):
            of_gpu = {"tokens_per_second": 1000.0 + seed, "peak_memory": memory + seed}
            one = result(method, 0.1, seed, [2.0], **of_gpu)
            write_line(tmp_path / "runs.jsonl", one)
            assert replace(one, val_loss=[]) in [
                replace(line, val_loss=[]) for line in read_lines(tmp_path / "runs.jsonl")
            ]
    text = (write_report(tmp_path).parent / "report.md").read_text()
    assert "| sgd | none | 0.1000 | 1,000 | 1.00 |\n| sgd | ema | 0.1000 | 1,000 | 1.50 |" in text
    (tmp_path / "runs.jsonl").unlink()
    write_line(tmp_path / "runs.jsonl", result("none", 0.1, 0, [2.0], tokens_per_second=9.0))
    assert "of the GPU" not in (write_report(tmp_path).parent / "report.md").read_text()
