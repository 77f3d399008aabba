"""Counter-based random numbers: every draw is a function of (seed, stream, step, position), never of history."""

import numpy as np

MASK_STREAM, ORDER_STREAM, BOX_STREAM, SUBSTITUTE_STREAM, SPLIT_STREAM, SLICE_STREAM = range(1, 7)


def generator(seed: int, stream: int, step: int, skip: int = 0) -> np.random.Generator:
    """A Philox generator for one stream at one step, `skip` blocks of four doubles ahead of its start.

    Consecutive slots that own a fixed number of blocks can be drawn in one vectorised call, and any slot alone.
    """
    key = np.array([seed, stream << 48 | step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=skip))


def torch_seed(seed: int, stream: int, step: int) -> int:
    """What to seed torch with for one stream at one step: of a seed its CPU generator takes the low 32 bits alone."""
    return int(generator(seed, stream, step).integers(2**63))
