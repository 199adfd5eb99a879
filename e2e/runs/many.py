"""Many trainings that belong together: plan them, run each in its own process, resume after a stop.

Cross-validation, search and studies share it.
"""

from __future__ import annotations

import queue
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from e2e.errors import UserError, format_list
from e2e.files import read_json, write_json
from e2e.log import clock
from e2e.runs.processes import Children, Process, command_line


def write_plan(file: Path, plan: Mapping[str, Any], what: str) -> None:
    """Write what the runs beside ``file`` are, or compare it with what an earlier command wrote.

    Parameters
    ----------
    what
        A noun for the message, such as "cross-validation".

    Raises
    ------
    UserError
        The folder holds the runs of another plan; the message lists the differences.
    """
    if file.is_file():
        earlier = read_json(file)
        differences = [
            f"{key}: {earlier.get(key)} in the folder, {plan.get(key)} now"
            for key in dict.fromkeys([*earlier, *plan])
            if earlier.get(key) != plan.get(key)
        ]
        if differences:
            raise UserError(
                f"{file.parent} holds another {what}\n{format_list(differences)}\n"
                "  choose another --out"
            )
    write_json(file, plan)


def is_done(folder: Path) -> bool:
    """Return whether the run in ``folder`` was trained and evaluated."""
    return (folder / "metrics.json").is_file()


def start_or_resume(command: Sequence[str], folder: Path) -> list[str]:
    """Return the arguments of the training in ``folder``: ``command``, or to resume it where it stopped."""
    if (folder / "settings.yaml").is_file():
        return ["--resume", str(folder)]
    return [*command, f"run.out={folder}"]


def run_command(
    command: str,
    arguments: Sequence[str],
    log: Path,
    gpus: str = "",
    wrapper: Sequence[str] = (),
) -> int:
    """Run ``e2e <command>`` to its end and return its exit code; see :func:`start_command`.

    Raises
    ------
    KeyboardInterrupt
        This process received a signal, and so did the command, which has ended.
    """
    children = Children()
    process = start_command(children, command, arguments, log, gpus, wrapper)
    children.wait(process.wait)
    return process.returncode


def start_command(
    children: Children,
    command: str,
    arguments: Sequence[str],
    log: Path,
    gpus: str = "",
    wrapper: Sequence[str] = (),
) -> Process:
    """Start ``e2e <command>`` as one of the children.

    Parameters
    ----------
    command
        Such as ``train``.
    log
        File to which the command line and its output are appended.
    gpus
        GPU numbers that the command may use, such as ``0,1``: one process is started for each. Empty:
        one process, and whatever devices the machine has.
    wrapper
        Command that runs the command, such as one that measures its memory; it is not logged.
    """
    changes = {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    num_ranks = len(gpus.split(","))
    ranks = [f"--gpus={num_ranks}"] if num_ranks > 1 else []
    words = command_line(command, [*arguments, *ranks])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(words)}\n".encode())
        file.flush()
        return children.start([*wrapper, *words], file, changes)


def train_all(
    runs: Mapping[Path, Sequence[str]], slots: Sequence[str], report: Callable[[str], None]
) -> None:
    """Train every run that is not done, ``len(slots)`` at a time.

    Parameters
    ----------
    runs
        Run folder -> command of the training. The output goes to ``<folder>.log``.
    slots
        GPU numbers for each of the runs at a time; see :func:`run_command`.
    report
        Called with a line for each training that starts or ends.

    Raises
    ------
    UserError
        Trainings failed; the message names their logs. Those under way are finished first, and no other
        is started.
    KeyboardInterrupt
        This process received a signal; the trainings received it too and have ended.
    """
    children = Children()
    free_slots: queue.SimpleQueue[str] = queue.SimpleQueue()
    for slot in slots:
        free_slots.put(slot)
    failures: list[str] = []
    stop = Event()

    def train_one(folder: Path) -> None:
        if stop.is_set():
            return
        slot = free_slots.get()
        log = folder.with_name(f"{folder.name}.log")
        started = time.monotonic()
        try:
            on_gpu = f" on GPU {slot}" if slot else ""
            report(f"{time.strftime('%H:%M:%S')}  {folder.name} started{on_gpu}")
            arguments = start_or_resume(runs[folder], folder)
            code = start_command(children, "train", arguments, log, slot).wait()
        finally:
            free_slots.put(slot)
        ending = f"failed with exit code {code}" if code else "finished"
        time_taken = clock(time.monotonic() - started)
        report(f"{time.strftime('%H:%M:%S')}  {folder.name} {ending} after {time_taken}")
        if code:
            failures.append(f"{folder.name}: exit code {code}, see {log}")
            stop.set()

    with ThreadPoolExecutor(len(slots)) as pool:
        futures = [pool.submit(train_one, folder) for folder in runs if not is_done(folder)]
        children.wait(partial(_wait_for_all, futures, stop))
    for future in futures:
        future.result()
    if failures:
        raise UserError(
            f"{len(failures)} run(s) failed\n{format_list(failures)}\n"
            "  fix the cause, then run the same command again: finished runs are kept, stopped ones resume"
        )


def _wait_for_all(futures: Sequence[Future[None]], stop: Event) -> None:
    """Wait for the trainings; after a signal no other is started."""
    try:
        wait(futures)
    except KeyboardInterrupt:
        stop.set()
        raise
