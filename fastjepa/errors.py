"""Classes of errors that are told in one sentence, and the sentence for those that are not ours."""

import re
from errno import EMFILE, ENFILE

MISTAKE, MACHINE_FAILED = 2, 1  # exit codes


class UserError(ValueError):
    """A mistake that the user can mend: the message is one sentence that names the thing and the remedy."""


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key, the file and the remedy."""


class SplitError(UserError):
    """A data set without the split that is asked for; the message names the data set and the remedy."""


class CheckpointError(OSError):
    """A checkpoint that cannot be written, or cannot be trusted; the message names the file and the remedy."""


class RunError(RuntimeError):
    """A run that cannot go on; the message names the step and the last good checkpoint."""


class LoaderError(RunError):
    """Worker processes that no longer deliver; the message names the cause that can be seen and the remedy."""


def is_users_to_mend(error: Exception) -> bool:
    """Return whether an error is the user's to mend: its message is the whole story, or memory ran out."""
    return isinstance(error, UserError | OSError | RunError) or is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, of a GPU (torch's OutOfMemoryError, or cuBLAS without a workspace) or of the host."""
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or any(words in str(error) for words in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def is_out_of_files(error: BaseException) -> bool:
    """Return whether this process, or the machine, may open no more files."""
    return isinstance(error, OSError) and error.errno in (EMFILE, ENFILE)


def out_of_files_sentence() -> str:
    """Return the beginning of a sentence for that; a further remedy may follow."""
    try:
        import resource  # not on Windows

        limit = f" (ulimit -n is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
    except ImportError:
        limit = ""
    return f"too many open files{limit}: raise the limit, ulimit -n 4096"


def exit_code(error: Exception) -> int:
    """Return the exit code of a command that ends with an error of `is_users_to_mend`."""
    return MACHINE_FAILED if isinstance(error, LoaderError) or is_out_of_files(error) else MISTAKE


def sentence_of(error: Exception, command: str) -> str:
    """Return the sentence for an error of `is_users_to_mend` that ends `command`."""
    if is_out_of_memory(error):
        return out_of_memory_sentence(error, command)
    if not is_out_of_files(error):
        return str(error)
    return out_of_files_sentence() + (", or lower data.num_workers" if command == "train" else ", or take fewer processes")


def out_of_memory_sentence(error: Exception, command: str) -> str:
    """Return one sentence for an error of `is_out_of_memory`, with the remedy for `command`; torch's own is a paragraph."""
    wanted = re.search(r"[Tt]ried to allocate ([0-9.]+ \w+)", str(error))
    asked = f"out of memory{f', {wanted[1]} more were asked for' if wanted else ''}"
    train = "lower runtime.micro_batch or set runtime.checkpoint_activations=true, which change no result; `fastjepa plan` says"
    other = "close what else uses it, take --device cpu, or less at a time: --help says"
    return f"{asked}; {train} what fits" if command == "train" else f"{asked}; {other} how"
