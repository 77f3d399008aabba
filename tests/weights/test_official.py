"""Training from the official format and into it, and what reading a ViT-H/14 of it costs."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastjepa.checkpoint.directory import find_checkpoint
from fastjepa.checkpoint.restore import load_networks, restore_checkpoint
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.checkpoint.state import TrainState, read_state
from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import Schedule
from fastjepa.errors import CheckpointError
from fastjepa.model.jepa import build_pair
from fastjepa.run.verify import (
    FINAL_TOLERANCE,
    VERIFY_TOLERANCE,
    ReferenceFile,
    reference_batch,
    relative_error,
    restored_networks,
)
from fastjepa.weights.official import adopt_training, official_contents, write_official
from tests.support.places import REFERENCES
from tests.support.steps import take_step
from tests.support.weights import SHAPE, convert, make_state, official_file, same_networks


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_checkpoint(path / "checkpoints", make_state(config_from_dict(SHAPE)))
    return path


def resumed(path: Path, root: Path, config: Config, steps_per_epoch: int) -> tuple[TrainState, PlainEngine, Average]:
    """A run that goes on from an official file, made anew and filled as the trainer fills it."""
    found = adopt_training(path, root, steps_per_epoch, {"config": config.to_dict(), "world": 1})
    jepa, target = build_pair(config)
    engine = PlainEngine(jepa)
    state = TrainState(0, {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target}, engine.optimizer)
    return restore_checkpoint(found, state), engine, Average(target, jepa.encoder)


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem)
def test_training_goes_on_from_the_official_format(tmp_path, file):
    """Three steps of a reference trajectory, handed over as an official file; steps four and five follow the reference."""
    reference = ReferenceFile(file)
    engine, target = restored_networks(reference)
    ipe, config = int(reference.meta["ipe"]), reference.config
    schedule = Schedule(config.optimization, ipe)

    def steps(engine, average, numbers):
        batches = {s: reference_batch(reference[f"step{s}.images"], *reference.masks(s)) for s in numbers}
        return [take_step(engine, average, [batches[s]], schedule(s), config).loss for s in numbers]

    steps(engine, Average(target, engine.jepa.encoder), range(3))
    networks = {"encoder": engine.jepa.encoder, "predictor": engine.jepa.predictor, "target_encoder": target}
    save_checkpoint(tmp_path / "run", TrainState(3, networks, engine.optimizer, record={"config": config.to_dict()}))
    convert(tmp_path / "run", tmp_path / "jepa.pth.tar", "--to", "meta", "--steps-per-epoch", ipe)
    state, engine, average = resumed(tmp_path / "jepa.pth.tar", tmp_path / "resumed", config, ipe)
    assert state.step == 3
    losses = steps(engine, average, range(3, 5))
    errors = [relative_error(ours, theirs) for ours, theirs in zip(losses, reference["losses"][3:5], strict=True)]
    assert max(errors) < VERIFY_TOLERANCE
    final = {f"{name}.{k}": v for name, network in state.networks.items() for k, v in network.state_dict().items()}
    assert max(relative_error(final[k], v) for k, v in reference.below("final.").items()) < FINAL_TOLERANCE


def test_the_official_optimizer_can_load_what_is_written(run, tmp_path):
    """The groups hold the positions, which are parameters there: rebuilt here, and loaded into a plain AdamW."""
    convert(run, tmp_path / "jepa.pth.tar", "--to", "meta")
    written = torch.load(tmp_path / "jepa.pth.tar", weights_only=True)
    assert (written["epoch"], written["world_size"], written["scaler"]) == (1, 2, None)
    weights, others = [], []
    for network in ("encoder", "predictor"):
        parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in written[network].items()}
        weights.append([p for name, p in parameters.items() if "bias" not in name and p.ndim != 1])
        others.append([p for name, p in parameters.items() if "bias" in name or p.ndim == 1])
    optimizer = torch.optim.AdamW([{"params": group} for group in weights + others])
    optimizer.load_state_dict(written["opt"])
    stored = load_file(find_checkpoint(run) / "optimizer.safetensors")
    assert weights[0][0] not in optimizer.state  # pos_embed
    assert torch.equal(optimizer.state[weights[0][1]]["exp_avg"], stored["encoder.patch_embed.proj.weight.exp_avg"])
    assert torch.equal(optimizer.state[others[1][-1]]["exp_avg_sq"], stored["predictor.predictor_proj.bias.exp_avg_sq"])
    assert [group["weight_decay"] for group in optimizer.param_groups][2:] == [0, 0]


def without_ours(run: Path, path: Path, **changed) -> Path:
    """A run in the official format with nothing in it of ours, at the end of an epoch."""
    write_official(path, {k: v for k, v in official_contents(run).items() if k != "fastjepa"} | changed)
    return path


def test_an_official_file_is_taken_up_at_its_epoch(run, tmp_path):
    """Bit for bit, whether or not the positions have a place in its groups, and with counts that are plain numbers."""
    expected = make_state(config_from_dict(SHAPE))
    opt = official_contents(run)["opt"]
    fixed = {0: "encoder", opt["param_groups"][1]["params"][1]: "predictor"}  # positions; the mask token comes before
    kept = [[i for i in group["params"] if i not in fixed] for group in opt["param_groups"]]
    order = {old: new for new, old in enumerate(sum(kept, []))}
    lean = {
        "state": {order[i]: entry | {"step": int(entry["step"])} for i, entry in opt["state"].items()},
        "param_groups": [
            group | {"params": [order[i] for i in ids]} for group, ids in zip(opt["param_groups"], kept, strict=True)
        ],
    }
    for name, state_dict in (("official", opt), ("lean", lean)):
        path = without_ours(run, tmp_path / f"{name}.pth.tar", opt=state_dict, epoch=3)
        state, engine, _ = resumed(path, tmp_path / name, config_from_dict(SHAPE), 5)
        assert state.step == 15
        said = read_state(tmp_path / name / "jepa-00000015")["record"]
        assert (said["world"], said["adopted"]) == (2, {"file": path.name, "epoch": 3})
        assert all(same_networks(state.networks[n].state_dict(), net.state_dict()) for n, net in expected.networks.items())
        ours, theirs = (s.optimizer.state_dict() for s in (state, expected))
        assert ours["state"].keys() == theirs["state"].keys()
        assert all(same_networks(ours["state"][i], theirs["state"][i]) for i in theirs["state"])
        assert [group["decayed"] for group in state.optimizer.param_groups] == [True, True, False, False]


def test_a_file_that_does_not_fit_is_refused(run, tmp_path):
    contents = official_contents(run)
    other, _ = official_file(tmp_path / "other.pth.tar", meta={"depth": 1})
    short = {**contents["opt"], "param_groups": contents["opt"]["param_groups"][:3]}
    moved = {**contents["opt"], "state": {i + 1: entry for i, entry in contents["opt"]["state"].items()}}
    weights = without_ours(run, tmp_path / "weights.pth.tar")
    torch.save({k: v for k, v in torch.load(weights, weights_only=True).items() if k != "opt"}, tmp_path / "no-opt.pth.tar")
    faults = {
        other: "give the YAML it was made with",
        without_ours(run, tmp_path / "short.pth.tar", opt=short): "does not belong to its networks",
        without_ours(run, tmp_path / "moved.pth.tar", opt=moved): "is not AdamW's for",
        tmp_path / "no-opt.pth.tar": "holds no opt to go on with",
    }
    for path, sentence in faults.items():
        with pytest.raises(CheckpointError, match=sentence):
            adopt_training(path, tmp_path / "out", 5, {"config": config_from_dict(SHAPE).to_dict()})
    assert not (tmp_path / "out").exists()


def test_a_run_must_say_how_long_its_epochs_are(run, tmp_path, capsys):
    state = make_state(config_from_dict(SHAPE))
    del state.record["steps_per_epoch"]
    save_checkpoint(tmp_path / "run", state)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "x.pth.tar"), "--to", "meta"]) == 2
    assert "pass --steps-per-epoch" in capsys.readouterr().err


def test_the_trainer_continues_what_was_converted(tmp_path, capsys):
    """A run is stopped, handed to the official format and back, and ends with the weights of one that never was."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(images / f"{i}.png")
    shape = SHAPE | {
        "data": SHAPE["data"] | {"source": str(images), "batch_size": 4, "num_workers": 0},
        "mask": SHAPE["mask"] | {"min_keep": 2, "truncate_group": 4},
        "optimization": {"epochs": 2, "warmup": 1},
        "runtime": SHAPE["runtime"] | {"threads": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(shape))
    common = ["--config", str(tmp_path / "config.yaml"), "--output"]
    assert main(["train", *common, str(tmp_path / "whole")]) == 0
    assert main(["train", *common, str(tmp_path / "first"), "--max-steps", "2"]) == 0
    convert(tmp_path / "first", tmp_path / "ep1.pth.tar", "--to", "meta", "--steps-per-epoch", 2)
    assert torch.load(tmp_path / "ep1.pth.tar", weights_only=True)["epoch"] == 1
    convert(tmp_path / "ep1.pth.tar", tmp_path / "second", "--to", "run", *common[:2], "--steps-per-epoch", 2)
    assert main(["train", *common, str(tmp_path / "second")]) == 0
    assert "resuming from" in capsys.readouterr().out
    whole, second = (load_networks(tmp_path / name) for name in ("whole", "second"))
    assert all(same_networks(second[name], whole[name]) for name in whole)


def test_a_bf16_run_has_the_scaler_that_the_official_code_then_loads(tmp_path):
    config = config_from_dict(SHAPE | {"runtime": {"dtype": "bf16", "device": "cpu"}})
    save_checkpoint(tmp_path / "checkpoints", make_state(config))
    contents = official_contents(tmp_path)
    torch.amp.GradScaler("cpu").load_state_dict(contents["scaler"])
    assert contents["lr"] == config.optimization.lr


def test_a_run_from_an_official_file_needs_its_yaml_and_epoch(run, tmp_path, capsys):
    path, _ = official_file(tmp_path / "jepa.pth.tar", meta={"depth": 1})
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "run"]) == 2
    assert "--to run needs --config" in capsys.readouterr().err


SYNTHETIC = """
import sys
import numpy as np
import torch
from fastjepa.config.schema import Config, DataConfig, MaskConfig, MetaConfig
from fastjepa.model.jepa import build_pair
from fastjepa.model.positions import sincos_positions
from fastjepa.weights.official import optimizer_order, write_official

class Sparse:
    "A file in which zeros are holes."
    def __init__(self, path):
        self.file = open(path, "wb")
    def write(self, data):
        values = np.frombuffer(data, np.uint8)
        self.file.seek(len(values), 1) if len(values) > 65536 and not values.any() else self.file.write(data)
        return len(values)
    def flush(self):
        self.file.flush()

meta = MetaConfig(model_name="vit_huge", pred_depth=12, pred_emb_dim=384)
with torch.device("meta"):
    jepa, target = build_pair(Config(DataConfig(crop_size=224), MaskConfig(patch_size=14), meta))
parts = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target}
networks = {name: {k: torch.zeros(t.shape) for k, t in network.state_dict().items()} for name, network in parts.items()}
networks["target_encoder"]["norm.weight"] += 1
for encoder in (networks["encoder"], networks["target_encoder"]):
    encoder["pos_embed"] = sincos_positions(1280, (16, 16))  # which say the grid
groups = optimizer_order(networks, with_fixed=True)
entries, number = {}, 0
for name in sum(groups, []):
    network, _, key = name.partition(".")
    shape = networks[network][key].shape
    entries[number] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
    number += 1
ids = iter(range(number))
opt = {"state": entries, "param_groups": [{"params": [next(ids) for _ in names]} for names in groups]}
write_official(Sparse(sys.argv[1]), networks | {"opt": opt, "scaler": None, "epoch": 300})
"""

MEASURED = """
import resource, sys
from fastjepa.cli.main import main
assert main(["convert", *sys.argv[1:]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.long
def test_a_vit_h14_converts_in_6_gb(tmp_path):
    """Zeros in place of the 10.4 GB that an official file has, so that it is holes on the disk."""

    def python(code: str, *words: object) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout

    file, out = tmp_path / "h14.pth.tar", tmp_path / "h14"
    try:
        python(SYNTHETIC, file)
        assert 10.3e9 < file.stat().st_size < 10.5e9
        peak = int(python(MEASURED, file, out, "--to", "fastjepa").split()[-1])
        assert peak < 6e9, f"{peak / 1e9:.1f} GB"
        assert json.loads((out / "config.json").read_text())["form"]["num_heads"] == 16
        assert load_file(out / "model.safetensors")["norm.weight"].eq(1).all()
    finally:
        (out / "model.safetensors").unlink(missing_ok=True)
        file.unlink(missing_ok=True)
