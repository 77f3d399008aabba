"""Which implementation of an op runs: its definition in torch, or its Triton kernel. Decided here alone.

`auto` runs the kernel on CUDA tensors and the definition elsewhere. What was asked for by `use` runs or raises.
With TRITON_INTERPRET=1 in the environment before triton is imported, `triton` also runs on a CPU, slowly, for tests.
"""

import os

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

    def jit(kernel):
        return kernel


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
    """Why no Triton kernel can run on tensors of this device type, or nothing."""
    if ABSENT:
        return f"triton is not installed ({ABSENT})"
    if device_type == "cuda" or (device_type == "cpu" and INTERPRETED):
        return ""
    if device_type == "cpu":
        return "it needs a GPU, or TRITON_INTERPRET=1 set before triton is imported"
    return f"it has none for tensors on {device_type}"


def runs_triton(op: str, tensor: Tensor) -> bool:
    """Whether `op` runs its kernel on this tensor; RuntimeError where triton was asked for and cannot."""
    asked = _asked[op]
    if asked == "auto":
        return tensor.is_cuda and not ABSENT
    if asked == "triton" and (reason := unusable(tensor.device.type)):
        raise RuntimeError(f"{op}: the Triton kernel cannot run here: {reason}; use auto or torch")
    return asked == "triton"


def plan(device_type: str) -> dict[str, tuple[str, str]]:
    """For each op what runs on this kind of device, and why."""
    on_gpu = device_type == "cuda" and not ABSENT
    auto = ("triton", "auto, on a GPU") if on_gpu else ("torch", f"auto: {unusable('cuda') or 'no GPU'}")
    return {op: auto if asked == "auto" else (asked, "asked for") for op, asked in _asked.items()}


def check_idx(name: str, idx: Tensor, rows: int) -> None:
    """The dtype of an index; its values too on a CPU or with FASTJEPA_KERNELS_DEBUG=1: elsewhere reading them would wait."""
    if idx.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, not {idx.dtype}; idx.int() converts it")
    if torch.compiler.is_compiling() or not idx.numel() or idx.is_meta or not (DEBUG or idx.device.type == "cpu"):
        return
    low, high = (int(value) for value in idx.aminmax())
    if low < 0 or high >= rows:
        raise IndexError(f"{name} has values from {low} to {high}, outside the {rows} rows it indexes")


def check_float(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, not {tensor.dtype}")


def check_device(op: str, first: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the first argument on {first.device}; move one of them")


def block_width(width: int, most: int = 1024) -> int:
    """Columns a program takes: the largest power of two that divides the width, or one that covers it when that is small."""
    divisor = width & -width
    return min(divisor, most) if divisor >= 64 else min(1 << (width - 1).bit_length(), most)


def contiguous_rows(x: Tensor) -> Tensor:
    """x, copied only where the elements of its last dimension do not lie side by side; rows may be any distance apart."""
    return x if x.stride(-1) == 1 else x.contiguous()
