"""scatter_tokens against its definition."""

import pytest
import torch
from checks import DTYPES, as_good, compiles_whole, equal, some_rows
from torch.library import opcheck

import fastjepa_kernels
from fastjepa_kernels import gather_tokens, scatter_tokens, scatter_tokens_ref

# (rows, width, placed): the widths of ViT-B, L, H and g, odd ones, prime counts, one row, none placed, none at all
SIZES = [
    (67, 768, 31),
    (16, 1024, 16),
    (23, 1280, 7),
    (12, 1408, 5),
    (37, 100, 13),
    (5, 1, 3),
    (9, 384, 0),
    (1, 64, 1),
    (0, 64, 0),
]


def image_rows(images: int, tokens: int, kept: int, device: torch.device) -> torch.Tensor:
    """Return (images, kept) int32: distinct places in each image."""
    places = [some_rows(tokens, kept, device, seed=i) for i in range(images)]
    return torch.stack(places) if images else torch.zeros(0, kept, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "placed"), SIZES)
def test_places_rows_and_returns_their_gradients_exactly(rows, width, placed, dtype, device):
    x = torch.randn(placed, width, device=device).to(dtype).requires_grad_()
    idx = some_rows(rows, placed, device)
    equal(scatter_tokens, scatter_tokens_ref, x, idx, rows)
    equal(scatter_tokens, scatter_tokens_ref, x, idx, rows, torch.randn(width, device=device).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "placed"), SIZES)
def test_fills_the_other_rows_and_adds_positions(rows, width, placed, dtype, device):
    x = torch.randn(placed, width, device=device).to(dtype).requires_grad_()
    fill = torch.randn(width, device=device).to(dtype).requires_grad_()
    positions = torch.randn(max(rows, 1), width, device=device).to(dtype)
    idx = some_rows(rows, placed, device)
    for given in [(fill, None), (None, positions), (fill, positions)]:
        as_good(scatter_tokens, scatter_tokens_ref, x, idx, rows, *given, units=8)  # dfill sums in another order


@pytest.mark.parametrize(("images", "tokens", "kept"), [(3, 11, 4), (1, 7, 7), (4, 5, 0), (0, 5, 2), (2, 0, 0)])
def test_places_in_each_image_by_itself(images, tokens, kept, device):
    x = torch.randn(images, kept, 96, device=device, requires_grad=True)
    fill = torch.randn(96, device=device, requires_grad=True)
    idx = image_rows(images, tokens, kept, device)
    equal(scatter_tokens, scatter_tokens_ref, x, idx, tokens)
    positions = torch.randn(max(tokens, 1), 96, device=device)
    as_good(scatter_tokens, scatter_tokens_ref, x, idx, tokens, fill, positions, units=8)
    assert scatter_tokens(x, idx, tokens).shape == (images, tokens, 96)


def test_positions_repeat_along_the_rows(device):
    """A table of N positions serves packed images too: row m gets positions[m % N]."""
    x, positions = torch.randn(7, 64, device=device), torch.randn(6, 64, device=device)
    idx = some_rows(18, 7, device)
    expected = scatter_tokens(x, idx, 18) + positions.repeat(3, 1)
    torch.testing.assert_close(scatter_tokens(x, idx, 18, positions=positions), expected, rtol=0, atol=0)


@pytest.mark.parametrize("fill_dtype", DTYPES)
@pytest.mark.parametrize("positions_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_has_the_dtype_of_the_sum(dtype, positions_dtype, fill_dtype, device):
    """The result has the dtype of x + positions in eager torch, the gradients those of x and fill."""
    x = torch.randn(5, 96, device=device).to(dtype).requires_grad_()
    fill = torch.randn(96, device=device).to(fill_dtype).requires_grad_()
    positions = torch.randn(11, 96, device=device).to(positions_dtype)
    idx = some_rows(11, 5, device)
    out = scatter_tokens(x, idx, 11, fill, positions)
    assert out.dtype == (x[:1] + positions[:1]).dtype
    assert scatter_tokens(x, idx, 11, fill).dtype == dtype
    if out.is_cuda or out.dtype != torch.bfloat16:  # Triton's interpreter cuts to bfloat16 instead of rounding
        torch.testing.assert_close(out, scatter_tokens_ref(x, idx, 11, fill, positions), rtol=0, atol=0)
    as_good(scatter_tokens, scatter_tokens_ref, x, idx, 11, fill, positions, units=8)
    as_good(scatter_tokens, scatter_tokens_ref, x, idx, 11, fill, units=8)


def test_gather_and_scatter_invert_each_other(device):
    x, whole = torch.randn(3, 4, 64, device=device), torch.randn(3, 11, 64, device=device)
    idx = image_rows(3, 11, 4, device)
    assert torch.equal(gather_tokens(scatter_tokens(x, idx, 11, fill=x[0, 0]), idx), x)
    everywhere = image_rows(3, 11, 11, device)
    assert torch.equal(scatter_tokens(gather_tokens(whole, everywhere), everywhere, 11), whole)


def test_the_gradient_of_fill_sums_the_rows_not_named(device):
    """More rows than one program sums, integers that fp32 adds exactly; the same bits every time for those it does not."""
    rows, placed = 1031, 517
    x = torch.zeros(placed, 32, device=device)
    fill = torch.zeros(32, device=device, requires_grad=True)
    idx = some_rows(rows, placed, device)
    unnamed = torch.ones(rows, dtype=torch.bool, device=device)
    unnamed[idx.long()] = False
    whole = torch.randint(-9, 9, (rows, 32), device=device).float()
    (dfill,) = torch.autograd.grad(scatter_tokens(x, idx, rows, fill), fill, whole)
    torch.testing.assert_close(dfill, whole[unnamed].sum(0), rtol=0, atol=0)
    rough = torch.randn(rows, 32, device=device)
    sums = [torch.autograd.grad(scatter_tokens(x, idx, rows, fill), fill, rough)[0] for _ in range(3)]
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_takes_strided_inputs(device):
    """Columns of a wider table, every other index, a transposed table of positions, an expanded gradient."""
    qkv, idx = torch.randn(13, 3 * 64, device=device), some_rows(40, 26, device)[::2]
    positions, fill = torch.randn(64, 40, device=device).t(), torch.randn(128, device=device)[::2].requires_grad_()
    x = qkv[:, 64:128].requires_grad_()
    out = scatter_tokens(x, idx, 40, fill, positions)
    torch.testing.assert_close(out, scatter_tokens_ref(x, idx, 40, fill, positions), rtol=0, atol=0)
    for dout in (torch.randn(64, 40, device=device).t(), torch.randn(64, device=device).expand(40, 64)):
        ours = torch.autograd.grad(out, (x, fill), dout, retain_graph=True)
        theirs = torch.autograd.grad(scatter_tokens_ref(x, idx, 40, fill, positions), (x, fill), dout)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
        torch.testing.assert_close(ours[1], theirs[1])
    cut = torch.randn(3, 9, 64, device=device)[:, 2:6]
    equal(scatter_tokens, scatter_tokens_ref, cut, image_rows(3, 11, 4, device), 11)


def test_the_result_is_never_an_input(device):
    x, idx = torch.randn(4, 64, device=device), torch.arange(4, dtype=torch.int32, device=device)
    for op in (scatter_tokens, scatter_tokens_ref):
        assert op(x, idx, 4).data_ptr() != x.data_ptr()
        assert op(x[:0], idx[:0], 1, x[0]).data_ptr() != x.data_ptr()


def test_the_definition_has_the_gradients_of_calculus():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(4, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(5, 4, dtype=torch.float64)
    idx = torch.tensor([[4, 0, 2], [1, 2, 3]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, fill: scatter_tokens_ref(x, idx, 5, fill, positions), (x, fill))
    assert torch.autograd.gradcheck(lambda x: scatter_tokens_ref(x, idx[0], 5), (x[0],))


@pytest.mark.parametrize("positions_dtype", [torch.float32, torch.bfloat16])
def test_registered_with_torch(positions_dtype, device):
    x = torch.randn(6, 64, device=device).bfloat16().requires_grad_()
    fill = torch.randn(64, device=device, requires_grad=True)
    positions = torch.randn(9, 64, device=device).to(positions_dtype)
    idx = image_rows(2, 9, 3, device)
    ops = torch.ops.fastjepa_kernels
    for given in [(None, None), (fill, None), (fill, positions)]:
        opcheck(ops.scatter_tokens_fwd.default, (x, idx.flatten(), 18, 3, 9, *given))
    dout = torch.randn(18, 64, device=device)
    opcheck(ops.scatter_tokens_dfill.default, (dout, idx.flatten(), 3, 9))
    opcheck(ops.scatter_tokens_dx.default, (dout, idx.flatten(), 3, 9, torch.bfloat16))
    compiles_whole(lambda x, fill: scatter_tokens(x.view(2, 3, 64), idx, 9, fill, positions), x, fill)
    compiles_whole(lambda x: scatter_tokens(x, idx[0], 9), x.detach()[:3].requires_grad_())


@pytest.mark.parametrize(
    ("x", "idx", "given", "error", "says"),
    [
        ((4, 8), torch.zeros(2, 2, dtype=torch.int32), {}, ValueError, r"x \(T, D\) needs idx \(T,\)"),
        ((4, 8), torch.zeros(3, dtype=torch.int32), {}, ValueError, r"got \(4, 8\), \(3,\)"),
        ((2, 4, 8), torch.zeros(2, 3, dtype=torch.int32), {}, ValueError, r"idx \(B, K\)"),
        ((8,), torch.zeros((), dtype=torch.int32), {}, ValueError, r"got \(8,\)"),
        ((2, 8), torch.zeros(2, dtype=torch.int64), {}, TypeError, "int32"),
        ((2, 8), torch.tensor([0, 6], dtype=torch.int32), {}, IndexError, "from 0 to 6, outside the 6 rows"),
        ((2, 8), torch.tensor([-1, 5], dtype=torch.int32), {}, IndexError, "from -1 to 5"),
        ((2, 8), None, {"num_rows": -1}, ValueError, "num_rows must not be negative, not -1"),
        ((2, 8), None, {"fill": torch.zeros(7)}, ValueError, r"fill must be \(8,\), not \(7,\)"),
        ((2, 8), None, {"fill": torch.zeros(8, dtype=torch.float64)}, TypeError, "fill must be float32, bfloat16"),
        ((2, 8), None, {"fill": torch.zeros(8, device="meta")}, ValueError, "fill is on meta"),
        ((2, 8), None, {"positions": torch.zeros(8)}, ValueError, r"positions must be \(N, 8\)"),
        ((2, 8), None, {"positions": torch.zeros(6, 7)}, ValueError, r"not \(6, 7\)"),
        ((2, 8), None, {"positions": torch.zeros(4, 8)}, ValueError, "N dividing 6"),
        ((2, 8), None, {"positions": torch.zeros(0, 8)}, ValueError, r"not \(0, 8\)"),
        ((2, 8), None, {"positions": torch.zeros(6, 8).int()}, TypeError, "positions must be float32"),
        ((2, 8), None, {"positions": torch.zeros(6, 8, device="meta")}, ValueError, "positions is on meta"),
        ((2, 8), None, {"positions": torch.zeros(6, 8, requires_grad=True)}, ValueError, "no gradient; detach them"),
    ],
)
def test_says_what_is_wrong(x, idx, given, error, says):
    idx = torch.arange(x[0], dtype=torch.int32) if idx is None else idx
    with pytest.raises(error, match=says):
        scatter_tokens(torch.zeros(x), idx, **{"num_rows": 6, **given})


def test_wants_floating_rows():
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        scatter_tokens(torch.zeros(2, 8, dtype=torch.int32), torch.arange(2, dtype=torch.int32), 4)


@pytest.mark.parametrize("way", ["triton", "torch"])
def test_a_place_that_is_named_twice_is_refused(way):
    fastjepa_kernels.use(way)
    idx = torch.tensor([[3, 1], [2, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match="scatter_tokens: idx names a row twice; give each place once"):
        scatter_tokens(torch.randn(2, 2, 4), idx, 5)
    assert scatter_tokens(torch.randn(2, 2, 4), idx[:1].expand(2, 2), 5).shape == (2, 5, 4)  # in two images
