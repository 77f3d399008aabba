"""ema_update_ against its definition: bits where torch rounds alike, masters and copies, skipped steps, moved tensors."""

import pytest
import torch
from checks import compiles_whole
from torch.library import opcheck

import fastjepa_kernels
from fastjepa_kernels import ema_update as room
from fastjepa_kernels.ema_update import ema_table, ema_update_, ema_update_ref

# one launch meets: the widths of ViT-B, L, H and g, odd ones, a prime, a scalar, a vector's worth, chunk borders, nothing
SHAPES = [(3, 768), (1024,), (2, 1280), (1408,), (5, 100), (37,), (), (8,), (4096,), (4097,), (2, 4099), (0, 5)]
NARROW = [torch.float32, torch.bfloat16]


def tensors(device, dtype, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def clones(*lists):
    return [[x.clone() for x in each] for each in lists]


def assert_near(ours, theirs):
    """Assert equality but for one rounding: the definition may fuse the multiply and the add."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=5e-7)


@pytest.mark.parametrize("target", NARROW)
@pytest.mark.parametrize("source", NARROW)
@pytest.mark.parametrize("with_copies", [False, True])
def test_every_tensor_moves(target, source, with_copies, device):
    targets, sources = tensors(device, target), tensors(device, source, seed=1)
    copies = tensors(device, torch.bfloat16, seed=2) if with_copies else []
    expected, expected_copies = clones(targets, copies)
    ema_update_(targets, sources, 0.75, copies=copies)
    ema_update_ref(expected, sources, 0.75, copies=expected_copies)
    assert_near(targets, expected)
    assert_near(copies, expected_copies)
    if with_copies:
        assert_near(copies, [t.bfloat16() for t in targets])
        if device.type == "cuda":  # the interpreter truncates where a GPU rounds to nearest
            assert all(torch.equal(copy, t.bfloat16()) for copy, t in zip(copies, targets, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.996, 1.0])
def test_the_definition_is_the_average_and_the_op_the_definition(momentum, device):
    targets, sources = tensors(device, torch.float32), tensors(device, torch.float32, seed=1)
    exact = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(targets, sources, strict=True)]
    (expected,) = clones(targets)
    ema_update_ref(expected, sources, momentum)
    ema_update_(targets, sources, momentum)
    assert_near(targets, [x.float() for x in exact])
    assert_near(expected, [x.float() for x in exact])
    if momentum in (0.0, 1.0):
        unmoved = sources if momentum == 0.0 else expected
        assert all(torch.equal(a, b) for a, b in zip(targets, unmoved, strict=True))


def test_the_definition_is_a_loop_of_lerp_to_the_bit(device):
    targets, sources = tensors(device, torch.float32), tensors(device, torch.float32, seed=1)
    (looped,) = clones(targets)
    finite = torch.tensor(True, device=device)
    ema_update_ref(targets, sources, 0.996, finite)
    for average, value in zip(looped, sources, strict=True):
        average.lerp_(value, (1.0 - 0.996) * finite.float())
    assert all(torch.equal(a, b) for a, b in zip(targets, looped, strict=True))


def test_the_definition_averages_float64_in_float64(device):
    t, s = torch.randn(9, dtype=torch.float64, device=device), torch.randn(9, dtype=torch.float64, device=device)
    exact = 0.996 * t + (1 - 0.996) * s
    ema_update_ref([t], [s], 0.996)
    torch.testing.assert_close(t, exact, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("target", NARROW)
@pytest.mark.parametrize("f", [ema_update_, ema_update_ref])
def test_a_skipped_step_writes_nothing(f, target, device):
    targets, copies = tensors(device, target), tensors(device, torch.bfloat16, seed=2)
    kept, kept_copies = clones(targets, copies)
    sources = tensors(device, torch.float32, seed=1)
    f(targets, sources, 0.5, torch.tensor(False, device=device), copies)
    assert all(torch.equal(a, b) for a, b in zip(targets + copies, kept + kept_copies, strict=True))
    f(targets, sources, 0.5, torch.tensor(True, device=device), copies)
    assert not torch.equal(targets[0], kept[0]) and not torch.equal(copies[0], kept_copies[0])


def test_the_kernel_does_not_even_read_a_skipped_source(device):
    targets, sources = [torch.zeros(9, device=device)], [torch.full((9,), float("inf"), device=device)]
    ema_update_(targets, sources, 0.5, torch.tensor(False, device=device))
    assert (targets[0] == 0).all()


def test_momentum_may_live_on_the_device(device):
    targets, sources = tensors(device, torch.float32), tensors(device, torch.float32, seed=1)
    (expected,) = clones(targets)
    ema_update_(targets, sources, torch.tensor(0.75, device=device))
    ema_update_(expected, sources, 0.75)
    assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))
    ema_update_ref(targets, sources, torch.tensor(0.75, device=device))
    ema_update_ref(expected, sources, 0.75)
    assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))


def test_no_byte_beside_a_tensor_is_touched(device):
    """Views into flat buffers: at odd addresses, their neighbours unread and unwritten, however their ends fall."""
    spans = [(1, 40), (44, 60), (64, 64 + 4096), (4164, 4200), (4203, 4204)]
    flat, source = torch.zeros(5000, device=device), torch.full((5000,), float("nan"), device=device)
    copy = torch.zeros(5000, dtype=torch.bfloat16, device=device)
    for start, stop in spans:
        source[start:stop] = 1.0
    views = [[x[start:stop] for start, stop in spans] for x in (flat, source, copy)]
    ema_update_(views[0], views[1], 0.5, copies=views[2])
    expected = torch.zeros(5000, device=device)
    for start, stop in spans:
        expected[start:stop] = 0.5
    assert torch.equal(flat, expected) and torch.equal(copy, expected.bfloat16())
    assert ema_table(views[0][:1], views[1][:1]).kinds == [0] and ema_table(views[0][2:3], views[1][2:3]).kinds == [
        room.ALIGNED
    ]
    assert ema_table([torch.zeros(39, device=device)], views[1][:1]).kinds == [0]


def test_one_launch_for_each_combination_of_dtypes(device):
    """Whole vectors in one launch, and one for the odd ends; every element in exactly one chunk."""
    even = [(3, 768), (1024,), (2, 1280), (4096,), (8200,)]
    table = ema_table(tensors(device, torch.float32, shapes=even), tensors(device, torch.float32, shapes=even))
    assert table.kinds == [room.ALIGNED] and len(table.chunks[0]) == 1 + 1 + 1 + 1 + 3
    odd = ema_table(tensors(device, torch.float32), tensors(device, torch.float32))
    assert sorted(odd.kinds) == [0, room.ALIGNED]
    taken = [torch.zeros(t.numel(), dtype=torch.int) for t in tensors(device, torch.float32)]
    for chunks, kind in zip(odd.chunks, odd.kinds, strict=True):
        for row, first in chunks.tolist():
            stop = len(taken[row]) // 8 * 8 if kind else len(taken[row])
            taken[row][first : min(first + room.CHUNK, stop)] += 1
    assert all((count == 1).all() for count in taken)


@pytest.mark.parametrize("moved", ["nothing", "addresses", "alignment", "length"])
def test_a_table_that_no_longer_fits_is_not_believed(moved, device):
    targets, sources = tensors(device, torch.float32), tensors(device, torch.float32, seed=1)
    table = ema_table(targets, sources)
    if moved == "addresses":
        targets = clones(targets)[0]
    elif moved == "alignment":
        targets[0] = torch.zeros(3 * 768 + 1, device=device)[1:].view(3, 768)
    elif moved == "length":
        targets[0], sources[0] = torch.randn(9, device=device), torch.randn(9, device=device)
    (expected,) = clones(targets)
    ema_update_(targets, sources, 0.75, table=table)
    ema_update_ref(expected, sources, 0.75)
    assert_near(targets, expected)
    fitted = room.fitting(table, room.owners_of(targets, sources, ()), torch.device(device))
    assert (fitted is table) == (moved == "nothing")
    assert (fitted.chunks is table.chunks) == (moved in ("nothing", "addresses"))


def test_no_tensors_no_launch(device):
    ema_update_([], [], 0.5)
    ema_update_ref([], [], 0.5)
    empty = [torch.empty(0, device=device)]
    ema_update_(empty, empty, 0.5, table=ema_table(empty, empty))
    assert ema_table([], []).kinds == []


def test_parameters_are_moved_without_a_graph(device):
    target, source = torch.nn.Linear(5, 3, device=device), torch.nn.Linear(5, 3, device=device)
    ema_update_(list(target.parameters()), list(source.parameters()), 0.0)
    assert torch.equal(target.weight, source.weight) and target.weight.is_leaf and target.weight.requires_grad


def test_registered_with_torch(device):
    op = torch.ops.fastjepa_kernels.ema_update_fwd.default
    targets, sources = (tensors(device, torch.float32, seed, [(3, 100), (8,)]) for seed in (0, 1))
    copies, finite = [x.bfloat16() for x in targets], torch.tensor(True, device=device)
    opcheck(op, (targets, sources, [], 0.25, None, None, None, None, [], []))
    opcheck(op, (targets, sources, copies, 0.0, torch.tensor(0.9, device=device), finite, *ema_table(targets, sources, copies)))


@pytest.mark.parametrize("way", ["triton", "torch"])
def test_compiles_whole(way, device):
    fastjepa_kernels.use(way)
    finite = torch.tensor(True, device=device)

    def moved(target, source):
        """Move out of place, so that the check can run it twice; its tensors are never where the table has them."""
        target, copy = target.clone(), target.bfloat16()
        ema_update_([target], [source], 0.75, finite, [copy], table)
        return target + copy

    x, y = torch.randn(3, 100, device=device), torch.randn(3, 100, device=device)
    table = ema_table([x.clone()], [y], [x.bfloat16()])
    compiles_whole(moved, x, y)


def parts(**changed):
    given = {"targets": [torch.zeros(4)], "sources": [torch.zeros(4)], "momentum": 0.5}
    return given | changed


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (parts(sources=[]), ValueError, "0 sources for 1"),
        (parts(copies=[torch.zeros(4).bfloat16()] * 2), ValueError, "2 copies for 1"),
        (parts(targets=[torch.zeros(4).half()]), TypeError, r"targets\[0\] must be float32 or bfloat16"),
        (parts(sources=[torch.zeros(4).double()]), TypeError, r"sources\[0\] must be float32 or bfloat16"),
        (parts(copies=[torch.zeros(4)]), TypeError, r"copies\[0\] must be bfloat16"),
        (parts(sources=[torch.zeros(2, 2)]), ValueError, r"sources\[0\] is \(2, 2\), its partner \(4,\)"),
        (parts(targets=[torch.zeros(8)[::2]]), ValueError, r"targets\[0\] is not contiguous"),
        (parts(sources=[torch.zeros(4, device="meta")]), ValueError, "is on meta"),
        (parts(momentum=torch.zeros(1)), TypeError, "momentum must be a 0-dim torch.float32"),
        (parts(momentum=torch.zeros((), dtype=torch.float64)), TypeError, "momentum must be a 0-dim torch.float32"),
        (parts(momentum=1.012), ValueError, "momentum is 1.012; it must be between 0 and 1"),
        (parts(momentum=-0.1), ValueError, "momentum is -0.1"),
        (parts(momentum=float("nan")), ValueError, "momentum is nan"),
        (parts(momentum=torch.tensor(1.5)), ValueError, "momentum is 1.5"),
        (parts(momentum=torch.tensor(float("nan"))), ValueError, "momentum is nan"),
        (parts(momentum=float("inf")), ValueError, "momentum is inf"),
        (parts(momentum="0.5"), TypeError, "momentum must be a number or a 0-dim tensor, not str"),
        (parts(momentum=None), TypeError, "momentum must be a number or a 0-dim tensor, not NoneType"),
        (parts(finite=torch.ones(())), TypeError, "finite must be a 0-dim torch.bool"),
        (parts(finite=torch.ones((), dtype=torch.bool, device="meta")), ValueError, "finite is on meta"),
    ],
)
def test_says_what_is_wrong(arguments, error, says):
    with pytest.raises(error, match=says):
        ema_update_(**arguments)


def test_a_target_is_given_once():
    tied = torch.zeros(4)
    with pytest.raises(ValueError, match="share their memory"):
        ema_table([tied, tied], [torch.zeros(4), torch.zeros(4)])


@pytest.mark.parametrize("way", ["triton", "torch"])
def test_targets_that_overlap_are_refused(way):
    """A kernel would race for the elements that they share."""
    fastjepa_kernels.use(way)
    flat, sources = torch.zeros(12), [torch.zeros(6), torch.zeros(6)]
    for targets, copies in (([flat[:6], flat[5:11]], None), ([torch.zeros(6) for _ in "ab"], [flat.bfloat16()[:6]] * 2)):
        with pytest.raises(ValueError, match="share their memory; give each once"):
            ema_table(targets, sources, copies)
        with pytest.raises(ValueError, match="share their memory; give each once"):
            ema_update_(targets, sources, 0.5, copies=copies)
    ema_update_([flat[:6], flat[6:]], sources, 0.5)


@pytest.mark.parametrize("way", ["triton", "torch"])
def test_a_source_that_another_target_moves_is_refused(way):
    """It would be read before or after its change. A target that is its own source stays as it is; sources may be shared."""
    fastjepa_kernels.use(way)
    a, b, flat = torch.randn(6), torch.randn(6), torch.randn(12)
    for targets, sources in (([a, b], [b, a]), ([flat[:6]], [flat[1:7]]), ([flat[6:]], [flat[6:].view(torch.bfloat16)[:6]])):
        with pytest.raises(ValueError, match="share their memory"):
            ema_update_(targets, sources, 0.5)
    shared, before = torch.ones(6), a.clone()
    ema_update_([a, b, flat[:6]], [a, shared, shared], 0.0)
    assert torch.equal(a, before) and torch.equal(b, shared) and torch.equal(flat[:6], shared)
