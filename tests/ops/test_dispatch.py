"""Ops under torch.func, forward mode and double backward: the definition composes, a kernel refuses in one sentence."""

import pytest
import torch
import torch.autograd.forward_ad as forward
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fastjepa_kernels as k

SEED = torch.Generator().manual_seed(0)
FEATURES, POSITIONS, TOKEN, WEIGHT = (torch.randn(shape, generator=SEED) for shape in ((6, 8), (6, 8), (8,), (3,)))
CU, ROWS = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([4, 1, 0], dtype=torch.int32)
TWICE, SEQUENCES = torch.tensor([4, 1, 4], dtype=torch.int32), torch.tensor([0, 2, 4, 0], dtype=torch.int32)
EACH = torch.stack([ROWS, ROWS.flip(0)])  # (2, 3): indices of two images, or two sets for vmap
INDEXED = {  # (x, idx) -> result, the shape of x, idx
    "gather_tokens": (k.gather_tokens, (6, 8), ROWS),
    "gather_tokens of images": (k.gather_tokens, (2, 6, 8), EACH),
    "gather_tokens_repeated": (k.gather_tokens_repeated, (6, 8), TWICE),
    "scatter_tokens": (lambda x, idx: k.scatter_tokens(x, idx, 6), (3, 8), ROWS),
    "scatter_tokens with fill": (lambda x, idx: k.scatter_tokens(x, idx, 6, TOKEN, POSITIONS), (3, 8), ROWS),
    "scatter_tokens of images": (lambda x, idx: k.scatter_tokens(x, idx, 6, TOKEN, POSITIONS), (2, 3, 8), EACH),
    "assemble_predictor": (lambda x, idx: k.assemble_predictor(x, idx, POSITIONS, TOKEN, SEQUENCES), (3, 8), ROWS),
    "target_loss": (lambda x, idx: k.target_loss(x, FEATURES, idx, WEIGHT), (3, 8), ROWS),
}
ATTENTION = {
    "short_attention": lambda x: k.short_attention(x, x, x, CU, CU, 4, 4),
    "varlen_attention by short": lambda x: k.varlen_attention(x, x, x, CU, CU, 4, 4, "short"),
    "varlen_attention by matmul": lambda x: k.varlen_attention(x, x, x, CU, CU, 4, 4, "matmul"),
}
OPS = {name: (lambda x, f=f, idx=idx: f(x, idx), shape) for name, (f, shape, idx) in INDEXED.items()}
OPS |= {name: (f, (6, 2, 8)) for name, f in ATTENTION.items()}


def second_derivative(f, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize("op", OPS)
def test_the_definitions_compose_with_torch_func(op):
    k.use("torch")
    f, shape = OPS[op]
    x, dx = torch.randn(2, *shape), torch.randn(shape)
    one = x[0]
    torch.testing.assert_close(vmap(f)(x), torch.stack([f(row) for row in x]))
    leaf = one.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf).square().sum(), leaf)
    squares = lambda x: f(x).square().sum()  # noqa: E731
    torch.testing.assert_close(grad(squares)(one), expected)
    torch.testing.assert_close(vmap(grad(squares))(x)[0], expected)
    jacobian = jacrev(f)(one)
    torch.testing.assert_close(jacfwd(f)(one), jacobian)
    tangent = (jacobian * dx).flatten(f(one).ndim).sum(-1)
    torch.testing.assert_close(jvp(f, (one,), (dx,))[1], tangent)
    with forward.dual_level():
        torch.testing.assert_close(forward.unpack_dual(f(forward.make_dual(one, dx))).tangent, tangent)
    curvature = hessian(squares)(one)
    if op not in ("short_attention", "varlen_attention by short"):  # torch's scaled_dot_product_attention has none
        bent = (curvature * 2 * expected).flatten(one.ndim).sum(-1)
        torch.testing.assert_close(second_derivative(f, one), bent, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("op", INDEXED)
def test_vmap_goes_over_indices_too(op):
    k.use("torch")
    f, shape, idx = INDEXED[op]
    x, several = torch.randn(2, *shape), torch.stack([idx, idx.flip(-1)])
    torch.testing.assert_close(vmap(f, (None, 0))(x[0], several), torch.stack([f(x[0], one) for one in several]))
    torch.testing.assert_close(vmap(f)(x, several), torch.stack([f(*both) for both in zip(x, several, strict=True)]))
    squares = grad(lambda x, idx: f(x, idx).square().sum())
    torch.testing.assert_close(vmap(squares, (None, 0))(x[0], several)[1], squares(x[0], several[1]))


def dual(f, x: Tensor) -> Tensor:
    with forward.dual_level():
        return f(forward.make_dual(x, x))


TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: vmap(f)(x[None]),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).sum())(x),
    "forward mode": dual,
}


@pytest.mark.parametrize("op", [op for op in OPS if "matmul" not in op])
def test_a_kernel_refuses_what_would_lose_its_derivatives(op):
    """A kernel is given the values and not the tangents: a derivative of zero, in silence."""
    f, shape = OPS[op]
    for transform in TRANSFORMS.values():
        with pytest.raises(RuntimeError, match="^[a-z_]+: the Triton kernel has no rules for torch.func or forward mode; use"):
            transform(f, torch.randn(shape))
    name = "short_attention" if "attention" in op else op.split()[0].removesuffix("_repeated")
    if name == "gather_tokens" and "repeated" not in op:
        second_derivative(f, torch.randn(shape))
        return
    with pytest.raises(RuntimeError, match=f"^{name}: the Triton kernel has no second derivative; .* has one$"):
        second_derivative(f, torch.randn(shape))


@pytest.mark.parametrize("way", ["torch", "triton"])
def test_constants_have_no_derivative_and_say_so(way):
    """A gradient of zeros would be wrong in silence."""
    k.use(way)
    x = torch.randn(3, 8)
    constants = {
        "features": (lambda c: k.target_loss(x, c, ROWS, WEIGHT), FEATURES),
        "weight": (lambda c: k.target_loss(x, FEATURES, ROWS, c), WEIGHT),
        "positions": (lambda c: k.scatter_tokens(x, ROWS, 6, None, c).sum(), POSITIONS),
        "positions have": (lambda c: k.assemble_predictor(x, ROWS, c, TOKEN, SEQUENCES).sum(), POSITIONS),
        "images": (lambda c: k.patchify_tokens(c, ROWS, None, None, 4, torch.float32).sum(), torch.randn(2, 3, 8, 8)),
    }
    for name, (f, constant) in constants.items():
        for made in (lambda f=f, c=constant: grad(f)(c), lambda f=f, c=constant: f(c.clone().requires_grad_())):
            with pytest.raises(ValueError, match=f"{name}.* no gradient; |{name} has no gradient; "):
                made()


def test_patches_compose_but_for_gradients():
    k.use("torch")
    images, several = torch.randn(2, 2, 3, 8, 8), torch.stack([ROWS, ROWS.flip(0)])
    f = lambda images, idx=ROWS: k.patchify_tokens(images, idx, None, None, 4, torch.float32)  # noqa: E731
    torch.testing.assert_close(vmap(f)(images, several), torch.stack([f(*both) for both in zip(images, several, strict=True)]))
    torch.testing.assert_close(jvp(f, (images[0],), (images[1],))[1], f(images[1]))


@pytest.mark.parametrize("way", ["torch", "triton"])
def test_what_writes_in_place_is_refused_inside_transforms(way):
    k.use(way)
    target, source = torch.zeros(3, 8), torch.ones(3, 8)
    steps, hyper = torch.zeros(1), torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.0]], dtype=torch.float64)

    def step(x: Tensor) -> Tensor:
        k.adamw_ema_step_([target], [x], [target.clone()], [target.clone()], steps, hyper, [0])
        return target.sum()

    def average(x: Tensor) -> Tensor:
        k.ema_update_([target], [x], 0.5)
        return target.sum()

    for op, f in (("ema_update", average), ("adamw_ema_step", step)):
        for transform in (
            lambda f=f: grad(f)(source),
            lambda f=f: vmap(f)(source[None]),
            lambda f=f: jvp(f, (source,), (source,)),
        ):
            with pytest.raises(RuntimeError, match=f"^{op}: it writes in place and has no rules for torch.func"):
                transform()
    assert not target.any() and not steps.any()


@pytest.mark.parametrize("way", ["torch", "triton"])
@pytest.mark.parametrize("bad", [[-1, 0, 1], [0, 1, 6], [2**31 - 1, 0, 1], [-(2**31), 0, 1]])
def test_an_index_outside_the_rows_is_refused_by_both(way, bad):
    """Negative ones too: they do not count from the end."""
    k.use(way)
    idx, x = torch.tensor(bad, dtype=torch.int32), torch.randn(6, 8)
    images = torch.randn(1, 3, 8, 12)  # 6 patches of 4x4
    for call in (
        lambda: k.gather_tokens(x, idx),
        lambda: k.gather_tokens(x[None], idx[None]),
        lambda: k.gather_tokens_repeated(x, idx),
        lambda: k.scatter_tokens(x[:3], idx, 6),
        lambda: k.assemble_predictor(x[:3], idx, POSITIONS, TOKEN, SEQUENCES),
        lambda: k.target_loss(x[:3], FEATURES, idx, WEIGHT),
        lambda: k.patchify_tokens(images, idx, None, None, 4, torch.float32),
    ):
        with pytest.raises(IndexError, match=r"idx has values from -?\d+ to -?\d+, outside the 6 rows it indexes"):
            call()


@pytest.mark.parametrize("way", ["torch", "triton"])
def test_repeats_of_another_index_are_refused_by_both(way):
    """The definition does not need them, and the kernel's gradient would be wrong."""
    k.use(way)
    x, others = torch.randn(6, 8), k.occurrences(TWICE.flip(0) % 3, 6)
    k.gather_tokens_repeated(x, TWICE, k.occurrences(TWICE, 6))
    with pytest.raises(ValueError, match=r"gather_tokens_repeated: repeats are those of another idx; make them by occurrences"):
        k.gather_tokens_repeated(x, TWICE, others)
    with pytest.raises(ValueError, match=r"gather_tokens_repeated: repeats must be occurrences\(idx, 6\), shapes"):
        k.gather_tokens_repeated(x, TWICE, k.occurrences(TWICE, 5))
    with pytest.raises(ValueError, match="assemble_predictor: repeats are those of another idx"):
        k.assemble_predictor(x[:3], ROWS, POSITIONS, TOKEN, SEQUENCES, k.occurrences(SEQUENCES.flip(0) + 1, 9))
