"""The command line: missing packages, wrong options, and commands that it tells to type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_ema_nesterov.cli import main
from lightning_ema_nesterov.experiments.typed_commands import typed_command
from lightning_ema_nesterov.version import __version__

BENCHMARK = ["benchmark", "--num_elements", "1000", "--num_tensors", "2", "--num_rounds", "1"]
BENCHMARK += ["--forms", "default"]
# What the extras bring; torchmetrics and tqdm are Lightning's own.
PLOTS_AND_LOGS = ["matplotlib", "tensorboard", "markdown", "scipy", "litgpt", "pytorch_optimizer"]


@dataclass(frozen=True)
class Case:
    """A command where packages are not installed."""

    packages: tuple[str, ...]
    arguments: tuple[str, ...]
    extra: str = ""

    @property
    def name(self) -> str:
        return f"{self.arguments[0]} without {' '.join(self.packages)}"


MISSING = [
    Case(("jsonargparse",), ("quickstart",), "quickstart"),
    Case(("jsonargparse",), ("report", "out"), "study"),
    Case(("jsonargparse",), ("benchmark",), "litgpt"),
    Case(("litgpt",), ("benchmark", "--models", "0.1M"), "litgpt"),
    Case(("jsonargparse",), ("--help",), "quickstart"),
    Case(("matplotlib",), ("quickstart",), "quickstart"),
    Case(("litgpt",), ("quickstart",), "quickstart"),
    Case(("tensorboard",), ("compare", "study.yaml"), "study"),
    Case(("markdown",), ("report", "out"), "study"),
    Case(("matplotlib",), ("report", "out"), "study"),
    Case(("litgpt",), ("pretrain",), "litgpt"),
]
WORKING = [
    Case(tuple(PLOTS_AND_LOGS), tuple(BENCHMARK)),
    Case(tuple(PLOTS_AND_LOGS), ("convex", "--out", "convex.jsonl")),
]
VERSION = Case(("jsonargparse",), ("--version",))
AVERAGE = Case(("jsonargparse", *PLOTS_AND_LOGS), ("average", "nowhere", "target"))
BROKEN = Case(("lightning_ema_nesterov.experiments.tables",), tuple(BENCHMARK))
CASES = [*MISSING, *WORKING, VERSION, AVERAGE, BROKEN]

# One process imports what is always there, and each case is a fork of it.
SCRIPT = """
import json, os, sys, warnings
import lightning_ema_nesterov.trainer.base_callback
from lightning_ema_nesterov.cli import main
codes = []
for idx, (packages, arguments) in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if not pid:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{idx}.{name}", os.O_WRONLY | os.O_CREAT), number)
        os.mkdir(f"{idx}")
        os.chdir(f"{idx}")
        for package in packages:
            for name in [n for n in sys.modules if (n + ".").startswith(package + ".")]:
                del sys.modules[name]
            sys.modules[package] = None
        if "convex" in arguments:
            from lightning_ema_nesterov.experiments import convex, modes
            convex.CONDITIONS, convex.NUM_NOISY_STEPS = (10.0,), 100
            modes.TIME_SCALES, modes.NUM_NOISY_RUNS = (1.0,), 10
        sys.argv = ["ema-nesterov", *arguments]
        main()
        sys.exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended, what it said, and what it left in its folder."""

    code: int
    output: str
    error: str
    files: list[str]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    folder = tmp_path_factory.mktemp("commands")
    cases = json.dumps([(case.packages, case.arguments) for case in CASES])
    command = [sys.executable, "-c", SCRIPT, cases]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, timeout=240
    )
    return {
        case: Outcome(
            code,
            (folder / f"{idx}.out").read_text(),
            (folder / f"{idx}.err").read_text(),
            [path.name for path in (folder / f"{idx}").iterdir()],
        )
        for idx, (case, code) in enumerate(zip(CASES, json.loads(result.stdout), strict=True))
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", MISSING, ids=lambda case: case.name)
def test_missing_package_is_named_with_its_extra(case: Case, outcomes: dict[Case, Outcome]) -> None:
    found = outcomes[case]
    assert found.code == 1
    assert found.error.count("\n") == 1, found.error
    assert f"needs {case.packages[0]}" in found.error
    assert f"which the extra {case.extra!r} installs" in found.error
    assert f"pip install -c constraints.txt -e '.[{case.extra}]'" in found.error
    assert not found.files


@pytest.mark.slow
@pytest.mark.parametrize("case", WORKING, ids=lambda case: case.arguments[0])
def test_benchmark_and_convex_need_no_packages_for_plots_and_logs(
    case: Case, outcomes: dict[Case, Outcome]
) -> None:
    found = outcomes[case]
    assert found.code == 0, found.error
    assert "Figures: " in found.output
    assert found.files


@pytest.mark.slow
def test_average_needs_no_extra(outcomes: dict[Case, Outcome]) -> None:
    found = outcomes[AVERAGE]
    said = "ema-nesterov: source must be a checkpoint, and nowhere does not exist.\n"
    assert (found.code, found.error) == (1, said)


@pytest.mark.slow
def test_our_own_module_that_is_missing_is_no_matter_of_extras(
    outcomes: dict[Case, Outcome],
) -> None:
    assert outcomes[BROKEN].code == 1
    assert "ModuleNotFoundError" in outcomes[BROKEN].error
    assert "the extra" not in outcomes[BROKEN].error


@pytest.mark.slow
def test_version_needs_no_other_package(outcomes: dict[Case, Outcome]) -> None:
    assert outcomes[VERSION].code == 0
    assert outcomes[VERSION].output == f"ema-nesterov {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--steps", "3"], "Unrecognized arguments: --steps 3"),
        (["quickstart", "--num_steps", "many"], "num_steps must be int, got many."),
        (["quickstart", "--lr", "fast"], "lr must be float, got fast."),
        (["benchmark", "--num_elements", "x"], "num_elements must be list[int] or int, got x."),
        (["compare"], "study is missing."),
        (["compare", "a.yaml", "--num_workers", "two"], "num_workers must be int, got two."),
        (["quickstrat"], "argument subcommand: invalid choice: 'quickstrat'"),
    ],
)
def test_wrong_option_prints_the_error_first_and_briefly(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"ema-nesterov: {message}")
    command = "" if arguments == ["quickstrat"] else f" {arguments[0]}"
    assert second == f"Options: ema-nesterov{command} --help"


def test_wrong_files_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text("model:\n\t- 1\n")
    for arguments, message in (
        (["compare", "study.yaml"], "study.yaml is not YAML in line 2, column 1"),
        (["compare", "other.yaml"], "other.yaml does not exist"),
        (["report", "nowhere"], "nowhere/runs must hold event files of finished runs"),
    ):
        monkeypatch.setattr(sys, "argv", ["ema-nesterov", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert message in str(end.value)
        assert "\n" not in str(end.value)
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_commands_to_type_work_without_an_activated_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("python", "tensorboard"):
        (programs / name).write_text("#!/bin/sh\necho it is $0\n")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert shutil.which("tensorboard") is None
    line = typed_command("tensorboard", "--logdir", Path("my runs"))
    assert line == ".venv/bin/tensorboard --logdir 'my runs'"
    said = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert said.stdout == "it is .venv/bin/tensorboard\n"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert typed_command("tensorboard") == str(programs / "tensorboard")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin")  # activated
    assert typed_command("tensorboard") == "tensorboard"
    assert typed_command("no-such-program") == "no-such-program"
