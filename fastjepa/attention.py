"""The attention of the networks: `runtime.attention` names a way, the kernels' one door runs it over packed sequences."""

import torch
from torch import Tensor

from fastjepa.config import ConfigError
from fastjepa.packing import Packed
from fastjepa_kernels import attention_way, varlen_attention


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation `runtime.attention: name` means here; ConfigError where the one asked for cannot run."""
    try:
        return attention_way(name, device, dtype)
    except ValueError as error:
        raise ConfigError(f"runtime.{error}") from error


def attention(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, way: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence.

    Args:
        q: (Tq, H, d); k, v: (Tk, H, d), fp32, bf16 or fp16.
        queries, keys: sequence s of the one attends to sequence s of the other; only lengths are used.
        way: what `choose` returned.

    Returns:
        (Tq, H, d).
    """
    return varlen_attention(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_len, keys.max_len, way)
