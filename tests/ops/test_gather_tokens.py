"""gather_tokens and gather_tokens_repeated against their definitions."""

import pytest
import torch
from checks import DTYPES, as_good, compiles_whole, equal, some_rows
from torch.library import opcheck

import fastjepa_kernels
from fastjepa_kernels import gather_tokens, gather_tokens_ref, gather_tokens_repeated, gather_tokens_repeated_ref, occurrences

# (rows, width, taken): the widths of ViT-B, L, H and g, odd ones, prime counts, one row, none
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "taken"), SIZES)
def test_moves_rows_and_their_gradients_exactly(rows, width, taken, dtype, device):
    x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    equal(gather_tokens, gather_tokens_ref, x, some_rows(rows, taken, device))


@pytest.mark.parametrize(("images", "tokens", "kept"), [(3, 11, 4), (1, 7, 7), (4, 5, 0), (0, 5, 2)])
def test_indexes_each_image_by_itself(images, tokens, kept, device):
    x = torch.randn(images, tokens, 96, device=device, requires_grad=True)
    idx = (
        torch.stack([some_rows(tokens, kept, device, seed=i) for i in range(images)])
        if images
        else torch.zeros(0, kept, dtype=torch.int32, device=device)
    )
    equal(gather_tokens, gather_tokens_ref, x, idx)


def test_takes_every_other_index(device):
    x, idx = torch.randn(9, 64, device=device), some_rows(9, 8, device)
    torch.testing.assert_close(gather_tokens(x, idx[::2]), x[idx[::2].long()], rtol=0, atol=0)


def test_takes_rows_of_a_wider_table_without_copying(device):
    qkv = torch.randn(13, 3 * 64, device=device)
    idx = some_rows(13, 6, device)
    torch.testing.assert_close(gather_tokens(qkv[:, 64:128], idx), qkv[idx.long(), 64:128], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "taken"), [(17, 768, 60), (5, 1408, 19), (8, 100, 8), (3, 64, 0), (40, 96, 7)])
def test_repeats_sum_their_gradients(rows, width, taken, dtype, device):
    x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    idx = torch.randint(rows, (taken,), device=device, dtype=torch.int32)
    as_good(gather_tokens_repeated, gather_tokens_repeated_ref, x, idx)
    as_good(lambda x, idx: gather_tokens_repeated(x, idx, occurrences(idx, rows)), gather_tokens_repeated_ref, x, idx)


def test_repeats_are_summed_in_fp32(device):
    x = torch.ones(1, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
    for op in (gather_tokens_repeated, gather_tokens_repeated_ref):
        x.grad = None
        op(x, torch.zeros(1024, dtype=torch.int32, device=device)).sum().backward()
        assert x.grad.tolist() == [[1024.0] * 4]  # bf16 sums stall at 256


def test_repeats_are_summed_in_the_order_of_the_index(device):
    """1e8 + 1 - 1e8 is 0 or 1 in fp32, by the order: here in rising t, every time."""
    x = torch.zeros(1, 64, device=device, requires_grad=True)
    dout = torch.tensor([1e8, 1.0, -1e8], device=device)[:, None].expand(3, 64)
    gather_tokens_repeated(x, torch.zeros(3, dtype=torch.int32, device=device)).backward(dout)
    assert (x.grad == 0).all()
    x.grad = None
    gather_tokens_repeated(x, torch.zeros(3, dtype=torch.int32, device=device)).backward(dout[[0, 2, 1]])
    assert (x.grad == 1).all()


def test_the_definitions_have_the_gradients_of_calculus():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gather_tokens_ref, (x, torch.tensor([4, 0, 2], dtype=torch.int32)))
    assert torch.autograd.gradcheck(gather_tokens_repeated_ref, (x, torch.tensor([4, 0, 4], dtype=torch.int32)))


def test_registered_with_torch(device):
    x = torch.randn(9, 64, device=device, requires_grad=True)
    idx = some_rows(9, 4, device)
    ops = torch.ops.fastjepa_kernels
    opcheck(ops.gather_tokens_fwd.default, (x, idx, 4, 0))
    opcheck(ops.gather_tokens_repeated_fwd.default, (x, idx, *occurrences(idx, 9)))
    opcheck(ops.gather_tokens_repeated_bwd.default, (x.detach()[:4], *occurrences(idx, 9)))
    compiles_whole(gather_tokens, x, idx)
    compiles_whole(gather_tokens_repeated, x, idx)


@pytest.mark.parametrize(
    ("x", "idx", "error", "says"),
    [
        (torch.zeros(4, 8), torch.zeros(2, dtype=torch.int64), TypeError, "int32"),
        (torch.zeros(4, 8, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), TypeError, "float32, bfloat16"),
        (torch.zeros(4, 8), torch.zeros(2, 2, dtype=torch.int32), ValueError, r"idx \(T,\)"),
        (torch.zeros(2, 4, 8), torch.zeros(3, 2, dtype=torch.int32), ValueError, r"idx \(B, K\)"),
        (torch.zeros(4, 8, device="meta"), torch.zeros(2, dtype=torch.int32), ValueError, "is on cpu"),
        (torch.zeros(4, 8), torch.tensor([0, 4], dtype=torch.int32), IndexError, "from 0 to 4"),
        (torch.zeros(4, 8), torch.tensor([-1, 3], dtype=torch.int32), IndexError, "from -1 to 3"),
    ],
)
def test_says_what_is_wrong(x, idx, error, says):
    with pytest.raises(error, match=says):
        gather_tokens(x, idx)


def test_repeated_wants_a_flat_table():
    with pytest.raises(ValueError, match="flatten"):
        gather_tokens_repeated(torch.zeros(2, 4, 8), torch.zeros(2, 1, dtype=torch.int32))


@pytest.mark.parametrize("way", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(9, 4), (2, 9, 4)])
def test_a_row_that_is_named_twice_is_refused(way, shape, monkeypatch):
    """The kernel's gradient would keep one of the two: a CPU refuses it as a card does in debug mode."""
    fastjepa_kernels.use(way)
    x, idx = torch.randn(shape), torch.tensor([3, 1, 3], dtype=torch.int32).expand(*shape[:-2], 3)
    with pytest.raises(ValueError, match="gather_tokens: idx names a row twice; use gather_tokens_repeated"):
        gather_tokens(x, idx)
    assert gather_tokens(x, idx[..., :2]).shape == (*shape[:-2], 2, 4)
    assert len(gather_tokens_repeated(x.flatten(0, -2), idx.flatten())) == idx.numel()
