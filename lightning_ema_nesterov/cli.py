"""The command ``ema-nesterov``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

__all__ = ["average", "benchmark", "compare", "convex", "main", "pretrain", "quickstart", "report"]


def quickstart(
    *,
    num_steps: int = 2000,
    seed: int = 0,
    lr: float = 2e-3,
    lookahead_step_size: float = 0.5,
    ema_decay: float = 0.99,
    batch_size: int = 8,
    out_dir: Path = Path("out/quickstart"),
    text: Path | None = None,
) -> None:
    """Train a small language model with AdamW and with AdamW and EMA-Nesterov, and compare.

    Args:
        num_steps: Optimizer steps of each run, a positive multiple of 20.
        seed: Seed of the weights and of the order of the text, the same for both runs.
        lr: Peak base learning rate of both runs.
        lookahead_step_size: Peak lookahead step size, in [0, 1).
        ema_decay: Weight of the past in the EMA direction, in [0, 1).
        batch_size: Windows of 64 bytes in a batch, at least 1. Small batches are noisy.
        out_dir: Folder for logs, checkpoints, the table and the picture; each call makes a run_N.
        text: A text file, or a folder of text files, instead of Python's standard library.
    """
    from lightning_ema_nesterov.experiments.quickstart import Settings, run_quickstart

    settings = Settings(num_steps, seed, lr, lookahead_step_size, ema_decay, batch_size)
    run_quickstart(settings, out_dir=out_dir, text=text)


def benchmark(
    *,
    num_elements: list[int] = [10**6, 10**7, 10**8],  # noqa: B006  # jsonargparse shows it
    num_tensors: list[int] = [10, 100, 2000],  # noqa: B006
    forms: list[str] = ["default", "compile", "one_pass", "bfloat16", "int8"],  # noqa: B006
    num_rounds: int = 15,
    num_threads: list[int] = [1],  # noqa: B006
    device: str = "cpu",
    out: Path = Path("out/benchmark.json"),
) -> None:
    """Measure what the method costs, against a straightforward form, a plain copy and AdamW.

    Args:
        num_elements: Elements of all parameters together.
        num_tensors: Parameters that they are split into; each number with each of num_elements.
        forms: default, compile, one_pass (compile=True where nobody can look between two steps),
            bfloat16, int8.
        num_rounds: Interleaved rounds, of which the medians are taken, at least 1.
        num_threads: Numbers of threads of torch on a CPU, each at least 1.
        device: As torch names it.
        out: JSON file for the figures.
    """
    from lightning_ema_nesterov.experiments.benchmark.run import run_benchmark

    sizes = [(elements, tensors) for elements in num_elements for tensors in num_tensors]
    run_benchmark(
        sizes,
        forms=forms,
        num_rounds=num_rounds,
        num_threads=num_threads,
        device=device,
        out=out,
    )


def compare(
    study: Path,
    *,
    out_dir: Path | None = None,
    quick: bool = False,
    num_workers: int = 1,
) -> None:
    """Train all runs of a study: methods, base optimizers, learning rates and seeds.

    A study that was stopped goes on where it stopped.

    Args:
        study: YAML file that says what is trained. Examples are in recipes/studies. Models, data
            and callbacks of yours are found beside it and in the current folder.
        out_dir: Folder of the study. By default out/studies/ and the name of the file.
        quick: Whether to train its quick form.
        num_workers: Runs at the same time, at least 1.
    """
    from lightning_ema_nesterov.experiments.study.compare import run_study
    from lightning_ema_nesterov.experiments.study.load import load_study

    sys.path += [str(study.parent.resolve()), str(Path.cwd())]  # behind what is installed
    name = study.stem + ("-quick" if quick else "")
    folder = Path("out/studies", name) if out_dir is None else out_dir
    run_study(load_study(study, is_quick=quick), folder, num_workers=num_workers)


def convex(*, out: Path = Path("out/convex.jsonl")) -> None:
    """Measure EMA-Nesterov on convex problems, where theory says what to expect.

    Args:
        out: File for the results, as JSON lines.
    """
    from lightning_ema_nesterov.experiments.convex import run_convex

    run_convex(out)


def report(study_dir: Path) -> None:
    """Write tables and figures of a study from its event files, also of one that is not finished.

    Args:
        study_dir: Folder that `ema-nesterov compare` wrote.
    """
    from lightning_ema_nesterov.experiments.study.report import write_report

    write_report(study_dir)


def average(source: Path, target: Path, *, share: float = 1.0) -> None:
    """Write the average of the weights that a checkpoint made with EMA-Nesterov holds.

    Args:
        source: A .ckpt file or a distributed folder of the Trainer, a lit_model.pth of LitGPT, or a
            file or a distributed folder of a loop of your own. It is unpickled: trust it.
        target: File to write. It loads where the source's weights load.
        share: Share of the way from the last weights to their average, in [0, 1].
    """
    from lightning_ema_nesterov.averages import average_checkpoint

    average_checkpoint(source, target, share)


def pretrain(*, strategy: Literal["ddp", "fsdp2"] = "ddp") -> None:
    """Run `litgpt pretrain` with DDP or FSDP2 on several devices; it has all of its options.

    Args:
        strategy: How several devices work together, instead of LitGPT's FSDP1.
    """


def _pretrain(arguments: list[str]) -> None:
    try:
        from lightning_ema_nesterov.litgpt.launch import launch
    except ModuleNotFoundError as error:
        sys.exit(
            f"ema-nesterov pretrain needs {error.name}: "
            "pip install 'lightning-ema-nesterov[litgpt]'"
        )
    launch(arguments)


def main() -> None:
    """Run the command line; an error in the input is one line on standard error."""
    if sys.argv[1:2] == ["pretrain"]:
        _pretrain(sys.argv[2:])
        return
    try:
        from jsonargparse import auto_cli
    except ModuleNotFoundError as error:
        sys.exit(
            f"ema-nesterov needs {error.name}: pip install 'lightning-ema-nesterov[quickstart]'"
        )
    try:
        auto_cli(
            {
                "average": average,
                "quickstart": quickstart,
                "compare": compare,
                "report": report,
                "convex": convex,
                "pretrain": pretrain,
                "benchmark": benchmark,
            },
            # jsonargparse wants a value behind the name of a bool.
            args=["--quick=true" if arg == "--quick" else arg for arg in sys.argv[1:]],
        )
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        sys.exit(f"ema-nesterov: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
