"""The choice between the two implementations of an op, its definition in torch and its Triton kernel, made here alone.

`auto` runs the kernel on CUDA tensors, and the definition elsewhere and inside torch.func's transforms. The one that `use`
asks for runs, or an error says why it cannot. With TRITON_INTERPRET=1 in the environment before triton is imported, `triton`
also runs on a CPU, slowly, for tests.

Triton compiles a kernel again for an integer argument that is 1, and for one that 16 divides. Where that buys wider loads
(widths, strides) it is wanted. Numbers of rows change every step and only bound a mask: their kernels name them in
`do_not_specialize`.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit, ABSENT = triton.jit, ""
except ImportError as error:  # macOS, Windows: the definitions still run
    triton, ABSENT = None, str(error)

    class tl:
        constexpr = int

    def jit(kernel=None, **options):
        return kernel or jit


OPS = (
    "gather_tokens",
    "scatter_tokens",
    "assemble_predictor",
    "patchify_tokens",
    "target_loss",
    "ema_update",
    "adamw_ema_step",
    "short_attention",
)
WAYS = ("auto", "triton", "torch")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DEBUG = os.environ.get("FASTJEPA_KERNELS_DEBUG", "0") != "0"  # check index values on CUDA too, at the price of a sync
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

_asked = dict.fromkeys(OPS, "auto")


def use(way: str = "auto", **per_op: str) -> None:
    """Ask for `auto`, `triton` or `torch`, for every op or by name: use("auto", target_loss="torch").

    Raises:
        ValueError: an unknown way or op.
        RuntimeError: triton is asked for where no kernel can run.
    """
    asked = dict.fromkeys(OPS, way) | per_op
    for op, name in asked.items():
        if op not in OPS:
            raise ValueError(f"fastjepa_kernels has no op {op}; it has {', '.join(OPS)}")
        if name not in WAYS:
            raise ValueError(f"{op}: {name} is no implementation; use one of {', '.join(WAYS)}")
        if name == "triton" and (reason := unusable("cuda" if torch.cuda.is_available() else "cpu")):
            raise RuntimeError(f"{op}: the Triton kernel cannot run here: {reason}; use auto or torch")
    _asked.update(asked)


def unusable(device_type: str) -> str:
    """Return the reason why no Triton kernel can run on tensors of this device type, or an empty string."""
    if ABSENT:
        return f"triton is not installed ({ABSENT})"
    if device_type == "cuda" or (device_type == "cpu" and INTERPRETED):
        return ""
    if device_type == "cpu":
        return "it needs a GPU, or TRITON_INTERPRET=1 set before triton is imported"
    return f"it has none for tensors on {device_type}"


def transformed() -> bool:
    """Return True inside grad, vmap, jvp and the like of torch.func, and inside forward-mode autograd.

    A kernel registered with torch would be given the values there and lose the tangents: a derivative of zero, in silence.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def check_untransformed(op: str) -> None:
    """Raise RuntimeError inside torch.func's transforms, for an op that writes in place: its derivatives would be lost."""
    if transformed():
        raise RuntimeError(f"{op}: it writes in place and has no rules for torch.func or forward mode; call it outside of them")


def runs_triton(op: str, tensor: Tensor) -> bool:
    """Return True where `op` runs its kernel on this tensor; RuntimeError where triton was asked for and cannot run."""
    asked = _asked[op]
    if transformed():
        if asked == "triton":
            raise RuntimeError(f"{op}: the Triton kernel has no rules for torch.func or forward mode; use auto or torch")
        return False
    if asked == "auto":
        return tensor.is_cuda and not ABSENT
    if asked == "triton" and (reason := unusable(tensor.device.type)):
        raise RuntimeError(f"{op}: the Triton kernel cannot run here: {reason}; use auto or torch")
    return asked == "triton"


def refuse_second_derivative(op: str, *derivatives: Any, remedy: str = "") -> None:
    """Make the kernels of `op`'s first derivative say that they have none themselves, where torch would name register_autograd.

    Args:
        derivatives: registered ops (torch.library.custom_op).
        remedy: where one is to be had; default: the definition.
    """
    remedy = remedy or f'fastjepa_kernels.use({op}="torch") has one'

    def refuse(*_) -> None:
        raise RuntimeError(f"{op}: the Triton kernel has no second derivative; {remedy}")

    for derivative in derivatives:
        derivative.register_autograd(refuse)


def plan(device_type: str) -> dict[str, tuple[str, str]]:
    """Return, for each op, the implementation that runs on this kind of device, and the reason."""
    on_gpu = device_type == "cuda" and not ABSENT
    auto = ("triton", "auto, on a GPU") if on_gpu else ("torch", f"auto: {unusable('cuda') or 'no GPU'}")
    return {op: auto if asked == "auto" else (asked, "asked for") for op, asked in _asked.items()}


def on_device(device: torch.device) -> AbstractContextManager:
    """Make a card the current one for the time of a `with`; do nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch kernel[grid] on the card of its first argument; Triton alone would take the current card, whatever that is."""
    with on_device(first.device):
        kernel[grid](first, *arguments, **options)


def may_read(tensor: Tensor) -> bool:
    """Return True where a check may read values: on a CPU, and with FASTJEPA_KERNELS_DEBUG=1; elsewhere reading waits."""
    if torch.compiler.is_compiling() or tensor.is_meta or transformed():
        return False
    return DEBUG or tensor.device.type == "cpu"


def check_idx(name: str, idx: Tensor, rows: int) -> None:
    """Raise TypeError where an index is not int32, and IndexError where it leaves the rows and `may_read` allows a look."""
    if idx.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, not {idx.dtype}; idx.int() converts it")
    if not idx.numel() or not may_read(idx):
        return
    low, high = (int(value) for value in idx.aminmax())
    if low < 0 or high >= rows:
        raise IndexError(f"{name} has values from {low} to {high}, outside the {rows} rows it indexes")


def check_distinct(op: str, idx: Tensor, rows: int, remedy: str) -> None:
    """Raise ValueError where (T,) or (B, K) idx names a row twice (in an image) and `may_read` allows a look."""
    if not idx.numel() or not may_read(idx):
        return
    named = torch.zeros(*idx.shape[:-1], rows, dtype=torch.bool, device=idx.device).scatter_(-1, idx.long(), True)
    if int(named.sum()) < idx.numel():
        raise ValueError(f"{op}: idx names a row twice; {remedy}")


def check_float(op: str, **tensors: Tensor) -> None:
    """Raise TypeError where a tensor has a dtype that no kernel takes."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, not {tensor.dtype}")


def check_device(op: str, first: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError where a tensor is on another device than the first."""
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the first argument on {first.device}; move one of them")


def block_width(width: int, most: int = 1024) -> int:
    """Return how many columns a program takes: a power of two that divides the width, or else one that covers it.

    768 = 3 * 256 gives 256, three programs a row and no masked lane. 100 = 25 * 4 would give 4: below 64 a program takes
    the whole row instead, 128 columns of which 28 are masked. 2048 gives `most`.
    """
    divisor = width & -width  # the lowest bit that is set: the largest power of two that divides
    return min(divisor, most) if divisor >= 64 else min(1 << (width - 1).bit_length(), most)


def contiguous_rows(x: Tensor) -> Tensor:
    """Return x, copied only where elements of its last dimension do not lie side by side; rows may be any distance apart."""
    return x if x.stride(-1) == 1 else x.contiguous()
