"""Work over many files in worker processes, with a progress bar."""

import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)  # standard output is for the path alone

STALL = 600.0  # seconds in which processes that work use some of the processor, however slow their files come
POLL = 1.0  # seconds between two looks at them

_held: tuple[Callable, Any] | None = None  # in a worker: what to do, and with what


def map_in_processes(work: Callable[[Any, Any], Any], job: Any, items: Sequence, workers: int) -> Iterator[Any]:
    """Yield work(job, item) of each item, in order, by `workers` processes; each process is handed `job` once.

    An exception of `work` is raised here. The processes end with the iterator: when it is exhausted or closed, and on
    Ctrl-C. OSError when one of them is killed, or when all stand still for STALL seconds.
    """
    executor = ProcessPoolExecutor(min(workers, max(1, len(items))), initializer=_start_worker, initargs=(work, job))
    try:
        futures = deque(executor.submit(_run_item, item) for item in items)
        while futures:  # none is kept: with it, its result would be
            yield _result(futures.popleft(), executor)
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed, which lack of memory does; try fewer --workers") from error
    finally:
        processes = list((executor._processes or {}).values())  # a public way to end them comes with Python 3.14
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()  # SIGTERM does not reach a stopped one
        for process in processes:
            process.join()


def _result(future: Future, executor: ProcessPoolExecutor) -> Any:
    """Return what a future gives, or raise what it raises; OSError where the processes stand still meanwhile."""
    spent, since = -1, time.monotonic()
    while not wait([future], timeout=POLL).done:
        if (now := _cpu_ticks(list(executor._processes or {}))) != spent:
            spent, since = now, time.monotonic()
        if time.monotonic() - since > STALL:
            raise OSError(f"the worker processes have done nothing for {STALL:g} s; look at the storage of the data")
    return future.result()


def _cpu_ticks(processes: list[int]) -> int:
    """Return the processor time that processes have used, which grows as long as they do anything."""
    used = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended, or there is no /proc
            continue
        used += int(fields[11]) + int(fields[12])  # of user and system
    return used


def _start_worker(work: Callable, job: Any) -> None:
    """Keep the work and the job in this process, so that they are sent to it once and not with every item."""
    global _held
    _held = work, job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process ends the others


def _run_item(item: Any) -> Any:
    work, job = _held
    return work(job, item)


def counting_bar() -> Progress:
    """Return a progress bar that counts; it leaves nothing behind, and is silent where standard error is no terminal."""
    # Where standard output is a pipe, what is printed meanwhile must go there: rich would send it to standard error.
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    options = {"transient": True, "disable": not console.is_terminal, "redirect_stdout": sys.stdout.isatty()}
    return Progress(*columns, console=console, **options)
