"""Packed attention inputs and the rivals that both attention benches share."""

import torch
import torch.nn.functional as F
from protocol import Load, Provider, Setting, missing
from torch import Tensor


def packed(setting: Setting, sequences: int, shortest: int, longest: int, heads: int, head_dim: int) -> Load:
    """Self-attention over sequences of random lengths; bf16 on a card, as the trainer's autocast has it."""
    lengths = torch.randint(shortest, longest + 1, (sequences,), generator=torch.Generator().manual_seed(0))
    starts = F.pad(lengths.cumsum(0), (1, 0)).int().to(setting.device)
    q, k, v = (setting.randn(int(lengths.sum()), heads, head_dim) for _ in range(3))
    flops = 4 * int(lengths.square().sum()) * heads * head_dim
    return Load((q, k, v, starts, starts, longest, longest), [q, k, v], flops=flops)


def padded_sdpa(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _, longest: int, __) -> Tensor:
    """Rows spread to (sequences, longest), a key mask, and packed again: all of it timed."""
    column = torch.arange(longest, device=q.device)
    lengths = starts.diff()
    there = column < lengths[:, None]
    source = (starts[:-1, None] + column).clamp_max(len(q) - 1)
    spread = [x[source].transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*spread, attn_mask=there[:, None, None]).transpose(1, 2)
    row = torch.arange(len(q), device=q.device)
    sequence = torch.searchsorted(starts[1:], row, right=True)
    return out[sequence, row - starts[sequence]]


def flash_attn(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, starts_q, starts_k, max_q, max_k)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, starts_q, starts_k, max_q, max_k)


RIVALS = {
    "flash-attn": Provider(flash_attn, absent=missing("flash_attn"), cuda_only=True),
    "torch varlen": Provider(torch_varlen, cuda_only=True),
    "padded SDPA": padded_sdpa,
}
