"""The MAE that I-JEPA is compared with: what it sees, what it is asked, what it costs, and that it resumes."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from fastjepa.config.load import load_config
from fastjepa.config.schema import Config
from fastjepa.data.pixels import normalise_pixels
from fastjepa.evals.inputs import open_subject
from fastjepa.loss.regularizers import covariance_penalty, regularizer_term, variance_hinge
from fastjepa.model.jepa import build_pair
from fastjepa.model.vit import use_attention
from fastjepa.rng import MASK_STREAM, torch_seed
from fastjepa.studies import mae
from fastjepa.studies.mae import build_mae, mae_flops_per_image, mae_loss, mae_step, random_keep, train_mae, visible_sequences
from fastjepa.studies.sweep import BASE_CONFIG
from tests.support.images import write_idx
from tests.support.runs import same_weights, weights

SMALL = ["data.batch_size=8", "data.crop_scale=[1.0,1.0]", "meta.embed_dim=32", "meta.depth=2", "optimization.warmup=0",
         "runtime.dtype=fp32", "runtime.device=cpu", "logging.every=1"]  # fmt: skip


@pytest.fixture
def cfg() -> Config:
    return load_config(BASE_CONFIG, SMALL)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), np.uint8))


def patches_of(images: torch.Tensor, side: int = 4) -> torch.Tensor:
    """(b, C, H, W) -> (b, N, p p C), pixels row by row, channels last: the definition."""
    b, channels, height, width = images.shape
    tiles = images.view(b, channels, height // side, side, width // side, side)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, side * side * channels)


def test_three_quarters_are_hidden_and_every_patch_is_one_or_the_other(cfg):
    keep, masked = random_keep(8, cfg, torch.device("cpu"))
    assert keep.shape == (8, 16) and masked.shape == (8, 48)
    assert torch.equal(torch.cat((keep, masked), dim=1).sort(dim=1).values, torch.arange(64).expand(8, -1))
    assert len({tuple(row) for row in keep.tolist()}) == 8


def test_the_loss_is_on_normalised_pixels_of_the_hidden_patches(cfg, images):
    state, encoder, decoder = build_mae(cfg, torch.device("cpu"))
    keep, masked = random_keep(8, cfg, torch.device("cpu"))
    seen = encoder(images, visible_sequences(keep, cfg)).view(8, 16, 32)
    target = patches_of(normalise_pixels(images, cfg.mean_std)).gather(1, masked[:, :, None].expand(-1, -1, 48))
    target = (target - target.mean(dim=2, keepdim=True)) / (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
    expected = (decoder(seen, keep, masked) - target).square().mean()
    assert mae_loss(encoder, decoder, images, keep, masked, cfg)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_regularizer_reads_the_mean_of_what_is_seen(cfg, images):
    """A row for each image, as for a context of I-JEPA."""
    settings = ["loss.regularizer=vicreg", "loss.regularizer_weight=0.7", "loss.covariance_weight=0.5"]
    asked = load_config(BASE_CONFIG, [*SMALL, *settings])
    state, encoder, decoder = build_mae(asked, torch.device("cpu"))
    torch.manual_seed(torch_seed(0, MASK_STREAM, 0))
    keep, masked = random_keep(8, asked, torch.device("cpu"))
    pooled = encoder(images, visible_sequences(keep, asked)).view(8, 16, 32).mean(dim=1)
    added = 0.7 * (variance_hinge(pooled) + 0.5 * covariance_penalty(pooled))
    plain, _ = mae_loss(encoder, decoder, images, keep, masked, asked)
    term = regularizer_term("vicreg", 0.7, 0.5)
    total = mae_step(encoder, decoder, state, iter([images]), asked, term)
    assert added.item() > 0.01 and total.item() == pytest.approx((plain + added).item(), rel=1e-5)


def test_the_encoder_does_not_see_what_is_hidden(cfg, images):
    _, encoder, decoder = build_mae(cfg, torch.device("cpu"))
    keep, masked = random_keep(8, cfg, torch.device("cpu"))
    predicted = decoder(encoder(images, visible_sequences(keep, cfg)).view(8, 16, 32), keep, masked)
    changed = patches_of(images).clone()
    changed.scatter_(1, masked[:, :, None].expand(-1, -1, 48), 0)
    other = changed.view(8, 8, 8, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(8, 3, 32, 32)
    assert not torch.equal(other, images)
    assert torch.equal(predicted, decoder(encoder(other, visible_sequences(keep, cfg)).view(8, 16, 32), keep, masked))


def test_the_decoder_knows_where_the_patches_are(cfg, images):
    """The prediction of a patch is the same wherever in the list of hidden patches it stands."""
    _, encoder, decoder = build_mae(cfg, torch.device("cpu"))
    keep, masked = random_keep(8, cfg, torch.device("cpu"))
    seen = encoder(images, visible_sequences(keep, cfg)).view(8, 16, 32)
    torch.testing.assert_close(decoder(seen, keep, masked).flip(1), decoder(seen, keep, masked.flip(1)))


def test_it_starts_from_the_encoder_that_ijepa_starts_from(cfg):
    _, encoder, _ = build_mae(cfg, torch.device("cpu"))
    assert same_weights(encoder.state_dict(), build_pair(cfg)[0].encoder.state_dict())


def test_flops_are_those_that_torch_counts(cfg, images):
    """On attention of plain matrix products: torch counts no others on a CPU."""
    _, encoder, decoder = build_mae(cfg, torch.device("cpu"))
    use_attention(encoder, "matmul")
    for module in decoder.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    keep, masked = random_keep(8, cfg, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        mae_loss(encoder, decoder, images, keep, masked, cfg)[0].backward()
    assert mae_flops_per_image(cfg) == pytest.approx(counter.get_total_flops() / 8, rel=0.01)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config over 40 images in idx files: two epochs of five steps."""
    draw = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"idx/{prefix}-images-idx3-ubyte.gz", draw.integers(0, 256, (40, 28, 28), np.uint8))
        write_idx(tmp_path / f"idx/{prefix}-labels-idx1-ubyte.gz", np.arange(40, dtype=np.uint8) % 4)
    config = load_config(BASE_CONFIG, [*SMALL, "data.channels=1", f"data.source={tmp_path / 'idx'}"])
    (tmp_path / "mae.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return tmp_path / "mae.yaml"


def test_it_learns_and_is_read_as_any_run(file, tmp_path):
    train_mae(file, tmp_path / "run", 10)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and lines[-1]["loss"] < lines[0]["loss"]
    start, target, context = (open_subject(tmp_path / "run").encoder(which) for which in ("random", "target", "context"))
    assert same_weights(target.state_dict(), context.state_dict()) and not same_weights(target.state_dict(), start.state_dict())


def test_a_run_has_the_regularizer_of_its_config(file, tmp_path):
    settings = yaml.safe_load(file.read_text())
    train_mae(file, tmp_path / "plain", 1)
    settings["loss"] |= {"regularizer": "vicreg", "regularizer_weight": 1.0}
    file.write_text(yaml.safe_dump(settings))
    train_mae(file, tmp_path / "vicreg", 1)
    plain, more = (json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"] for name in ("plain", "vicreg"))
    assert more > plain + 0.01


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_it_continues_bit_for_bit(file, tmp_path, monkeypatch, optimizer):
    settings = yaml.safe_load(file.read_text())
    settings["optimization"]["optimizer"] = optimizer
    file.write_text(yaml.safe_dump(settings))
    hidden, hide = [], random_keep
    monkeypatch.setattr(mae, "random_keep", lambda *args: hidden.append(hide(*args)) or hidden[-1])
    train_mae(file, tmp_path / "whole", 7)
    for stop in (3, 7):
        train_mae(file, tmp_path / "parts", stop)
    assert same_weights(weights(tmp_path / "whole", 7), weights(tmp_path / "parts", 7))
    assert len(hidden) == 14  # no step was taken twice,
    assert len({tuple(masked.flatten().tolist()) for _, masked in hidden}) == 7  # and each hides other patches


def test_another_seed_hides_other_patches(cfg, images, monkeypatch):
    hidden, hide = [], random_keep
    monkeypatch.setattr(mae, "random_keep", lambda *args: hidden.append(hide(*args)) or hidden[-1])
    for seed in (0, 1):
        state, encoder, decoder = build_mae(cfg, torch.device("cpu"))
        mae_step(encoder, decoder, state, iter([images]), load_config(BASE_CONFIG, [*SMALL, f"runtime.seed={seed}"]))
    assert not torch.equal(hidden[0][1], hidden[1][1])


def test_micro_batches_of_one_step_weigh_alike(cfg, images):
    """The gradient of a step is the mean of those of its micro-batches."""
    state, encoder, decoder = build_mae(cfg, torch.device("cpu"))
    halves = load_config(BASE_CONFIG, [*SMALL, "runtime.micro_batch=4"])
    total = mae_step(encoder, decoder, state, iter(images.split(4)), halves)
    _, encoder, decoder = build_mae(cfg, torch.device("cpu"))
    torch.manual_seed(torch_seed(0, MASK_STREAM, 0))
    drawn = [random_keep(4, cfg, torch.device("cpu")) for _ in range(2)]
    losses = [mae_loss(encoder, decoder, part, *hidden, cfg)[0] for part, hidden in zip(images.split(4), drawn, strict=True)]
    assert total.item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)


@pytest.mark.parametrize(("dtype", "fused"), [("bf16", False), ("fp32", True)])
def test_on_a_cpu_in_bf16_the_decoder_attends_by_plain_products_with_the_gradients_of_the_fused_kernel(
    images, monkeypatch, dtype, fused
):
    cfg = load_config(BASE_CONFIG, [*SMALL, f"runtime.dtype={dtype}"])

    def gradients() -> tuple[torch.Tensor, bool]:
        state, encoder, decoder = build_mae(cfg, torch.device("cpu"))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            mae_step(encoder, decoder, state, iter([images]), cfg)
        ran = any("flash_attention" in event.key for event in profile.key_averages())
        return torch.cat([p.grad.flatten() for part in (encoder, decoder) for p in part.parameters() if p.requires_grad]), ran

    ours, ran = gradients()
    monkeypatch.setattr(mae, "attention_of", lambda dtype, device: nullcontext())
    plain, ran_without = gradients()
    assert (ran, ran_without) == (fused, True)
    assert (ours - plain).norm() < (0.02 if dtype == "bf16" else 1e-6) * plain.norm()
