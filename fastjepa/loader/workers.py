"""Worker processes that make items ahead of their use, and every way in which they can fail to deliver."""

import atexit
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOSPC
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from fastjepa.errors import LoaderError, is_out_of_files, is_users_to_mend, out_of_files_sentence
from fastjepa.loader.shared import Shared, SharedMemoryError, free_and_total, share, spare_descriptors

POLL = 1.0  # seconds between two looks at the processes while one of them is waited for
SETTLE = 2.0  # seconds after which a process that was killed is seen to be dead
MIB = 2**20
ENDING = (signal.SIGINT, signal.SIGTERM)  # which a launcher or a terminal sends to every process of a run

_waits_since: float | None = None  # the monotonic clock when the main thread began to wait for an item


def seconds_waited() -> float:
    """Return for how long the main thread has been waiting for an item by now; 0 where it is not waiting."""
    since = _waits_since
    return 0.0 if since is None else time.monotonic() - since


@contextmanager
def _waiting() -> Iterator[None]:
    """Note that the main thread waits."""
    global _waits_since
    _waits_since = time.monotonic()
    try:
        yield
    finally:
        _waits_since = None


@dataclass(frozen=True)
class Crew:
    """The worker processes of a loader: how many, how far ahead, and the sentences for what they lack."""

    processes: int  # 0: the items are made in this process
    ahead: int = 2  # items that each makes before they are asked for
    pinned: bool = False
    timeout: float = 600.0  # seconds without an item that end the wait
    key: str = ""  # of the config, which gives `timeout`
    remedy: str = "close other programs"  # how to need less

    def most_items(self) -> int:
        """Return how many items are in shared memory at most: those made ahead, the one in use and the one before it.

        8 processes that make 2 ahead give 18.
        """
        return self.processes * self.ahead + 2 if self.processes else 0

    def told(self, error: Exception) -> Exception:
        """Return the LoaderError that says what to do about a lack of memory or descriptors, or the error itself."""
        if is_out_of_files(error):
            return LoaderError(f"{out_of_files_sentence()}, or {self.remedy}")
        if isinstance(error, SharedMemoryError):
            return LoaderError(self.shared_memory_sentence(error.wanted))
        return error

    def shared_memory_sentence(self, item: int) -> str:
        """Return the sentence for shared memory that cannot hold another item of so many bytes."""
        free, total = (size // MIB for size in free_and_total() or (0, 0))
        least = -(-self.most_items() * max(item, MIB) // MIB)
        return (
            f"/dev/shm is full: {free} of {total} MiB free, and {self.processes} loader processes ask for up to {least} MiB: "
            f"make it larger (docker run --shm-size={least}m) or {self.remedy}"
        )

    def death_sentence(self, process: BaseProcess) -> str:
        """Return the sentence for a process that has ended by itself or was killed."""
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
        why = ", as the system does when memory runs out (dmesg says so)" if code == -signal.SIGKILL else ""
        return f"loader process {process.pid} {how}{why}; give it more memory or {self.remedy}"

    def stall_sentence(self) -> str:
        """Return the sentence for processes that live and deliver nothing."""
        free, total = (size // MIB for size in free_and_total() or (0, 0))
        limit = f"{self.timeout:g} s ({self.key})" if self.key else f"{self.timeout:g} s"
        return (
            f"the loader has delivered nothing for {limit}: look at the storage of the data, at "
            f"/dev/shm ({free} of {total} MiB free; docker run --shm-size), or {self.remedy}"
        )


class Workers(Iterator):
    """The items of a data set, in order, made ahead of time by processes, or in this one where there are none.

    Raises what the data set raises. Nothing waits for ever: LoaderError where a process dies, where none delivers for
    `crew.timeout` seconds, and where shared memory or descriptors run out.
    """

    def __init__(self, dataset: Dataset, items: Sequence[int], crew: Crew):
        self._crew, self._made, before = crew, None, multiprocessing.active_children()
        self._waits = self._stalled = False
        self._closed = threading.Event()
        try:
            with _signals_held():
                self._made = iter(_torch_loader(dataset, items, crew))
        except OSError as error:
            _kill([child for child in multiprocessing.active_children() if child not in before])
            told = crew.told(SharedMemoryError(ENOSPC, 0) if error.errno == ENOSPC else error)
            cannot = LoaderError(f"{crew.processes} loader processes cannot be started ({error.strerror}); {crew.remedy}")
            raise (cannot if told is error else told) from error
        self.processes: list[BaseProcess] = getattr(self._made, "_workers", [])
        self._pinning, self._pinning_failed = getattr(self._made, "_pin_memory_thread", None), ""
        if self._pinning:
            self._pinning._invoke_excepthook = self._note_failure  # else its traceback stands above the sentence
        if self.processes:
            # Knowing them, torch raises when a process dies, in the middle of anything: a checkpoint too.
            signal_handling._remove_worker_pids(id(self._made))
            self._made._worker_pids_set = False
            threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.close)  # before multiprocessing's own, which would wait for ever for deaf processes

    def __next__(self) -> Any:
        if self._made is None:
            raise StopIteration
        with _waiting():
            self._waits = True
            made = self._received() if self.processes else next(self._made)
            self._waits = False
        if isinstance(made, Exception):
            raise made
        return made.opened() if isinstance(made, Shared) else made

    def _received(self) -> Shared | Exception:
        """Return the next item as it was sent; the wait is cut up, so that deaths are seen."""
        while True:
            try:
                return next(self._made)
            except StopIteration:
                self.close()  # DALI asks once more
                raise
            except Exception as error:  # of any class: what a process raises, and what a broken connection does
                late = str(error).startswith("DataLoader timed out")
                if reason := self._fault(0.0 if late else SETTLE):
                    raise LoaderError(reason) from error  # torch would pass over a dead process's items: never ask it again
                if not late:
                    raise

    def _watch(self) -> None:
        """End the processes when the main thread has waited for too long, be it for the answer of a stopped one."""
        while not self._closed.wait(POLL / 4):
            if self._waits and seconds_waited() > self._crew.timeout:
                self._stalled = all(process.is_alive() for process in self.processes)
                for process in self.processes:
                    process.kill()
                return

    def _fault(self, settle: float) -> str | None:
        """Return what is wrong with the processes, or with this one; None where nothing is seen within `settle` seconds."""
        until = time.monotonic() + (SETTLE if self._pinning_failed else settle)
        while True:
            if self._stalled:
                return self._crew.stall_sentence()
            if dead := [process for process in self.processes if not process.is_alive()]:
                return self._crew.death_sentence(dead[0])
            if (settle or self._pinning) and (told := self._without_descriptors()):
                return told
            if time.monotonic() >= until:
                failed = self._pinning_failed
                return f"the loader's memory cannot be pinned ({failed}); set data.pin_mem=false" if failed else None
            time.sleep(POLL / 10)

    def _note_failure(self, thread: threading.Thread) -> None:
        """Note what has ended the thread that pins memory: where a process has died or descriptors ran out, it comes first."""
        error = sys.exc_info()[1]
        self._pinning_failed = f"{type(error).__name__}: {error}"

    def _without_descriptors(self) -> str | None:
        """Return the sentence for a process that may open no more files; torch's receiving end raises many things then."""
        try:
            with spare_descriptors(10):
                return None
        except OSError as error:
            return str(self._crew.told(error))

    def close(self) -> None:
        """End the processes at once, in the middle of whatever they do."""
        atexit.unregister(self.close)
        self._closed.set()
        made, self._made = self._made, None
        if self.processes and made is not None:
            _kill(self.processes)
            if not made._shutdown:  # by torch itself, after the last item
                _let_go(made)


def _torch_loader(dataset: Dataset, items: Sequence[int], crew: Crew) -> DataLoader:
    """Return torch's loader of the items in order, one at a time."""
    ahead = {"prefetch_factor": crew.ahead, "timeout": POLL, "worker_init_fn": _ignore_signals} if crew.processes else {}
    return DataLoader(
        _Sent(dataset, crew) if crew.processes else dataset,
        batch_size=None,
        sampler=items,
        num_workers=crew.processes,
        collate_fn=_unchanged,
        pin_memory=crew.pinned,
        generator=torch.Generator(),  # the global one must not move
        **ahead,
    )


class _Sent(Dataset):
    """Items as a worker process sends them: in shared memory, or the error that the user can mend.

    Raised there, an error would arrive as its whole traceback.
    """

    def __init__(self, dataset: Dataset, crew: Crew):
        self.dataset, self.crew = dataset, crew

    def __getitem__(self, item: int) -> Shared | Exception:
        try:
            return share(self.dataset[item])
        except Exception as error:
            if not is_users_to_mend(error):
                raise
            return self.crew.told(error)


def _unchanged(item: Any) -> Any:
    return item


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back the signals that end a run: a process that starts meanwhile holds them until it can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int) -> None:
    """Make a worker deaf to Ctrl-C, which reaches every process of the terminal; the training process ends the workers."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # what came while it started is dropped


def _kill(processes: Sequence[BaseProcess]) -> None:
    """End processes, whatever they do, and wait for their end."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _let_go(made: Any) -> None:
    """Close what torch's iterator holds when its processes are dead: its own way out asks each of them, and waits."""
    made._shutdown = True
    if hasattr(made, "_pin_memory_thread"):
        made._pin_memory_thread_done_event.set()
        made._worker_result_queue.put((None, None))  # which wakes it
        made._pin_memory_thread.join(6 * POLL)
    for queue in (*made._index_queues, made._worker_result_queue):
        queue.cancel_join_thread()
        queue.close()
