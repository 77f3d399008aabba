"""assemble_predictor and its layout against their definitions."""

from itertools import product

import pytest
import torch
from checks import DTYPES, as_good, compiles_whole, values_and_grads
from torch.library import opcheck

from fastjepa_kernels import assemble_predictor, assemble_predictor_ref, occurrences, predictor_layout

# (context rows, positions, rows, width): the predictors' 384, others, odd ones, prime counts, one row, none
SIZES = [
    (31, 16, 67, 384),
    (7, 9, 300, 192),
    (5, 4, 23, 768),
    (3, 4, 11, 1024),
    (3, 2, 5, 1280),
    (2, 3, 7, 1408),
    (13, 5, 37, 100),
    (1, 1, 1, 64),
    (4, 3, 0, 64),
    (0, 3, 5, 64),
    (0, 3, 0, 1),
]


def inputs(context_rows, places, rows, width, device, context_dtype=torch.float32, positions_dtype=None, mask_dtype=None):
    torch.manual_seed(rows)
    context = torch.randn(context_rows, width, device=device).to(context_dtype).requires_grad_()
    positions = torch.randn(places, width, device=device).to(positions_dtype or context_dtype)
    mask_token = torch.randn(width, device=device).to(mask_dtype or context_dtype).requires_grad_()
    context_idx = torch.randint(places, (context_rows,), device=device, dtype=torch.int32)
    idx = torch.randint(context_rows + places, (rows,), device=device, dtype=torch.int32)
    return context, context_idx, positions, mask_token, idx


def same_bits(ours, theirs):
    """Assert equal bits; within a unit in Triton's interpreter, which cuts to bfloat16 where the definition and a GPU round."""
    assert ours.dtype == theirs.dtype
    cuts = ours.dtype == torch.bfloat16 and not ours.is_cuda
    torch.testing.assert_close(ours, theirs, rtol=2**-7 if cuts else 0, atol=0)


def sums_as_good(op, *given):
    """Two fp32 sums of the same rows in different orders differ by more than two units."""
    as_good(op, assemble_predictor_ref, *given, units=8.0 if given[3].dtype == torch.float32 else 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("context_rows", "places", "rows", "width"), SIZES)
def test_equals_its_definition_and_sums_the_repeats(context_rows, places, rows, width, dtype, device):
    given = inputs(context_rows, places, rows, width, device, dtype)
    same_bits(assemble_predictor(*given), assemble_predictor_ref(*given))
    sums_as_good(assemble_predictor, *given)


def test_takes_the_repeats_that_a_loader_counted(device):
    given = inputs(7, 9, 61, 96, device)
    repeats = occurrences(given[-1], 16)
    sums_as_good(lambda *given: assemble_predictor(*given, repeats), *given)
    with_them, without = (values_and_grads(assemble_predictor, [*given, counted]) for counted in (repeats, None))
    for ours, theirs in zip(with_them, without, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("context_dtype", "positions_dtype", "mask_dtype"), list(product(DTYPES, repeat=3)))
def test_promotes_as_torch_does_and_gives_each_gradient_its_inputs_dtype(context_dtype, positions_dtype, mask_dtype, device):
    given = inputs(5, 4, 19, 64, device, context_dtype, positions_dtype, mask_dtype)
    out = assemble_predictor(*given)
    assert out.dtype == torch.promote_types(context_dtype, positions_dtype)
    same_bits(out, assemble_predictor_ref(*given))
    sums_as_good(assemble_predictor, *given)


@pytest.mark.parametrize("wanted", ["context", "mask_token", "neither"])
def test_makes_only_the_gradients_that_are_wanted(wanted, device):
    context, context_idx, positions, mask_token, idx = inputs(5, 4, 19, 64, device)
    context.requires_grad_(wanted == "context")
    mask_token.requires_grad_(wanted == "mask_token")
    given = context, context_idx, positions, mask_token, idx
    assert assemble_predictor(*given).requires_grad == (wanted != "neither")
    sums_as_good(assemble_predictor, *given)


def test_repeats_are_summed_in_rising_order(device):
    """1e8 + 1 - 1e8 is 0 or 1 in fp32, by the order."""
    context, context_idx, positions, mask_token, _ = inputs(1, 2, 0, 64, device)
    idx = torch.zeros(3, dtype=torch.int32, device=device)
    dout = torch.tensor([1e8, 1.0, -1e8], device=device)[:, None].expand(3, 64)
    for rows, total in ((dout, 0.0), (dout[[0, 2, 1]], 1.0)):
        (gradient,) = torch.autograd.grad(assemble_predictor(context, context_idx, positions, mask_token, idx), context, rows)
        assert (gradient == total).all()


def test_the_mask_token_sums_many_rows_the_same_way_every_time(device):
    context, context_idx, positions, mask_token, _ = inputs(3, 4, 0, 64, device)
    idx = torch.randint(7, (1009,), device=device, dtype=torch.int32)
    dout = torch.randn(1009, 64, device=device)
    first, again = (
        torch.autograd.grad(assemble_predictor(context, context_idx, positions, mask_token, idx), mask_token, dout)[0]
        for _ in range(2)
    )
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(first, dout[idx >= 3].double().sum(dim=0).float(), rtol=1e-5, atol=1e-5)


def test_takes_rows_of_wider_tables_without_copying(device):
    context, context_idx, positions, mask_token, idx = inputs(7, 5, 17, 192, device)
    given = context.detach()[:, 64:128], context_idx, positions[:, :64], mask_token.detach()[::3], idx
    torch.testing.assert_close(assemble_predictor(*given), assemble_predictor_ref(*given), rtol=0, atol=0)
    given = context[:, 64:128], context_idx, positions[:, :64], mask_token[::3], idx
    wide_dout = torch.randn(17, 192, device=device)
    ours, theirs = (
        torch.autograd.grad(op(*given), (context, mask_token), wide_dout[:, 64:128])
        for op in (assemble_predictor, assemble_predictor_ref)
    )
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast_changes_nothing(device):
    given = inputs(5, 4, 19, 64, device, torch.bfloat16, torch.float32, torch.float32)
    for op in (assemble_predictor, assemble_predictor_ref):
        with torch.autocast(device.type, torch.bfloat16):
            under = op(*given)
        torch.testing.assert_close(under, op(*given), rtol=0, atol=0)


def by_loop(contexts, blocks, masks, images):
    """Lay out by a loop what predictor_layout must give, from lengths of contexts (mask major) and blocks (block major)."""
    total = sum(contexts)
    idx, cu_seqlens = [], [0]
    for block in range(len(blocks) // images if images else 0):
        for mask in range(masks):
            for image in range(images):
                sequence = mask * images + image
                start = sum(contexts[:sequence])
                idx += range(start, start + contexts[sequence])
                idx += [total + position for position in blocks[block * images + image]]
                cu_seqlens.append(len(idx))
    return idx, cu_seqlens


# (lengths of the contexts, mask major; positions of the blocks, block major; context masks, images)
LAYOUTS = [
    ([2, 3], [[5, 6], [1], [0, 2, 4], [7]], 1, 2),  # two blocks, one mask, two images
    ([2, 3, 1, 4], [[5, 6], [1]], 2, 2),  # one block, two masks
    ([1, 0, 2, 3, 1, 1], [[3], [], [1, 2], [0], [4, 5], []], 2, 3),  # empty contexts and blocks
    ([4], [[0, 1, 2]], 1, 1),
    ([0], [[]], 1, 1),
    ([3, 2], [], 1, 2),  # no block
    ([], [[1], [2]], 0, 2),  # no context mask
    ([], [], 0, 0),
]


def layout_inputs(contexts, blocks, device):
    def starts(lengths):
        return torch.tensor([0, *lengths], device=device).cumsum(0).int()

    flat = torch.tensor([position for block in blocks for position in block], dtype=torch.int32, device=device)
    return starts(contexts), flat, starts([len(block) for block in blocks])


@pytest.mark.parametrize(("contexts", "blocks", "masks", "images"), LAYOUTS)
def test_the_layout_is_that_of_a_loop(contexts, blocks, masks, images, device):
    context_starts, target_idx, target_starts = layout_inputs(contexts, blocks, device)
    idx, cu_seqlens = predictor_layout(context_starts, target_idx, target_starts, images, sum(contexts))
    assert idx.dtype == cu_seqlens.dtype == torch.int32
    assert (idx.tolist(), cu_seqlens.tolist()) == by_loop(contexts, blocks, masks, images)


def test_layout_and_rows_together(device):
    contexts, blocks, masks, images = [3, 1, 2, 4], [[5], [1, 2], [0, 3], [4]], 2, 2
    context, context_idx, positions, mask_token, _ = inputs(10, 6, 0, 96, device)
    idx, _ = predictor_layout(*layout_inputs(contexts, blocks, device), images, 10)
    seen, masked = context + positions[context_idx.long()], mask_token + positions
    rows = [seen[i] if i < 10 else masked[i - 10] for i in by_loop(contexts, blocks, masks, images)[0]]
    given = context, context_idx, positions, mask_token, idx
    torch.testing.assert_close(assemble_predictor(*given), torch.stack(rows), rtol=0, atol=0)
    sums_as_good(assemble_predictor, *given)


def test_the_definition_has_the_gradients_of_calculus():
    context, positions, mask_token = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 2), (4, 2), (2,)))
    context_idx, idx = torch.tensor([3, 0, 1], dtype=torch.int32), torch.tensor([2, 0, 6, 2, 3, 6, 5], dtype=torch.int32)
    leaves = context.requires_grad_(), mask_token.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda context, mask_token: assemble_predictor_ref(context, context_idx, positions, mask_token, idx), leaves
    )


def test_registered_with_torch(device):
    given = inputs(5, 4, 19, 64, device, torch.bfloat16, torch.float32, torch.float32)
    repeats, dout = occurrences(given[-1], 9), torch.randn(19, 64, device=device)
    ops = torch.ops.fastjepa_kernels
    opcheck(ops.assemble_predictor_fwd.default, (*given, *repeats))
    opcheck(ops.assemble_predictor_fwd.default, (*given, None, None))
    opcheck(ops.assemble_predictor_dcontext.default, (dout, *repeats, 5, torch.bfloat16))
    opcheck(ops.assemble_predictor_dmask.default, (dout, given[-1], 5))
    compiles_whole(assemble_predictor, *given)
    compiles_whole(lambda *given: assemble_predictor(*given, repeats), *given)


def test_the_layout_compiles_whole(device):
    contexts, blocks, masks, images = LAYOUTS[2]
    layout = torch.compile(predictor_layout, fullgraph=True, backend="aot_eager")
    idx, cu_seqlens = layout(*layout_inputs(contexts, blocks, device), images, sum(contexts))
    assert (idx.tolist(), cu_seqlens.tolist()) == by_loop(contexts, blocks, masks, images)


CONTEXT, PLACES, TABLE, MASK, IDX = "context", "context_idx", "positions", "mask_token", "idx"


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({CONTEXT: torch.zeros(3)}, ValueError, r"context \(T, P\) needs context_idx"),
        ({PLACES: torch.zeros(2, dtype=torch.int32)}, ValueError, r"context \(T, P\) needs context_idx"),
        ({TABLE: torch.zeros(4, 7)}, ValueError, r"positions must be \(N, 8\), not \(4, 7\)"),
        ({TABLE: torch.zeros(1, 4, 8)}, ValueError, r"positions must be \(N, 8\)"),
        ({MASK: torch.zeros(1, 1, 8)}, ValueError, r"mask_token must be \(8,\), not \(1, 1, 8\); flatten"),
        ({IDX: torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"idx must be \(L,\), not \(2, 2\)"),
        ({TABLE: torch.zeros(4, 8, requires_grad=True)}, ValueError, "positions have no gradient; detach them"),
        ({"repeats": (torch.zeros(5), torch.zeros(4))}, ValueError, r"occurrences\(idx, 7\), shapes \(5,\) and \(8,\)"),
        ({"repeats": (torch.zeros(4), torch.zeros(8))}, ValueError, r"got \(4,\), \(8,\)"),
        ({CONTEXT: torch.zeros(3, 8).int()}, TypeError, "context must be float32"),
        ({TABLE: torch.zeros(4, 8).double()}, TypeError, "positions must be float32"),
        ({MASK: torch.zeros(8).int()}, TypeError, "mask_token must be float32"),
        ({MASK: torch.zeros(8, device="meta")}, ValueError, "mask_token is on meta"),
        ({IDX: torch.zeros(5, dtype=torch.int64)}, TypeError, "idx must be int32"),
        ({PLACES: torch.zeros(3, dtype=torch.int64)}, TypeError, "context_idx must be int32"),
        ({IDX: torch.tensor([0, 7], dtype=torch.int32)}, IndexError, "idx has values from 0 to 7, outside the 7 rows"),
        ({PLACES: torch.tensor([0, 4, 1], dtype=torch.int32)}, IndexError, "context_idx has values from 0 to 4"),
    ],
)
def test_says_what_is_wrong(wrong, error, says):
    right = {
        CONTEXT: torch.zeros(3, 8),
        PLACES: torch.zeros(3, dtype=torch.int32),
        TABLE: torch.zeros(4, 8),
        MASK: torch.zeros(8),
        IDX: torch.zeros(5, dtype=torch.int32),
    }
    with pytest.raises(error, match=says):
        assemble_predictor(**(right | wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"context_cu_seqlens": torch.tensor([0, 1, 3])}, TypeError, "context_cu_seqlens must be int32"),
        ({"target_idx": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "target_idx must be flat"),
        ({"target_idx": torch.zeros(4, dtype=torch.int32, device="meta")}, ValueError, "target_idx is on meta"),
        ({"images": 3}, ValueError, r"context_cu_seqlens must have n \* 3 \+ 1 values for 3 images, not 3"),
        ({"images": 0}, ValueError, r"context_cu_seqlens must have n \* 0 \+ 1 values"),
        ({"context_rows": 4}, ValueError, "context_cu_seqlens must rise from 0 to 4, the rows it divides; it goes from 0 to 3"),
        ({"context_cu_seqlens": torch.tensor([1, 1, 3]).int()}, ValueError, "it goes from 1 to 3"),
        ({"context_cu_seqlens": torch.tensor([0, 4, 3]).int()}, ValueError, "must rise from 0 to 3"),
        ({"target_cu_seqlens": torch.tensor([0, 2, 5]).int()}, ValueError, "target_cu_seqlens must rise from 0 to 4"),
        ({"target_cu_seqlens": torch.zeros(0).int()}, ValueError, "target_cu_seqlens must have"),
    ],
)
def test_the_layout_says_what_is_wrong(wrong, error, says):
    right = {
        "context_cu_seqlens": torch.tensor([0, 1, 3]).int(),
        "target_idx": torch.zeros(4).int(),
        "target_cu_seqlens": torch.tensor([0, 2, 4]).int(),
        "images": 2,
        "context_rows": 3,
    }
    predictor_layout(**right)
    with pytest.raises(error, match=says):
        predictor_layout(**(right | wrong))
