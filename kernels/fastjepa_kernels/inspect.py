"""Read the cost of the kernels without a GPU: `python -m fastjepa_kernels.inspect --arch sm_90 [--op NAME] [--json] [--check]`.

A child process runs every op and its gradient in Triton's interpreter, at the trainer's widths and few rows, and notes the
launches that the op's own launchers make, every address they touch, and what torch moves around them. Each launch is then
compiled for the card as the JIT would specialise it: registers, spills and shared memory come from the binary, the widths
of global accesses from the PTX, each traced back to the kernel argument it goes through.

Bytes are those of a launch's distinct addresses (rows that programs re-read come from L2); `requested` counts every access.
"""

import argparse
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import dispatch

LIMITS = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KiB of shared memory an SM; 64 warps, 32 blocks, 65536 registers each
ADDRESSES = "(addresses)"  # accesses through a pointer that was itself read from memory: a table of tensors
MATTERS = 0.05  # share of an op's bytes from which the width of an argument's accesses matters
SLACK = 1.05  # bytes moved against the least possible
LOOKS = {"aminmax", "_local_scalar_dense"}  # index values are checked on a CPU alone
BLANK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "fill_", "zero_"}


class Launch(NamedTuple):
    """A kernel's launch as Triton's JIT would specialise it, and the bytes that it moved in the interpreter."""

    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: list[tuple[int, ...]]  # arguments that 16 divides, by place; those in a tuple by their place in it too
    options: dict[str, int]
    grid: tuple[int, ...]
    loads: dict[str, int]  # distinct bytes by argument
    stores: dict[str, int]
    requested: int

    @property
    def moved(self) -> int:
        return sum(self.loads.values()) + sum(self.stores.values())


class Phase(NamedTuple):
    """One direction of one case: its launches, the bytes that torch moved beside them, and the bytes that had to move."""

    op: str
    shape: str
    direction: str
    launches: list[Launch]
    torch_bytes: int
    least: int

    @property
    def moved(self) -> int:
        return self.torch_bytes + sum(launch.moved for launch in self.launches)


class Watch(TorchDispatchMode):
    """Note the launches, and count the bytes that torch itself reads and writes, inside registered ops too."""

    def __init__(self):
        super().__init__()
        self.launches, self.torch_bytes, self.paused = [], 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastjepa_kernels":  # below its registration, with this mode still on
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if not self.paused and name not in LOOKS | BLANK:
            self.torch_bytes += _torch_traffic(name, func._schema.is_mutable, args, out)
        return out

    @contextmanager
    def pause(self):
        self.paused, before = True, self.paused
        yield
        self.paused = before


def _torch_traffic(name: str, mutates: bool, args: tuple, out: Any) -> int:
    """Return the bytes that an operator of torch reads and writes; 0 for a view, at most its storage for an expanded tensor."""
    read = list(_tensors(args[1:] if name in OVERWRITES else args))
    written = list(_tensors(out))
    storages = {tensor.untyped_storage().data_ptr() for tensor in read}
    if not mutates and any(tensor.untyped_storage().data_ptr() in storages for tensor in written):
        return 0  # a view
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*read, *written))


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def interpreter_watched(watch: Watch):
    """Note every launch inside: Triton's interpreter runs it, and its loads and stores are looked at on the way."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    touched = {"load": [], "store": []}
    names = {"load": "create_masked_load", "store": "create_masked_store"}
    run, inner = InterpretedFunction.run, {way: getattr(InterpreterBuilder, name) for way, name in names.items()}

    def watched_run(self, *args, grid, warmup, **kwargs):
        for accesses in touched.values():
            accesses.clear()
        with watch.pause():
            run(self, *args, grid=grid, warmup=warmup, **kwargs)
            watch.launches.append(_launch(self, args, grid, kwargs, touched))

    def watched(way: str):
        def access(self, pointers, *rest):
            mask = rest[0 if way == "load" else 1]
            addresses = pointers.data[mask.data.astype(bool)].astype("int64")
            touched[way].append((pointers.get_element_ty().primitive_bitwidth // 8, torch.from_numpy(addresses)))
            return inner[way](self, pointers, *rest)

        return access

    InterpretedFunction.run = watched_run
    for way, name in names.items():
        setattr(InterpreterBuilder, name, watched(way))
    try:
        yield
    finally:
        InterpretedFunction.run = run
        for way, name in names.items():
            setattr(InterpreterBuilder, name, inner[way])


def _launch(function, args: tuple, grid, kwargs: dict, touched: dict) -> Launch:
    """Return the launch as the JIT would specialise it."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import native_specialize_impl

    given = inspect.signature(function.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in function.arg_names})
    given.apply_defaults()
    fixed = set(function.kwargs.get("do_not_specialize") or ())
    signature, constexprs, aligned = {}, {}, []
    for place, (name, value) in enumerate(given.arguments.items()):
        kind, special = "constexpr", value
        if "constexpr" not in str(function.fn.__annotations__.get(name, "")):
            kind, special = native_specialize_impl(CUDABackend, value, False, not fixed & {name, place}, True)
        signature[name] = kind
        if kind == "constexpr":
            constexprs[name] = special
        aligned += [(place, *path) for path, _, one in _parts(name, special) if one == "D" and kind != "constexpr"]
    named = (part for name, value in given.arguments.items() for part in _parts(name, value))
    pointers = {part: value for _, part, value in named if isinstance(value, Tensor)}
    options = {k: v for k, v in kwargs.items() if k not in function.arg_names and v is not None}
    grid = tuple(grid(given.arguments) if callable(grid) else grid)
    requested = sum(size * len(addresses) for accesses in touched.values() for size, addresses in accesses)
    split = {way: _by_argument(accesses, pointers) for way, accesses in touched.items()}
    return Launch(function.fn.__module__, function.fn.__name__, signature, constexprs, aligned, options, grid,
                  split["load"], split["store"], requested)  # fmt: skip


def _parts(name: str, value: Any) -> list[tuple[tuple[int, ...], str, Any]]:
    """Return (path, name, value) of an argument: of x as it is, of a tuple those of x[0], x[1], ..."""
    return [((i,), f"{name}[{i}]", one) for i, one in enumerate(value)] if isinstance(value, tuple) else [((), name, value)]


def _by_argument(accesses: list[tuple[int, Tensor]], pointers: dict[str, Tensor]) -> dict[str, int]:
    """Sum the bytes of the distinct addresses, by the argument in whose memory they lie."""
    counted = defaultdict(int)
    for size in {size for size, _ in accesses}:
        distinct = torch.cat([addresses for one, addresses in accesses if one == size]).unique()
        for name, tensor in pointers.items():
            span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n) + 1
            inside = (distinct >= tensor.data_ptr()) & (distinct < tensor.data_ptr() + span * tensor.element_size())
            if inside.any():
                counted[name] += size * int(inside.sum())
                distinct = distinct[~inside]
        if len(distinct):
            counted[ADDRESSES] += size * len(distinct)
    return dict(counted)


def record(cases: str, op: str) -> list[Phase]:
    """Run both directions of every case of one op; to be called in a process with TRITON_INTERPRET=1."""
    torch.set_num_threads(1)
    dispatch.use("triton")
    phases = []
    make, variants = importlib.import_module(cases).CASES[op]
    for variant in variants:
        torch.manual_seed(0)
        case = make(*variant)
        shape = " ".join(str(part).removeprefix("torch.") for part in variant)
        for leaf in case.leaves:
            leaf.requires_grad_()
        out, launches, moved = _watched(case.call)
        results = list(_tensors(out))
        phases.append(Phase(op, shape, "forward", launches, moved, _bytes(*case.reads, *case.writes, *results)))
        if not case.leaves:
            continue
        dout = torch.ones_like(results[0])
        grads, launches, moved = _watched(lambda: torch.autograd.grad(results[0], case.leaves, dout))  # noqa: B023
        needed = _bytes(dout[: case.dout_rows] if dout.ndim else dout, *case.back_reads, *grads)
        phases.append(Phase(op, shape, "backward", launches, moved, needed))
    return phases


def _watched(call: Callable[[], Any]) -> tuple[Any, list[Launch], int]:
    watch = Watch()
    with interpreter_watched(watch), watch:
        out = call()
    return out, watch.launches, watch.torch_bytes


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compiled(launch: Launch, arch: str) -> dict:
    """Compile one launch for `arch`; return its registers, spills, shared memory, widths and occupancy."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    attrs = {path: [["tt.divisibility", 16]] for path in launch.aligned}
    source = ASTSource(kernel, signature=launch.signature, constexprs=launch.constexprs, attrs=attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=launch.options)
    registers, spills = _resources(binary.asm["cubin"])
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    passed = [part for name, kind in launch.signature.items() if kind != "constexpr" for part in _parts(name, kind)]
    pointers = {place: name for place, (_, name, kind) in enumerate(passed) if kind.startswith("*")}
    return {
        "registers": registers, "spills": spills, "shared": shared, "warps": warps,
        "occupancy": occupancy(arch, registers, shared, warps), **widths(binary.asm["ptx"], pointers),
    }  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers a thread and bytes of local memory a thread: in these kernels all of it is spilled registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    return int(usage[0]), max(int(usage[1]), int(usage[2]))


def occupancy(arch: str, registers: int, shared: int, warps: int) -> float:
    """Return resident warps over the 64 an SM can hold; registers go by 256 a warp, a block takes 1 KiB of shared memory more.

    40 registers, 8 warps, no shared memory: a warp takes 40 * 32 = 1280 registers, a block 10,240, and 65,536 hold 6 blocks:
    48 of 64 warps.
    """
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(64 // warps, by_registers, LIMITS[arch] * 1024 // (shared + 1024), 32) * warps / 64


def widths(ptx: str, pointers: dict[int, str]) -> dict[str, dict[str, list[int]]]:
    """Find how many bytes a thread moves at once, widest first, of loads and stores, by the argument they go through.

    `pointers` names the kernel's parameters that are pointers, by place. Addresses are followed back through the PTX to them.
    """
    sources, accesses = defaultdict(set), []
    for name, operands in re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;\n]*);", ptx, re.MULTILINE):
        inside = re.findall(r"\[\s*(%?\w+)", operands)
        if name.startswith("cp.async") and len(inside) == 2:
            accesses.append(("load", inside[1], int(operands.split(",")[2], 0)))
        elif access := re.match(r"(ld|st)\.global.*?(?:\.v(\d))?\.[busf](\d+)$", name):
            accesses.append(("load" if access[1] == "ld" else "store", inside[0], int(access[2] or 1) * int(access[3]) // 8))
        elif name.startswith("ld.param") or not inside:
            registers = re.findall(r"%\w+", operands)
            made = len(re.findall(r"%\w+", operands.partition("}")[0])) if operands.startswith("{") else 1
            for register in registers[:made]:
                sources[register] |= {*registers[made:], *inside}
    found = {"load": defaultdict(set), "store": defaultdict(set)}
    for way, register, size in accesses:
        for place in _parameters(register, sources) & pointers.keys() or {None}:
            found[way][pointers.get(place, ADDRESSES)].add(size)
    return {way: {name: sorted(sizes, reverse=True) for name, sizes in by.items()} for way, by in found.items()}


def _parameters(register: str, sources: dict[str, set[str]]) -> set[int]:
    """Return the places of the kernel's parameters that a register is made of; a value loaded from memory is not followed."""
    seen, ahead = set(), [register]
    while ahead:
        if (name := ahead.pop()) not in seen:
            seen.add(name)
            ahead += sources.get(name, ())
    return {int(place[1]) for name in seen if (place := re.search(r"_param_(\d+)$", name))}


def rows(phases: list[Phase], archs: list[str]) -> list[dict]:
    """Make one row for every launch, card and case; equal launches are compiled once."""
    known, found, launches = {}, [], [(phase, launch) for phase in phases for launch in phase.launches]
    for (phase, launch), arch in product(launches, archs):
        key = repr((arch, *launch[:6]))
        known[key] = known.get(key) or compiled(launch, arch)
        found.append(
            {"op": phase.op, "case": phase.shape, "direction": phase.direction, "kernel": launch.kernel, "arch": arch}
            | known[key]
            | {"grid": launch.grid, "bytes": {"load": launch.loads, "store": launch.stores}}
            | {"requested": launch.requested, "moved": phase.moved, "least": phase.least}
        )  # fmt: skip
    return found


def broken(found: list[dict], unaligned: Collection[tuple[str, str, str]] = ()) -> list[str]:
    """Say each promise that is broken; `unaligned`: (op, how its case begins, load or store) that cannot go by 16 bytes."""
    said = {}
    for row in found:
        name = f"{row['op']} ({row['case']}), {row['direction']}"
        where = f"{name}: {row['kernel']} on {row['arch']}"
        if row["spills"]:
            said[f"{where} spills {row['spills']} bytes a thread; make its blocks smaller or its warps more"] = None
        for way in ("load", "store"):
            exempt = any((row["op"], way) == (op, of) and row["case"].startswith(case) for op, case, of in unaligned)
            for pointer, size in row["bytes"][way].items():
                narrowest = min(row[way].get(pointer) or row[way][ADDRESSES])
                if size >= MATTERS * row["moved"] and narrowest < 16 and not exempt:
                    said[f"{where} {way}s {pointer} by {narrowest} bytes; 16 is what its aligned rows allow"] = None
        if row["moved"] > SLACK * row["least"]:
            said[f"{name} moves {row['moved']} bytes where {row['least']} would do; look for a copy or a second pass"] = None
        if row["moved"] < row["least"]:
            said[f"{name} moves {row['moved']} bytes, fewer than its case's least of {row['least']}; correct the case"] = None
    return list(said)


def measure(cases: str, ops: list[str], archs: list[str]) -> list[dict]:
    """Make the rows of these ops of module `cases`; launches are recorded in child processes, one op a process."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(min(2, len(ops)), mp_context=multiprocessing.get_context("spawn")) as pool:
            phases = [phase for found in pool.map(record, [cases] * len(ops), ops) for phase in found]
    finally:
        del os.environ["TRITON_INTERPRET"]
    return rows(phases, archs)


COLUMNS = ["op", "case", "direction", "kernel", "arch",
           "registers", "spills", "shared", "warps", "occupancy", "load", "store", "moved/least"]  # fmt: skip


def table(found: list[dict]) -> str:
    """Lay the rows out in columns, for a terminal."""

    def cell(row: dict, column: str) -> str:
        if column in ("load", "store"):
            return " ".join(f"{name.removesuffix('_ptr')}:{'/'.join(map(str, by))}" for name, by in row[column].items())
        if column == "moved/least":
            return f"{row['moved'] / row['least']:.3f}"
        return f"{row[column]:.0%}" if column == "occupancy" else str(row[column])

    cells = [COLUMNS, *([cell(row, column) for column in COLUMNS] for row in found)]
    across = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, across, strict=True)).rstrip() for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastjepa_kernels.inspect", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=LIMITS, help="card to compile for, repeatable (default sm_90)")
    parser.add_argument("--op", action="append", help="op to look at, repeatable (default all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="exit 1 with a sentence for every promise broken")
    parser.add_argument("--cases", default="fastjepa_kernels.cases", help="module whose CASES, PROMISED and UNALIGNED to use")
    asked = parser.parse_args()
    if dispatch.ABSENT or dispatch.INTERPRETED:
        sys.exit(f"inspect: it compiles with triton; {dispatch.ABSENT or 'unset TRITON_INTERPRET'}")
    known = importlib.import_module(asked.cases)
    if unknown := set(asked.op or ()) - known.CASES.keys():
        sys.exit(f"inspect: no op {', '.join(unknown)}; there are {', '.join(known.CASES)}")
    found = measure(asked.cases, asked.op or list(known.CASES), asked.arch or ["sm_90"])
    print(json.dumps(found, indent=1) if asked.json else table(found))
    if asked.check and (said := broken([row for row in found if row["op"] in known.PROMISED], known.UNALIGNED)):
        sys.exit("\n".join(said))


if __name__ == "__main__":
    main()
