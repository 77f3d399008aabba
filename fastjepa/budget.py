"""The one shape that micro-batches are padded to for a CUDA graph, from what masks hold."""

import functools

import numpy as np

from fastjepa import flops, masks, packing
from fastjepa.config import Config
from fastjepa.packing import Budget, Size

DRAWS = 1000


@functools.cache
def of(config: Config, total: int, micro_batch: int | None = None) -> Budget:
    """The budget of micro-batches of a global batch of `total` images.

    Rows are runtime.token_budget or, for each count, the most that DRAWS steps draw: about one micro-batch in DRAWS / 3 is
    then over it. Dummies are as many as the smallest of those micro-batches needs.
    """
    sizes = drawn(config, total, micro_batch or config.micro_batch)
    least, most = (Size(*map(int, extreme)) for extreme in (sizes.min(axis=0), sizes.max(axis=0)))
    context, target, queries = config.runtime.token_budget or most[:3]
    blocks = 1 if config.joint else config.mask.target_blocks
    size = most._replace(context=context, target=target, queries=queries, sequences=blocks * context + queries)
    lacking = ((size.context - least.context, size.longest_context), (size.queries - least.queries, size.longest_block),
               (size.sequences - least.sequences, size.longest_sequence))  # fmt: skip
    return Budget(size, max(0, *(-(-rows // longest) for rows, longest in lacking)))


@functools.cache
def drawn(config: Config, total: int, micro_batch: int) -> np.ndarray:
    """(DRAWS, len(Size)) sizes of the first micro-batch of each step."""
    mask, seed = config.mask, config.runtime.seed
    pairs = (masks.draw(mask, config.grid, seed, step, 0, micro_batch, total) for step in range(DRAWS))
    return np.array(
        [Size.of(context, target.any(axis=1, keepdims=True) if config.joint else target) for context, target in pairs]
    )


def over(config: Config, total: int) -> int:
    """How many of DRAWS micro-batches do not fit."""
    found = of(config, total)
    return sum(not found.holds(Size(*size)) for size in drawn(config, total, config.micro_batch).tolist())


def padding(config: Config, total: int, steps: int = 16) -> float:
    """FLOPs that the padding adds, as a share of those of the same micro-batches without."""
    mask, seed = config.mask, config.runtime.seed
    pairs = [masks.draw(mask, config.grid, seed, step, 0, config.micro_batch, total) for step in range(steps)]
    plain, padded = (sum(flops.packed(config, *packing.pack(*pair, joint=config.joint, budget=room)).total for pair in pairs)
                     for room in (None, of(config, total)))  # fmt: skip
    return padded / plain - 1


def note(config: Config, total: int) -> str:
    """What to tell the user: the budget, how often it is too small, and what it costs."""
    size, dummies = of(config, total)
    return (
        f"token budget of a micro-batch: {size.context} context rows, {size.target} target rows, {size.queries} queries, "
        f"{dummies} dummies; {over(config, total)} of {DRAWS} draws are over it, and padding adds "
        f"{padding(config, total):.1%} to the FLOPs"
    )
