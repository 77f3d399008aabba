"""adamw_ema_step_ against its definition, and the definition against torch.optim.AdamW and the textbook."""

import pytest
import torch
from checks import compiles_whole
from torch.library import opcheck

import fastjepa_kernels
from fastjepa_kernels import adamw_ema_step as room
from fastjepa_kernels.adamw_ema_step import adamw_ema_step_, adamw_ema_step_ref, adamw_ema_table
from fastjepa_kernels.ema_update import ALIGNED, COPY

# parameters with a target (first) and without: whole vectors, odd ends, a scalar, a chunk's border, nothing, one more group
SHAPES = [(2, 768), (37,), (), (4097,), (1280,), (0, 3), (5, 100), (9,)]
WITH_TARGET = 5
GROUPS = [0, 1, 1, 2, 2, 0, 2, 1]
HYPER = [(1e-2, 0.9, 0.999, 1e-8, 0.05), (3e-3, 0.8, 0.95, 1e-6, 0.0), (1e-1, 0.0, 0.5, 1e-3, 0.4)]  # of each group
NARROW = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # beta1 = 0, which is right


class Case:
    """The tensors of some steps."""

    def __init__(self, device, grad=torch.float32, target=torch.float32, copies=True, absent=()):
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.grad_dtype, self.absent = device, grad, absent
        self.params = [self.random(shape) for shape in SHAPES]
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]
        self.steps = torch.zeros(len(SHAPES), device=device)
        self.hyper = torch.tensor(HYPER, dtype=torch.float64, device=device)
        self.targets = [p.to(target) for p in self.params[:WITH_TARGET]]
        self.targets = [t.clone() if t is p else t for t, p in zip(self.targets, self.params, strict=False)]
        self.copies = [t.bfloat16() for t in self.targets] if copies else []
        self.copies = [c.clone() if c is t else c for c, t in zip(self.copies, self.targets, strict=False)]

    def random(self, shape):
        return torch.randn(shape, generator=self.generator).to(self.device)

    def grads(self):
        drawn = [self.random(shape).to(self.grad_dtype) for shape in SHAPES]
        return [None if i in self.absent else grad for i, grad in enumerate(drawn)]

    def state(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, self.steps, *self.targets, *self.copies]

    def step(self, f, grads, momentum=0.75, finite=None, table=None):
        f(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.hyper, GROUPS,
            self.targets, momentum, self.copies, finite, table,
        )  # fmt: skip

    def table(self, grads):
        return adamw_ema_table(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, GROUPS, self.targets, self.copies
        )  # fmt: skip


def assert_near(ours, theirs, units=16):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=units * eps, atol=units * eps)


@pytest.mark.parametrize("grad", NARROW)
@pytest.mark.parametrize("target", NARROW)
@pytest.mark.parametrize("copies", [False, True])
def test_three_steps_equal_the_definition(grad, target, copies, device):
    ours, theirs = Case(device, grad, target, copies), Case(device, grad, target, copies)
    for _ in range(3):
        ours.step(adamw_ema_step_, ours.grads())
        theirs.step(adamw_ema_step_ref, theirs.grads())
    assert_near(ours.state(), theirs.state())
    assert (ours.steps == 3).all()


@pytest.mark.parametrize("f", [adamw_ema_step_, adamw_ema_step_ref])
def test_each_is_torchs_adamw_and_a_loop_of_lerp(f, device):
    case = Case(device)
    params = [p.clone().requires_grad_() for p in case.params]
    averages = [p.detach().clone() for p in params[:WITH_TARGET]]
    groups = [
        {"params": [p for p, g in zip(params, GROUPS, strict=True) if g == group],
         "lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
        for group, (lr, *betas, eps, decay) in enumerate(HYPER)
    ]  # fmt: skip
    theirs = torch.optim.AdamW(groups, foreach=False)
    for _ in range(4):
        grads = case.grads()
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        case.step(f, grads)
        theirs.step()
        for average, p in zip(averages, params, strict=False):
            average.lerp_(p.detach(), 0.25)
    state = [theirs.state[p] for p in params]
    assert_near(case.params, [p.detach() for p in params])
    assert_near(case.exp_avgs, [s["exp_avg"] for s in state])
    assert_near(case.exp_avg_sqs, [s["exp_avg_sq"] for s in state])
    assert_near(case.targets, averages)
    assert case.steps.tolist() == [float(s["step"]) for s in state]


def test_the_definition_is_the_textbooks_formula(device):
    """Loshchilov and Hutter's algorithm 2, in float64, with the average of its result."""
    generator = torch.Generator().manual_seed(0)
    p, t = (torch.randn(50, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    grads = [torch.randn(50, generator=generator, dtype=torch.float64).to(device) for _ in range(5)]
    m, v, steps = torch.zeros_like(p), torch.zeros_like(p), torch.zeros(1, dtype=torch.float64, device=device)
    params, targets, moments = [p.clone()], [t.clone()], (torch.zeros_like(p), torch.zeros_like(p))
    lr, beta1, beta2, eps, decay = HYPER[0]
    hyper = torch.tensor(HYPER[:1], dtype=torch.float64, device=device)
    for count, g in enumerate(grads, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p = p - lr * decay * p - lr * (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + eps)
        t = 0.75 * t + 0.25 * p
        adamw_ema_step_ref(params, [g], moments[:1], moments[1:], steps, hyper, [0], targets, 0.75)
    for ours, exact in zip((*params, *moments, *targets), (p, m, v, t), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("f", [adamw_ema_step_, adamw_ema_step_ref])
def test_a_skipped_step_changes_nothing_and_is_not_counted(f, device):
    skipped, straight = Case(device), Case(device)
    bad = [torch.full_like(grad, float("nan")) for grad in skipped.grads()]
    straight.grads()
    no, yes = torch.tensor(False, device=device), torch.tensor(True, device=device)
    kept = [x.clone() for x in skipped.state()]
    skipped.step(f, bad, finite=no)
    assert all(torch.equal(a, b) for a, b in zip(skipped.state(), kept, strict=True))
    for _ in range(2):
        skipped.step(f, skipped.grads(), finite=yes)
        skipped.step(f, bad, finite=no)
        straight.step(f, straight.grads())
    assert all(torch.equal(a, b) for a, b in zip(skipped.state(), straight.state(), strict=True))
    assert (skipped.steps == 2).all()


@pytest.mark.parametrize("f", [adamw_ema_step_, adamw_ema_step_ref])
def test_without_a_gradient_only_the_average_moves(f, device):
    case = Case(device, absent=(1, 3, 6))
    case.targets = [t + 1 for t in case.targets]
    before = [[x.clone() for x in each] for each in (case.params, case.exp_avgs, case.targets)]
    case.step(f, case.grads())
    for i in (1, 3, 6):
        assert torch.equal(case.params[i], before[0][i]) and torch.equal(case.exp_avgs[i], before[1][i])
    for i in (1, 3):
        torch.testing.assert_close(case.targets[i], before[2][i].lerp(case.params[i], 0.25))
    assert case.steps.tolist() == [0.0 if i in (1, 3, 6) else 1.0 for i in range(len(SHAPES))]
    assert not torch.equal(case.params[0], before[0][0])


@pytest.mark.parametrize("f", [adamw_ema_step_, adamw_ema_step_ref])
def test_momentum_may_live_on_the_device(f, device):
    ours, theirs = Case(device), Case(device)
    ours.step(f, ours.grads(), momentum=torch.tensor(0.75, device=device))
    theirs.step(f, theirs.grads(), momentum=0.75)
    assert all(torch.equal(a, b) for a, b in zip(ours.state(), theirs.state(), strict=True))


def test_counts_of_a_long_run_keep_their_corrections(device):
    """1 - beta^t in fp32 would be off by 6e-5 of itself at t = 1 and beta = 0.999."""
    for count in (0.0, 1.0, 99_999.0):
        ours, theirs = Case(device), Case(device)
        for case in (ours, theirs):
            case.steps.fill_(count)
            case.hyper[:, 0] = 1.0
            for p in case.params:
                p.zero_()
        ours.step(adamw_ema_step_, ours.grads())
        theirs.step(adamw_ema_step_ref, theirs.grads())
        for a, b in zip(ours.params, theirs.params, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=0)


def test_one_launch_where_dtypes_and_ends_are_even(device):
    """One launch serves parameters with and without targets."""
    params, grads, first, second, targets = ([torch.randn(8 * n, device=device) for n in (1, 700, 3)] for _ in range(5))
    targets = targets[:2]
    table = adamw_ema_table(params, grads, first, second, [0, 0, 0], targets)
    assert table.kinds == [ALIGNED] and len(table.chunks[0]) == 4
    copied = adamw_ema_table(params, grads, first, second, [0, 0, 0], targets, [x.bfloat16() for x in targets])
    assert copied.kinds == [ALIGNED | COPY]
    misplaced = [grads[0], torch.zeros(5601, device=device)[1:], grads[2]]
    assert sorted(adamw_ema_table(params, misplaced, first, second, [0, 0, 0]).kinds) == [0, ALIGNED]


@pytest.mark.parametrize("moved", ["nothing", "gradients", "absent", "dtype"])
def test_gradients_may_move_under_a_table(moved, device):
    ours, theirs = Case(device), Case(device)
    table = ours.table(ours.grads())
    grads = theirs.grads()
    if moved == "absent":
        grads[0] = None
    elif moved == "dtype":
        grads = [grad.bfloat16() for grad in grads]
    table = ours.table(grads) if moved == "nothing" else table
    ours.step(adamw_ema_step_, grads, table=table)
    theirs.step(adamw_ema_step_ref, grads)
    assert_near(ours.state(), theirs.state())
    here = room.owners_of(room.Stepped(ours.params, grads, ours.exp_avgs, ours.exp_avg_sqs, GROUPS, ours.targets, ours.copies))
    fitted = room.fitting(table, here, torch.device(device))
    assert (fitted is table) == (moved == "nothing")
    assert (fitted.chunks is table.chunks) == (moved != "dtype")


def test_no_byte_beside_a_tensor_is_touched(device):
    """Views into flat buffers, one element off alignment; a target stays alone with its parameter."""
    flats = [torch.zeros(64, device=device) for _ in range(5)]
    param, grad, exp_avg, exp_avg_sq, target = ([flat[5:20]] for flat in flats)
    grad[0].fill_(1.0)
    hyper = torch.tensor([(0.1, 0.9, 0.999, 1e-12, 0.0)], dtype=torch.float64, device=device)
    adamw_ema_step_(param, grad, exp_avg, exp_avg_sq, torch.zeros(1, device=device), hyper, [0], target, 0.5)
    torch.testing.assert_close(param[0], torch.full((15,), -0.1, device=device))
    torch.testing.assert_close(target[0], torch.full((15,), -0.05, device=device))
    assert all((flat[:5] == 0).all() and (flat[20:] == 0).all() for flat in flats)


def test_no_parameters_no_launch(device):
    none = torch.zeros(0, device=device)
    adamw_ema_step_([], [], [], [], none, torch.zeros(1, 5, dtype=torch.float64, device=device), [])
    assert adamw_ema_table([], [], [], [], []).kinds == []


def arguments(device, copies=True):
    case = Case(device, copies=copies)
    grads = case.grads()
    return case, (
        case.params, grads, case.exp_avgs, case.exp_avg_sqs, case.steps, case.hyper, GROUPS, case.targets, case.copies
    )  # fmt: skip


def test_registered_with_torch(device):
    op = torch.ops.fastjepa_kernels.adamw_ema_step_fwd.default
    case, given = arguments(device)
    opcheck(op, (*given, 0.25, None, None, None, None, [], []))
    momentum, finite = torch.tensor(0.75, device=device), torch.tensor(True, device=device)
    opcheck(op, (*given, 0.0, momentum, finite, *case.table(given[1])))


@pytest.mark.parametrize("way", ["triton", "torch"])
def test_compiles_whole(way, device):
    fastjepa_kernels.use(way)
    hyper, finite = torch.tensor(HYPER[:1], dtype=torch.float64, device=device), torch.tensor(True, device=device)

    def stepped(param, grad):
        """Step out of place, so that the check can run it twice."""
        param, target, moments = param.clone(), param.clone(), [torch.zeros_like(param) for _ in range(2)]
        steps = torch.zeros(1, device=param.device)
        adamw_ema_step_([param], [grad], moments[:1], moments[1:], steps, hyper, [0], [target], 0.75, finite=finite)
        return param + target + steps

    compiles_whole(stepped, torch.randn(3, 100, device=device), torch.randn(3, 100, device=device))


SHARED = torch.zeros(6)


def parts(**changed):
    given = {name: [torch.zeros(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    return given | {"steps": torch.zeros(1), "hyper": torch.zeros(1, 5, dtype=torch.float64), "groups": [0]} | changed


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (parts(params=[torch.zeros(4).bfloat16()]), TypeError, r"params\[0\] must be float32, not torch.bfloat16"),
        (parts(grads=[]), ValueError, "0 grads for 1"),
        (parts(grads=[torch.zeros(4).half()]), TypeError, r"grads\[0\] must be float32 or bfloat16"),
        (parts(grads=[torch.zeros(5)]), ValueError, r"grads\[0\] is \(5,\), its partner \(4,\)"),
        (parts(grads=[torch.zeros(8)[::2]]), ValueError, r"grads\[0\] is not contiguous"),
        (parts(exp_avgs=[torch.zeros(4).bfloat16()]), TypeError, r"exp_avgs\[0\] must be float32"),
        (parts(exp_avg_sqs=[]), ValueError, "0 exp_avg_sqs for 1"),
        (parts(steps=torch.zeros(2)), ValueError, r"steps must be \(1,\)"),
        (parts(hyper=torch.zeros(1, 5)), ValueError, r"hyper must be \(G, 5\) of float64"),
        (parts(groups=[1]), IndexError, "from 1 to 1, hyper has 1"),
        (parts(groups=[]), ValueError, "0 groups for 1"),
        (parts(targets=[torch.zeros(4)] * 2), ValueError, "2 targets for 1 params"),
        (parts(targets=[torch.zeros(4, device="meta")]), ValueError, "is on meta"),
        (parts(targets=[torch.zeros(4)], copies=[torch.zeros(4)]), TypeError, r"copies\[0\] must be bfloat16"),
        (parts(copies=[torch.zeros(4).bfloat16()]), ValueError, "1 copies for 0"),
        (parts(momentum=1.012), ValueError, "momentum is 1.012; it must be between 0 and 1"),
        (parts(params=[SHARED[:4]], targets=[SHARED[2:]], momentum=0.5), ValueError, "share their memory; give each once"),
        (parts(finite=torch.ones(1, dtype=torch.bool)), TypeError, "finite must be a 0-dim torch.bool"),
        (parts(momentum=torch.ones((), dtype=torch.bfloat16)), TypeError, "momentum must be a 0-dim torch.float32"),
    ],
)
def test_says_what_is_wrong(given, error, says):
    with pytest.raises(error, match=says):
        adamw_ema_step_(**given)


@pytest.mark.parametrize("way", ["triton", "torch"])
@pytest.mark.parametrize(
    ("one", "other"), [("exp_avgs", "exp_avg_sqs"), ("exp_avgs", "params"), ("targets", "exp_avgs"), ("grads", "params")]
)
def test_tensors_that_share_memory_with_a_written_one_are_refused(way, one, other):
    fastjepa_kernels.use(way)
    given = {name: [torch.ones(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "targets")}
    rest = {"steps": torch.zeros(1), "hyper": torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.0]], dtype=torch.float64), "groups": [0]}
    adamw_ema_step_(**given, **rest, momentum=0.5)
    with pytest.raises(ValueError, match="share their memory"):
        adamw_ema_step_(**given | {one: given[other]}, **rest, momentum=0.5)
