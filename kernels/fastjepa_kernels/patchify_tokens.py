"""patchify_tokens: copy the visible patches of images into normalised rows, ready for the patch-embedding GEMM.

    out[t, (c p + i) p + j] = (images[b, c, y p + i, z p + j] / u - mean[c]) / std[c]      u = the value that counts as 1
    where idx[t] = (b gh + y) gw + z: columns in the order of a convolution's weight, so that
    out @ weight.flatten(1).T + bias is the convolution at those patches

Made in fp32 as (x - u mean) / (u std), exact in x. Traffic, e bytes an element: T C p p (e_in + e_out), and 4 bytes a row
for the index. Patches that idx does not name are not read; images lie as they came, NCHW or NHWC, and are not copied.

An example: 2 images of 3 x 32 x 48, p = 16, so gh = 2 rows of gw = 3 patches, N = 6 an image. idx 10 is image 10 // 6 = 1,
patch 10 % 6 = 4, which is row y = 4 // 3 = 1, column z = 4 % 3 = 1: pixels [16, 32) down and [16, 32) across. Column 300 of
its row is channel 300 // 256 = 1, line 44 // 16 = 2, pixel 44 % 16 = 12 of the patch.
"""

import math

import torch
from torch import Tensor

from . import dispatch
from .dispatch import jit, tl

TILE = 4096  # elements a program takes


def patchify_tokens_ref(
    images: Tensor,
    idx: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    patch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    unit: float | None = None,
) -> Tensor:
    """Compute patchify_tokens in plain PyTorch; uint16, for which torch has few operations, is made fp32 first."""
    count, channels, gh, gw = _grid(images, patch_size)
    unit = _unit(images, unit)
    images = images.float() if images.dtype == torch.uint16 else images
    patches = images.unflatten(3, (gw, patch_size)).unflatten(2, (gh, patch_size)).permute(0, 2, 4, 1, 3, 5)
    # (B, gh, gw, C, p, p), a view: with an index only the patches that it names are copied
    if idx is not None:
        patches = patches.reshape(count * gh * gw, channels, patch_size, patch_size).index_select(0, idx)
    wide = dtype if mean is None and unit == 1 else torch.float32
    rows = patches.to(wide, copy=idx is None, memory_format=torch.contiguous_format)  # never a view of the images
    rows = rows.view(count * gh * gw if idx is None else len(idx), channels, patch_size**2)
    if mean is not None:
        rows.sub_((unit * mean)[:, None]).div_((unit * std)[:, None])
    elif unit != 1:
        rows.div_(unit)
    return rows.flatten(1).to(dtype)


@jit(do_not_specialize=["T"])
def _patchify_tokens_fwd_kernel(
    images_ptr,  # (B, C, H, W), any strides
    idx_ptr,  # (T,) int32, or anything
    mean_ptr,  # (C,) fp32, or anything
    std_ptr,  # (C,) fp32, or anything
    out_ptr,  # (T, C, P, P)
    T,
    C,
    N,  # patches an image
    GW,  # patches a row of the image
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    UNIT: tl.constexpr,  # the images' value that counts as 1
    HAS_IDX: tl.constexpr,
    NORMALISE: tl.constexpr,
    ALIGN: tl.constexpr,  # divides the offset of every line of every patch
    P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_i = tl.program_id(2) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = tl.arange(0, BLOCK_J)
    mask_t, mask_c = offs_t < T, offs_c < C
    mask = mask_t[:, None, None, None] & mask_c[None, :, None, None]
    mask = mask & (offs_i < P)[None, None, :, None] & (offs_j < P)[None, None, None, :]
    # A tile is (BLOCK_T patches, BLOCK_C channels, BLOCK_I lines, BLOCK_J pixels): where does each patch start?
    patch = tl.load(idx_ptr + offs_t, mask=mask_t, other=0) if HAS_IDX else offs_t.to(tl.int32)
    row, column = patch % N // GW * P, patch % GW * P
    start = (patch // N).to(tl.int64) * stride_b + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    # ALIGN tells the compiler that lines start at multiples of it, so that it may load 16 bytes of a line at once.
    start = tl.multiple_of(start, [ALIGN])[:, None, None, None] + (offs_c.to(tl.int64) * stride_c)[None, :, None, None]
    line = tl.multiple_of(offs_i.to(tl.int64) * stride_h, [ALIGN])[None, None, :, None]
    x_ptr = images_ptr + (start + line + (offs_j.to(tl.int64) * stride_w)[None, None, None, :])
    x = tl.load(x_ptr, mask=mask, other=0).to(tl.float32)
    if NORMALISE:
        mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
        std = tl.load(std_ptr + offs_c, mask=mask_c, other=1.0)
        x = (x - (UNIT * mean)[None, :, None, None]) * (1.0 / (UNIT * std))[None, :, None, None]
    elif UNIT != 1:
        x *= 1.0 / UNIT
    inside = (offs_c[:, None, None] * P + offs_i[None, :, None]) * P + offs_j[None, None, :]
    tl.store(out_ptr + ((offs_t * C)[:, None, None, None] * (P * P) + inside[None]), x.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("fastjepa_kernels::patchify_tokens_fwd", mutates_args=())
def patchify_tokens_fwd(
    images: Tensor,
    idx: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    patch_size: int,
    dtype: torch.dtype,
    unit: float | None = None,
) -> Tensor:
    """Return (T, C * p * p) of `dtype`: a program takes a tile of at most 4096 elements, whole patches where they fit."""
    count, channels, gh, gw = _grid(images, patch_size)
    rows = count * gh * gw if idx is None else len(idx)
    out = images.new_empty(rows, channels * patch_size**2, dtype=dtype)
    if out.numel():
        # p = 16, C = 3: a line is 16 pixels, and 4 channels (one masked) of 16 lines are 1024: 4 patches a tile.
        side = 1 << (patch_size - 1).bit_length()
        block_c = min(1 << (channels - 1).bit_length(), max(1, TILE // side))
        block_i = min(side, max(1, TILE // (side * block_c)))
        block_t = max(1, TILE // (side * block_c * block_i))
        grid = (-(-rows // block_t), -(-channels // block_c), -(-patch_size // block_i))
        dispatch.launch(
            _patchify_tokens_fwd_kernel, grid,
            images, *(out if x is None else x.contiguous() for x in (idx, mean, std)), out,
            rows, channels, gh * gw, gw, *images.stride(),
            UNIT=_unit(images, unit), HAS_IDX=idx is not None, NORMALISE=mean is not None,
            ALIGN=_alignment(images, patch_size), P=patch_size,
            BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_I=block_i, BLOCK_J=side,
        )  # fmt: skip
    return out


@patchify_tokens_fwd.register_fake
def _(images, idx, mean, std, patch_size, dtype, unit=None):
    count, channels, gh, gw = _grid(images, patch_size)
    return images.new_empty(count * gh * gw if idx is None else idx.shape[0], channels * patch_size**2, dtype=dtype)


def _grid(images: Tensor, patch_size: int) -> tuple[int, int, int, int]:
    """Return the number of images, of channels, and of patches down and across."""
    return images.shape[0], images.shape[1], images.shape[2] // patch_size, images.shape[3] // patch_size


def _unit(images: Tensor, unit: float | None) -> float:
    """Return the value that counts as 1: `unit`, else 255 of uint8, 65535 of uint16 and 1 of floats."""
    return {torch.uint8: 255, torch.uint16: 65535}.get(images.dtype, 1) if unit is None else unit


def _alignment(images: Tensor, patch_size: int) -> int:
    """Return the largest power of two, at most 16, that divides the offset (in elements) of every line of every patch.

    Offsets are sums of the strides of image, line and patch (p pixels). NCHW of 3 x 32 x 48, p = 16: 4608, 48 and 16 give
    16. p = 14: 14 gives 2. The lowest bit set in any of them is that power.
    """
    image, _, line, pixel = images.stride()
    together = image | line | pixel * patch_size | 16
    return together & -together


def patchify_tokens(
    images: Tensor,
    idx: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    patch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    unit: float | None = None,
) -> Tensor:
    """Copy the patches of `images` that `idx` names into normalised rows, in the order of a convolution's weight.

    Args:
        images: (B, C, H, W), uint8, uint16, fp32, bf16 or fp16; any strides: NHWC is images.permute(0, 3, 1, 2); H and W
            multiples of patch_size. They have no gradient.
        idx: (T,) int32, patch n of image b is b * N + n, N patches an image in raster order; None: every patch, in order.
        mean: (C,) fp32, subtracted, where `unit` counts as 1; None, as std: values are divided by `unit` alone.
        std: (C,) fp32, divided by.
        patch_size: p.
        dtype: of the result, fp32, bf16 or fp16; the arithmetic is fp32.
        unit: the value of images that counts as 1, such as 4095 of 12 bits in 16; default: 255 of uint8, 65535 of uint16,
            1 of floats.

    Returns:
        (T, C * p * p), or (B * N, C * p * p).

    Raises:
        ValueError, TypeError, IndexError: wrong shape, dtype or device; an index out of range (CPU and debug only).
    """
    _check(images, idx, mean, std, patch_size, dtype)
    if unit is not None and not 0 < unit < math.inf:
        raise ValueError(f"patchify_tokens: unit must be finite and greater than 0, not {unit}")
    if not dispatch.runs_triton("patchify_tokens", images):
        return patchify_tokens_ref(images, idx, mean, std, patch_size, dtype, unit)
    return patchify_tokens_fwd(images, idx, mean, std, patch_size, dtype, unit)


def _check(
    images: Tensor, idx: Tensor | None, mean: Tensor | None, std: Tensor | None, patch_size: int, dtype: torch.dtype
) -> None:
    op = "patchify_tokens"
    if images.ndim != 4:
        raise ValueError(f"{op}: images must be (B, C, H, W), not {tuple(images.shape)}")
    if patch_size < 1 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"{op}: height and width must be multiples of patch_size {patch_size}, not {tuple(images.shape[2:])}; resize"
        )
    if (mean is None) != (std is None):
        raise ValueError(f"{op}: {'mean' if mean is None else 'std'} is missing; give mean and std, or neither")
    given = {name: tensor for name, tensor in (("mean", mean), ("std", std)) if tensor is not None}
    for name, tensor in given.items():
        if tensor.shape != images.shape[1:2] or tensor.dtype != torch.float32:
            raise ValueError(f"{op}: {name} must be float32 ({images.shape[1]},), not {tensor.dtype} {tuple(tensor.shape)}")
    if any(tensor.requires_grad for tensor in (images, *given.values())):
        raise ValueError(f"{op}: images, mean and std have no gradient; detach them, or use a convolution")
    if images.dtype not in (torch.uint8, torch.uint16, *dispatch.FLOATS):
        raise TypeError(f"{op}: images must be uint8, uint16, float32, bfloat16 or float16, not {images.dtype}")
    if dtype not in dispatch.FLOATS:
        raise TypeError(f"{op}: dtype must be float32, bfloat16 or float16, not {dtype}")
    count, _, gh, gw = _grid(images, patch_size)
    if count * gh * gw >= 2**31:
        raise ValueError(f"{op}: {count * gh * gw} patches are more than int32 can index; split the batch")
    if idx is not None and idx.ndim != 1:
        raise ValueError(f"{op}: idx must be (T,), not {tuple(idx.shape)}; add image * {gh * gw} and flatten it")
    dispatch.check_device(op, images, **given, **({} if idx is None else {"idx": idx}))
    if idx is not None:
        dispatch.check_idx("idx", idx, count * gh * gw)
