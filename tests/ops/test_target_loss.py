"""target_loss against its definition."""

import pytest
import torch
from checks import DTYPES, as_good, values_and_grads
from torch.library import opcheck

from fastjepa_kernels import target_loss, target_loss_ref

KINDS = ["smooth_l1", "l2", "cosine"]

# (predictions, features, width): the widths of ViT-B, L, H, g and more, odd ones, prime counts, one row, none
SIZES = [
    (31, 17, 768),
    (5, 5, 1024),
    (7, 3, 1280),
    (3, 4, 1408),
    (2, 2, 1664),
    (29, 11, 100),
    (47, 13, 3),
    (1, 1, 64),
    (0, 3, 64),
    (0, 0, 64),
]


def inputs(queries, rows, width, device, dtype=torch.float32, features_dtype=None):
    torch.manual_seed(queries)
    prediction = (1.5 * torch.randn(queries, width, device=device)).to(dtype).requires_grad_()
    features = (3 * torch.randn(rows, width, device=device) + 1).to(features_dtype or dtype)
    idx = torch.randint(max(rows, 1), (queries,), device=device, dtype=torch.int32)
    return prediction, features, idx, torch.rand(queries, device=device) / max(queries, 1)


def both(kind):
    return [lambda *given, f=f: f(*given, kind) for f in (target_loss, target_loss_ref)]


def compare(given, kind):
    """The loss is fp32 whatever the dtypes; the gradient is as good as the prediction's dtype lets it be."""
    dtype = given[0].dtype
    wide = [x.float() if x.is_floating_point() else x for x in given]
    loss = target_loss(*given, kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, target_loss_ref(*wide, kind), rtol=2e-6, atol=1e-7)
    rounded = [lambda *given, f=f: f(*given).to(given[0].dtype) for f in both(kind)]
    as_good(*rounded, *given, units=8.0 if dtype == torch.float32 else 2.0)  # fp32 sums of D terms in another order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "rows", "width"), SIZES)
def test_loss_and_gradient(queries, rows, width, dtype, kind, device):
    compare(inputs(queries, rows, width, device, dtype), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features_dtype", DTYPES)
def test_predictions_and_features_may_differ_in_dtype(features_dtype, dtype, kind, device):
    compare(inputs(13, 7, 96, device, dtype, features_dtype), kind)


def test_smooth_l1_is_the_default_and_weights_make_the_mean(device):
    prediction, features, idx, _ = inputs(13, 7, 96, device)
    target = torch.nn.functional.layer_norm(features, (96,))[idx.long()]
    weight = torch.full((13,), 1 / 13, device=device)
    torch.testing.assert_close(
        target_loss(prediction, features, idx, weight), torch.nn.functional.smooth_l1_loss(prediction, target)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_follows_the_scalar_above(kind, device):
    """A factor of the loss multiplies the gradient, whether the graph is used once or twice."""
    prediction, *rest = inputs(7, 5, 100, device)
    (unit,) = torch.autograd.grad(target_loss(prediction, *rest, kind), prediction)
    loss = -3 * target_loss(prediction, *rest, kind)
    first, again = (torch.autograd.grad(loss, prediction, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, -3 * unit)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_scale_reaches_fp16_gradients_that_would_vanish_without_it(kind, device):
    """weight / D of a ViT-H step is below fp16's smallest number: only the scaled gradient fits."""
    prediction, features, idx, _ = inputs(7, 5, 1280, device, torch.float16)
    weight = torch.full((7,), 1 / 22937, device=device)
    wide = prediction.detach().float().requires_grad_()
    (target_loss(prediction, features, idx, weight, kind) * 65536).backward()
    (target_loss_ref(wide, features, idx, weight, kind) * 65536).backward()
    error, largest = (prediction.grad.float() - wide.grad).abs().max(), wide.grad.abs().max()
    assert error <= 2**-10 * largest + 2**-24


def test_features_of_little_variance_and_predictions_of_zeros(device):
    """A flat row normalises to zero, a faint one by its eps; torch's cosine_similarity keeps norms above 1e-8."""
    prediction = torch.cat((torch.zeros(2, 64), torch.randn(2, 64))).to(device).requires_grad_()
    features = torch.stack((torch.full((64,), 3.0), 0.01 * torch.randn(64))).to(device)
    given = prediction, features, torch.tensor([0, 1, 0, 1], device=device).int(), torch.ones(4, device=device)
    for kind in KINDS:
        compare(given, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_that_is_not_finite_shows(kind, device):
    prediction, *rest = inputs(3, 2, 64, device)
    with torch.no_grad():
        prediction[1, 5] = torch.nan
    loss, gradient = values_and_grads(lambda *given: target_loss(*given, kind), [prediction, *rest])
    assert loss.isnan() and gradient[1, 5].isnan()
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_writes_no_gradient_that_nobody_wants(kind, device):
    prediction, *rest = inputs(7, 5, 96, device)
    with torch.no_grad():
        quiet = target_loss(prediction, *rest, kind)
    torch.testing.assert_close(quiet, target_loss(prediction, *rest, kind).detach(), rtol=0, atol=0)
    assert not quiet.requires_grad and not target_loss(prediction.detach(), *rest, kind).requires_grad
    made = torch.ops.fastjepa_kernels.target_loss_fwd(prediction.detach(), rest[:1], *rest[1:], kind, False)
    assert made[1].shape == (0, 96)


def test_features_with_a_gradient_are_fine_where_nothing_is_tracked(device):
    prediction, features, idx, weight = inputs(3, 2, 64, device)
    with torch.no_grad():
        assert target_loss(prediction, features.requires_grad_(), idx, weight).isfinite()


def test_takes_rows_of_wider_tables(device):
    prediction, features, idx, weight = inputs(7, 5, 192, device)
    given = prediction[:, 64:128], features[:, :64], idx.repeat_interleave(2)[::2], weight.repeat_interleave(2)[::2]
    ours, theirs = (torch.autograd.grad(f(*given), prediction)[0] for f in (target_loss, target_loss_ref))
    torch.testing.assert_close(ours, theirs)
    across = prediction.detach().t().contiguous().t().requires_grad_()
    ours, theirs = (torch.autograd.grad(f(across, features, idx, weight), across)[0] for f in (target_loss, target_loss_ref))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind, device):
    given = inputs(7, 5, 96, device, torch.bfloat16)
    for f in both(kind):
        with torch.autocast(device.type, torch.bfloat16):
            under = values_and_grads(f, list(given))
        for got, expected in zip(under, values_and_grads(f, list(given)), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def several(layers, parts, queries, width, device, dtype=torch.float32):
    """Inputs with the features of several layers, each of a mean and scale of its own, and a prediction `parts` wide."""
    prediction, _, idx, weight = inputs(queries, 5, parts * width, device, dtype)
    features = [((1 + n) * torch.randn(5, width, device=device) - n).to(dtype) for n in range(layers)]
    return prediction, features, idx, weight


def by_hand(prediction, features, idx, weight, kind):
    """The loss as the maths says it: a loop over rows and layers."""
    distance = {
        "smooth_l1": torch.nn.functional.smooth_l1_loss,
        "l2": torch.nn.functional.mse_loss,
        "cosine": lambda p, y: 1 - torch.nn.functional.cosine_similarity(p, y, dim=0),
    }[kind]
    width, total = features[0].shape[1], 0.0
    for row, at, share in zip(prediction.float(), idx.tolist(), weight, strict=True):
        normal = [torch.nn.functional.layer_norm(layer[at].float(), (width,)) for layer in features]
        if len(row) == width:
            normal = [torch.nn.functional.layer_norm(sum(normal) / len(normal), (width,))]
        apart = [distance(part, target) for part, target in zip(row.split(width), normal, strict=True)]
        total = total + share * sum(apart) / len(apart)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "parts"), [(2, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("width", [96, 100, 3])
def test_several_layers_are_predicted_each_or_as_their_average(layers, parts, width, kind, device):
    given = several(layers, parts, 7, width, device)
    for f in both(kind):
        pairs = zip(values_and_grads(f, list(given)), values_and_grads(by_hand, [*given, kind]), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layers", "parts", "queries"), [(4, 4, 31), (4, 1, 31), (2, 2, 0), (2, 1, 1)])
def test_several_layers_in_every_dtype(layers, parts, queries, dtype, device):
    prediction, features, idx, weight = several(layers, parts, queries, 768, device, dtype)
    for kind in KINDS:
        wide = [layer.float() for layer in features]
        loss = target_loss(prediction, features, idx, weight, kind)
        torch.testing.assert_close(loss, target_loss_ref(prediction.float(), wide, idx, weight, kind), rtol=2e-6, atol=1e-7)
        ours, plain = (
            lambda p, *rest, f=f, kind=kind: f(p, rest[:layers], *rest[layers:], kind).to(p.dtype)
            for f in (target_loss, target_loss_ref)
        )
        as_good(ours, plain, prediction, *features, idx, weight, units=8.0 if dtype == torch.float32 else 2.0)


def test_a_sequence_of_one_layer_is_that_layer_to_the_bit(device):
    prediction, features, idx, weight = inputs(13, 7, 96, device)
    for f in (target_loss, target_loss_ref):
        alone, listed = (values_and_grads(f, [prediction, one, idx, weight]) for one in (features, [features]))
        assert all(map(torch.equal, alone, listed))


def test_layers_may_be_rows_of_wider_tables_and_are_compiled_whole(device):
    prediction, features, idx, weight = several(2, 2, 7, 64, device)
    wide = torch.cat((features[0], features[1]), dim=1)
    given = prediction, [features[0], wide[:, 64:]], idx, weight
    torch.testing.assert_close(target_loss(*given), target_loss_ref(prediction, features, idx, weight))
    opcheck(torch.ops.fastjepa_kernels.target_loss_fwd.default, (*given, "l2", True))
    compiled = torch.compile(target_loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(values_and_grads(f, list(given)) for f in (compiled, target_loss)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_has_the_gradients_of_calculus(kind):
    prediction, features, idx, weight = inputs(4, 3, 5, torch.device("cpu"), torch.float64)
    assert torch.autograd.gradcheck(lambda p: target_loss_ref(p, features, idx, weight, kind), (prediction,))


@pytest.mark.parametrize("kind", KINDS)
def test_registered_with_torch(kind, device):
    given = inputs(5, 3, 64, device)
    ops = torch.ops.fastjepa_kernels
    prediction, features, *rest = given
    opcheck(ops.target_loss_fwd.default, (prediction, [features], *rest, kind, True))
    opcheck(ops.target_loss_fwd.default, (prediction.detach(), [features], *rest, kind, False))
    opcheck(ops.target_loss_bwd.default, (torch.randn(5, 64, device=device), given[3], torch.tensor(2.0, device=device)))
    compiled = torch.compile(target_loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(values_and_grads(f, [*given, kind]) for f in (compiled, target_loss)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"kind": "l1"}, ValueError, "l1 is no kind of distance; use one of smooth_l1, l2, cosine"),
        ({"prediction": torch.zeros(3)}, ValueError, r"prediction \(Q, D\) needs features \(U, D\), .* got \(3,\), \(2, 8\)"),
        ({"features": torch.zeros(2, 7)}, ValueError, r"got \(3, 8\), \(2, 7\)"),
        ({"prediction": torch.zeros(3, 0), "features": torch.zeros(2, 0)}, ValueError, r"got \(3, 0\), \(2, 0\)"),
        ({"features": [torch.zeros(2, 8), torch.zeros(3, 8)]}, ValueError, r"got \(3, 8\), \(2, 8\), \(3, 8\)"),
        ({"features": [torch.zeros(2, 4)] * 3}, ValueError, r"got \(3, 8\), \(2, 4\), \(2, 4\), \(2, 4\)"),
        ({"features": []}, ValueError, r"got \(3, 8\)"),
        ({"features": [torch.zeros(2, 8), torch.zeros(2, 8).double()]}, TypeError, r"features\[1\] must be float32"),
        ({"idx": torch.zeros(2).int()}, ValueError, r"3 predictions need idx and weight \(3,\); got \(2,\), \(3,\)"),
        ({"weight": torch.ones(3, 1)}, ValueError, r"got \(3,\), \(3, 1\)"),
        ({"features": torch.zeros(2, 8, requires_grad=True)}, ValueError, r"compute the target under torch.no_grad\(\)"),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight has no gradient; detach it"),
        ({"prediction": torch.zeros(3, 8).double()}, TypeError, "prediction must be float32"),
        ({"features": torch.zeros(2, 8).int()}, TypeError, "features must be float32"),
        ({"weight": torch.ones(3).half()}, TypeError, "weight must be float32, not torch.float16"),
        ({"features": torch.zeros(2, 8, device="meta")}, ValueError, "features is on meta"),
        ({"idx": torch.zeros(3, dtype=torch.int64)}, TypeError, "idx must be int32"),
        ({"idx": torch.tensor([0, 2, 1]).int()}, IndexError, "idx has values from 0 to 2, outside the 2 rows"),
    ],
)
def test_says_what_is_wrong(wrong, error, says):
    right = {
        "prediction": torch.zeros(3, 8),
        "features": torch.zeros(2, 8),
        "idx": torch.zeros(3).int(),
        "weight": torch.ones(3),
        "kind": "l2",
    }
    with pytest.raises(error, match=says):
        target_loss(**(right | wrong))
