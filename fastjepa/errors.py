"""Classes of errors that are told in one sentence, and the sentence for those that are not ours."""

import re


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


def is_users_to_mend(error: Exception) -> bool:
    """Return whether an error is the user's to mend: its message is the whole story, or memory ran out."""
    return isinstance(error, UserError | OSError | RunError) or is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, of a GPU (torch's OutOfMemoryError, or cuBLAS without a workspace) or of the host."""
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or any(words in str(error) for words in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def out_of_memory_sentence(error: Exception, command: str) -> str:
    """Return one sentence for an error of `is_out_of_memory`, with the remedy for `command`; torch's own is a paragraph."""
    wanted = re.search(r"[Tt]ried to allocate ([0-9.]+ \w+)", str(error))
    asked = f"out of memory{f', {wanted[1]} more were asked for' if wanted else ''}"
    train = "lower runtime.micro_batch or set runtime.checkpoint_activations=true, which change no result; `fastjepa plan` says"
    other = "close what else uses it, take --device cpu, or less at a time: --help says"
    return f"{asked}; {train} what fits" if command == "train" else f"{asked}; {other} how"
