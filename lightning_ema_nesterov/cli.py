"""The command ``ema-nesterov``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ema_nesterov.averages.command import average, run_average
from lightning_ema_nesterov.version import __version__

__all__ = ["benchmark", "compare", "convex", "main", "memory", "pretrain", "quickstart", "report"]

_T = TypeVar("_T")


def quickstart(
    *,
    num_steps: int = 2000,
    seed: int = 0,
    lr: float = 2e-3,
    lookahead_step_size: float = 0.5,
    ema_decay: float = 0.99,
    batch_size: int = 8,
    num_threads: int = 1,
    out_dir: Path = Path("out/quickstart-trainer"),
    text: Path | None = None,
) -> None:
    """Train a small language model with AdamW and with AdamW and EMA-Nesterov, and compare.

    Args:
        num_steps: Optimizer steps of each run, a positive multiple of 20.
        seed: Seed of the weights and of the order of the text, the same for both runs.
        lr: Peak base learning rate of both runs.
        lookahead_step_size: Peak lookahead step size, as for EMANesterov.
        ema_decay: Weight of the past in the EMA direction, in [0, 1).
        batch_size: Windows of 64 bytes in a batch, at least 1. Small batches are noisy.
        num_threads: Threads of torch. On a model as small as this, more are rarely faster, and on
            shared cores much slower.
        out_dir: Folder for logs, checkpoints, the table and the picture; each call makes a run_N.
        text: A text file, or a folder of text files, instead of Python's standard library.
    """
    with _extra("quickstart"):
        from lightning_ema_nesterov.experiments.quickstart import Settings, run_quickstart

    settings = Settings(
        num_steps, seed, lr, lookahead_step_size, ema_decay, batch_size, num_threads
    )
    run_quickstart(settings, out_dir=out_dir, text=text)


def benchmark(
    *,
    num_elements: list[int] | int = [10**6, 10**7, 10**8],  # noqa: B006  # jsonargparse shows it
    num_tensors: list[int] | int = [10, 100, 2000],  # noqa: B006
    forms: list[str] | str = ["default", "compile", "one_pass", "bfloat16", "int8"],  # noqa: B006
    num_rounds: int = 15,
    num_threads: list[int] | int = [1],  # noqa: B006
    device: str = "cpu",
    models: list[str] | str | None = None,
    batch_size: int = 8,
    optimizers: list[str] | str = [],  # noqa: B006
    out: Path = Path("out/benchmark.json"),
) -> None:
    """Measure what the method costs, against a straightforward form, a plain copy and AdamW.

    And what its average of the weights costs, against Lightning's EMAWeightAveraging.
    With --optimizers: what steps of base optimizers cost, against AdamW's.

    Args:
        num_elements: Elements of all parameters together: a number, or a list like '[1000, 2000]'.
        num_tensors: Parameters that they are split into; each number with each of num_elements
            that is at least twice as large.
        forms: default, compile, one_pass (compile=True where nobody can look between two steps),
            bfloat16, int8.
        num_rounds: Interleaved rounds, of which the medians are taken, at least 1.
        num_threads: Numbers of threads of torch on a CPU, each at least 1.
        device: As torch names it.
        models: Models whose training steps in bfloat16 are measured too: 0.1M, 124M, 350M, 1B. By
            default the last three on a GPU, and none on a CPU.
        batch_size: Windows in such a step, at least 1: of 64 tokens for 0.1M, of 1,024 otherwise.
        optimizers: all, or names as `ema-nesterov memory` prints them: time their steps instead, on
            a LLaMA 60M with two blocks.
        out: JSON file for the figures.
    """
    if optimizers:
        with _extra("companions"):
            from lightning_ema_nesterov.experiments.benchmark.step_time import run_step_times

            names, threads = _as_list(optimizers), _as_list(num_threads)[0]
            run_step_times(names, num_rounds, num_threads=threads, device=device, out=out)
        return
    with _extra("litgpt"):
        from lightning_ema_nesterov.experiments.benchmark.run import run_benchmark

    pairs = [(e, t) for e in _as_list(num_elements) for t in _as_list(num_tensors)]
    if models is None:
        models = ["124M", "350M", "1B"] if device.startswith("cuda") else []
    with _extra("litgpt"):
        run_benchmark(
            [(e, t) for e, t in pairs if 2 * t <= e] or pairs,
            forms=_as_list(forms),
            num_rounds=num_rounds,
            num_threads=_as_list(num_threads),
            device=device,
            models=_as_list(models),
            batch_size=batch_size,
            out=out,
        )


def memory(
    *,
    sizes: list[str] | str = ["60M", "130M", "350M", "1B", "7B"],  # noqa: B006
    optimizers: list[str] | str = ["all"],  # noqa: B006
    out: Path = Path("out/memory.md"),
) -> None:
    """Measure what base optimizers keep for each parameter of LLaMA models, without their memory.

    Args:
        sizes: Of the models: 60M, 130M, 350M, 1B, 7B.
        optimizers: all, or names as the table prints them.
        out: Markdown file for the tables.
    """
    with _extra("companions"):
        from lightning_ema_nesterov.experiments.benchmark.memory import run_memory

        run_memory(_as_list(sizes), _as_list(optimizers), out)


def compare(
    study: Path,
    *,
    out_dir: Path | None = None,
    quick: bool = False,
    num_workers: int = 1,
) -> None:
    """Train all runs of a study: methods, base optimizers, learning rates and seeds.

    A study that was stopped goes on where it stopped. One that has got more seeds, learning rates
    or methods goes on too.

    Args:
        study: YAML file that says what is trained. Examples are in recipes/studies. Models, data
            and callbacks of yours are found beside it and in the current folder.
        out_dir: Folder of the study. By default out/studies/ and the name of the file.
        quick: Whether to train its quick form.
        num_workers: Runs at the same time, at least 1.
    """
    with _extra("study"):
        from lightning_ema_nesterov.experiments.study.compare import run_study
        from lightning_ema_nesterov.experiments.study.load import load_study

    sys.path += [str(study.parent.resolve()), str(Path.cwd())]  # behind what is installed
    name = study.stem + ("-quick" if quick else "")
    folder = Path("out/studies", name) if out_dir is None else out_dir
    run_study(load_study(study, is_quick=quick), folder, num_workers=num_workers)


def convex(*, out: Path = Path("out/convex.jsonl")) -> None:
    """Measure EMA-Nesterov on convex problems, where theory says what to expect.

    Args:
        out: File for the results, as JSON lines. Those by modes of a quadratic are in a file beside
            it, with `_modes` in its name.
    """
    with _extra("litgpt"):
        from lightning_ema_nesterov.experiments.convex import run_convex
        from lightning_ema_nesterov.experiments.modes import run_modes

    run_convex(out)
    run_modes(out.with_stem(f"{out.stem}_modes"))


def report(study_dir: Path) -> None:
    """Write tables and figures of a study from its event files, also of one that is not finished.

    Args:
        study_dir: Folder that `ema-nesterov compare` wrote.
    """
    with _extra("study"):
        from lightning_ema_nesterov.experiments.study.report import write_report

    write_report(study_dir)


def pretrain(*, strategy: Literal["ddp", "fsdp2"] = "ddp") -> None:
    """Run `litgpt pretrain` with DDP or FSDP2 on several devices; it has all of its options.

    Args:
        strategy: How several devices work together, instead of LitGPT's FSDP1.
    """


def _pretrain(arguments: list[str]) -> None:
    with _extra("litgpt"):
        from lightning_ema_nesterov.litgpt.launch import launch
    launch(arguments)


_COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "quickstart": (quickstart, "quickstart"),
    "average": (average, "litgpt"),  # listed here; on its own it needs none
    "compare": (compare, "study"),
    "report": (report, "study"),
    "convex": (convex, "litgpt"),
    "pretrain": (pretrain, "litgpt"),
    "benchmark": (benchmark, "litgpt"),
    "memory": (memory, "litgpt"),
}
"""Each command, and the extra with the packages that it needs."""


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """End with one line if a package is missing that an extra installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == __package__:
            raise  # not a matter of what is installed
        sys.exit(
            f"ema-nesterov needs {error.name}, which the extra {name!r} installs. In a clone of "
            f"the repository: pip install -c constraints.txt -e '.[{name}]'"
        )


def _as_list(value: list[_T] | _T) -> list[_T]:
    return value if isinstance(value, list) else [value]


def _in_one_line(message: str) -> str:
    """Say in one line what jsonargparse says in several."""
    text = " ".join(message.split())
    missing = re.search(r'Key "(?:\w+\.)*(\w+)" is required', text)
    if missing:
        return f"{missing[1]} is missing."
    found = re.match(r'Parser key "(?:\w+\.)*(\w+)": (.*)', text)
    if found is None:
        return text
    name, problem = found.groups()
    wrong = re.match(r"Expected an? (.*?)\. Got value: (.*)", problem) or re.match(
        r"Does not validate .* Subtypes: \[(.*?)\] Errors: .* Given value: (.*)", problem
    )
    if wrong is None:
        return f"{name}: {problem}"
    kinds = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", wrong[1]).replace(", ", " or ")
    return f"{name} must be {kinds}, got {wrong[2]}."


def _run(arguments: list[str]) -> None:
    known = [word for word in arguments if word in _COMMANDS]
    with _extra(_COMMANDS[known[0]][1] if known else "quickstart"):
        from jsonargparse import ArgumentParser, auto_cli

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            sys.stderr.write(
                f"ema-nesterov: {_in_one_line(message)}\n"
                f"Options: ema-nesterov {known[0] + ' ' if known else ''}--help\n"
            )
            self.exit(2)

    options: Any = {"parser_class": Parser, "prog": "ema-nesterov", "version": __version__}
    auto_cli(
        {name: command for name, (command, _) in _COMMANDS.items()},
        # jsonargparse wants a value behind the name of a bool.
        args=[
            "--quick=true" if word == "--quick" and following not in ("true", "false") else word
            for word, following in zip(arguments, [*arguments[1:], ""], strict=True)
        ],
        **options,
    )


def main() -> None:
    """Run the command line; an error in the input is one line on standard error."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["pretrain"]:
        _pretrain(arguments[1:])
    elif arguments == ["--version"]:  # needs no other package
        print(f"ema-nesterov {__version__}")
    else:
        try:
            if arguments[:1] == ["average"]:
                run_average(arguments[1:])
            else:
                _run(arguments)
        except (OSError, ValueError, MisconfigurationException) as error:
            sys.exit(f"ema-nesterov: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
