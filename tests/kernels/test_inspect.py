"""The inspector: every op keeps its promises on every card, and a planted fault is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastjepa_kernels import inspect
from tests.support.places import KERNELS

PROMISED = {
    "gather_tokens",
    "gather_tokens_repeated",
    "scatter_tokens",
    "assemble_predictor",
    "patchify_tokens",
    "target_loss",
    "ema_update",
    "adamw_ema_step",
}

# Rows by single values, a spilled table of sums, and a second pass through a copy that the op did not need.
PLANTED = """
import torch
from fastjepa_kernels.cases import Case
from fastjepa_kernels.dispatch import jit, tl

@jit
def _every_other_kernel(x_ptr, out_ptr, T, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs * stride, mask=offs < T), mask=offs < T)

@jit
def _spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x - tl.max(x, axis=0))

@torch.library.custom_op("fastjepa_kernels::planted", mutates_args=())
def planted(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.shape[0])
    x = x.clone()
    _every_other_kernel[(-(-len(out) // 64),)](x, out, len(out), x.stride(0), BLOCK=64)
    return out

@torch.library.custom_op("fastjepa_kernels::spilling", mutates_args=())
def spilling(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _spilling_kernel[(1,)](x, out, BLOCK=8192, num_warps=1)
    return out

def _planted(width):
    x = torch.randn(1000, width)
    return Case(lambda: planted(x), reads=[x[:, 0]])

def _spilling(width):
    x = torch.randn(width)
    return Case(lambda: spilling(x), reads=[x])

def _less(width):
    x = torch.randn(width)
    return Case(lambda: spilling(x), reads=[x, x])

CASES = {"planted": (_planted, [(3,)]), "spilling": (_spilling, [(8192,)]), "less": (_less, [(8192,)])}
PROMISED = {"planted", "spilling", "less"}
UNALIGNED = set()
"""


def run(*arguments: str, path: Path = KERNELS) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{path}{os.pathsep}{KERNELS}"
    command = [sys.executable, "-m", "fastjepa_kernels.inspect", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param("sm_90", marks=pytest.mark.slow),
        pytest.param("sm_80", marks=pytest.mark.long),
        pytest.param("sm_100", marks=pytest.mark.long),
    ],
)
def test_the_ops_keep_their_promises(arch: str):
    """No spills, 16-byte accesses where rows allow them, no byte moved twice."""
    done = run("--arch", arch, "--json", "--check")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["op"] for row in found} >= PROMISED
    assert {row["arch"] for row in found} == {arch}
    for row in found:
        assert 0 < row["registers"] <= 255 and 0 < row["occupancy"] <= 1
        assert row["requested"] >= sum(sum(by.values()) for by in row["bytes"].values())


@pytest.mark.slow
def test_what_is_wrong_is_said(tmp_path: Path):
    (tmp_path / "planted.py").write_text(PLANTED)
    done = run("--cases", "planted", "--check", path=tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert any("planted (3)" in line and "loads x_ptr by 4 bytes" in line for line in said)
    assert any("planted (3)" in line and "moves 32000 bytes where 8000 would do" in line for line in said)
    assert any("spilling (8192)" in line and "spills" in line for line in said)
    assert any("less (8192)" in line and "correct the case" in line for line in said)
    assert not any("spilling (8192)" in line and "moves" in line for line in said)


@pytest.mark.slow
def test_a_table_is_printed_of_one_op():
    done = run("--op", "patchify_tokens")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split() == [*inspect.COLUMNS]
    assert all("_patchify_tokens_fwd_kernel" in row for row in rows) and len(rows) >= 3


def test_an_unknown_op_is_refused():
    done = run("--op", "nothing")
    assert done.returncode == 1 and "no op nothing" in done.stderr


def test_occupancy_is_bounded_by_what_is_scarcest():
    assert inspect.occupancy("sm_90", registers=32, shared=0, warps=4) == 1
    assert inspect.occupancy("sm_90", registers=255, shared=0, warps=4) == 8 / 64
    assert inspect.occupancy("sm_80", registers=32, shared=100 * 1024, warps=8) == 8 / 64
    assert inspect.occupancy("sm_90", registers=32, shared=100 * 1024, warps=8) == 16 / 64
    assert inspect.occupancy("sm_90", registers=16, shared=0, warps=1) == 0.5


def test_widths_are_traced_to_their_arguments():
    ptx = """
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	ld.param.b32 	%r9, [k_param_2];
	mad.lo.s64 	%rd3, %rd7, 4, %rd1;
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
	@%p1 ld.global.b64 { %rd8 }, [ %rd2 + 0 ];
	add.s64 	%rd9, %rd8, 16;
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd9 + 0 ], 0x10, %r6;
	st.global.L1::evict_last.v2.b16 [ %rd2 + 4 ], { %rs1, %rs2 };
"""
    found = inspect.widths(ptx, {0: "x_ptr", 1: "out_ptr"})
    assert found["load"] == {"x_ptr": [16], "out_ptr": [8], inspect.ADDRESSES: [16]}
    assert found["store"] == {"out_ptr": [4]}


# Every op that takes rows, with the numbers of rows of five steps: one, multiples of 16, others.
RAGGED = """
import json, torch
from fastjepa_kernels import (assemble_predictor, gather_tokens, gather_tokens_repeated, inspect, patchify_tokens,
                              scatter_tokens, target_loss)
from fastjepa_kernels.cases import Case

def some(total, count):
    return torch.randperm(total)[:count].int()

def table(rows):
    return torch.randn(rows, 128)

def gather(rows):
    x = table(rows + 5)
    return Case(lambda: gather_tokens(x, some(rows + 5, rows)), reads=[], leaves=[x])

def repeated(rows):
    x, idx = table(rows + 5), torch.randint(rows + 5, (2 * rows + 1,)).int()
    return Case(lambda: gather_tokens_repeated(x, idx), reads=[], leaves=[x])

def scatter(rows):
    x, fill, positions = table(rows), torch.randn(128), table(rows + 5)
    return Case(lambda: scatter_tokens(x, some(rows + 5, rows), rows + 5, fill, positions), reads=[], leaves=[x, fill])

def assemble(rows):
    context, mask_token, idx = table(rows), torch.randn(128), torch.randint(rows + 40, (3 * rows + 1,)).int()
    context_idx, positions = torch.randint(40, (rows,)).int(), table(40)
    return Case(lambda: assemble_predictor(context, context_idx, positions, mask_token, idx), reads=[],
                leaves=[context, mask_token])

def patchify(rows):
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    return Case(lambda: patchify_tokens(images, some(64, rows)), reads=[])

def loss(rows):
    prediction, features, weight = table(rows), table(rows + 5), torch.rand(rows)
    return Case(lambda: target_loss(prediction, features, some(rows + 5, rows), weight), reads=[], leaves=[prediction])

CASES = {f.__name__: (f, [(rows,) for rows in (1, 16, 17, 32, 43)])
         for f in (gather, repeated, scatter, assemble, patchify, loss)}

if __name__ == "__main__":
    compiled = {}
    for op in CASES:
        for phase in inspect.record("ragged", op):
            for launch in phase.launches:
                key = f"{op} {phase.direction} {launch.kernel}"
                compiled.setdefault(key, set()).add(repr((launch.signature, launch.constexprs, launch.aligned, launch.options)))
    print(json.dumps({key: len(forms) for key, forms in compiled.items()}))
"""


@pytest.mark.slow
def test_numbers_of_rows_that_change_compile_nothing_anew(tmp_path: Path):
    """Triton compiles again for an argument that is 1, or that 16 divides: rows are neither, for good, as it buys nothing."""
    (tmp_path / "ragged.py").write_text(RAGGED)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{KERNELS}"}
    done = subprocess.run([sys.executable, "-m", "ragged"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forms = json.loads(done.stdout)
    assert len(forms) >= 12
    assert {kernel: count for kernel, count in forms.items() if count > 1} == {}
