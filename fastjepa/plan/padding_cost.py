"""The cost of padding micro-batches to one shape."""

from fastjepa.masks.packed import PackedSize
from fastjepa.masks.packer import Packer
from fastjepa.masks.padding import BUDGET_DRAWS, drawn_sizes
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.workload import Workload


def draws_over_budget(work: Workload, total: int) -> int:
    """Return how many of BUDGET_DRAWS micro-batches do not fit."""
    found, sizes = work.padding_budget(total), drawn_sizes(work.masking, total, work.micro_batch)
    return sum(not found.holds(PackedSize(*size)) for size in sizes.tolist())


def padding_share(work: Workload, total: int, steps: int = 16) -> float:
    """Return the FLOPs that the padding adds, as a share of those of the same micro-batches without."""
    packer, slots = Packer(work.masking), range(work.micro_batch)
    plain, padded = (
        sum(flops_of_packed(work, *packer.packed(step, slots, total, budget=room)).total for step in range(steps))
        for room in (None, work.padding_budget(total))
    )
    return padded / plain - 1


def padding_note(work: Workload, total: int) -> str:
    """Return the sentence for the user: the budget, how often it is too small, and what it costs."""
    size, dummies = work.padding_budget(total)
    return (
        f"token budget of a micro-batch: {size.context} context rows, {size.target} target rows, {size.queries} queries, "
        f"{dummies} dummies; {draws_over_budget(work, total)} of {BUDGET_DRAWS} draws are over it, and padding adds "
        f"{padding_share(work, total):.1%} to the FLOPs"
    )
