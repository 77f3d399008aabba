"""Muon for the hidden matrices beside AdamW for the rest.

Muon (Jordan et al., 2024) moves a matrix by its momentum with every singular value brought near 1; five Newton-Schulz steps
do that by matrix products alone. The update has the size of AdamW's: 0.2 sqrt(longer side) times a matrix of singular values
near 1 (arXiv 2502.16982, section 2.2).

Ranks hold the same weights, gradients and momentum. Each makes the products of its share of the matrices, and they exchange
what they found.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from fastjepa.engine.adamw import ADAMW, parameter_groups
from fastjepa.engine.precision import has_bf16
from fastjepa.ranks.collectives import all_gather_later, rank_count, this_rank

STACKED_ELEMENTS = 2**26  # of the matrices whose products are one on a rank: 268 MB in fp32


class MuonAdamW:
    """Two optimizers that are one to the engine and to checkpoints: each parameter is in one of them."""

    def __init__(self, encoder: nn.Module, predictor: nn.Module, pred_lr_scale: float = 1.0):
        hidden = hidden_groups(encoder, predictor, pred_lr_scale)
        chosen = {p for group in hidden for p in group["params"]}
        rest = parameter_groups(encoder, predictor, pred_lr_scale)
        for group in rest:
            group["params"] = [p for p in group["params"] if p not in chosen]
        self.adamw = torch.optim.AdamW(rest, **ADAMW, fused=True)
        self.muon = StackedMuon(hidden, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.param_groups = [*self.adamw.param_groups, *self.muon.param_groups]
        self.state = self.muon.state = self.adamw.state
        self.found_inf: Tensor | None = None  # 0-dim fp32 on the device: 1 leaves weights and state as they are

    def step(self) -> None:
        """Step both, unless `found_inf` is 1."""
        for optimizer in (self.adamw, self.muon):
            optimizer.found_inf = self.found_inf
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, or fill them with zeros."""
        for optimizer in (self.adamw, self.muon):
            optimizer.zero_grad(set_to_none)


def hidden_groups(encoder: nn.Module, predictor: nn.Module, pred_lr_scale: float) -> list[dict]:
    """Return the groups of the hidden matrices, the 2-d weights: for each network those of q, k and v, then the others.

    A weight of q, k and v, (3 D, D), is three matrices, one below the other (`parts`). The patch embedding (4-d) and the mask
    token (3-d) are none of them.
    """
    groups = []
    for network, scale in ((encoder, 1.0), (predictor, pred_lr_scale)):
        matrices = {name: p for name, p in network.named_parameters() if p.ndim == 2}
        for parts in (3, 1):
            members = [p for name, p in matrices.items() if name.endswith("qkv.weight") == (parts == 3)]
            groups.append({"params": members, "parts": parts, "decayed": True, "lr_scale": scale, "muon": True})
    return groups


class StackedMuon(torch.optim.Muon):
    """torch's Muon with the products of equal shapes stacked, a weight of q, k and v as three matrices, and the flag
    `found_inf` of torch's fused AdamW: 1 leaves weights and momentum as they are, and the host does not wait for it.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step with the gradients that are there. Ranks exchange the updates of a stack while they make the next."""
        begun = (
            self._begin_stack(group, *zip(*stack, strict=True)) for group in self.param_groups for stack in self._stacks(group)
        )
        for apply, _ in pairwise(chain(begun, [None])):  # a stack is applied when the next has begun
            apply()

    def _stacks(self, group: dict) -> Iterator[list[tuple[Tensor, ...]]]:
        """Yield the matrices of a group that have gradients, in stacks, each with its gradient and its momentum."""
        members = [p for p in group["params"] if p.grad is not None]
        for p in members:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        yield from stacks_of_a_shape(piece for p in members for piece in zip(*self._parts(p, group["parts"]), strict=True))

    def _parts(self, p: Tensor, parts: int) -> tuple[tuple[Tensor, ...], ...]:
        """Return the matrices of a weight, of its gradient and of its momentum, as views."""
        return tuple(t.detach().view(parts, -1, p.shape[1]).unbind() for t in (p, p.grad, self.state[p]["momentum_buffer"]))

    def _begin_stack(
        self, group: dict, weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> Callable[[], None]:
        """Move the momentum of matrices of one shape, begin to exchange their updates, and return what steps the weights."""
        skipped = weights[0].new_zeros(()) if self.found_inf is None else self.found_inf
        taken, momentum = 1.0 - skipped, group["momentum"]
        grad = torch.stack(grads).masked_fill_(skipped.bool(), 0.0)  # (M, A, B)
        buffer = torch.stack(buffers).lerp_(grad, taken * (1 - momentum))
        torch._foreach_copy_(buffers, buffer.unbind())
        made = orthogonalized_by_ranks(grad.lerp_(buffer, momentum), group)

        def apply() -> None:
            update = made().float()
            size = 0.2 * max(update.shape[1:]) ** 0.5 * group["lr"]
            torch._foreach_mul_(weights, 1.0 - taken * (group["lr"] * group["weight_decay"]))
            torch._foreach_sub_(weights, update.mul_(taken * size).unbind())

        return apply


def stacks_of_a_shape(matrices: Iterable[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield the matrices, each with what belongs to it, in lists of one shape and at most STACKED_ELEMENTS elements a rank."""
    by_shape: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix[0].shape, []).append(matrix)
    for shape, found in by_shape.items():
        most = max(1, STACKED_ELEMENTS // shape.numel()) * rank_count()
        yield from (found[start : start + most] for start in range(0, len(found), most))


def orthogonalized_by_ranks(x: Tensor, group: dict) -> Callable[[], Tensor]:
    """Return a function that waits for `orthogonalized` of matrices (M, A, B), which every rank has; each makes an equal part.

    Example: of 7 matrices on 4 ranks, ranks 0 to 2 make two each, rank 3 one, beside an empty place that is cut off.
    """
    part = -(-len(x) // rank_count())
    mine = x[this_rank() * part : (this_rank() + 1) * part]
    found = x.new_zeros(part, *x.shape[1:], dtype=torch.bfloat16)
    if len(mine):
        found[: len(mine)] = orthogonalized(mine, group)
    everyone = all_gather_later(found)
    return lambda: everyone()[: len(x)]


def orthogonalized(x: Tensor, group: dict) -> Tensor:
    """Return matrices (M, A, B) with singular values near 1, between about 0.7 and 1.2, in bf16.

    A step maps each singular value s of a matrix to a s + b s^3 + c s^5. Example with torch's coefficients (3.4445, -4.775,
    2.0315): 0.1 goes to 0.340, 0.992, 0.707, 1.107, 0.712.

    A CPU without instructions for bf16 multiplies in fp32, in which products of bf16 numbers are summed anyway, and rounds
    every result to bf16: the same to the rounding of bf16, many times faster.
    """
    a, b, c = group["ns_coefficients"]
    compute = torch.bfloat16 if has_bf16(x.device) else torch.float32
    x = x.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])).to(compute)  # no singular value is above 1 then
    for _ in range(group["ns_steps"]):
        gram = (x @ x.mT).bfloat16().to(compute)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c).bfloat16().to(compute)
        x = torch.baddbmm(x, polynomial, x, beta=a).bfloat16().to(compute)
    x = x.bfloat16()
    return x.mT if tall else x
