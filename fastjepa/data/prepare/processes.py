"""Work over many files in worker processes, with a progress bar."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)  # standard output is for the path alone

_held: tuple[Callable, Any] | None = None  # in a worker: what to do, and with what


def map_in_processes(work: Callable[[Any, Any], Any], job: Any, items: Sequence, workers: int) -> Iterator[Any]:
    """Yield work(job, item) of each item, in order, by `workers` processes; each process is handed `job` once.

    An exception of `work` is raised here. The processes end with the iterator: when it is exhausted or closed, and on
    Ctrl-C. OSError when one of them is killed.
    """
    executor = ProcessPoolExecutor(min(workers, max(1, len(items))), initializer=_start_worker, initargs=(work, job))
    try:
        yield from executor.map(_run_item, items)
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed, which lack of memory does; try fewer --workers") from error
    finally:
        processes = list((executor._processes or {}).values())  # a public way to end them comes with Python 3.14
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


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
