"""varlen_attention: every way against the plain definition, and which way runs where."""

import importlib
import subprocess
import sys
import types

import pytest
import torch
import torch._dynamo.testing
from checks import DTYPES, compiles_whole
from checks import as_good as as_good_in_units
from torch import Tensor

from fastjepa_kernels import dense_attention, dispatch
from fastjepa_kernels.varlen_attention import attention_way, varlen_attention, varlen_attention_ref

module = sys.modules[varlen_attention.__module__]  # the package's name for it is the function's
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def as_good(op, ref, *inputs) -> None:
    """Compare as the house does, but in fp32 the definition is its own truth: its sums may be made in another order."""
    as_good_in_units(op, ref, *inputs, units=16.0 if inputs[0].dtype == torch.float32 else 2.0)


def packed(queries: list[int], keys: list[int], dtype: torch.dtype, device: torch.device, width: int = 24) -> tuple:
    """Make the arguments of an attention function for two heads, q, k and v tracked."""
    q, k, v = (
        torch.randn(rows, 2, width, device=device).to(dtype).requires_grad_() for rows in (sum(queries), sum(keys), sum(keys))
    )
    cu_q, cu_k = (torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (queries, keys))
    return q, k, v, cu_q, cu_k, max(queries, default=0), max(keys, default=0)


def by(way: str):
    return lambda *inputs: varlen_attention(*inputs, way=way)


# (queries, keys) of each sequence: equal, ragged, fewer queries, above 64 keys, no queries, no keys, none at all
SEQUENCES = [
    ([7, 7, 7], [7, 7, 7]),
    ([5, 5], [11, 11]),
    ([3, 12, 1], [3, 12, 1]),
    ([3, 3], [9, 14]),
    ([4, 9], [20, 70]),
    ([0, 5, 0], [9, 16, 4]),
    ([0, 0], [3, 70]),
    ([2, 3, 0], [66, 0, 0]),
    ([2, 3], [0, 0]),
    ([], []),
]


@pytest.mark.parametrize("way", ["sdpa", "matmul", "short", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), SEQUENCES)
def test_is_attention_within_each_sequence(queries, keys, dtype, way, device):
    as_good(by(way), varlen_attention_ref, *packed(queries, keys, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["flash", "varlen", "xformers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(q, k) for q, k in SEQUENCES if 0 not in k])
def test_so_are_the_libraries(queries, keys, dtype, way):
    if module.missing(way):
        pytest.skip(f"{way}: {module.missing(way)}")
    as_good(by(way), varlen_attention_ref, *packed(queries, keys, dtype, CUDA))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["flash", "varlen", "xformers"])
@pytest.mark.parametrize("lengths", [[200, 131, 256], [1, 300, 64, 7]])
def test_the_libraries_read_slices_of_a_packed_qkv_beyond_128_tokens(lengths, way):
    """Where torch's varlen_attn would take cuDNN if it were not told otherwise; heads of 80, as a ViT-H has them."""
    if module.missing(way):
        pytest.skip(f"{way}: {module.missing(way)}")
    qkv = torch.randn(sum(lengths), 3, 2, 80, device=CUDA).bfloat16().requires_grad_()
    cu = torch.tensor([0, *lengths], device=CUDA).cumsum(0).int()
    as_good(
        lambda qkv: varlen_attention(*qkv.unbind(1), cu, cu, max(lengths), max(lengths), way),
        lambda qkv: varlen_attention_ref(*qkv.unbind(1), cu, cu),
        qkv,
    )


def test_varlen_asks_torch_for_a_window_wider_than_any_sequence(monkeypatch):
    """With a window torch takes FlashAttention; without one it takes cuDNN on some cards, which plans anew for every T."""
    asked = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda *x, **options: asked.append((x, options)))
    inputs = packed([200, 3], [200, 3], torch.bfloat16, CPU)
    module.load("varlen")(*inputs)
    ((given, options),) = asked
    assert all(a is b for a, b in zip(given, inputs, strict=True))
    assert options == {"window_size": (module.WINDOW, module.WINDOW)} and module.WINDOW >= 2**16


def test_torch_s_own_choice_with_the_window_is_not_cudnn(monkeypatch):
    """The condition for cuDNN, on a card that has it: true without the window, false with it."""
    varlen = importlib.import_module("torch.nn.attention.varlen")
    if not hasattr(varlen, "_can_use_cudnn"):  # before torch 2.14
        return
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda device_index: True)
    q = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(500, 16, 80))
    q.size = q.shape.__getitem__
    assert varlen._can_use_cudnn(q, q, q, 256, [-1, -1])
    assert not varlen._can_use_cudnn(q, q, q, 256, [module.WINDOW, module.WINDOW])


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_is_deterministic_where_torch_is_asked_to_be(deterministic, monkeypatch):
    asked = []
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = lambda *x, **options: asked.append(options)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    torch.use_deterministic_algorithms(deterministic)
    module.load("flash")(*packed([3], [3], torch.bfloat16, CPU))
    assert asked == [{"deterministic": deterministic}]


@pytest.mark.parametrize("way", ["sdpa", "matmul", "short"])
def test_looser_maxima_change_nothing(way, device):
    q, k, v, cu_q, cu_k, _, _ = packed([9, 4], [12, 80], torch.float32, device)
    as_good(lambda *x: varlen_attention(*x, cu_q, cu_k, 20, 100, way), lambda *x: varlen_attention_ref(*x, cu_q, cu_k), q, k, v)


@pytest.mark.parametrize("way", ["sdpa", "matmul"])
def test_slices_of_a_packed_qkv(way, device):
    qkv = torch.randn(22, 3, 2, 24, device=device, requires_grad=True)
    for lengths in ([11, 6, 5], [11, 11]):
        cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        as_good(
            lambda qkv, cu=cu: varlen_attention(*qkv.unbind(1), cu, cu, 11, 11, way),
            lambda qkv, cu=cu: varlen_attention_ref(*qkv.unbind(1), cu, cu),
            qkv,
        )


@pytest.mark.parametrize("way", ["sdpa", "matmul"])
@pytest.mark.parametrize(("queries", "keys"), [([2, 2], [3, 3]), ([1, 2], [3, 2]), ([1, 2], [66, 2]), ([0, 2], [3, 2])])
def test_the_ways_of_a_cpu_have_the_gradients_of_calculus(queries, keys, way):
    q, k, v, *rest = packed(queries, keys, torch.float64, CPU, width=2)
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, *rest, way), (q, k, v))


RAGGED = ([3, 12, 1, 0], [3, 12, 9, 4])


@pytest.mark.parametrize(("way", "dtype"), [("sdpa", torch.float32), ("matmul", torch.float32), ("matmul", torch.bfloat16)])
def test_short_sequences_are_gathered_to_what_padding_gives(way, dtype, monkeypatch):
    q, k, v, *rest = packed(*RAGGED, dtype, CPU)
    found = []
    for path in ("_gathered", "_padded"):
        monkeypatch.setattr(dense_attention, "_gathered", getattr(dense_attention, path))
        out = varlen_attention(q, k, v, *rest, way)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for gathered, padded in zip(*found, strict=True):
        torch.testing.assert_close(gathered, padded)


@pytest.mark.parametrize("way", ["sdpa", "matmul"])
def test_what_is_no_number_stays_in_its_sequence(way):
    q, k, v, *rest = packed([2, 3, 2], [4, 3, 5], torch.float32, CPU)
    with torch.no_grad():
        for x, row in ((q, 2), (k, 4), (v, 4)):
            x[row] = torch.nan
    bad = varlen_attention(q, k, v, *rest, way).isnan().flatten(1).any(dim=1)
    assert bad.tolist() == [False] * 2 + [True] * 3 + [False] * 2


def test_batched_products_have_second_derivatives():
    q, k, v, *rest = packed([1, 2], [3, 2], torch.float64, CPU, width=2)
    assert torch.autograd.gradgradcheck(lambda q, k, v: varlen_attention(q, k, v, *rest, "matmul"), (q, k, v))


def test_slots_follow_lengths_that_are_written_in_place():
    q, k, v, cu_q, cu_k, *most = packed([3, 4], [3, 4], torch.float32, CPU)
    with torch.inference_mode():  # slots that an evaluation has made can be trained with
        varlen_attention(q, k, v, cu_q, cu_k, *most, "sdpa")
    before = varlen_attention(q, k, v, cu_q, cu_k, *most, "sdpa")
    for cu in (cu_q, cu_k):
        cu[1] = 4
    after = varlen_attention(q, k, v, cu_q, cu_k, *most, "sdpa")
    torch.testing.assert_close(after, varlen_attention_ref(q, k, v, cu_q, cu_k))
    assert not torch.allclose(before, after)
    after.sum().backward()


def test_auto_multiplies_short_sequences_on_a_cpu():
    asked = [attention_way("auto", CPU, torch.float32, longest=longest) for longest in (16, 32, 33, None)]
    assert asked == ["matmul", "matmul", "sdpa", "sdpa"]


def test_equal_lengths_are_not_padded(monkeypatch):
    monkeypatch.setattr(dense_attention, "_padded", None)
    monkeypatch.setattr(dense_attention, "_each", None)
    as_good(by("auto"), varlen_attention_ref, *packed([70, 70], [80, 80], torch.float32, CPU))


def test_only_long_ragged_fp32_sequences_run_one_by_one(monkeypatch):
    monkeypatch.setattr(dense_attention, "_each", lambda *_: "each")
    monkeypatch.setattr(dense_attention, "_padded", lambda *_: "padded")
    runs = {
        (dtype, most): varlen_attention(*packed([3, 5], [7, most], dtype, CPU)) for dtype in DTYPES[:2] for most in (64, 65)
    }
    assert [case for case, ran in runs.items() if ran == "each"] == [(torch.float32, 65)]


@pytest.mark.parametrize("way", ["sdpa", "matmul", "short", "auto"])
@pytest.mark.parametrize(("queries", "keys"), [([4, 4], [6, 6]), ([4, 9], [20, 70])])
def test_compiles_whole(queries, keys, way, device):
    compiles_whole(by(way), *packed(queries, keys, torch.float32, device))


def test_the_choice_can_be_compiled():
    """A network that asks for auto inside a compiled region, as it would on a GPU."""

    @torch.compile(fullgraph=True, backend="eager")
    def f(x: Tensor) -> Tensor:
        return x + module.WAYS.index(attention_way("auto", CUDA, torch.bfloat16))

    assert f(torch.zeros(1)).item() == module.WAYS.index(attention_way("auto", CUDA, torch.bfloat16))


def test_the_first_call_of_a_library_can_be_compiled(monkeypatch):
    """It may happen inside a compiled network that the package is looked up."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, *x, window_size: q * window_size[0])
    monkeypatch.setattr(module, "_found", {})
    inputs = packed([5, 3], [5, 3], torch.float32, CPU)
    torch._dynamo.reset()
    run = torch.compile(lambda *x: module.library("varlen")(*x), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(*inputs), inputs[0] * module.WINDOW)


def test_importing_the_door_imports_no_library():
    code = "import sys, fastjepa_kernels.varlen_attention; print({'flash_attn', 'xformers'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("device", "dtype", "way"),
    [
        (CPU, torch.float32, "sdpa"),
        (CPU, torch.float64, "sdpa"),
        (CPU, torch.float16, "sdpa"),
        (CPU, torch.bfloat16, "matmul"),
        (CUDA, torch.float32, "sdpa"),
    ],
)
def test_auto_chooses_by_device_and_dtype(device, dtype, way):
    assert attention_way("auto", device, dtype) == way
    assert attention_way("sdpa", device, dtype) == "sdpa"
    assert attention_way("matmul", device, dtype) == "matmul"


@pytest.mark.parametrize(
    ("absent", "way"), [("", "flash"), ("flash", "varlen"), ("flash varlen", "xformers"), ("flash varlen xformers", "sdpa")]
)
def test_auto_takes_the_first_library_on_a_gpu_and_never_short(absent, way, monkeypatch):
    monkeypatch.setattr(module, "missing", lambda name: "no such module" if name in absent.split() else "")
    assert attention_way("auto", CUDA, torch.bfloat16) == way
    assert attention_way("auto", CUDA, torch.float16) == way
    assert attention_way("short", CUDA, torch.float32) == "short"


def test_xformers_makes_its_mask_once_for_each_pair_of_cu_seqlens(monkeypatch):
    """Lists of lengths are a wait: one a batch, not one a layer, and none where lengths are equal."""
    made = []

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, *lengths: list[int]):
            made.append(lengths)
            return lengths

    ops, bias = types.ModuleType("xformers.ops"), types.ModuleType("xformers.ops.fmha.attn_bias")
    ops.memory_efficient_attention = lambda q, k, v, attn_bias: q
    bias.BlockDiagonalMask = BlockDiagonalMask
    packages = {name: types.ModuleType(name) for name in ("xformers", "xformers.ops.fmha")}
    for name, package in (packages | {"xformers.ops": ops, "xformers.ops.fmha.attn_bias": bias}).items():
        monkeypatch.setitem(sys.modules, name, package)
    run = module.load("xformers")
    ragged, equal = packed([3, 5], [7, 4], torch.float32, CPU), packed([4, 4], [6, 6], torch.float32, CPU)
    assert run(*ragged).shape == (8, 2, 24)
    run(*ragged)
    assert made == [([3, 5], [7, 4])]
    run(*equal)
    run(*equal[:3], equal[3].clone(), *equal[4:])
    assert made[1:] == [([4, 4], [6, 6])]
    ragged[3][1] = 2
    run(*ragged)
    assert made[2:] == [([2, 6], [7, 4])]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "says"),
    [
        ("fast", CPU, torch.float32, "fast is no way; use one of auto, flash"),
        ("flash", CPU, torch.bfloat16, "flash needs a CUDA device and bf16 or fp16, not torch.bfloat16 on cpu; use auto"),
        ("varlen", CUDA, torch.float32, "varlen needs a CUDA device and bf16 or fp16, not torch.float32 on cuda; use auto"),
        ("xformers", CPU, torch.float32, "xformers needs"),
    ],
)
def test_a_way_that_cannot_run_says_so(name, device, dtype, says):
    with pytest.raises(ValueError, match=says):
        attention_way(name, device, dtype)


@pytest.mark.parametrize("library", ["flash", "varlen", "xformers"])
@pytest.mark.parametrize(("head_dim", "runs"), [(8, True), (64, True), (80, True), (256, True), (20, False), (264, False)])
def test_heads_that_flash_attention_cannot_take_are_refused_at_the_door(library, head_dim, runs, monkeypatch):
    monkeypatch.setattr(module, "missing", lambda name: "" if name == library else "no such module")
    assert attention_way("auto", CUDA, torch.bfloat16, head_dim, 300) == (library if runs else "sdpa")
    assert attention_way("auto", CUDA, torch.float32, head_dim, 300) == "sdpa"
    assert attention_way("sdpa", CUDA, torch.bfloat16, head_dim, 300) == "sdpa"
    if runs:
        assert attention_way(library, CUDA, torch.bfloat16, head_dim, 300) == library
        return
    limit = "at most 256" if head_dim > 256 else "a multiple of 8"
    says = f"{library} takes heads of {limit} channels, not {head_dim}; use auto"
    with pytest.raises(ValueError, match=says):
        attention_way(library, CUDA, torch.bfloat16, head_dim, 300)


@pytest.mark.parametrize(
    ("head_dim", "longest", "dtype", "says"),
    [
        (65, 256, torch.bfloat16, "short takes heads of at most 64 channels, not 65; use auto"),
        (80, None, torch.float32, "short takes heads of at most 64 channels, not 80"),
        (24, 257, torch.bfloat16, "short takes sequences of at most 256 tokens, not 257; use auto"),
        (None, 784, torch.bfloat16, "short takes sequences of at most 256 tokens, not 784"),
        (24, 100, torch.float64, "short needs fp32, bf16 or fp16, not torch.float64"),
    ],
)
def test_sequences_that_short_cannot_hold_are_refused_at_the_door(head_dim, longest, dtype, says):
    assert attention_way("short", CUDA, torch.bfloat16, 64, 256) == "short"
    with pytest.raises(ValueError, match=says):
        attention_way("short", CUDA, dtype, head_dim, longest)


def test_no_sequence_reaches_the_window_of_varlen(monkeypatch):
    monkeypatch.setattr(module, "missing", lambda name: "")
    assert attention_way("varlen", CUDA, torch.bfloat16, 64, module.WINDOW) == "varlen"
    with pytest.raises(ValueError, match="varlen takes sequences of at most"):
        attention_way("varlen", CUDA, torch.bfloat16, 64, module.WINDOW + 1)


def test_one_graph_serves_ragged_lengths():
    """Neither the door's limits nor the window specialise a compiled graph on the lengths of a batch."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    run = torch.compile(by("matmul"), fullgraph=True, backend=graphs, dynamic=True)
    for queries in ([5, 9, 3], [30, 2, 11], [7, 40, 13], [21, 8, 19]):
        run(*packed(queries, queries, torch.float32, CPU))
    assert graphs.frame_count == 1


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    for known in ("_found", "_absent"):
        monkeypatch.setattr(module, known, {})
    with pytest.raises(ValueError, match="flash cannot run here .*flash_attn.*; use auto"):
        attention_way("flash", CUDA, torch.bfloat16)
    assert attention_way("auto", CUDA, torch.bfloat16) != "flash"


def test_short_needs_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "ABSENT", "No module named 'triton'")
    with pytest.raises(ValueError, match="short cannot run here .*triton.*; use auto"):
        attention_way("short", CUDA, torch.bfloat16)


ROWS, CU = torch.zeros(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"q": torch.zeros(6, 16)}, ValueError, r"q \(Tq, H, d\)"),
        ({"v": torch.zeros(5, 2, 8)}, ValueError, r"k and v \(Tk, H, d\)"),
        ({"k": ROWS.double()}, TypeError, "one floating-point dtype"),
        ({"q": ROWS.int(), "k": ROWS.int(), "v": ROWS.int()}, TypeError, "one floating-point dtype"),
        ({"cu_seqlens_q": CU.long()}, TypeError, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_q": CU[:2]}, ValueError, r"must both be \(S \+ 1,\)"),
        ({"k": torch.zeros(6, 2, 8, device="meta")}, ValueError, "k is on meta"),
        ({"q": torch.zeros(7, 2, 8)}, ValueError, "cu_seqlens_q must rise from 0 to the 7 rows of q"),
        ({"cu_seqlens_k": CU + 1}, ValueError, "cu_seqlens_k must rise from 0"),
        ({"cu_seqlens_k": torch.tensor([0, 7, 6], dtype=torch.int32)}, ValueError, "cu_seqlens_k must rise from 0"),
        ({"max_q": 3}, ValueError, "max_q is 3, but a sequence has 4"),
        ({"way": "fast"}, ValueError, "no way"),
    ],
)
def test_says_what_is_wrong(changed, error, says):
    right = {"q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_q": 4, "max_k": 4}
    varlen_attention(**right)
    with pytest.raises(error, match=says):
        varlen_attention(**right | changed)
