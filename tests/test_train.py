"""The run as a user starts it: interruptions, resumption, ranks and micro-batches."""

import hashlib
import json
import os
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastjepa import train
from fastjepa.cli.main import main
from fastjepa.loss.jepa_loss import jepa_loss
from tests.support import ranks
from tests.support.runs import distances, lines, losses, same_weights, trained, wait_for_steps, weights, without_times


def test_a_run_writes_what_it_promises(toy_config, tmp_path, capsys):
    entries = trained(toy_config, tmp_path)
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


def test_a_warm_up_longer_than_the_run_is_said_at_the_start(toy_config, tmp_path, capsys):
    for steps in (1, 2):  # a new run, and a resumed one
        trained(toy_config, tmp_path, "--max-steps", steps, "optimization.warmup=40", "data.num_workers=0")
        said, _, after = capsys.readouterr().out.partition("step 1/" if steps == 1 else "step 2/")
        assert "40 epochs of warm-up in a run of 2: the learning rate ends at 0.00024" in said and "warm-up" not in after


DISTORTED = "data.use_color_distortion=true data.color_jitter_strength=1 data.use_gaussian_blur=true"


@pytest.mark.parametrize(
    "keys",
    [
        "",
        *(pytest.param(f"loss.regularizer={name}", marks=pytest.mark.slow) for name in ("vicreg", "sigreg")),
        pytest.param(DISTORTED, marks=pytest.mark.slow, id="distorted"),
    ],
)
def test_a_run_interrupted_mid_epoch_continues_bit_for_bit(toy_config, tmp_path, keys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Every step is probed: by default a run cut short is probed at its own end as well.
    settings = [*keys.split(), "logging.probe_every=1"]
    expected = trained(toy_config, whole, *settings)
    for stop in (3, 7, 8):
        trained(toy_config, parts, "--max-steps", stop, "data.num_workers=0", *settings)
    entries = trained(toy_config, parts, "--resume", "must", *settings)
    assert without_times(entries) == without_times(expected)
    assert same_weights(weights(whole, 10), weights(parts, 10))


ARMS = {
    "masked input": ["mask.strategy=rasterized", "loss.target=input", "loss.normalize=none"],
    "pixels": ["mask.strategy=block", "mask.share=batch", "loss.target=pixels"],
    "batch": ["mask.strategy=random", "loss.normalize=batch", "loss.regularizer=sigreg", "optimization.pred_lr_scale=2"],
    "rotary": ["meta.positions=rope", "meta.qk_norm=true", "meta.pred_emb_dim=16", "runtime.checkpoint_activations=true"],
    "muon": ["optimization.optimizer=muon", "optimization.muon_lr=0.01"],
}


@pytest.mark.parametrize("arm", [*(pytest.param(name, marks=pytest.mark.slow) for name in list(ARMS)[:3]), "rotary", "muon"])
def test_the_arms_of_the_ablations_train_resume_and_keep_their_objective(toy_config, tmp_path, arm):
    settings = [*ARMS[arm], "logging.monitor_every=2", "logging.probe_every=1", "data.num_workers=0"]
    expected = trained(toy_config, tmp_path / "whole", "--max-steps", 6, *settings)
    trained(toy_config, tmp_path / "parts", "--max-steps", 3, *settings)
    entries = trained(toy_config, tmp_path / "parts", "--max-steps", 6, *settings)
    assert without_times(entries) == without_times(expected)
    assert same_weights(weights(tmp_path / "parts", 6), weights(tmp_path / "whole", 6))
    assert all(0 < entry["effective_rank"] <= 32 for entry in entries[1::2]), "features are watched, not pixels"


def test_a_checkpoint_from_before_a_key_existed_resumes(toy_config, tmp_path, capsys):
    """The record lacks the key, and the optimizer's groups are the config's, not the file's."""
    trained(toy_config, tmp_path, "--max-steps", 3)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    state, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("state", "manifest"))
    del state["record"]["config"]["optimization"]["pred_lr_scale"]
    text = json.dumps(state)
    (folder / "state.json").write_text(text)
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert [entry["step"] for entry in trained(toy_config, tmp_path, "--max-steps", 5, "--resume", "must")] == [1, 2, 3, 4, 5]
    assert "config.optimization.pred_lr_scale: nothing in the checkpoint, 1.0 now" in capsys.readouterr().out


def test_micro_batches_give_the_same_run(toy_config, tmp_path):
    expected = trained(toy_config, tmp_path / "whole", "--max-steps", 4, "loss.regularizer=vicreg")
    entries = trained(toy_config, tmp_path / "micro", "--max-steps", 4, "loss.regularizer=vicreg", "runtime.micro_batch=2")
    assert [entry["loss"] for entry in entries] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)
    ours, theirs = weights(tmp_path / "micro", 4), weights(tmp_path / "whole", 4)
    for name in theirs:  # Adam turns rounding in near-zero gradients into steps: compare in norm
        assert (ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm() + 1e-6, name


@pytest.mark.slow
def test_muon_on_two_ranks_is_muon_on_one(toy_config, tmp_path):
    """Ranks share the products, with the gradient of all; the average of one step tells no rounding from a mistake."""
    settings = ["optimization.optimizer=muon", "--max-steps", 3]
    trained(toy_config, tmp_path / "one", *settings)
    two = ranks.train(2, "--config", toy_config, "--output", tmp_path / "two", "data.batch_size=4", *settings)
    ranks.succeeded(two)
    assert "runtime.zero: auto is 0 (plain DDP)" in two[0].stdout
    assert losses(lines(tmp_path / "two")) == pytest.approx(losses(lines(tmp_path / "one")), rel=1e-4)
    ours, theirs = weights(tmp_path / "two", 3), weights(tmp_path / "one", 3)
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-2 * theirs[name].norm() + 1e-6, name


def test_a_run_with_adamw_does_not_go_on_with_muon(toy_config, tmp_path, capsys):
    trained(toy_config, tmp_path, "--max-steps", 1)
    command = ["train", "--config", str(toy_config), "--output", str(tmp_path), "optimization.optimizer=muon"]
    assert main(command) == 2
    assert "encoder.blocks.0.attn" in (said := capsys.readouterr().err) and "resume with the configuration" in said


def test_other_weights_to_start_from(toy_config, tmp_path):
    trained(toy_config, tmp_path / "a", "--max-steps", 3)
    trained(toy_config, tmp_path / "b", "--max-steps", 3, "--init", tmp_path / "a", "runtime.seed=1", "optimization.lr=0.0",
            "optimization.start_lr=0.0", "optimization.final_lr=0.0", "optimization.ema=[1.0,1.0]")  # fmt: skip
    first, second = (load_file(tmp_path / run / "checkpoints/jepa-00000003/target_encoder.safetensors") for run in "ab")
    assert same_weights(first, second)
    file = tmp_path / "a/checkpoints/jepa-00000003/encoder.safetensors"
    trained(toy_config, tmp_path / "c", "--max-steps", 1, "--init", file, "data.crop_size=48", "optimization.ema=[1.0,1.0]")
    third = load_file(tmp_path / "c/checkpoints/jepa-00000001/target_encoder.safetensors")
    assert third["pos_embed"].shape[1] == 144, "positions follow the new resolution"
    encoder = load_file(file)
    assert same_weights(
        {k: v for k, v in third.items() if k != "pos_embed"}, {k: v for k, v in encoder.items() if k != "pos_embed"}
    )


def test_weights_of_another_size_are_refused(toy_config, tmp_path, capsys):
    trained(toy_config, tmp_path / "a", "--max-steps", 1)
    code = main(
        ["train", "--config", str(toy_config), "--output", str(tmp_path / "b"), "--init", str(tmp_path / "a"), "meta.depth=3"]
    )
    assert code == 2
    assert "do not fit the config's encoder" in capsys.readouterr().err


def test_a_refused_run_leaves_nothing_behind(toy_config, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", "--config", str(toy_config), "--output", str(output), "data.batch_size=64"]) == 2
    assert "fewer than one global batch of 64" in capsys.readouterr().err
    assert not output.exists()


def test_resume_must_and_never(toy_config, tmp_path, capsys):
    command = ["train", "--config", str(toy_config), "--output", str(tmp_path), "--max-steps", "1"]
    assert main([*command, "--resume", "must"]) == 2
    assert "nothing to resume from" in capsys.readouterr().err
    assert main(command) == 0
    assert main([*command, "--resume", "never", "runtime.seed=3"]) == 0
    assert len(lines(tmp_path)) == 1
    assert len(list(tmp_path.glob("checkpoints.until-*/jepa-*"))) == 1, "the earlier checkpoint is moved aside, not lost"


def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_over(toy_config, tmp_path, capsys):
    trained(toy_config, tmp_path, "--max-steps", 1)
    shard = tmp_path / "checkpoints/jepa-00000001/encoder.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert main(["train", "--config", str(toy_config), "--output", str(tmp_path)]) == 2
    assert "jepa-00000001: damaged, and there is no other" in capsys.readouterr().err
    assert len(trained(toy_config, tmp_path, "--resume", "never", "--max-steps", 1)) == 1


def test_an_official_config_decides_the_folder_and_the_tag(toy_config, tmp_path):
    official = yaml.safe_load(toy_config.read_text())
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


def test_skipped_steps_are_counted_and_time_moves_on(toy_config, tmp_path, monkeypatch):
    expected = trained(toy_config, tmp_path / "clean")
    monkeypatch.setattr(train, "jepa_loss", poisoned(lambda step: step in (2, 3)))
    entries = trained(toy_config, tmp_path / "skipping")
    assert [entry["skipped"] for entry in entries] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert entries[2]["loss"] is None
    updated = [entry["step"] for entry in entries if "ema_distance" in entry]
    assert updated == [1, 2, 6, 8, 10], "a skipped step has no update to count distances in, here the 4th"
    for name in ("lr", "weight_decay", "ema_momentum", "context_tokens"):
        assert [entry[name] for entry in entries] == [entry[name] for entry in expected]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "skipping", 10).values())


def test_too_many_skipped_steps_end_the_run_and_name_the_checkpoint(toy_config, tmp_path, monkeypatch, capsys):
    trained(toy_config, tmp_path, "--max-steps", 2)
    monkeypatch.setattr(train, "jepa_loss", poisoned(lambda step: True))
    assert main(["train", "--config", str(toy_config), "--output", str(tmp_path), "runtime.max_skipped=3"]) == 2
    message = capsys.readouterr().err
    assert "step 5" in message
    assert str(tmp_path / "checkpoints/jepa-00000002") in message


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_with_0(toy_config, tmp_path, number):
    whole = trained(toy_config, tmp_path / "whole", "optimization.epochs=20")
    process = ranks.command("train", "--config", toy_config, "--output", tmp_path / "cut", "optimization.epochs=20")
    wait_for_steps(tmp_path / "cut", 3)
    os.kill(process.pid, number)
    assert process.wait() == 0
    assert f"stopped by {number.name} after step" in process.stdout
    assert 3 <= len(lines(tmp_path / "cut")) < 100
    assert without_times(trained(toy_config, tmp_path / "cut", "optimization.epochs=20")) == without_times(whole)


@pytest.mark.parametrize("zero", ["auto", 1])
def test_two_ranks_and_micro_batches_give_the_run_of_one(toy_config, tmp_path, zero):
    expected = trained(toy_config, tmp_path / "one", "--max-steps", 5, "loss.regularizer=vicreg")
    two = ranks.train(2, "--config", toy_config, "--output", tmp_path / "two", "--max-steps", 5, "data.batch_size=4",
                      "runtime.micro_batch=2", "loss.regularizer=vicreg", f"runtime.zero={zero}")  # fmt: skip
    ranks.succeeded(two)
    assert ("runtime.zero: auto is 0 (plain DDP): about" in two[0].stdout) == (zero == "auto")
    assert losses(lines(tmp_path / "two")) == pytest.approx(losses(expected), rel=1e-5)
    assert distances(lines(tmp_path / "two")) == pytest.approx(distances(expected), rel=1e-4)


def test_two_ranks_stop_together_on_a_signal_to_one(toy_config, tmp_path):
    two = ranks.train(2, "--config", toy_config, "--output", tmp_path, "data.batch_size=4", "optimization.epochs=2000",
                      "logging.every=5")  # fmt: skip
    wait_for_steps(tmp_path, 2)
    os.kill(two[1].pid, signal.SIGTERM)
    ranks.succeeded(two)
    assert "stopped by SIGTERM" in two[0].stdout
    assert len(list((tmp_path / "checkpoints").glob("jepa-*"))) >= 1


def test_overrides_may_stand_anywhere(toy_config, tmp_path):
    command = [
        "train",
        "--config",
        toy_config,
        "logging.every=2",
        "logging.probe_every=0",
        "logging.monitor_every=0",
        "--max-steps",
        4,
        "optimization.epochs=1",
        "--output",
        tmp_path,
    ]
    assert main([str(word) for word in command]) == 0
    assert [entry["step"] for entry in lines(tmp_path)] == [2, 4]
    with pytest.raises(SystemExit):
        main([*map(str, command), "--no-such-option"])
