"""Variants of the objective as a user starts them: each is resumed, cut into micro-batches and shared by ranks unchanged."""

import json
import math
from pathlib import Path

import pytest
import torch

import fastjepa
from fastjepa.cli.main import main
from fastjepa.config.load import load_config
from fastjepa.evals.inputs import open_subject
from fastjepa.model.jepa import build_pair
from fastjepa.model.moments import MOMENTUM
from fastjepa.visualize.neighbours import load_predictor
from tests.support import ranks
from tests.support.images import save_image
from tests.support.runs import lines, losses, same_weights, trained, weights, without_times
from tests.support.teachers import write_teacher

VARIANTS = {
    "each layer": ["loss.target_layers=[1,2]"],
    "starved predictor": ["meta.predictor_context=0.25", "meta.predictor_repeats=3", "mask.num_enc_masks=2"],
    "visible": ["loss.visible_weight=0.5", "loss.visible_rise=[0,0.3]"],
    "visible, starved and joint": ["loss.visible_weight=0.5", "meta.predictor_context=0.5", "meta.predictor=joint"],
    "over the batch": ["loss.target_layers=[1,2]", "loss.layers=mean", "loss.normalize=batch", "loss.regularizer=vicreg"],
    "running": ["loss.normalize=running"],
    "running over the mean of layers": ["loss.target_layers=[1,2]", "loss.layers=mean", "loss.normalize=running"],
    "dyntanh": ["loss.normalize=dyntanh"],
    "rotary": ["meta.positions=rope", "meta.qk_norm=true", "meta.pred_emb_dim=16", "loss.target_layers=[1,2]"],
    "teacher": ["meta.teacher=TEACHER", "loss.target_layers=[1,3]", "loss.normalize=running"],
    "teacher over the batch": ["meta.teacher=TEACHER", "loss.normalize=batch", "loss.visible_weight=0.5"],
    "mean of layers": ["loss.target_layers=[1,2]", "loss.layers=mean", "loss.kind=l2"],
    "projected": ["loss.regularizer=sigreg", "loss.projector=[48,16]", "mask.num_enc_masks=2"],
}
QUIET = ["data.num_workers=0", "logging.monitor_every=0", "logging.probe_every=0"]


def settings_of(name: str, place: Path) -> list[str]:
    """Return a variant's settings, with a teacher of patches twice as large as the student's where it learns from one."""
    folder = place / "teacher"
    if any("TEACHER" in word for word in VARIANTS[name]) and not folder.exists():
        write_teacher(folder, 8, grid=(8, 8))
    return [*(word.replace("TEACHER", str(folder)) for word in VARIANTS[name]), *QUIET]


def values(output: Path) -> list[float]:
    """The losses of a run and what its regularizer adds."""
    return [entry.get(name, 0.0) for entry in lines(output) for name in ("loss", "regularizer")]


def alike(ours: Path, theirs: Path, step: int) -> None:
    """The same losses and weights but for rounding, which Adam makes steps of where gradients are near zero."""
    assert values(ours) == pytest.approx(values(theirs), rel=2e-5)
    found, expected = weights(ours, step), weights(theirs, step)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 5e-3 * expected[name].norm() + 1e-6, name


FAST = ("starved predictor", "over the batch")  # of each way in which a step's pieces hang together one


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
def test_a_variant_is_resumed_to_the_bit_and_cut_into_micro_batches(toy_config, tmp_path, name):
    whole, parts, micro = (tmp_path / run for run in ("whole", "parts", "micro"))
    settings = settings_of(name, tmp_path)
    expected = trained(toy_config, whole, "--max-steps", 6, *settings)
    trained(toy_config, parts, "--max-steps", 3, *settings)
    entries = trained(toy_config, parts, "--max-steps", 6, *settings)
    assert without_times(entries) == without_times(expected)
    assert same_weights(weights(whole, 6), weights(parts, 6))
    assert losses(expected) != losses(trained(toy_config, tmp_path / "base", "--max-steps", 6, *QUIET))
    trained(toy_config, micro, "--max-steps", 6, *settings, "runtime.micro_batch=2")
    alike(micro, whole, 6)
    moments = weights(whole, 6).get("predictor.target_moments.weight")
    assert (moments is not None) == ("loss.normalize=running" in settings)
    assert moments is None or float(moments) == pytest.approx(1 - MOMENTUM**6)


def test_an_encoder_whose_last_norm_is_a_tanh_is_read_and_written_for_those_that_have_one(toy_config, tmp_path, capsys):
    trained(toy_config, tmp_path / "run", "--max-steps", 1, *VARIANTS["dyntanh"], *QUIET)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = fastjepa.load_encoder(tmp_path / "run").forward_features(images)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "kept"), "--to", "fastjepa"]) == 0
    assert torch.equal(fastjepa.load_encoder(tmp_path / "kept").forward_features(images), features)
    for to, more, said in (("timm", [], "its last norm is a tanh"), ("transformers", [], "its last norm is a tanh"),
                           ("meta", [], "has a state that the official code has not"),
                           ("meta", ["--which", "target"], "its last norm is a tanh")):  # fmt: skip
        assert main(["convert", str(tmp_path / "run"), str(tmp_path / "other"), "--to", to, *more]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_projector_is_of_its_run_alone(toy_config, tmp_path, capsys):
    """Weights with one start a run without it, or with one of its own; predictions and encoders are read without."""
    standing = [f"optimization.{name}=0" for name in ("start_lr", "lr", "final_lr")]
    for name, keys in {"a": VARIANTS["projected"], "b": ["--init", tmp_path / "a"],
                       "c": ["--init", tmp_path / "a", *VARIANTS["projected"], *standing]}.items():  # fmt: skip
        trained(toy_config, tmp_path / name, "--max-steps", 1, *keys, *QUIET)
    a, b, c = (weights(tmp_path / name, 1) for name in "abc")
    first = build_pair(load_config(toy_config, VARIANTS["projected"]))[0].predictor.projector.state_dict()
    for name, tensor in first.items():
        stored = f"predictor.projector.{name}"
        assert stored not in b and torch.equal(c[stored], tensor) and not torch.equal(a[stored], tensor)
    predictor = load_predictor(open_subject(tmp_path / "a")).state_dict()
    assert predictor.keys() == {name.removeprefix("predictor.") for name in b if name.startswith("predictor.")}
    assert all(torch.equal(a[f"predictor.{name}"], tensor) for name, tensor in predictor.items())
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "other"), "--to", "meta"]) == 2
    assert "loss.projector has weights that the official code has not" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "kept"), "--to", "fastjepa"]) == 0


def test_other_weights_start_with_moments_of_their_own(toy_config, tmp_path):
    trained(toy_config, tmp_path / "a", "--max-steps", 2, *QUIET)
    for run, init in (("b", "a"), ("c", "b")):
        trained(toy_config, tmp_path / run, "--max-steps", 3, "--init", tmp_path / init, *VARIANTS["running"], *QUIET)
        moments = weights(tmp_path / run, 3)["predictor.target_moments.weight"]
        assert float(moments) == pytest.approx(1 - MOMENTUM**3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "each layer",
        "visible, starved and joint",
        "over the batch",
        "running over the mean of layers",
        "dyntanh",
        "rotary",
        "teacher",
        "teacher over the batch",
        "projected",
    ],
)
def test_two_ranks_give_the_run_of_one_sharded_or_not(toy_config, tmp_path, name):
    """Stage 3 holds no weight whole outside of the forward that uses it, as small as these are."""
    sharded, settings = tmp_path / "sharded.json", settings_of(name, tmp_path)
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    sharded.write_text(json.dumps({"zero_optimization": zero}))
    trained(toy_config, tmp_path / "one", "--max-steps", 6, *settings)
    more = ["--max-steps", 6, "data.batch_size=4", "runtime.micro_batch=2", *settings]
    for stage, given in ((0, ()), (3, ("--deepspeed_config", sharded))):
        words = ["--config", toy_config, "--output", tmp_path / f"zero{stage}", f"runtime.zero={stage}", *given]
        ranks.succeeded(ranks.train(2, *words, *more))
        assert values(tmp_path / f"zero{stage}") == pytest.approx(values(tmp_path / "one"), rel=2e-5)
    alike(tmp_path / "zero0", tmp_path / "one", 6)


COMPILED = ["visible, starved and joint", "projected", "mean of layers", "running", "rotary", "teacher"]  # the first: slow


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if i else pytest.mark.slow) for i, name in enumerate(COMPILED)]
)
def test_checkpointed_activations_give_the_same_bits_and_bf16_and_compile_the_same_run(toy_config, tmp_path, name):
    settings = ["--max-steps", 3, *settings_of(name, tmp_path)]
    plain = trained(toy_config, tmp_path / "plain", *settings)
    again = trained(toy_config, tmp_path / "again", *settings, "runtime.checkpoint_activations=true")
    assert losses(again) == losses(plain)
    for output, key, apart in (("bf16", "runtime.dtype=bf16", 2e-2), ("compiled", "runtime.compile=true", 1e-4)):
        assert losses(trained(toy_config, tmp_path / output, *settings, key)) == pytest.approx(losses(plain), rel=apart)


ON_PRESETS = {
    "layers": ["loss.target_layers=[2,3]"],
    "mean of layers over the batch": ["loss.target_layers=[1,2,3]", "loss.layers=mean", "loss.normalize=batch"],
    "rotary": ["meta.positions=rope", "meta.qk_norm=true"],
    "running": ["loss.normalize=running"],
    "dyntanh": ["loss.normalize=dyntanh", "loss.target_layers=last", "loss.layers=each"],
    "visreg": ["loss.regularizer=visreg"],
    "sigreg with a projector": ["loss.regularizer=sigreg", "loss.projector=[64,32]"],
    "starved": ["meta.predictor_context=0.25", "meta.predictor_repeats=4"],
    "knots": ["optimization.ema=[[0,0.9],[0.5,0.99],[1,1]]"],
    "visible": ["loss.visible_weight=0.5", "loss.visible_rise=[0,0.05]"],
    "muon": ["optimization.optimizer=muon"],
    "layers, rotary, muon": ["loss.target_layers=[2,3]", "meta.positions=rope", "optimization.optimizer=muon"],
    "layers, visible": ["loss.target_layers=[2,3]", "loss.visible_weight=0.5", "loss.visible_rise=[0,0.05]"],
    "mean of layers, joint, random": [
        "loss.target_layers=[1,2,3]", "loss.layers=mean", "loss.normalize=batch", "mask.strategy=random",
        "mask.hidden_share=0.75", "mask.pred_mask_scale=[0.15,0.2]", "meta.predictor=joint", "optimization.optimizer=muon",
    ],
    "starved, rotary, running": ["meta.predictor_context=0.5", "meta.positions=rope", "loss.normalize=running"],
}  # fmt: skip


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """160 images of two classes, in the folders of an evaluation."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(160):
        save_image(folder / "train" / "ab"[i % 2] / f"{i}.png", seed=i, size=(32, 32))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("preset", ["demo", "cifar10", "study"])
@pytest.mark.parametrize("name", ON_PRESETS)
def test_every_key_trains_on_each_small_preset(photographs, tmp_path, preset, name):
    """20 steps: the loss stays finite and, but where running moments change its scale, falls, though its target moves."""
    settings = [f"data.source={photographs}", "data.batch_size=32", "optimization.epochs=4", "optimization.warmup=1",
                "logging.every=1", "logging.monitor_every=10", "logging.probe_every=0", "loss.regularizer=none"]  # fmt: skip
    found = losses(trained(preset, tmp_path, *settings, *ON_PRESETS[name]))
    assert len(found) == 20 and all(map(math.isfinite, found))
    assert "running" in name or min(found[10:]) < max(found[:5])
