"""A frozen teacher's features as targets: against resized images, plain layers and a plain loss; and what is refused."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastjepa import load_encoder
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import StepSettings
from fastjepa.errors import ConfigError
from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.objective import choose_objective
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import build_pair
from fastjepa.model.vit import use_attention
from fastjepa.plan.flops import flops_per_image
from fastjepa.plan.plan import Cards, plan_run, settle_teacher, workload_of
from fastjepa.run.build import place_teacher
from fastjepa.run.step import Step
from fastjepa.weights.hub_folders import write_fastjepa
from fastjepa.weights.teacher import hash_of_weights
from tests.support.networks import masks, perturbed, plain_jepa, small
from tests.support.teachers import MEAN, STD, write_teacher

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def by_channel(values) -> torch.Tensor:
    return torch.tensor(values)[:, None, None]


def settled(folder, **sections):
    """The config of a run of 4 x 4 patches of 8 pixels that learns from the teacher in `folder`, and that teacher."""
    meta = {"teacher": str(folder)} | sections.pop("meta", {})
    config, teacher = settle_teacher(small(meta=meta, **sections))
    assert place_teacher(teacher, config, CPU) is not None
    return config, teacher


def batch_of(config, images=IMAGES) -> Batch:
    return Batch(images, *pack(*masks(), packing=Masking.of(config).packing), bad=())


def shown(patch_size: int) -> torch.Tensor:
    """The images as the teacher's own: 4 patches a side, normalised by its mean and deviation."""
    pixels = F.interpolate(IMAGES / 255, (4 * patch_size, 4 * patch_size), mode="bilinear", antialias=True)
    return (pixels - by_channel(MEAN)) / by_channel(STD)


def plain_features(folder, patch_size: int, layers) -> list[torch.Tensor]:
    """(b, N, D) of each layer, seen by hooks while the encoder gives its last."""
    encoder, found = load_encoder(folder, positions="computed"), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, given, out: found.append(out.view(3, 16, -1)))
    last = encoder.forward_features(shown(patch_size))
    return [last] if layers == "last" else [found[number - 1] for number in layers]


def by_hand(config, features: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the student's gradients: block by block, context by context, image by image, layer by layer."""
    jepa, (context, target) = perturbed(build_pair(config)[0]), masks()
    mean, std = map(by_channel, config.mean_std)
    prediction, _ = plain_jepa(jepa, (IMAGES / 255 - mean) / std, context, target)
    normal = (lambda rows: F.layer_norm(rows, rows.shape[-1:])) if config.loss.normalize == "layer" else (lambda rows: rows)
    wanted = [normal(rows) for rows in features]
    wanted = [normal(sum(wanted) / len(wanted))] if config.loss.layers == "mean" else wanted
    loss, at = 0.0, 0
    for r, _, i in itertools.product(range(3), range(2), range(3)):
        patches = np.flatnonzero(target[i, r])
        said = prediction[at : at + len(patches)].split(48, dim=1)
        loss = loss + sum(F.smooth_l1_loss(ours, rows[i, patches]) for ours, rows in zip(said, wanted, strict=True)) / len(
            wanted
        )
        at += len(patches)
    loss = loss / 18
    loss.backward()
    return loss, [p.grad for p in jepa.parameters()]


@pytest.mark.parametrize("patch_size", [8, 6, 12])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"normalize": "none"},
        {"target_layers": [1, 3]},
        {"target_layers": [1, 2], "layers": "mean"},
    ],
    ids=str,
)
def test_targets_are_the_features_of_resized_crops(tmp_path, patch_size: int, keys: dict):
    """Loss and gradients, for a teacher of another width, depth, patch size, mean and deviation than the student."""
    folder = write_teacher(tmp_path / "teacher", patch_size)
    config, teacher = settled(folder, loss=keys)
    expected, gradients = by_hand(config, plain_features(folder, patch_size, config.loss.target_layers))

    jepa, target_encoder = perturbed(build_pair(config)[0]), build_pair(config)[1]
    objective, batch = choose_objective(config.loss, NoRegularizer(), None, teacher), batch_of(config)
    target = objective.targets(target_encoder, batch)
    prediction, *_ = jepa(batch.images, batch.context, batch.blocks)
    loss = jepa_loss(prediction, target, batch.blocks, objective.distance, objective.normalization)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(jepa.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("patch_size", [8, 12])
def test_normalised_images_give_the_targets_of_their_bytes(tmp_path, patch_size: int):
    config, teacher = settled(write_teacher(tmp_path / "teacher", patch_size))
    objective, target_encoder = choose_objective(config.loss, NoRegularizer(), None, teacher), build_pair(config)[1]
    mean, std = map(by_channel, config.mean_std)
    bytes_, floats = (objective.targets(target_encoder, batch_of(config, x)) for x in (IMAGES, (IMAGES / 255 - mean) / std))
    torch.testing.assert_close(floats, bytes_, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_another_grid_takes_the_positions_of_the_runs(tmp_path):
    """It was trained on 5 x 5 patches; the file's features with computed positions are the same, and the user is told."""
    folder = write_teacher(tmp_path / "teacher", 12, grid=(5, 5))
    config, teacher = settle_teacher(small(meta={"teacher": str(folder)}))
    (told,) = place_teacher(teacher, config, CPU)
    assert told == "the teacher sees 48x48 pixels with the positions of 4x4 patches; it was trained on 5x5"
    torch.testing.assert_close(teacher.forward_features(shown(12)), plain_features(folder, 12, "last")[0])


def test_a_block_may_be_seen_alone(tmp_path):
    config, teacher = settled(write_teacher(tmp_path / "teacher", 12), loss={"target": "input"})
    batch = batch_of(config)
    found = choose_objective(config.loss, NoRegularizer(), None, teacher).targets(build_pair(config)[1], batch)
    images, target = shown(12), masks()[1]
    for i, r in itertools.product(range(3), range(3)):
        alone = teacher(images[i : i + 1], pack(target[i : i + 1, r : r + 1], target[i : i + 1, r : r + 1])[0])
        rows = slice(*batch.target.cu_seqlens[3 * r + i : 3 * r + i + 2].tolist())
        torch.testing.assert_close(found[rows], alone)


def test_the_average_follows_and_is_not_asked_and_the_teacher_stays(tmp_path, monkeypatch):
    """The features that are watched for collapse are the context's; only wanted rows leave the teacher's last block."""
    config, teacher = settled(write_teacher(tmp_path / "teacher"), data={"batch_size": 3})
    jepa, target_encoder = build_pair(config)
    monkeypatch.setattr(target_encoder, "forward", lambda *_, **__: pytest.fail("the target network was run"))
    engine, batch, rows = PlainEngine(jepa), batch_of(config), []
    step = Step(engine, Average(target_encoder, jepa.encoder), choose_objective(config.loss, NoRegularizer(), None, teacher))
    before, average = hash_of_weights(teacher), target_encoder.blocks[0].mlp.fc1.weight.clone()
    for block in teacher.blocks:
        block.mlp.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    tallies = [step([batch], StepSettings(lr=3e-3, weight_decay=0.0, ema_momentum=0.9))[0] for _ in range(20)]
    assert tallies[-1].loss < 0.9 * tallies[0].loss
    assert tallies[0].features.shape == (len(batch.context.idx), 32)
    assert rows[:3] == [48, 48, len(batch.target.idx)]
    assert hash_of_weights(teacher) == before and not torch.equal(target_encoder.blocks[0].mlp.fc1.weight, average)


def test_in_bf16_the_matrices_alone_are_narrow_and_the_features_those_of_autocast(tmp_path):
    folder = write_teacher(tmp_path / "teacher")
    _, wide = settled(folder)
    _, narrow = settled(folder, runtime={"dtype": "bf16"})
    assert {p.dtype for p in narrow.parameters() if p.ndim > 1} == {torch.bfloat16}
    assert {p.dtype for p in narrow.parameters() if p.ndim == 1} == {torch.float32}
    use_attention(wide, narrow.blocks[0].attn.way)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow(IMAGES), wide(IMAGES))


def test_a_hash_is_of_every_weight_and_of_what_else_decides_the_features(tmp_path):
    teachers = [settled(write_teacher(tmp_path / str(i), seed=seed))[1] for i, seed in enumerate((0, 0, 1))]
    assert hash_of_weights(teachers[0]) == hash_of_weights(teachers[1]) != hash_of_weights(teachers[2])
    teachers[1].blocks[-1].mlp.fc2.weight[-1, -1] += 1e-6
    assert hash_of_weights(teachers[1]) != hash_of_weights(teachers[0])
    other = settled(write_teacher(tmp_path / "mean", mean=(0.5, 0.5, 0.5)))[1]
    assert hash_of_weights(other) != hash_of_weights(teachers[0])


def test_the_config_takes_the_shape_of_the_file(tmp_path):
    folder = write_teacher(tmp_path / "teacher", 12)
    config, _ = settled(folder, loss={"target_layers": [2, 3]})
    assert config.meta.teacher_shape == (48, 3, 4, 96, 12)
    assert (config.target_dim, config.target_depth, config.predicted_dim) == (48, 3, 96)
    with pytest.raises(
        ConfigError, match=r"meta.teacher_shape: \[48, 3, 4, 96, 8\] is not that of .*, \[48, 3, 4, 96, 12\]; leave"
    ):
        settled(folder, meta={"teacher_shape": [48, 3, 4, 96, 8]})
    with pytest.raises(ConfigError, match="meta.teacher_shape: is not known here"):
        build_pair(small(meta={"teacher": str(folder)}))


def with_positions(path: Path, positions: torch.Tensor) -> Path:
    """A teacher of 5 x 5 patches with other positions than sine-cosine ones."""
    encoder = load_encoder(write_teacher(path.with_name("plain"), grid=(5, 5)))
    encoder.pos_embed = positions
    write_fastjepa(path, encoder.form, encoder.state_dict())
    return path


def unread(path: Path) -> Path:
    return path


SHAPE = [48, 3, 4, 96, 8]
REFUSED = {  # what writes the teacher, keys of the run, and a part of the sentence
    "channels": (lambda p: write_teacher(p, channels=1, mean=(0.5,), std=(0.5,)), {}, "takes images of 1 channels, and data"),
    "class token": (lambda p: with_positions(p, torch.randn(1, 26, 48)), {}, r"pos_embed is \(1, 26, 48\)"),
    "learned": (
        lambda p: with_positions(p, torch.randn(1, 25, 48)),
        {},
        "learned positions of 5x5 patches, and crops are cut",
    ),
    "absent": (unread, {}, "teacher is not there; name a run, a checkpoint or a file of weights"),
    "empty": (lambda p: p.mkdir() or p, {}, "meta.teacher: .* holds no complete checkpoint"),
    "layers": (write_teacher, {"loss": {"target_layers": [2, 4]}}, "4 is no block of a teacher of 3; name blocks"),
    "pixels": (unread, {"loss": {"target": "pixels"}}, "loss.target pixels asks no network for targets"),
    "dyntanh": (unread, {"loss": {"normalize": "dyntanh"}}, "dyntanh is the last norm of the run's own encoder"),
    "fp8": (unread, {"meta": {"embed_dim": 768}, "runtime": {"target_fp8": True}}, "runtime.target_fp8: meta.teacher replaces"),
    "shape alone": (unread, {"meta": {"teacher": None, "teacher_shape": SHAPE}}, "meta.teacher_shape: means nothing without"),
}


FEW = {"min_keep": 2, "truncate_group": 4}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plan_holds_the_teachers_weights_on_every_rank_and_reads_its_file(tmp_path, dtype: str):
    folder = write_teacher(tmp_path / "teacher", 12)
    config, teacher = settled(folder, mask=FEW, runtime={"dtype": dtype})
    held = sum(p.nbytes for p in teacher.parameters())
    asked = small(mask=FEW, meta={"teacher": str(folder)}, runtime={"dtype": dtype})  # its shape is not known yet
    found = plan_run(asked, Cards(count=4))
    assert {needs["teacher"] for needs in found["stages"].values()} == {held}
    assert found["flops_per_image"] == flops_per_image(workload_of(config), 4 * config.data.batch_size)
    assert plan_run(small(mask=FEW), Cards())["stages"][0]["teacher"] == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_teach_is_refused(tmp_path, name: str):
    make, sections, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        settled(make(tmp_path / "teacher"), **sections)
