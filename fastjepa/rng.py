"""Counter-based random numbers: every draw is a function of (seed, stream, step, position), never of history."""

import numpy as np

# One number for each purpose, so that no two purposes share a draw. Numbers never change: a resumed run relies on them.
MASK_STREAM, ORDER_STREAM, BOX_STREAM, SUBSTITUTE_STREAM, SPLIT_STREAM, SLICE_STREAM, DISTORTION_STREAM = range(1, 8)


def generator(seed: int, stream: int, step: int, skip: int = 0) -> np.random.Generator:
    """Return a Philox generator for one stream at one step, `skip` blocks of four doubles ahead of its start.

    Consecutive slots that own a fixed number of blocks can be drawn in one vectorised call, and any slot alone: with 11
    blocks a slot, `generator(s, t, k).random(3 * 44)[88:]` equals `generator(s, t, k, skip=22).random(44)`, which is slot 2.
    """
    key = np.array([seed, stream << 48 | step], dtype=np.uint64)  # steps below 2**48, streams below 2**16
    return np.random.Generator(np.random.Philox(key=key, counter=skip))


def torch_seed(seed: int, stream: int, step: int) -> int:
    """Return the seed for a torch generator that serves one stream at one step.

    torch's generator on the CPU keeps the low 32 bits of a seed alone, so the three numbers cannot just be added up.
    """
    return int(generator(seed, stream, step).integers(2**63))
