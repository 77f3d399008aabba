"""Muon beside AdamW: torch's own optimizers on each matrix, whatever the stacks and ranks, and nothing where a gradient is not
finite.
"""

import pytest
import torch

from fastjepa.engine import muon
from fastjepa.engine.adamw import ADAMW, apply_schedule
from fastjepa.engine.muon import MuonAdamW, hidden_groups, orthogonalized, stacks_of_a_shape
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import StepSettings
from fastjepa.model.jepa import build_pair
from fastjepa.ranks.world import join_world, leave_world
from tests.support import ranks
from tests.support.networks import perturbed, small

NOW = StepSettings(lr=1e-3, weight_decay=0.1, ema_momentum=0.9, muon_lr=2e-2, muon_weight_decay=0.05)
COEFFICIENTS = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5, "eps": 1e-7}


def engine() -> PlainEngine:
    torch.manual_seed(0)
    return PlainEngine(perturbed(build_pair(small())[0]), muon=True, pred_lr_scale=2.0)


def give_gradients(parameters, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=random)


def snapshot(of: PlainEngine) -> list[torch.Tensor]:
    moments = [value for state in of.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*of.parameters, *moments)]


def test_hidden_matrices_are_all_2d_weights_and_no_others():
    jepa, _ = build_pair(small())
    names = {p: name for name, p in jepa.named_parameters()}
    groups = hidden_groups(jepa.encoder, jepa.predictor, 3.0)
    found = [sorted(names[p].split(".", 1)[1] for p in group["params"]) for group in groups]
    assert found[0] == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    assert found[2] == ["predictor_blocks.0.attn.qkv.weight", "predictor_blocks.1.attn.qkv.weight"]
    assert len(found[1]) == 6 and len(found[3]) == 8 and "predictor_embed.weight" in found[3]
    assert [(group["parts"], group["lr_scale"]) for group in groups] == [(3, 1.0), (1, 1.0), (3, 3.0), (1, 3.0)]
    optimizer = MuonAdamW(jepa.encoder, jepa.predictor, 3.0)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(names), "every parameter has one optimizer"


def by_the_definition(jepa, steps: int) -> None:
    """Take the same steps with torch's Muon on every single matrix, q, k and v apart, and torch's AdamW on the rest."""
    apart, optimizers = {}, []
    for network, scale in ((jepa.encoder, 1.0), (jepa.predictor, 2.0)):
        for name, p in network.named_parameters():
            matrices = (
                [torch.nn.Parameter(m.detach().clone()) for m in p.chunk(3 if "qkv" in name else 1)] if p.ndim == 2 else [p]
            )
            apart[p] = matrices
            if p.ndim == 2:
                own = torch.optim.Muon(matrices, lr=2e-2 * scale, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
            else:
                own = torch.optim.AdamW([p], **ADAMW | {"lr": 1e-3 * scale, "weight_decay": 0.1 if p.ndim > 1 else 0.0})
            optimizers.append(own)
    for step in range(steps):
        give_gradients(jepa.parameters(), step)
        for p, matrices in apart.items():
            for matrix, grad in zip(matrices, p.grad.chunk(len(matrices)), strict=True):
                matrix.grad = grad.clone()
        for own in optimizers:
            own.step()
    with torch.no_grad():
        for p, matrices in apart.items():
            p.copy_(torch.cat(list(matrices)))


@pytest.mark.parametrize("most", [2**26, 1], ids=["stacked", "one by one"])
def test_five_steps_are_those_of_torchs_optimizers(monkeypatch, most):
    """To the rounding of bf16, in which torch's Muon multiplies: a step is as long as its learning rate says."""
    monkeypatch.setattr(muon, "STACKED_ELEMENTS", most)
    ours, theirs = engine(), engine().jepa
    start = [p.detach().clone() for p in ours.parameters]
    for step in range(5):
        give_gradients(ours.parameters, step)
        assert ours.step(NOW)
    by_the_definition(theirs, 5)
    for before, p, expected in zip(start, ours.parameters, theirs.parameters(), strict=True):
        moved, right = (x.detach() - before for x in (p, expected))
        assert (moved - right).norm() <= (0.02 if p.ndim == 2 else 1e-4) * right.norm()


def step_thrice(out: str) -> None:
    """Save the weights and moments after three steps, and how many matrices this process has multiplied in each."""
    world, made, multiply = join_world("cpu", timeout=60), [], muon.orthogonalized
    muon.orthogonalized = lambda x, group: made.append(len(x)) or multiply(x, group)
    of = engine()
    for step in range(3):
        give_gradients(of.parameters, step)
        assert of.step(NOW)
    torch.save((snapshot(of), sum(made) / 3), f"{out}{world.rank}")
    leave_world()


def test_ranks_share_the_products_and_have_the_same_weights(tmp_path):
    """Three ranks make the 26 matrices between them, none more than half, and end where one process ends."""
    ranks.run(step_thrice, str(tmp_path / "three"), count=3)
    ranks.run(step_thrice, str(tmp_path / "one"), count=1)
    (alone, all_made), *found = (torch.load(tmp_path / name) for name in ("one0", "three0", "three1", "three2"))
    assert sum(made for _, made in found) == all_made == 26 and max(made for _, made in found) <= all_made / 2
    for tensors, _ in found:
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0][0], strict=True)), "ranks have drifted apart"
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(tensors, alone, strict=True))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 32), (2, 32, 8), (1, 1, 8), (1, 1, 1)])
def test_singular_values_come_near_1(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(x, COEFFICIENTS)
    values = torch.linalg.svdvals(found.float())
    assert found.shape == x.shape and values.min() > 0.4 and values.max() < 1.3


def test_without_instructions_for_bf16_products_are_those_of_bf16(monkeypatch):
    """Both ways err from the exact iteration by the rounding of bf16, and the one in fp32 by no more."""
    x = torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(0))
    a, b, c = COEFFICIENTS["ns_coefficients"]
    exact = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(COEFFICIENTS["ns_steps"]):
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    errors = []
    for has in (True, False):
        monkeypatch.setattr(muon, "has_bf16", lambda device, has=has: has)
        found = orthogonalized(x, COEFFICIENTS)
        assert found.dtype == torch.bfloat16
        errors.append(float((found.double() - exact).norm() / exact.norm()))
    assert errors[1] < min(0.03, 1.2 * errors[0])


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalized(torch.zeros(2, 4, 4), COEFFICIENTS).any()


def test_stacks_have_one_shape_and_a_limit(monkeypatch):
    monkeypatch.setattr(muon, "STACKED_ELEMENTS", 20)
    matrices = [(torch.zeros(shape), number) for number, shape in enumerate([(2, 4), (4, 2), (2, 4), (2, 4), (5, 9)])]
    stacks = [[number for _, number in stack] for stack in stacks_of_a_shape(matrices)]
    assert stacks == [[0, 2], [3], [1], [4]], "20 elements are two matrices of 8; one of 45 goes alone"


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_weights_and_moments(poison, ndim):
    of, clean = engine(), engine()
    for number, one in enumerate((of, clean)):
        give_gradients(one.parameters, 1)
        assert one.step(NOW)
        if number == 0:
            before = snapshot(of)
            give_gradients(of.parameters, 2)
            next(p for p in of.parameters if p.ndim == ndim).grad.view(-1)[2] = poison
            assert not of.step(NOW)
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(of), strict=True))
        give_gradients(one.parameters, 3)
        assert one.step(NOW)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(of), snapshot(clean), strict=True))


def test_rates_and_decays_are_those_of_the_schedule():
    optimizer = engine().optimizer
    apply_schedule(optimizer, NOW)
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    adamw = [(1e-3, 0.1), (2e-3, 0.1), (1e-3, 0.0), (2e-3, 0.0)]
    assert found == [*adamw, (2e-2, 0.05), (2e-2, 0.05), (4e-2, 0.05), (4e-2, 0.05)]


def test_a_parameter_without_a_gradient_is_left_alone():
    of = engine().optimizer
    p = of.muon.param_groups[0]["params"][0]
    before = p.detach().clone()
    p.grad = None
    of.step()
    assert torch.equal(p, before) and p not in of.state
