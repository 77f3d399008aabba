"""ema_update_: the moving average of every parameter, in one launch.

    target <- target + (1 - momentum) (source - target)        copy <- bf16(target)

in fp32, where `finite` holds; nothing is written elsewhere. The arithmetic is torch.lerp's, its form for weights from one
half on included, so that momentum 0 copies the source exactly.

Traffic, e_t and e_s bytes an element: 2 e_t + e_s, and 2 for a copy; 16 bytes a chunk of 4096 elements for its place.

One launch moves tensors of any number and size, because the kernel reads their addresses from a table. An example: fp32
targets A of 10,000 elements and B of 10, both 16-byte aligned, without copies.

    addresses (2, 5)   A: [target, source, 0, 10000, 8]   B: [target, source, 0, 10, 8]        8 = ALIGNED
    launch of kind 8   chunks [[0, 0], [0, 4096], [0, 8192], [1, 0]]     A whole (10,000 = 8 * 1250), B's first 8 elements
    launch of kind 0   chunks [[1, 8]]                                   B's last 2 elements, one by one
"""

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .dispatch import jit, tl

CHUNK = 4096  # elements a program takes
VECTOR = 8  # elements in 16 bytes of bf16: whole vectors and the rest of a tensor are launched apart
BF16_TARGET, BF16_SOURCE, COPY, ALIGNED = 1, 2, 4, 8  # bits of a kind: 9 is an aligned bf16 target; one launch a kind


class Table(NamedTuple):
    """Addresses of tensors, for a kernel that takes them all; a table that is kept saves making it every step.

    A table never makes a result wrong: each call compares it with the tensors it is given (on the host, no wait), and where
    they moved it sends their new addresses along, a few dozen bytes a tensor.
    """

    owners: Tensor  # (n, K) int64 on the CPU, a row a tensor: addresses, 0 for absent ones; elements, kind last
    addresses: Tensor  # the same on the device
    chunks: list[Tensor]  # a launch each: (C, 2) int64 on the device, the row and its first element of each chunk
    kinds: list[int]  # of each launch


def ema_update_ref(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    finite: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    table: Table | None = None,
) -> None:
    """Compute ema_update_; sources must be finite whatever `finite` says, as their difference is multiplied by zero."""
    if not targets:
        return
    wide = torch.promote_types(targets[0].dtype, torch.float32)
    weight = 1.0 - momentum
    weight = weight.to(wide) if isinstance(weight, Tensor) else torch.full((), weight, dtype=wide, device=targets[0].device)
    weight = weight if finite is None else weight * finite
    with torch.no_grad():
        alike = [target.dtype == source.dtype == wide for target, source in zip(targets, sources, strict=True)]
        if all(alike):
            torch._foreach_lerp_(list(targets), list(sources), [weight] * len(targets))
        else:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(torch.lerp(target.to(wide), source.to(wide), weight))
        for copy, target in zip(copies or (), targets, strict=bool(copies)):
            copy.copy_(target if finite is None else torch.where(finite, target.to(copy.dtype), copy))


@jit
def _ema_update_fwd_kernel(
    addresses_ptr,  # (n, 5) int64: target, source, copy, elements, kind
    chunks_ptr,  # (C, 2) int64: row of addresses, first element
    momentum_ptr,  # () fp32, or anything
    finite_ptr,  # () bool, or anything
    weight,  # 1 - momentum, where it is no tensor
    HAS_MOMENTUM: tl.constexpr,
    HAS_FINITE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    TARGET: tl.constexpr,  # dtype
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # From the program's chunk to its tensor's row, and from there to the memory of target, source and copy.
    chunk = tl.program_id(0).to(tl.int64) * 2
    row = addresses_ptr + tl.load(chunks_ptr + chunk) * 5
    first = tl.load(chunks_ptr + chunk + 1)
    target_ptr = tl.load(row).to(tl.pointer_type(TARGET)) + first
    source_ptr = tl.load(row + 1).to(tl.pointer_type(SOURCE)) + first
    copy_ptr = tl.load(row + 2).to(tl.pointer_type(tl.bfloat16)) + first
    elements = tl.load(row + 3) - first
    if ALIGNED:
        target_ptr = tl.multiple_of(target_ptr, 16)
        source_ptr = tl.multiple_of(source_ptr, 16)
        copy_ptr = tl.multiple_of(copy_ptr, 16)
        elements = elements // 8 * 8  # the rest is another launch's
    offs = tl.arange(0, BLOCK)
    mask = offs < elements
    if HAS_FINITE:
        mask = mask & (tl.load(finite_ptr) != 0)
    if HAS_MOMENTUM:
        weight = 1.0 - tl.load(momentum_ptr)
    # torch.lerp starts from the nearer end: a + w (b - a) below one half, b - (1 - w) (b - a) from there on.
    near = weight < 0.5
    target = tl.load(target_ptr + offs, mask=mask).to(tl.float32)
    source = tl.load(source_ptr + offs, mask=mask).to(tl.float32)
    moved = tl.where(near, target, source) + tl.where(near, weight, weight - 1.0) * (source - target)
    average = moved.to(TARGET)
    tl.store(target_ptr + offs, average, mask=mask)
    if HAS_COPY:
        tl.store(copy_ptr + offs, average.to(tl.bfloat16), mask=mask)


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor, 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()


def kind_of(addresses: Sequence[int], bits: int) -> int:
    """Add ALIGNED to the bits of the dtypes where 16 divides every address; an absent tensor's 0 does not count."""
    return bits | (ALIGNED if all(place % 16 == 0 for place in addresses) else 0)


def make_table(owners: Tensor, device: torch.device) -> Table:
    """Cut the tensors of (n, K) int64 rows, elements and kind last, into the chunks of each kind, on the device.

    A tensor that is 16-byte aligned gives its whole vectors to its kind, and the fewer than eight elements left to the
    kind without alignment: 4,099 aligned elements are chunks [0, 4096) of their kind and [4096, 4099) of the other.
    """
    launches: dict[int, list[Tensor]] = {}
    for row, (elements, kind) in enumerate(owners[:, -2:].tolist()):
        whole = elements // VECTOR * VECTOR if kind & ALIGNED else 0
        for of, start, stop in ((kind, 0, whole), (kind & ~ALIGNED, whole, elements)):
            if start < stop:
                first = torch.arange(start, stop, CHUNK, device="cpu")
                launches.setdefault(of, []).append(torch.stack([torch.full_like(first, row), first], dim=1))
    chunks = [upload(torch.cat(parts), device) for parts in launches.values()]  # (C, 2) each
    return Table(owners, upload(owners, device), chunks, list(launches))


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting for it; torch keeps the pinned memory until it is read."""
    if device.type != "cuda":
        return values.to(device)
    with dispatch.on_device(device):  # the stream that may be capturing is this card's
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph would replay addresses that moved; make the table before capturing, and keep it")
        return values.pin_memory().to(device, non_blocking=True)


def fitting(table: Table | None, owners: Tensor, device: torch.device) -> Table:
    """Return a table for these owners: the given one, the given one with new addresses, or a new one."""
    if table is None or not torch.equal(owners[:, -2:], table.owners[:, -2:]):
        return make_table(owners, device)
    if torch.equal(owners, table.owners):
        return table
    return table._replace(owners=owners, addresses=upload(owners, device))


def owners_of(targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor]) -> Tensor:
    """Return (n, 5) int64 on the CPU: addresses of target, source and copy (0: none), elements, kind."""
    rows = []
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        places = (target.data_ptr(), source.data_ptr(), address(copies[i] if copies else None))
        bits = BF16_TARGET * (target.dtype == torch.bfloat16) | BF16_SOURCE * (source.dtype == torch.bfloat16)
        bits |= COPY * bool(copies)
        rows.append((*places, target.numel(), kind_of(places, bits)))
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 5)


def run_kernels(table: Table, weight: float, momentum: Tensor | None, finite: Tensor | None) -> None:
    """Launch the kernel once for each kind of tensor; where an argument is absent the kernel does not read its place."""
    for chunks, kind in zip(table.chunks, table.kinds, strict=True):
        dispatch.launch(
            _ema_update_fwd_kernel, (len(chunks),),
            table.addresses, chunks, chunks if momentum is None else momentum, chunks if finite is None else finite, weight,
            HAS_MOMENTUM=momentum is not None, HAS_FINITE=finite is not None,
            HAS_COPY=bool(kind & COPY), ALIGNED=bool(kind & ALIGNED),
            TARGET=tl.bfloat16 if kind & BF16_TARGET else tl.float32,
            SOURCE=tl.bfloat16 if kind & BF16_SOURCE else tl.float32,
            BLOCK=CHUNK, num_warps=8,
        )  # fmt: skip


@torch.library.custom_op("fastjepa_kernels::ema_update_fwd", mutates_args={"targets", "copies"})
def ema_update_fwd(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    copies: Sequence[Tensor],
    weight: float,
    momentum: Tensor | None,
    finite: Tensor | None,
    owners: Tensor | None,
    addresses: Tensor | None,
    chunks: Sequence[Tensor],
    kinds: Sequence[int],
) -> None:
    """Compare the table with the tensors given here, which may be a compiled graph's clones, and launch."""
    table = None if owners is None else Table(owners, addresses, chunks, kinds)
    run_kernels(fitting(table, owners_of(targets, sources, copies), targets[0].device), weight, momentum, finite)


@ema_update_fwd.register_fake
def _(targets, sources, copies, weight, momentum, finite, owners, addresses, chunks, kinds):
    return None


def ema_table(targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] | None = None) -> Table:
    """Make the table of these tensors once, for every later `ema_update_`; a CUDA graph must be captured with one.

    Raises:
        ValueError, TypeError: as ema_update_; targets or copies that share memory with another tensor.
    """
    _check_tensors(targets, sources, copies)
    check_averaged_apart(targets, sources, copies)
    return make_table(owners_of(targets, sources, copies or ()), targets[0].device if targets else torch.device("cpu"))


def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    finite: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    table: Table | None = None,
) -> None:
    """Move every target towards its source, in place: target <- momentum * target + (1 - momentum) * source, in fp32.

    Args:
        targets: fp32 or bf16, any shapes, contiguous, on one device, no two overlapping. A bf16 average stalls near
            momentum 1: keep fp32 ones, and `copies` to compute from.
        sources: one for each target, of its shape; fp32 or bf16.
        momentum: between 0 and 1; a float, or a 0-dim fp32 tensor on the device, which a CUDA graph reads at each replay.
        finite: 0-dim bool tensor on the device; where it is False nothing is written. The definition, which a CPU runs,
            then wants finite sources, as a skipped optimizer step leaves them.
        copies: bf16, one for each target: its new value rounded, written in the same pass.
        table: ema_table(targets, sources, copies) where it is made beforehand; else it is made here, at a few
            milliseconds for a thousand tensors. The kernel alone needs it.

    Raises:
        ValueError, TypeError: wrong number, shape, dtype, layout or device; a momentum outside [0, 1], or targets or copies
            that share memory with another tensor (a tensor's value, and memory: CPU and debug only).
    """
    _check_tensors(targets, sources, copies)
    if not targets:
        return
    dispatch.check_untransformed("ema_update")
    check_scalars("ema_update", targets[0], momentum, finite)
    if dispatch.may_read(targets[0]):
        check_averaged_apart(targets, sources, copies)
    if not dispatch.runs_triton("ema_update", targets[0]):
        return ema_update_ref(targets, sources, momentum, finite, copies)
    given = isinstance(momentum, Tensor)
    with torch.no_grad():
        ema_update_fwd(
            targets, sources, copies or [], 0.0 if given else 1.0 - momentum, momentum if given else None, finite,
            *(table or (None, None, [], [])),
        )  # fmt: skip


def check_scalars(op: str, first: Tensor, momentum: float | Tensor, finite: Tensor | None) -> None:
    """Raise TypeError or ValueError where `momentum` or `finite` is a wrong tensor, or momentum is not between 0 and 1.

    The value of a tensor is looked at only where `may_read` allows it.
    """
    for name, tensor, dtype in (("momentum", momentum, torch.float32), ("finite", finite, torch.bool)):
        if isinstance(tensor, Tensor):
            if tensor.ndim or tensor.dtype != dtype:
                raise TypeError(f"{op}: {name} must be a 0-dim {dtype} tensor, not {tuple(tensor.shape)} of {tensor.dtype}")
            dispatch.check_device(op, first, **{name: tensor})
    if not isinstance(momentum, Real | torch.SymFloat | Tensor):
        raise TypeError(f"{op}: momentum must be a number or a 0-dim tensor, not {type(momentum).__name__}")
    known = not isinstance(momentum, Tensor) or dispatch.may_read(momentum)
    if known and not 0 <= momentum <= 1:
        raise ValueError(f"{op}: momentum is {float(momentum):.6g}; it must be between 0 and 1")


def check_apart(op: str, written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> None:
    """Raise ValueError where a tensor that is written shares memory with another, for which a kernel's programs would race.

    Addresses [(100, 124), (120, 144)] of two tensors: the second begins before the first ends. Tensors that are only read
    may share theirs with one another.
    """
    spans = [(t.data_ptr(), t.numel() * t.element_size(), True) for t in written]
    spans += [(t.data_ptr(), t.numel() * t.element_size(), False) for t in read]
    end = end_written = 0  # of all that began before, and of those among them that are written
    for start, size, writes in sorted(span for span in spans if span[1]):
        if start < (end if writes else end_written):
            other = "two of the tensors that are written" if writes and start < end_written else "a written and a read tensor"
            raise ValueError(f"{op}: {other} share their memory; give each once, and its own")
        end = max(end, start + size)
        end_written = max(end_written, start + size) if writes else end_written


def check_averaged_apart(targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] | None) -> None:
    """Check the tensors of an average; a target may be its own source, as where two models share a frozen weight."""
    pairs = zip(targets, sources, strict=True)
    others = [s for t, s in pairs if t.data_ptr() != s.data_ptr() or t.dtype != s.dtype]
    check_apart("ema_update", [*targets, *(copies or ())], others)


def check_alike(op: str, name: str, tensors: Sequence[Tensor], like: Sequence[Tensor], dtypes: tuple) -> None:
    """Raise an error unless each tensor has one of the dtypes, the shape and device of its partner, and no gaps."""
    if len(tensors) != len(like):
        raise ValueError(f"{op}: there are {len(tensors)} {name} for {len(like)} tensors; give one for each")
    for i, (tensor, partner) in enumerate(zip(tensors, like, strict=True)):
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{op}: {name}[{i}] must be {wanted}, not {tensor.dtype}")
        if tensor.shape != partner.shape:
            raise ValueError(f"{op}: {name}[{i}] is {tuple(tensor.shape)}, its partner {tuple(partner.shape)}; match them")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name}[{i}] is not contiguous; make it so, or lerp_ it by itself")
        if tensor.device != like[0].device:
            raise ValueError(f"{op}: {name}[{i}] is on {tensor.device}, the first tensor on {like[0].device}; move one of them")


def _check_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] | None) -> None:
    check_alike("ema_update", "targets", targets, targets, (torch.float32, torch.bfloat16))
    check_alike("ema_update", "sources", sources, targets, (torch.float32, torch.bfloat16))
    if copies:
        check_alike("ema_update", "copies", copies, targets, (torch.bfloat16,))
