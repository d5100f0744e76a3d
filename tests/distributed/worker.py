"""One process of a distributed run: what ``processes.py`` starts."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from tests.distributed import attached_run, cases, trainer_run
from tests.distributed.strategies import rank
from tests.processes import measure_first_process_only


def main(
    folder: Path, log: Path, environment: Mapping[str, str], runs: Sequence[cases.Case]
) -> None:
    """Do runs one after another, and leave their results in a folder.

    Args:
        folder: Where to write the result or the traceback of each run.
        log: Where the process writes what it prints.
        environment: Variables that ``torchrun`` would set.
        runs: What to do; the first that raises ends the process.
    """
    with log.open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    do_all(folder, runs)


def do_all(folder: Path, runs: Sequence[cases.Case]) -> None:
    torch.set_num_threads(1)
    measure_first_process_only(rank())
    for case in runs:
        if case.port is not None:
            run_apart(case, folder)
        elif code := run_or_explain(case, folder):
            leave(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    leave(0)


def run_or_explain(case: cases.Case, folder: Path) -> int:
    try:
        return run_one(case, folder)
    except BaseException:
        text = traceback.format_exc()
        sys.stderr.write(text)
        traceback_file(folder, case.name, rank()).write_text(text)
        return 1


def run_one(case: cases.Case, folder: Path) -> int:
    try:
        if isinstance(case, cases.AttachedRun):
            result = attached_run.run(case)
        else:
            result = trainer_run.run(case)
    except SystemExit as end:  # the Trainer's answer to SIGTERM
        return int(end.code or 0)
    except (Exception, CheckpointException) as error:  # the latter is not an Exception
        if not case.may_fail:
            raise
        result = {"error": f"{type(error).__name__}: {error}"}
    torch.save(result, result_file(folder, case.name, rank()))
    if dist.is_initialized():
        dist.barrier()
    return 0


def run_apart(case: cases.Case, folder: Path) -> None:
    """Do one run in a process of its own, and write down with which code it ended."""
    os.environ["MASTER_PORT"] = str(case.port)
    pid = os.fork()  # all is imported, and nothing started: much cheaper than a new interpreter
    if pid == 0:
        leave(run_or_explain(case, folder))
    _, status = os.waitpid(pid, 0)
    code_file(folder, case.name, rank()).write_text(str(os.waitstatus_to_exitcode(status)))


def result_file(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}-{rank}.pt"


def traceback_file(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}-{rank}.traceback"


def code_file(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}-{rank}.code"


def leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's communication threads can abort the interpreter's own way out


if __name__ == "__main__":  # torchrun starts it so
    do_all(Path(sys.argv[1]), pickle.loads(Path(sys.argv[2]).read_bytes()))
