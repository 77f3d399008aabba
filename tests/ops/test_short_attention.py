"""short_attention against the plain definition, a sequence at a time."""

import pytest
import torch
from checks import DTYPES, compiles_whole, values_and_grads
from checks import as_good as as_good_in_units
from torch import Tensor
from torch.library import opcheck

import fastjepa_kernels
from fastjepa_kernels.short_attention import common, shapes, short_attention, short_attention_ref
from fastjepa_kernels.varlen_attention import varlen_attention_ref


def as_good(op, ref, *inputs) -> None:
    """Compare as the house does, but in fp32 with sums of up to 256 products in another order, as the CPU has it."""
    as_good_in_units(op, ref, *inputs, units=48.0 if inputs[0].dtype == torch.float32 else 2.0)


def cu_seqlens(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def packed(queries: list[int], keys: list[int], heads: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """Make the arguments of an attention function, q, k and v tracked."""
    q, k, v = (
        torch.randn(rows, heads, width, device=device).to(dtype).requires_grad_()
        for rows in (sum(queries), sum(keys), sum(keys))
    )
    maxima = max(queries, default=0), max(keys, default=0)
    return q, k, v, cu_seqlens(queries, device), cu_seqlens(keys, device), *maxima


# (queries, keys) of each sequence: the predictor's, its last block's (fewer queries), one key, odd, long, no queries, none
RAGGED = [
    ([60, 97], [60, 97]),
    ([17, 40], [113, 128]),
    ([1, 1], [1, 1]),
    ([3, 1, 65], [5, 2, 61]),
    ([256, 1], [256, 1]),
    ([33, 129], [160, 7]),
    ([0, 5, 0], [9, 16, 4]),
    ([0, 0], [3, 2]),
    ([2, 0], [3, 0]),
    ([], []),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), RAGGED)
def test_is_attention_within_each_sequence(queries, keys, dtype, device):
    as_good(short_attention, varlen_attention_ref, *packed(queries, keys, 2, 24, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(16, 24), (6, 64), (3, 32), (2, 20), (1, 16), (2, 1), (1, 63)])
def test_takes_heads_of_any_width_to_64(heads, width, dtype, device):
    as_good(short_attention, varlen_attention_ref, *packed([19, 7], [33, 7], heads, width, dtype, device))


VIEWS = {
    "slices of a packed qkv": lambda x: x[:, :144].view(34, 3, 2, 24).unbind(1),
    "q of its own, slices of a packed kv": lambda x: (x[:, :48].view(34, 2, 24), *x[:, 64:160].view(34, 2, 2, 24).unbind(1)),
    "rows at odd places": lambda x: tuple(x[:, at : at + 48].view(34, 2, 24) for at in (1, 53, 107)),
    "three different strides": lambda x: (
        x[:, :96].view(34, 2, 48)[..., 3:27],
        x.flatten()[: 34 * 48].view(34, 2, 24),
        x[:, 90:162].view(34, 3, 24)[:, ::2],
    ),
    "heads that are not contiguous": lambda x: [
        x.flatten()[at:][: 24 * 2 * 34].view(24, 2, 34).permute(2, 1, 0) for at in (0, 5, 9)
    ],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_reads_q_k_and_v_where_they_lie(views, dtype, device):
    """The views are made inside: a copy of an input would lose its strides."""
    rows = torch.randn(34, 163, device=device).to(dtype).requires_grad_()
    cu = cu_seqlens([13, 21], device)
    as_good(
        lambda rows: short_attention(*views(rows), cu, cu, 21, 21),
        lambda rows: varlen_attention_ref(*views(rows), cu, cu),
        rows,
    )


def test_reads_an_output_s_gradient_where_it_lies(device):
    q, k, v, *rest = packed([9, 4], [12, 7], 2, 24, torch.float32, device)
    wide = torch.randn(13, 2, 30, device=device)
    for dout in (wide[..., 2:26], wide[:, :1, :1].expand(13, 2, 24), torch.randn(24, 2, 13, device=device).permute(2, 1, 0)):
        ours, theirs = (
            torch.autograd.grad(f(q, k, v, *rest), (q, k, v), dout) for f in (short_attention, varlen_attention_ref)
        )
        torch.testing.assert_close(ours, theirs)


def test_large_scores_neither_overflow_nor_lose_their_row(device):
    """Scores in the thousands: fp32 still knows each to 1e-4 of a nat, and P to as much."""
    q, k, v, *rest = packed([9, 4], [20, 31], 2, 32, torch.float32, device)
    inputs = [(x.detach() * 30).requires_grad_() for x in (q, k)] + [v, *rest]
    out, *grads = values_and_grads(short_attention, inputs)
    torch.testing.assert_close(out, varlen_attention_ref(*inputs), rtol=1e-3, atol=1e-3)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_padding_s_keys_weigh_nothing_however_low_the_scores(device):
    """Every score near -200: the padding's, 0, would be exp(200) of them."""
    q, k, v, *rest = packed([9, 4], [20, 31], 2, 32, torch.float32, device)
    low = [((6 + x.detach() / 8) * sign).requires_grad_() for x, sign in ((q, 1), (k, -1))]
    inputs = [*low, v, *rest]
    for ours, theirs in zip(*(values_and_grads(f, inputs) for f in (short_attention, varlen_attention_ref)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_looser_maxima_change_nothing(device):
    q, k, v, cu_q, cu_k, _, _ = packed([9, 4], [12, 7], 2, 24, torch.float32, device)
    as_good(lambda *x: short_attention(*x, cu_q, cu_k, 100, 200), lambda *x: varlen_attention_ref(*x, cu_q, cu_k), q, k, v)


def test_two_runs_give_the_same_bits(device):
    inputs = packed([40, 70], [70, 65], 2, 24, torch.bfloat16, device)
    dout = torch.randn(110, 2, 24, device=device)
    first, second = (values_and_grads(short_attention, list(inputs), dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [([7, 7], [9, 9]), ([5, 70, 2], [66, 70, 3]), ([0, 2, 0], [3, 0, 0]), ([], [])])
def test_the_definition_is_the_plain_one(queries, keys, dtype, device):
    """A CPU runs it, padded or one by one, and it never gives NaN."""
    as_good(short_attention_ref, varlen_attention_ref, *packed(queries, keys, 2, 8, dtype, device))


def test_the_definition_has_the_gradients_of_calculus():
    for queries, keys in [([3, 3], [2, 2]), ([1, 3], [4, 2])]:
        q, k, v, *rest = packed(queries, keys, 2, 3, torch.float64, torch.device("cpu"))
        assert torch.autograd.gradcheck(lambda q, k, v, rest=rest: short_attention_ref(q, k, v, *rest), (q, k, v))
        assert torch.autograd.gradcheck(lambda q, k, v, rest=rest: varlen_attention_ref(q, k, v, *rest), (q, k, v))


def test_registered_with_torch(device):
    inputs = packed([5, 3], [6, 4], 2, 24, torch.float32, device)
    q, k, v, *rest = (x.detach() if isinstance(x, Tensor) else x for x in inputs)
    ops = torch.ops.fastjepa_kernels
    opcheck(ops.short_attention_fwd.default, inputs)
    out, lse = ops.short_attention_fwd(q, k, v, *rest)
    opcheck(ops.short_attention_bwd.default, (torch.randn_like(out), q, k, v, lse, *rest))
    compiles_whole(short_attention, *inputs)


def test_lse_is_the_logarithm_of_each_query_s_sum(device):
    q, k, v, *rest = packed([5], [6], 2, 24, torch.float32, device)
    _, lse = torch.ops.fastjepa_kernels.short_attention_fwd(q, k, v, *rest)
    scores = q.transpose(0, 1) @ k.transpose(0, 1).mT * 24**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1).T)


def test_without_triton_the_definition_runs(device):
    inputs = packed([5, 3], [6, 4], 2, 24, torch.float32, device)
    fastjepa_kernels.use(short_attention="torch")
    torch.testing.assert_close(short_attention(*inputs), short_attention_ref(*inputs), rtol=0, atol=0)
    assert torch.ops.fastjepa_kernels.short_attention_fwd(*inputs)[0].shape == (8, 2, 24)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 64])
@pytest.mark.parametrize("most", [1, 16, 17, 129, 256])
def test_a_program_holds_every_key_and_whole_tiles(width, most, dtype, backward):
    chosen = shapes(torch.empty(most, 1, width, dtype=dtype), most, most, backward)
    assert chosen["BLOCK_N"] >= most and chosen["BLOCK_D"] >= width
    assert all(16 <= size <= 256 and size & (size - 1) == 0 for name, size in chosen.items() if name.startswith("BLOCK"))


def test_aligned_rows_are_moved_16_bytes_at_a_time():
    qkv = torch.zeros(5, 3, 16, 24, dtype=torch.bfloat16)
    assert common(*qkv.unbind(1)) == 8
    assert common(qkv[:, 0, :, :20]) == 4
    assert common(qkv.float()[:, 0]) == 4
    assert common(torch.zeros(5, 99)[:, :96].view(5, 4, 24)) == 1


ROWS, CU = torch.zeros(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"q": torch.zeros(6, 2, 65), "k": torch.zeros(6, 2, 65), "v": torch.zeros(6, 2, 65)}, ValueError, "heads of 65"),
        ({"max_k": 257}, ValueError, "at most 256; use another way"),
        ({"max_q": 300}, ValueError, "max_q 300"),
        ({"q": ROWS.double(), "k": ROWS.double(), "v": ROWS.double()}, TypeError, "float32, bfloat16 or float16"),
        ({"q": ROWS.bfloat16()}, TypeError, "one floating-point dtype"),
        ({"k": torch.zeros(6, 3, 8)}, ValueError, r"k and v \(Tk, H, d\)"),
        ({"cu_seqlens_k": CU.long()}, TypeError, "cu_seqlens_k must be int32"),
        ({"max_k": 3}, ValueError, "max_k is 3, but a sequence has 4"),
    ],
)
def test_says_what_is_wrong(changed, error, says):
    right = {"q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_q": 4, "max_k": 4}
    short_attention_ref(**right)
    with pytest.raises(error, match=says):
        short_attention(**right | changed)
