"""The cost of padding micro-batches to one shape."""

from fastjepa.config.schema import Config
from fastjepa.masks.packed import PackedSize
from fastjepa.masks.packer import packer_of
from fastjepa.masks.padding import BUDGET_DRAWS, drawn_sizes, padding_budget
from fastjepa.plan.flops import flops_of_packed


def draws_over_budget(config: Config, total: int) -> int:
    """Return how many of BUDGET_DRAWS micro-batches do not fit."""
    found = padding_budget(config, total)
    return sum(not found.holds(PackedSize(*size)) for size in drawn_sizes(config, total, config.micro_batch).tolist())


def padding_share(config: Config, total: int, steps: int = 16) -> float:
    """Return the FLOPs that the padding adds, as a share of those of the same micro-batches without."""
    packer, slots = packer_of(config), range(config.micro_batch)
    plain, padded = (
        sum(flops_of_packed(config, *packer.packed(step, slots, total, budget=room)).total for step in range(steps))
        for room in (None, padding_budget(config, total))
    )
    return padded / plain - 1


def padding_note(config: Config, total: int) -> str:
    """Return the sentence for the user: the budget, how often it is too small, and what it costs."""
    size, dummies = padding_budget(config, total)
    return (
        f"token budget of a micro-batch: {size.context} context rows, {size.target} target rows, {size.queries} queries, "
        f"{dummies} dummies; {draws_over_budget(config, total)} of {BUDGET_DRAWS} draws are over it, and padding adds "
        f"{padding_share(config, total):.1%} to the FLOPs"
    )
