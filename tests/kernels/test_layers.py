"""The doors for other trainers against the classes they replace: timm's PatchEmbed and ModelEmaV3, torch's AdamW."""

import io
import math
import pickle
from copy import copy, deepcopy

import pytest
import timm.layers
import timm.utils
import torch
from torch import Tensor, nn

from fastjepa_kernels.layers import FusedAdamWEMA, MaskedPatchEmbed, ModelEma

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0, **arguments) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        images, labels = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(10, (4,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(**arguments)
        losses.append(loss.item())
    return losses


def grouped(model: nn.Module) -> list[dict]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0, "lr": 2e-3},
    ]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("grouping", [grouped, lambda model: model.parameters()])
def test_twenty_steps_have_the_losses_of_adamw_and_a_loop_of_lerp(grouping):
    model, plain = small_model(), small_model()
    target, average = deepcopy(model), deepcopy(plain)
    pairs = list(zip(model.parameters(), target.parameters(), strict=True))
    copies = [(p, t.detach().bfloat16()) for p, t in pairs]
    ours = FusedAdamWEMA(grouping(model), lr=3e-3, targets=pairs, copies=copies)
    theirs = torch.optim.AdamW(grouping(plain), lr=3e-3, foreach=False)
    scheduled = torch.optim.lr_scheduler.CosineAnnealingLR(ours, 20), torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 20)
    for step in range(20):
        expected = train(plain, theirs, 1, seed=step)
        with torch.no_grad():
            for a, p in zip(average.parameters(), plain.parameters(), strict=True):
                a.lerp_(p, 0.1)
        assert train(model, ours, 1, seed=step, momentum=0.9) == pytest.approx(expected, rel=1e-5)
        for scheduler in scheduled:
            scheduler.step()
    assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert_close(dict(target.named_parameters()), dict(average.named_parameters()))
    assert all(torch.equal(copy, t.bfloat16()) for (_, copy), (_, t) in zip(copies, pairs, strict=True))


def test_some_parameters_have_no_target():
    """A predictor has none, wherever it stands among the groups."""
    model, plain = small_model(), small_model()
    target = deepcopy(model[3])
    ours = FusedAdamWEMA(grouped(model), targets=zip(model[3].parameters(), target.parameters(), strict=True))
    train(model, ours, 4, momentum=0.0)
    train(plain, torch.optim.AdamW(grouped(plain)), 4)
    assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), model[3].parameters(), strict=True))


def test_a_step_that_is_not_finite_changes_nothing():
    model = small_model()
    target = deepcopy(model)
    optimizer = FusedAdamWEMA(model.parameters(), targets=zip(model.parameters(), target.parameters(), strict=True))
    train(model, optimizer, 2, momentum=0.9, finite=torch.tensor(True))
    kept = [deepcopy(dict(m.named_parameters())) for m in (model, target)], deepcopy(optimizer.state_dict())
    train(model, optimizer, 1, momentum=0.9, finite=torch.tensor(False))
    for m, before in zip((model, target), kept[0], strict=True):
        assert all(torch.equal(p, before[name]) for name, p in m.named_parameters())
    for number, state in optimizer.state_dict()["state"].items():
        assert state["step"] == 2
        assert all(torch.equal(state[name], kept[1]["state"][number][name]) for name in state)


def test_state_moves_from_adamw_and_back():
    """Ten steps of AdamW, ten of ours and ten of AdamW are thirty of AdamW."""
    model, plain = small_model(), small_model()
    theirs = torch.optim.AdamW(grouped(plain), lr=3e-3)
    expected = [loss for seed in range(3) for loss in train(plain, theirs, 10, seed)]
    first = torch.optim.AdamW(grouped(model), lr=3e-3)
    losses = train(model, first, 10, 0)
    ours = FusedAdamWEMA(grouped(model))
    ours.load_state_dict(deepcopy(first.state_dict()))
    assert ours.param_groups[0]["lr"] == 3e-3
    losses += train(model, ours, 10, 1)
    last = torch.optim.AdamW(grouped(model))
    last.load_state_dict(deepcopy(ours.state_dict()))
    losses += train(model, last, 10, 2)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert all(state["step"] == 30 for state in last.state.values())
    assert ours.state_dict()["state"][0].keys() == last.state_dict()["state"][0].keys()


def test_state_survives_a_file(tmp_path):
    model, twin = small_model(), small_model()
    ours = FusedAdamWEMA(grouped(model), lr=3e-3)
    train(model, ours, 3)
    torch.save((model.state_dict(), ours.state_dict()), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    twin.load_state_dict(weights)
    again = FusedAdamWEMA(grouped(twin))
    again.load_state_dict(state)
    assert train(twin, again, 3, seed=1) == train(model, ours, 3, seed=1)


def test_parameters_without_gradients_are_as_in_adamw():
    """A head that joins later starts its count then; a parameter that never has a gradient has no state."""
    model, plain = small_model(), small_model()
    ours, theirs = FusedAdamWEMA(model.parameters(), lr=3e-3), torch.optim.AdamW(plain.parameters(), lr=3e-3)
    for m in (model, plain):
        m[0].requires_grad_(False)
    train(model, ours, 3)
    train(plain, theirs, 3)
    assert ours.state.keys() == {*model[1].parameters(), *model[3].parameters()}
    for m in (model, plain):
        m[0].requires_grad_(True)
    train(model, ours, 3)
    train(plain, theirs, 3)
    assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert [ours.state[p]["step"].item() for p in model.parameters()] == [3, 6, 6, 6, 6]
    with_group = FusedAdamWEMA(model[0].parameters())
    with_group.add_param_group({"params": list(model[3].parameters()), "lr": 1.0})
    assert len(with_group.param_groups) == 2


def test_a_closure_is_called_with_gradients():
    model = nn.Linear(3, 1)
    optimizer = FusedAdamWEMA(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


def test_the_optimizer_says_what_is_wrong():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="1 targets belong to no parameter"):
        FusedAdamWEMA([p], targets=[(q, p)])
    with pytest.raises(ValueError, match="1 copies for 2 targets"):
        FusedAdamWEMA([p, q], targets=[(p, torch.zeros(3)), (q, torch.zeros(3))], copies=[(p, torch.zeros(3).bfloat16())])
    with pytest.raises(ValueError, match="asks for amsgrad"):
        FusedAdamWEMA([{"params": [p], "amsgrad": True}])
    with pytest.raises(ValueError, match="at least 0"):
        FusedAdamWEMA([p], lr=-1.0)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        FusedAdamWEMA([p], betas=(0.9, 1.0))
    with pytest.raises(TypeError, match="step needs momentum"):
        FusedAdamWEMA([p], targets=[(p, torch.zeros(3))]).step()
    theirs = torch.optim.AdamW([p], amsgrad=True)
    p.grad = torch.ones(3)
    theirs.step()
    with pytest.raises(ValueError, match="amsgrad"):
        FusedAdamWEMA([q]).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9},
        {"decay": 0.9, "exclude_buffers": True},
        {"decay": 0.99, "use_warmup": True, "update_after_step": 2, "warmup_gamma": 2.0, "warmup_power": 0.75},
        {"decay": 0.99, "use_warmup": True, "min_decay": 0.5},
        {"decay": 0.3, "dtype": torch.float64},
        {"decay": 0.9, "device": "cpu"},
    ],
)
def test_the_average_is_timms(options):
    model = small_model()
    model.register_buffer("counter", torch.tensor(3))
    ours, theirs = ModelEma(model, **options), timm.utils.ModelEmaV3(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        train(model, optimizer, 1, seed=step)
        model.counter += 1
        assert ours.get_decay(step) == pytest.approx(theirs.get_decay(step))
        ours.update(model, step=step)
        theirs.update(model, step=step)
        assert_close(ours.state_dict(), theirs.state_dict())
    assert not ours.module.training and ours.get_decay() == options["decay"]
    x = torch.randn(2, 3, 8, 8).to(options.get("dtype", torch.float32))
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ours.set(model)
    assert_close(ours.module.float().state_dict(), model.state_dict())


def test_the_average_of_bf16_weights_may_be_fp32():
    model = small_model().bfloat16()
    ours, theirs = (ema(model, decay=0.9, dtype=torch.float32) for ema in (ModelEma, timm.utils.ModelEmaV3))
    for p in model.parameters():
        p.data += 1
    ours.update(model)
    theirs.update(model)
    assert ours.module[3].weight.dtype == torch.float32
    assert_close(ours.state_dict(), theirs.state_dict())


def test_the_average_skips_a_step_and_moves_tied_and_strided_weights_once():
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)}
    )
    model["b"].weight = model["a"].weight
    ema = ModelEma(model, decay=0.75)
    before = deepcopy(ema.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += 4.0
    ema.apply_update_(model, 0.75, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())
    ema.apply_update_(model, 0.75, torch.tensor(True))
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value, before[name] + 1.0)


def visible(images: int, patches: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(images * patches, generator=generator)[: images * patches // 3].int()


def test_the_embedding_of_visible_patches_is_timms():
    theirs = timm.layers.PatchEmbed(img_size=32, patch_size=8, in_chans=3, embed_dim=24)
    ours = MaskedPatchEmbed(patch_size=8, in_chans=3, embed_dim=24)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == ["proj.weight", "proj.bias"]
    images, idx = torch.randn(2, 3, 32, 32), visible(2, 16)
    expected = theirs(images).flatten(0, 1)
    torch.testing.assert_close(ours(images), expected)
    torch.testing.assert_close(ours(images, idx), expected[idx.long()])
    dout = torch.randn(len(idx), 24)
    grads = torch.autograd.grad(ours(images, idx), ours.parameters(), dout)
    for grad, exact in zip(grads, torch.autograd.grad(expected[idx.long()], theirs.parameters(), dout), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-4)


def test_the_embedding_normalises_bytes_itself():
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    ours = MaskedPatchEmbed(patch_size=8, embed_dim=24, bias=False, mean=MEAN, std=STD)
    assert list(ours.state_dict()) == ["proj.weight"]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    expected = ours.proj((images / 255 - mean) / std).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours((images / 255 - mean) / std), expected, rtol=1e-4, atol=1e-5)  # floats are as they are
    torch.testing.assert_close(ours.bfloat16()(images).float(), expected, rtol=0.05, atol=0.05)


def test_the_embedding_computes_in_autocasts_dtype():
    ours = MaskedPatchEmbed(patch_size=8, embed_dim=24)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(1, 3, 16, 16)).dtype == torch.bfloat16
    assert ours(torch.randn(1, 3, 16, 16)).dtype == torch.float32
    with pytest.raises(ValueError, match="2 values for 3 channels"):
        MaskedPatchEmbed(mean=(0.5, 0.5))


def through_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), through_torch])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_optimizer_survives_pickle_and_deepcopy(copied, steps_before):
    """Model, average and optimizer are copied in one call, as they name one another's tensors."""
    model = small_model()
    target = deepcopy(model)
    optimizer = FusedAdamWEMA(grouped(model), lr=3e-3, targets=zip(model.parameters(), target.parameters(), strict=True))
    train(model, optimizer, steps_before, momentum=0.9)
    twin, average, again = copied((model, target, optimizer))
    assert train(twin, again, 3, seed=1, momentum=0.9) == train(model, optimizer, 3, seed=1, momentum=0.9)
    for ours, theirs in ((model, twin), (target, average)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert next(model.parameters()) is not next(twin.parameters())
    assert all(state["step"] == steps_before + 3 for state in again.state.values())


def test_the_optimizers_state_goes_through_a_file_into_another(tmp_path):
    model, other = small_model(), small_model(seed=1)
    averages = [deepcopy(m) for m in (model, other)]
    first, second = (
        FusedAdamWEMA(grouped(m), lr=3e-3, targets=zip(m.parameters(), a.parameters(), strict=True))
        for m, a in zip((model, other), averages, strict=True)
    )
    train(model, first, 2, momentum=0.9)
    torch.save([first.state_dict(), model.state_dict(), averages[0].state_dict()], tmp_path / "state.pt")
    state, *networks = torch.load(tmp_path / "state.pt")
    for network, values in zip((other, averages[1]), networks, strict=True):
        network.load_state_dict(values)
    second.load_state_dict(state)
    assert train(other, second, 3, seed=1, momentum=0.9) == train(model, first, 3, seed=1, momentum=0.9)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in averages), strict=True))


def test_a_shallow_copy_of_the_optimizer_is_refused():
    """It would move the moments of the first, and count the steps by itself."""
    model = small_model()
    optimizer = FusedAdamWEMA(model.parameters())
    train(model, optimizer, 2)
    with pytest.raises(TypeError, match="a shallow copy would share moments, not their counts; deepcopy model and optimizer"):
        copy(optimizer)
    train(model, optimizer, 1)
    assert all(state["step"] == 3 for state in optimizer.state_dict()["state"].values())


WRONG_NUMBERS = [{"lr": math.nan}, {"eps": math.inf}, {"weight_decay": -1.0}, {"betas": (math.nan, 0.9)}]


@pytest.mark.parametrize("wrong", WRONG_NUMBERS)
def test_numbers_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        FusedAdamWEMA(small_model().parameters(), **wrong)


def test_the_embedding_keeps_mean_and_std_that_were_set_later():
    embedding = MaskedPatchEmbed(patch_size=8, embed_dim=24, mean=MEAN, std=STD)
    embedding.mean.fill_(0.25)
    assert torch.equal(embedding.double().to_empty(device="cpu").mean, torch.full((3,), 0.25))
    twin = through_torch(deepcopy(embedding))
    assert torch.equal(twin.mean, embedding.mean) and torch.equal(twin.bfloat16().std, torch.tensor(STD))


def test_the_embedding_keeps_mean_and_std_through_the_meta_device():
    """A large model is built without memory, then emptied onto its device and loaded: mean and std are in no state dict."""
    plain = MaskedPatchEmbed(patch_size=8, embed_dim=24, mean=MEAN, std=STD)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.device("meta"):
        built = nn.Sequential(MaskedPatchEmbed(patch_size=8, embed_dim=24, mean=MEAN, std=STD))
    assert built[0].mean.is_meta
    torch.utils.deterministic.fill_uninitialized_memory, before = True, torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
    built.to_empty(device="cpu")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
    built[0].load_state_dict(plain.state_dict())
    torch.testing.assert_close(built[0](images), plain(images), rtol=0, atol=0)
    assert built.bfloat16()[0].mean.dtype == torch.float32
    torch.testing.assert_close(built[0].mean, torch.tensor(MEAN), rtol=0, atol=0)
