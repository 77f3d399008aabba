"""Packed attention inputs and the rivals that both attention benches share."""

import torch
import torch.nn.functional as F
from protocol import Inputs, Provider, Setting, missing
from torch import Tensor


def packed(setting: Setting, sequences: int, shortest: int, longest: int, heads: int, head_dim: int) -> Inputs:
    """Return q, k and v of sequences of random lengths; bf16 on a card, as the trainer's autocast has it."""
    lengths = torch.randint(shortest, longest + 1, (sequences,), generator=torch.Generator().manual_seed(0))
    starts = F.pad(lengths.cumsum(0), (1, 0)).int().to(setting.device)
    q, k, v = (setting.randn(int(lengths.sum()), heads, head_dim) for _ in range(3))
    flops = 4 * int(lengths.square().sum()) * heads * head_dim
    return Inputs((q, k, v, starts, starts, longest, longest), [q, k, v], flops=flops)


def padded_sdpa(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _, longest: int, *rest) -> Tensor:
    """Spread the rows to (sequences, longest), attend under a key mask, and pack them again: all of it is timed."""
    column = torch.arange(longest, device=q.device)
    lengths = starts.diff()
    there = column < lengths[:, None]
    source = (starts[:-1, None] + column).clamp_max(len(q) - 1)
    spread = [x[source].transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*spread, attn_mask=there[:, None, None]).transpose(1, 2)
    row = torch.arange(len(q), device=q.device)
    sequence = torch.searchsorted(starts[1:], row, right=True)
    return out[sequence, row - starts[sequence]]


def flash_attn(*args) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(*args)


def torch_varlen(*args) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*args)


RIVALS = {
    "flash-attn": Provider(flash_attn, absent=missing("flash_attn"), cuda_only=True),
    "torch varlen": Provider(torch_varlen, cuda_only=True),
    "padded SDPA": padded_sdpa,
}
