"""The vision transformer over packed rows: attention, blocks and the encoder.

Parameter names are those of the official state dicts. Work whose result nobody reads is not done: patches outside a
context are never embedded, a last block finishes only the rows that are wanted, and what the predictor's target blocks
share in its first block is computed once. `runtime.attention` names the library that attention runs in.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjepa.errors import ConfigError
from fastjepa.masks.packed import Packed, full_sequences
from fastjepa.model.positions import DEFAULT_POSITIONS, Positions, interpolated_positions, sincos_positions
from fastjepa_kernels import attention_way, gather_tokens, gather_tokens_repeated, varlen_attention
from fastjepa_kernels.layers import MaskedPatchEmbed


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None, longest: int | None = None
) -> str:
    """Return the implementation that `runtime.attention: name` means for heads of `head_dim` channels and sequences of at
    most `longest` rows, which are judged where they are given; ConfigError where the one asked for cannot run.
    """
    try:
        return attention_way(name, device, dtype, head_dim, longest)
    except ValueError as error:
        raise ConfigError(f"runtime.{error}") from error


def packed_attention(q: Tensor, k: Tensor, v: Tensor, queries: Packed, keys: Packed, way: str) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v within each sequence.

    Args:
        q: (Tq, H, d); k, v: (Tk, H, d), fp32, bf16 or fp16.
        queries, keys: sequence s of the one attends to sequence s of the other; only lengths are used.
        way: what `choose_attention` returned.

    Returns:
        (Tq, H, d).
    """
    return varlen_attention(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_len, keys.max_len, way)


EncoderShape = tuple[int, int, int, float]  # width, blocks, heads, width of the MLP over that of the encoder
RepeatedRows = tuple[Tensor, Tensor]  # order and starts, as in Blocks


class Attention(nn.Module):
    """Multi-head self-attention within packed sequences."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.way = "sdpa"  # set for the whole network by `use_attention`
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    @property
    def head_dim(self) -> int:
        """Return the channels of a head."""
        return self.proj.in_features // self.num_heads

    def forward(
        self, x: Tensor, sequences: Packed, queries: Packed | None = None, repeats: RepeatedRows | None = None
    ) -> Tensor:
        """Map normalised rows x (M, D) to (T, D), or to (Q, D) for the rows `queries.idx` alone.

        With `repeats`, x is a table of distinct rows and `sequences.idx` says which of them each of the T rows is.
        """
        dim = self.proj.in_features
        if repeats is not None:
            qkv = gather_tokens_repeated(self.qkv(x), sequences.idx, repeats)  # (T, 3D)
            q, kv = qkv[:, :dim], qkv[:, dim:]
            q = q if queries is None else gather_tokens(q, queries.idx)
        elif queries is None:
            q, kv = self.qkv(x).split((dim, 2 * dim), dim=1)
        else:
            q = F.linear(gather_tokens(x, queries.idx), self.qkv.weight[:dim], self.qkv.bias[:dim])
            kv = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:])
        k, v = kv.view(kv.shape[0], 2, self.num_heads, -1).unbind(1)
        q = q.view(q.shape[0], self.num_heads, -1)
        out = packed_attention(q, k, v, queries or sequences, sequences, self.way)
        return self.proj(out.reshape(q.shape[0], dim))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(
        self, x: Tensor, sequences: Packed, queries: Packed | None = None, repeats: RepeatedRows | None = None
    ) -> Tensor:
        """Map (M, D) to (T, D) or, with `queries`, to (Q, D); arguments as in Attention."""
        mixed = self.attn(self.norm1(x), sequences, queries, repeats)
        if repeats is not None:
            x = gather_tokens_repeated(x, sequences.idx, repeats)
        if queries is not None:
            x = gather_tokens(x, queries.idx)
        x = x + mixed
        return x + self.mlp(self.norm2(x))


class DynTanh(nn.Module):
    """Bounded last norm: weight * tanh(alpha * x) + bias, each of them learned for every feature (Colton, 2508.02829).

    It looks at no other feature, so tokens keep their energies, which a layer norm makes equal. The target network has the
    average of what the encoder learns: a loss that could learn the scale of its own targets would shrink them.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((dim,), 0.5))
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D) to (T, D) fp32 or wider."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class Encoder(nn.Module):
    """Vision transformer without a class token, fixed 2-d sine-cosine positions (paper, appendix A)."""

    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: int,
        channels: int,
        mean_std: tuple[Sequence[float], Sequence[float]],
        shape: EncoderShape,
        norm: str = "layer",
    ):
        """Build it; `norm` is the last norm, a layer norm or the `dyntanh` of that name."""
        super().__init__()
        dim, depth, num_heads, mlp_ratio = shape
        self.grid, self.embed_dim, self.checkpointed = grid, dim, False
        self.other_positions: Positions = DEFAULT_POSITIONS  # of grids that are not the training grid
        self.antialias = True  # of interpolated positions
        self.register_buffer("pos_embed", sincos_positions(dim, grid))  # (1, N, D)
        self.patch_embed = MaskedPatchEmbed(patch_size, channels, dim, mean=mean_std[0], std=mean_std[1])
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = DynTanh(dim) if norm == "dyntanh" else nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)

    def forward(
        self,
        images: Tensor,
        visible: Packed | None = None,
        wanted: Packed | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the features of patches after the final norm, or the outputs of some blocks.

        Args:
            images: (b, C, H, W), uint8, or floats that are normalised; any resolution that is a multiple of the patch.
            visible: the patches that are seen, as sequences of flat rows; default: every image whole.
            wanted: the rows (of the T that are seen) to return; default: all.
            layers: rising numbers of blocks, counted from 1, whose outputs to return in place of the final norm's; blocks
                after the last of them are not run.

        Returns:
            (T, D), or (Q, D) for the wanted rows; a tuple of those of each of the layers.
        """
        p = self.patch_embed.proj.kernel_size[0]
        grid = images.shape[2] // p, images.shape[3] // p
        positions = self.positions(grid)  # (N, D)
        x = self.patch_embed(images, None if visible is None else visible.idx)
        if visible is None:
            visible = full_sequences(len(images), grid[0] * grid[1], images.device)
            x = (x.view(len(images), *positions.shape) + positions).flatten(0, 1)
        else:
            x = x + positions.index_select(0, visible.idx % len(positions))
        if layers is not None:
            return self._outputs(x, visible, wanted, layers)
        for block in self.blocks[:-1]:
            x = run_block(block, self.checkpointed, x, visible)
        return self.norm(run_block(self.blocks[-1], self.checkpointed, x, visible, wanted))

    def _outputs(self, x: Tensor, visible: Packed, wanted: Packed | None, layers: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return the outputs of some blocks on the wanted rows, which are all that the last of them finishes."""
        found, last = [], layers[-1]
        for number, block in enumerate(self.blocks[:last], 1):
            x = run_block(block, self.checkpointed, x, visible, wanted if number == last else None)
            if number in layers:
                found.append(x if number == last or wanted is None else gather_tokens(x, wanted.idx))
        return tuple(found)

    def features(self, images: Tensor) -> Tensor:
        """Map whole images (b, C, H, W) to (b, N, D)."""
        return self(images).view(len(images), -1, self.embed_dim)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position embeddings (N, D) of a grid; where it is not the training grid, as `other_positions` says."""
        if grid == self.grid:
            return self.pos_embed[0]
        if self.other_positions == "interpolated":
            return interpolated_positions(self.pos_embed, self.grid, grid, self.antialias)[0]
        trained = self.grid if self.other_positions == "scaled" else None
        return sincos_positions(self.embed_dim, grid, trained)[0].to(self.pos_embed)


def use_attention(network: nn.Module, way: str) -> None:
    """Let every attention of the network run in the library that `way` names."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.way = way


def use_auto_attention(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let every attention of the network run in what `runtime.attention: auto` means for its heads."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.way = choose_attention("auto", device, dtype, module.head_dim)


def run_block(block: Block, checkpointed: bool, *args) -> Tensor:
    """Call a block, recomputing its activations in the backward pass when asked to."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random
    return block(*args)


def init_weights(module: nn.Module) -> None:
    """Draw weights from a truncated normal of deviation 0.02, as the official code ends up with (its depth-wise rescale is
    overwritten).
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
