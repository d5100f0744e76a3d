"""Train the runs of a study that are not finished yet."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from lightning_ema_nesterov.experiments.study.claim import claim, read_config
from lightning_ema_nesterov.experiments.study.results import (
    Result,
    read_event_folder,
    read_lines,
    write_line,
)
from lightning_ema_nesterov.experiments.study.rounds import confirming_runs
from lightning_ema_nesterov.experiments.study.spec import Run, Study
from lightning_ema_nesterov.experiments.study.train import check_optimizers, train_run
from lightning_ema_nesterov.experiments.typed_commands import typed_command

__all__ = ["LINES", "RUNS", "run_study"]

LINES, RUNS, LOCK = "runs.jsonl", "runs", ".lock"


def run_study(study: Study, out_dir: Path, *, num_workers: int = 1) -> None:
    """Train what is left of a study.

    Args:
        study: The study.
        out_dir: Its folder, with ``study.json``, one line for each finished run in ``runs.jsonl``,
            and TensorBoard event files below ``runs``.
        num_workers: Runs at the same time, at least 1.

    Raises:
        ValueError: If the folder holds another study, ``num_workers`` is too small, or an
            optimizer cannot be made for the model; if another process trains in the folder.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}.")
    finished = {result.run for result in read_lines(out_dir / LINES)}
    check_optimizers(study, [run for run in study.runs() if run not in finished])
    try:
        with _held(out_dir):
            claim(study, out_dir, finished)
            print(f"Folder: {out_dir}")
            print(f"Watch: {typed_command('tensorboard', '--logdir', out_dir / RUNS)}")
            if study.confirming_seeds:
                print("The runs that choose learning rates; those that confirm them follow:")
            _train_all(study, study.runs(), out_dir, num_workers=num_workers)
            if study.confirming_seeds:
                second_round = confirming_runs(study, read_lines(out_dir / LINES))
                print("The runs that confirm:")
                _train_all(study, second_round, out_dir, num_workers=num_workers)
    except (KeyboardInterrupt, SystemExit):  # the latter is the Trainer's answer to Ctrl-C
        sys.exit("Stopped. The same command goes on from here.")
    print(f"Report: {typed_command('ema-nesterov', 'report', out_dir)}")


@contextmanager
def _held(out_dir: Path) -> Iterator[None]:
    """Keep other processes out of the folder of a study; make it if there is none.

    Args:
        out_dir: The folder.

    Raises:
        ValueError: If the folder holds something else, or another process is in it.
    """
    is_study = read_config(out_dir) is not None
    if not is_study and out_dir.exists() and any(path.name != LOCK for path in out_dir.iterdir()):
        raise ValueError(f"{out_dir} is not empty and holds no study: give another out_dir.")
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out_dir / LOCK, timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"Another process trains in {out_dir}: wait for it, or give another out_dir."
        ) from None


def _train_all(study: Study, runs: Sequence[Run], out_dir: Path, *, num_workers: int) -> None:
    finished = {result.run for result in read_lines(out_dir / LINES)}
    left = [run for run in runs if run not in finished]
    num_finished = len(runs) - len(left)
    print(f"{len(runs)} runs, {num_finished} of them finished.")
    waiting = dict.fromkeys(left)
    with tqdm(total=num_finished + len(left), initial=num_finished, unit="run") as progress:
        progress.set_description(_describe(waiting, num_workers))
        for result in _results(study, left, out_dir / RUNS, num_workers):
            write_line(out_dir / LINES, result)
            waiting.pop(result.run)
            outcome = "diverged" if result.is_diverged else f"{result.final:.4f}"
            progress.set_postfix_str(f"last: {outcome}")
            progress.set_description(_describe(waiting, num_workers))
            progress.update()


def _describe(waiting: Iterable[Run], num_workers: int) -> str:
    running = itertools.islice(waiting, num_workers)
    return ", ".join(f"{r.base} {r.method} {r.lr:g} seed {r.seed}" for r in running) or "finished"


def _results(study: Study, runs: Sequence[Run], root: Path, num_workers: int) -> Iterator[Result]:
    if num_workers == 1:
        for run in runs:
            yield _train(study, run, root)
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
    ) as pool:
        with _interrupts_ignored():  # the workers keep to that: Ctrl-C reaches them too
            futures = [pool.submit(_train, study, run, root) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_worker(parent: int) -> None:
    """Have a worker end when the study was killed, which could not tell it."""
    tqdm.set_lock(threading.RLock())  # its own, between processes, outlives a killed worker

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train(study: Study, run: Run, root: Path) -> Result:
    train_run(study, run, root)
    return read_event_folder(root / run.folder)
