"""The run as a user starts it: every launcher, interruptions, resumption, ranks and micro-batches."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastjepa import train
from fastjepa.cli.main import main
from fastjepa.loss.jepa_loss import jepa_loss

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TINY = {
    "data": {"batch_size": 8, "crop_size": 32, "num_workers": 1},
    "mask": {"patch_size": 4, "min_keep": 4, "truncate_group": 4},
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "pred_depth": 2, "pred_emb_dim": 24},
    "optimization": {"epochs": 2, "warmup": 1, "ema": [0.9, 1.0]},
    "logging": {"every": 1, "monitor_every": 2},
    "runtime": {"dtype": "fp32", "device": "cpu", "threads": 1},
}


def write_config(directory: Path) -> Path:
    """A config over 40 small images: five steps an epoch, ten in all."""
    random = np.random.default_rng(0)
    for i in range(40):
        pixels = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(directory / f"{i:02}.png")
    file = directory / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"source": str(directory)}}))
    return file


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("images"))


def run(*command: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def trained(config: Path, output: Path, *arguments: object) -> list[dict]:
    assert main(["train", "--config", str(config), "--output", str(output), *map(str, arguments)]) == 0
    return lines(output)


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


TIMES = {"images_per_s", "mfu", "memory_gib", "monitor_share"}


def without_times(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((output / "checkpoints" / f"jepa-{step:08d}").glob("*.safetensors"))
    assert len(files) == 4
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_writes_what_it_promises(config, tmp_path, capsys):
    entries = trained(config, tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, 11))
    assert {"step", "epoch", "loss", "lr", "weight_decay", "ema_momentum", "images_per_s", "mfu", "context_tokens",
            "target_tokens", "skipped"} <= entries[0].keys()  # fmt: skip
    assert {"feature_std", "effective_rank"} <= entries[1].keys()
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert entries[-1]["epoch"] == 2
    assert {file.name for file in tmp_path.iterdir()} >= {"config.yaml", "run.json", "metrics.jsonl", "checkpoints"}
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["jepa-00000005", "jepa-00000010"]
    assert json.loads((tmp_path / "run.json").read_text())["versions"]["torch"] == torch.__version__
    assert "finished after step 10" in capsys.readouterr().out


@pytest.mark.parametrize("regularizer", ["none", "vicreg", "sigreg"])
def test_a_run_interrupted_mid_epoch_continues_bit_for_bit(config, tmp_path, regularizer):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = trained(config, whole, f"loss.regularizer={regularizer}")
    for stop in (3, 7, 8):
        trained(config, parts, "--max-steps", stop, "data.num_workers=0", f"loss.regularizer={regularizer}")
    entries = trained(config, parts, "--resume", "must", f"loss.regularizer={regularizer}")
    assert without_times(entries) == without_times(expected)
    assert same(weights(whole, 10), weights(parts, 10))


ARMS = {
    "masked input": ["mask.strategy=rasterized", "loss.target=input", "loss.normalize=none"],
    "pixels": ["mask.strategy=block", "mask.share=batch", "loss.target=pixels"],
    "batch": ["mask.strategy=random", "loss.normalize=batch", "loss.regularizer=sigreg", "optimization.pred_lr_scale=2"],
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_of_the_ablations_train_resume_and_keep_their_objective(config, tmp_path, arm):
    settings = [*ARMS[arm], "logging.monitor_every=2", "data.num_workers=0"]
    expected = trained(config, tmp_path / "whole", "--max-steps", 6, *settings)
    trained(config, tmp_path / "parts", "--max-steps", 3, *settings)
    entries = trained(config, tmp_path / "parts", "--max-steps", 6, *settings)
    assert without_times(entries) == without_times(expected)
    assert same(weights(tmp_path / "parts", 6), weights(tmp_path / "whole", 6))
    assert all(0 < entry["effective_rank"] <= 32 for entry in entries[1::2]), "features are watched, not pixels"


def test_a_checkpoint_from_before_a_key_existed_resumes(config, tmp_path, capsys):
    """The record lacks the key, and the optimizer's groups are the config's, not the file's."""
    trained(config, tmp_path, "--max-steps", 3)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    state, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("state", "manifest"))
    del state["record"]["config"]["optimization"]["pred_lr_scale"]
    text = json.dumps(state)
    (folder / "state.json").write_text(text)
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert [entry["step"] for entry in trained(config, tmp_path, "--max-steps", 5, "--resume", "must")] == [1, 2, 3, 4, 5]
    assert "config.optimization.pred_lr_scale: nothing in the checkpoint, 1.0 now" in capsys.readouterr().out


def test_micro_batches_give_the_same_run(config, tmp_path):
    expected = trained(config, tmp_path / "whole", "--max-steps", 4, "loss.regularizer=vicreg")
    entries = trained(config, tmp_path / "micro", "--max-steps", 4, "loss.regularizer=vicreg", "runtime.micro_batch=2")
    assert [entry["loss"] for entry in entries] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)
    ours, theirs = weights(tmp_path / "micro", 4), weights(tmp_path / "whole", 4)
    for name in theirs:  # Adam turns rounding in near-zero gradients into steps: compare in norm
        assert (ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm() + 1e-6, name


def test_other_weights_to_start_from(config, tmp_path):
    trained(config, tmp_path / "a", "--max-steps", 3)
    trained(config, tmp_path / "b", "--max-steps", 3, "--init", tmp_path / "a", "runtime.seed=1", "optimization.lr=0.0",
            "optimization.start_lr=0.0", "optimization.final_lr=0.0", "optimization.ema=[1.0,1.0]")  # fmt: skip
    first, second = (load_file(tmp_path / run / "checkpoints/jepa-00000003/target_encoder.safetensors") for run in "ab")
    assert same(first, second)
    file = tmp_path / "a/checkpoints/jepa-00000003/encoder.safetensors"
    trained(config, tmp_path / "c", "--max-steps", 1, "--init", file, "data.crop_size=48", "optimization.ema=[1.0,1.0]")
    third = load_file(tmp_path / "c/checkpoints/jepa-00000001/target_encoder.safetensors")
    assert third["pos_embed"].shape[1] == 144, "positions follow the new resolution"
    encoder = load_file(file)
    assert same({k: v for k, v in third.items() if k != "pos_embed"}, {k: v for k, v in encoder.items() if k != "pos_embed"})


def test_weights_of_another_size_are_refused(config, tmp_path, capsys):
    trained(config, tmp_path / "a", "--max-steps", 1)
    code = main(
        ["train", "--config", str(config), "--output", str(tmp_path / "b"), "--init", str(tmp_path / "a"), "meta.depth=3"]
    )
    assert code == 2
    assert "do not fit the config's encoder" in capsys.readouterr().err


def test_a_refused_run_leaves_nothing_behind(config, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", "--config", str(config), "--output", str(output), "data.batch_size=64"]) == 2
    assert "fewer than one global batch of 64" in capsys.readouterr().err
    assert not output.exists()


def test_resume_must_and_never(config, tmp_path, capsys):
    command = ["train", "--config", str(config), "--output", str(tmp_path), "--max-steps", "1"]
    assert main([*command, "--resume", "must"]) == 2
    assert "nothing to resume from" in capsys.readouterr().err
    assert main(command) == 0
    assert main([*command, "--resume", "never", "runtime.seed=3"]) == 0
    assert len(lines(tmp_path)) == 1
    assert len(list(tmp_path.glob("checkpoints.until-*/jepa-*"))) == 1, "the earlier checkpoint is moved aside, not lost"


def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_over(config, tmp_path, capsys):
    trained(config, tmp_path, "--max-steps", 1)
    shard = tmp_path / "checkpoints/jepa-00000001/encoder.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert main(["train", "--config", str(config), "--output", str(tmp_path)]) == 2
    assert "jepa-00000001: damaged, and there is no other" in capsys.readouterr().err
    assert len(trained(config, tmp_path, "--resume", "never", "--max-steps", 1)) == 1


def test_an_official_config_decides_the_folder_and_the_tag(config, tmp_path):
    official = yaml.safe_load(config.read_text())
    official["logging"] |= {"folder": str(tmp_path / "official"), "write_tag": "h14"}
    file = tmp_path / "official.yaml"
    file.write_text(yaml.safe_dump(official))
    assert main(["train", "--config", str(file), "--max-steps", "2"]) == 0
    assert (tmp_path / "official/checkpoints/h14-00000002").is_dir()
    official["meta"] |= {"load_checkpoint": True, "read_checkpoint": "h14-00000002"}
    file.write_text(yaml.safe_dump(official))
    assert main(["train", "--config", str(file), "--max-steps", "3"]) == 0
    assert [entry["step"] for entry in lines(tmp_path / "official")] == [1, 2, 3]


def poisoned(when):
    """jepa_loss that gives NaN gradients at the steps `when` accepts."""
    calls = iter(range(1000))

    def loss(*args):
        value = train_loss(*args)
        return value * float("nan") if when(next(calls)) else value

    return loss


train_loss = jepa_loss


def test_skipped_steps_are_counted_and_time_moves_on(config, tmp_path, monkeypatch):
    expected = trained(config, tmp_path / "clean")
    monkeypatch.setattr(train, "jepa_loss", poisoned(lambda step: step in (2, 3)))
    entries = trained(config, tmp_path / "skipping")
    assert [entry["skipped"] for entry in entries] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert entries[2]["loss"] is None
    for name in ("lr", "weight_decay", "ema_momentum", "context_tokens"):
        assert [entry[name] for entry in entries] == [entry[name] for entry in expected]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "skipping", 10).values())


def test_too_many_skipped_steps_end_the_run_and_name_the_checkpoint(config, tmp_path, monkeypatch, capsys):
    trained(config, tmp_path, "--max-steps", 2)
    monkeypatch.setattr(train, "jepa_loss", poisoned(lambda step: True))
    assert main(["train", "--config", str(config), "--output", str(tmp_path), "runtime.max_skipped=3"]) == 2
    message = capsys.readouterr().err
    assert "step 5" in message
    assert str(tmp_path / "checkpoints/jepa-00000002") in message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_saves_and_exits_with_0(config, tmp_path, number):
    trained(config, tmp_path / "whole", "optimization.epochs=20")
    command = [sys.executable, "fastjepa/train.py", "--config", config, "--output", tmp_path / "cut", "optimization.epochs=20"]
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "cut/metrics.jsonl").exists() or len(lines(tmp_path / "cut")) < 3:
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"stopped by {number.name} after step" in out
    assert 3 <= len(lines(tmp_path / "cut")) < 100
    trained(config, tmp_path / "cut", "optimization.epochs=20")
    assert without_times(lines(tmp_path / "cut")) == without_times(lines(tmp_path / "whole"))


LAUNCHERS = {
    "script": [sys.executable, "fastjepa/train.py", "--local_rank=0"],
    "command": [BIN / "fastjepa", "train"],
    "torchrun": [BIN / "torchrun", "--nproc_per_node", 1, "--master_port", 29611, "fastjepa/train.py"],
    "deepspeed": [BIN / "deepspeed", "--num_accelerators", 1, "--master_port", 29612, "fastjepa/train.py"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_starts_the_same_run(config, tmp_path, launcher):
    expected = trained(config, tmp_path / "expected", "--max-steps", 3)
    arguments = ["--config", config, "--output", tmp_path / "run", "--max-steps", 3]
    done = run(*LAUNCHERS[launcher], *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert without_times(lines(tmp_path / "run")) == without_times(expected)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_give_the_run_of_one(config, tmp_path, launcher):
    expected = trained(config, tmp_path / "one", "--max-steps", 5, "loss.regularizer=vicreg")
    ranks = {"torchrun": [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", 29613],
             "deepspeed": [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", 29614]}[launcher]  # fmt: skip
    zero = {"torchrun": "auto", "deepspeed": 1}[launcher]
    arguments = ["--config", config, "--output", tmp_path / "two", "--max-steps", 5, f"runtime.zero={zero}"]
    done = run(*ranks, "fastjepa/train.py", *arguments, "data.batch_size=4", "runtime.micro_batch=2", "loss.regularizer=vicreg")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("runtime.zero: auto is 0 (plain DDP): about" in done.stdout) == (zero == "auto")
    assert [entry["loss"] for entry in lines(tmp_path / "two")] == pytest.approx([e["loss"] for e in expected], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_stop_together_on_a_signal_to_one(config, tmp_path):
    arguments = ["--config", config, "--output", tmp_path, "data.batch_size=4", "optimization.epochs=2000", "logging.every=5"]
    command = [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", 29615, "fastjepa/train.py", *arguments]
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics.jsonl").exists() or len(lines(tmp_path)) < 2:
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped by SIGTERM" in out
    assert len(list((tmp_path / "checkpoints").glob("jepa-*"))) >= 1


def test_overrides_may_stand_anywhere(config, tmp_path):
    command = ["train", "--config", config, "logging.every=2", "--max-steps", 4, "optimization.epochs=1", "--output", tmp_path]
    assert main([str(word) for word in command]) == 0
    assert [entry["step"] for entry in lines(tmp_path)] == [2, 4]
    with pytest.raises(SystemExit):
        main([*map(str, command), "--no-such-option"])
