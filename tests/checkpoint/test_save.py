"""Checkpoints under kills, damage, full disks and mismatches; and bitwise, always."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastjepa.checkpoint import save
from fastjepa.checkpoint.directory import complete_checkpoints, find_checkpoint, latest_checkpoint, verify_checkpoint
from fastjepa.checkpoint.restore import load_networks, restore_checkpoint
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.checkpoint.state import TrainState, read_state, record_differences
from fastjepa.errors import CheckpointError, UserError
from fastjepa.model.jepa import NETWORKS
from tests.support import ranks


def make(seed=0, fused=True, width=8, step=0) -> TrainState:
    """Three small networks and an AdamW over two of them; one buffer is bf16."""
    torch.manual_seed(seed)
    networks = {name: nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 4)) for name in NETWORKS}
    networks["target_encoder"].register_buffer("shadow", torch.randn(5).bfloat16())
    weights = [p for name in ("encoder", "predictor") for p in networks[name].parameters() if p.ndim > 1]
    others = [p for name in ("encoder", "predictor") for p in networks[name].parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": others}], lr=1e-2, fused=fused)
    return TrainState(step, networks, optimizer, record={"threads": 1})


def train(state: TrainState, steps: int) -> list[float]:
    """Steps whose data depend on the step alone, and an EMA."""
    losses = []
    encoder, predictor, target = (state.networks[name] for name in NETWORKS)
    for _ in range(steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(state.step))
        loss = (predictor(encoder(x)) - target(x).detach()).square().mean()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        with torch.no_grad():
            for average, value in zip(target.parameters(), encoder.parameters(), strict=True):
                average.lerp_(value, 0.1)
        state.step += 1
        losses.append(loss.item())
    return losses


def everything(state: TrainState) -> dict:
    """Every bit of a state, as bytes, for comparison."""
    tensors = {f"{name}.{key}": t for name, network in state.networks.items() for key, t in network.state_dict().items()}
    for i, group in enumerate(state.optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            tensors |= {f"optimizer.{i}.{j}.{key}": t for key, t in state.optimizer.state.get(p, {}).items()}
    bits = {
        name: (t.dtype, t.shape, t.detach().contiguous().flatten().view(torch.uint8).tolist()) for name, t in tensors.items()
    }
    return bits | {"counters": (state.step, state.skipped, state.skipped_in_row, list(state.bad_files))}


def names(root) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("stepped", [0, 2])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, fused, stepped):
    run = make(fused=fused)
    train(run, 3)
    run.skipped, run.skipped_in_row, run.bad_files = 4, 1, ["a/b é.jpg"]
    at_save = everything(run)
    path = save_checkpoint(tmp_path, run)
    assert path.name == "jepa-00000003" and everything(run) == at_save

    resumed = make(seed=1, fused=fused)
    train(resumed, stepped)  # restores over an optimizer with and without state
    assert restore_checkpoint(path, resumed) is resumed
    assert everything(resumed) == at_save
    assert train(run, 4) == train(resumed, 4)
    assert everything(resumed) == everything(run)
    assert float(resumed.optimizer.state[resumed.networks["encoder"][0].weight]["step"]) == 7.0


def test_restoring_works_in_place(tmp_path):
    run = make()
    train(run, 1)
    path = save_checkpoint(tmp_path, run)
    weight = run.networks["encoder"][0].weight
    kept = [weight.data_ptr(), *(t.data_ptr() for t in run.optimizer.state[weight].values())]
    train(run, 1)
    restore_checkpoint(path, run)
    assert kept == [weight.data_ptr(), *(t.data_ptr() for t in run.optimizer.state[weight].values())]


def test_a_checkpoint_before_the_first_step_takes_the_optimizer_back_to_no_state(tmp_path):
    path = save_checkpoint(tmp_path, make())
    later = make(seed=1)
    train(later, 2)
    restore_checkpoint(path, later)
    assert everything(later) == everything(make()) and not later.optimizer.state


def test_names_come_from_the_modules_and_no_file_is_a_pickle(tmp_path):
    run = make()
    train(run, 1)
    path = save_checkpoint(tmp_path, run)
    stored = load_file(path / "optimizer.safetensors")
    assert {name for name in stored if name.startswith("predictor.2.")} == {
        f"predictor.2.{parameter}.{moment}" for parameter in ("weight", "bias") for moment in ("step", "exp_avg", "exp_avg_sq")
    }
    weights = [f"{name}.safetensors" for name in ("encoder", "optimizer", "predictor", "target_encoder")]
    assert names(path) == sorted([*weights, "manifest.json", "state.json"])
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == set(names(path)) - {"manifest.json"}
    assert read_state(path)["record"] == {"threads": 1}
    assert {file.stat().st_mode for file in path.iterdir()} == {(path / "state.json").stat().st_mode}


def test_optimizer_state_that_shares_one_buffer_is_saved(tmp_path):
    """Flat moments, and one step counter for all parameters."""
    run = make()
    train(run, 1)
    states = list(run.optimizer.state.values())
    flat = torch.cat([state["exp_avg"].flatten() for state in states])
    for state, piece in zip(states, flat.split([state["exp_avg"].numel() for state in states]), strict=True):
        state["exp_avg"] = piece.view_as(state["exp_avg"])
        state["step"] = states[0]["step"]
    before = everything(run)
    restored = make(seed=1)
    restore_checkpoint(save_checkpoint(tmp_path, run), restored)
    assert everything(restored) == before


def test_keep_last_prunes_older_ones_and_never_what_is_newer_or_of_another_tag(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, make(step=step), keep_last=2)
    save_checkpoint(tmp_path, make(step=1), tag="other")
    assert names(tmp_path) == ["jepa-00000003", "jepa-00000004", "other-00000001"]
    save_checkpoint(tmp_path, make(step=2), keep_last=1)  # a run taken back to an earlier step
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["jepa-00000002", "jepa-00000003", "jepa-00000004"]
    assert latest_checkpoint(tmp_path).name == "jepa-00000004" and latest_checkpoint(tmp_path, "other").name == "other-00000001"


def test_a_damaged_newest_one_does_not_cost_the_last_good_one(tmp_path):
    good, damaged = save_checkpoint(tmp_path, make(step=1)), save_checkpoint(tmp_path, make(step=2))
    (damaged / "encoder.safetensors").write_bytes(b"")
    newest = save_checkpoint(tmp_path, make(step=3), keep_last=2)
    assert complete_checkpoints(tmp_path) == [good, newest]


def test_keep_last_and_the_tag_are_checked(tmp_path):
    with pytest.raises(UserError, match=r"logging\.keep_last"):
        save_checkpoint(tmp_path, make(), keep_last=0)
    with pytest.raises(UserError, match=r"logging\.write_tag"):
        save_checkpoint(tmp_path, make(), tag="a/b")


def test_saving_a_step_again(tmp_path):
    path = save_checkpoint(tmp_path, make(step=5))
    inode = path.stat().st_ino
    assert save_checkpoint(tmp_path, make(step=5)) == path and path.stat().st_ino == inode  # equal: left alone
    save_checkpoint(tmp_path, make(seed=1, step=5))  # other weights: replaced
    restored = restore_checkpoint(path, make(seed=2))
    assert everything(restored) == everything(make(seed=1, step=5)) and names(tmp_path) == [path.name]


def test_saving_a_step_again_over_a_damaged_one_mends_it(tmp_path):
    path = save_checkpoint(tmp_path, make(step=5))
    flip(path / "encoder.safetensors")
    save_checkpoint(tmp_path, make(step=5))
    verify_checkpoint(path)
    (path / "manifest.json").unlink()
    save_checkpoint(tmp_path, make(step=5))
    verify_checkpoint(path)


def flip(file) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def truncate(file) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("name", ["encoder.safetensors", "target_encoder.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip, truncate])
def test_damage_is_named_with_what_was_expected_and_found_and_changes_nothing(tmp_path, name, damage):
    run = make()
    train(run, 1)
    path = save_checkpoint(tmp_path, run)
    damage(path / name)
    assert (latest_checkpoint(tmp_path) is None) == (damage is truncate)  # a wrong size is seen without reading the file
    other = make(seed=1)
    before = everything(other)
    with pytest.raises(
        CheckpointError, match=rf"{name}: damaged, expected {'sha256' if damage is flip else 'bytes'} \w+ and found \w+"
    ):
        restore_checkpoint(path, other)
    assert everything(other) == before


def test_a_missing_file_or_manifest_is_named(tmp_path):
    path = save_checkpoint(tmp_path, make())
    (path / "predictor.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"predictor\.safetensors: expected, and not there"):
        verify_checkpoint(path)
    (path / "manifest.json").write_text("{")
    assert complete_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing or unreadable"):
        restore_checkpoint(path, make())


def wider() -> TrainState:
    return make(seed=1, width=9)


def missing() -> TrainState:
    state = make(seed=1)
    state.networks["target_encoder"].append(nn.LayerNorm(4))
    return state


def extra() -> TrainState:
    state = make(seed=1)
    del state.networks["target_encoder"].shadow
    return state


def rounded() -> TrainState:
    state = make(seed=1)
    state.networks["target_encoder"].bfloat16()
    return state


def rounded_moments() -> TrainState:
    state = make(seed=1)
    train(state, 1)
    last = state.optimizer.state[state.networks["predictor"][2].bias]
    last["exp_avg_sq"] = last["exp_avg_sq"].bfloat16()
    return state


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            wider,
            r"encoder\.safetensors: 0\.weight is float32 \(8, 4\) in the checkpoint and float32 \(9, 4\) in this run; resume",
        ),
        (missing, r"target_encoder\.safetensors: 3\.weight is absent in the checkpoint and float32 \(4,\) in this run"),
        (extra, r"target_encoder\.safetensors: shadow is bfloat16 \(5,\) in the checkpoint and absent in this run"),
        (
            rounded,
            r"target_encoder\.safetensors: 0\.weight is float32 \(8, 4\) in the checkpoint and bfloat16 \(8, 4\) in this run",
        ),
        (
            rounded_moments,
            r"optimizer\.safetensors: predictor\.2\.bias\.exp_avg_sq is float32 \(4,\) .* bfloat16 \(4,\) in this run",
        ),
    ],
)
def test_a_mismatch_names_the_first_parameter_and_changes_nothing(tmp_path, other, message):
    run = make()
    train(run, 2)
    path = save_checkpoint(tmp_path, run)
    state = other()
    before = everything(state)
    with pytest.raises(CheckpointError, match=message):
        restore_checkpoint(path, state)
    assert everything(state) == before


def test_an_optimizer_that_is_not_adamw_or_holds_strangers_is_refused(tmp_path):
    run = make()
    run.optimizer = torch.optim.SGD(run.networks["encoder"].parameters(), lr=0.1, momentum=0.9)
    run.networks["encoder"](torch.ones(1, 4)).sum().backward()
    run.optimizer.step()
    with pytest.raises(CheckpointError, match="is not .*; use AdamW"):
        save_checkpoint(tmp_path, run)
    run.optimizer = torch.optim.AdamW(nn.Linear(2, 3).parameters())
    with pytest.raises(CheckpointError, match=r"a parameter \(3, 2\) of no saved network"):
        save_checkpoint(tmp_path, run)
    assert list(tmp_path.iterdir()) == []


def test_networks_load_from_a_run_a_checkpoint_or_a_file(tmp_path):
    run = make(step=3)
    save_checkpoint(tmp_path / "checkpoints", make(seed=1, step=2), tag="z")
    path = save_checkpoint(tmp_path / "checkpoints", run)
    expected = run.networks["target_encoder"].state_dict()
    for where in (tmp_path, tmp_path / "checkpoints", path, str(tmp_path)):
        assert find_checkpoint(where) == path
        loaded = load_networks(where)
        assert list(loaded) == list(NETWORKS)
        assert all(torch.equal(loaded["target_encoder"][name], tensor) for name, tensor in expected.items())
    assert list(load_networks(path / "target_encoder.safetensors")) == ["target_encoder"]
    save_file({f"target_encoder.{name}": tensor for name, tensor in expected.items()}, tmp_path / "one.safetensors")
    assert load_networks(tmp_path / "one.safetensors")["target_encoder"].keys() == expected.keys()
    save_file(dict(expected), tmp_path / "backbone.safetensors")
    assert load_networks(tmp_path / "backbone.safetensors")["encoder"].keys() == expected.keys()


def test_loading_what_is_not_there_or_damaged_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        load_networks(tmp_path)
    with pytest.raises(CheckpointError, match=r"none\.safetensors: not a readable safetensors file"):
        load_networks(tmp_path / "none.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle.pth")
    with pytest.raises(CheckpointError, match=r"pickle\.pth: not a readable safetensors file"):
        load_networks(tmp_path / "pickle.pth")
    path = save_checkpoint(tmp_path, make())
    flip(path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors: damaged"):
        load_networks(path)


def test_differences_between_records_are_lines(tmp_path):
    saved = json.loads(
        json.dumps({"threads": 2, "world": 1, "versions": {"torch": "2.11"}, "config": {"data": {"crop": (1, 2)}}})
    )
    same = {"threads": 2, "world": 1, "versions": {"torch": "2.11"}, "config": {"data": {"crop": (1, 2)}}}
    assert record_differences(saved, same) == []
    now = same | {"threads": 4, "versions": {"torch": "2.14"}, "machine": "b"}
    del now["world"]
    assert record_differences(saved, now) == [
        "threads: 2 in the checkpoint, 4 now",
        "world: 1 in the checkpoint, nothing now",
        "versions.torch: 2.11 in the checkpoint, 2.14 now",
        "machine: nothing in the checkpoint, b now",
    ]


def test_everything_is_on_disk_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("rename"), replace(old, new)))
    path = save_checkpoint(tmp_path, make())
    rename = events.index("rename")
    before = [os.path.basename(event) for event in events[:rename]]
    assert sorted(before[:-2]) == sorted(set(names(path)) - {"manifest.json"})
    assert before[-2] == "manifest.json" and before[-1].startswith(".tmp-")
    assert events[rename + 1] == str(tmp_path)


def kill_at(moment: int) -> None:
    """Let this process kill itself before or after the `moment`-th call that changes the disk, or in the middle of it."""
    calls = 0

    def now() -> bool:
        nonlocal calls
        calls += 1
        return calls == moment

    def hook(module: object, name: str, halfway: Callable) -> None:
        real = getattr(module, name)

        def hooked(*args, **kwargs):
            if now():
                halfway(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if now():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, hooked)

    save_file = save.save_file

    def half_a_file(tensors: dict, file: Path) -> None:
        save_file(tensors, file)
        os.truncate(file, os.path.getsize(file) // 2)

    def one_file(path: Path, *_: object) -> None:
        if os.path.isdir(path):
            next(Path(path).iterdir()).unlink()

    hook(os, "fsync", lambda *_: None)
    hook(os, "replace", lambda *_: None)
    hook(save, "save_file", half_a_file)
    hook(shutil, "rmtree", one_file)


def kill_writers(root: Path, again: bool) -> None:
    """Fork one writer a moment, which kills itself there, until a writer finishes; print what was found each time."""
    old, new = make(seed=1, step=1), make(seed=2, step=1 if again else 2)
    outcomes = []
    for moment in range(1, 200):
        shutil.rmtree(root, ignore_errors=True)
        save_checkpoint(root, old, keep_last=1)
        if (writer := os.fork()) == 0:
            kill_at(moment)
            save_checkpoint(root, new, keep_last=1)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) != -signal.SIGKILL:
            break
        found = complete_checkpoints(root)
        for path in root.glob("[!.]*"):
            verify_checkpoint(path)  # nothing half-written or half-deleted under a checkpoint's name
        restored = everything(restore_checkpoint(found[-1], make(seed=3)))
        outcomes.append("new" if restored == everything(new) else "old" if restored == everything(old) else "neither")
        save_checkpoint(root, new, keep_last=1)
        assert os.listdir(root) == [f"jepa-{new.step:08d}"], os.listdir(root)  # the next save cleans up
    print(json.dumps(outcomes))


@pytest.mark.parametrize("step", ["next", pytest.param("again", marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_leaves_the_old_or_the_new_one_whole(tmp_path, step):
    (done,) = ranks.succeeded([ranks.begin(kill_writers, tmp_path / "checkpoints", step == "again")])
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes, reverse=True) and set(outcomes) == {"old", "new"}


def fill_the_disk(root: Path, room: int) -> None:
    """Save where no file may be larger than `room` bytes; print the error."""
    good = save_checkpoint(root, make(step=1))
    state = make(seed=1)
    train(state, 2)
    before = everything(state)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    with pytest.raises(CheckpointError) as refused:
        save_checkpoint(root, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    print(refused.value)
    assert [path.name for path in root.iterdir()] == [good.name], list(root.iterdir())
    verify_checkpoint(good)
    assert everything(state) == before


@pytest.mark.parametrize("room", [100, 1500])  # too little for the first file, and for the optimizer's after others fitted
def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_ones(tmp_path, room):
    (done,) = ranks.succeeded([ranks.begin(fill_the_disk, tmp_path / "checkpoints", room)])
    assert "jepa-00000002: could not be written (" in done.stdout and "too large" in done.stdout.lower()
    assert "free some space" in done.stdout and done.stdout.count("\n") == 1


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    left = {
        "dead": f".tmp-jepa-00000001@{host}@{dead.pid}",
        "own": f".tmp-jepa-00000001@{host}@{os.getpid()}",
        "living": f".tmp-jepa-00000001@{host}@{os.getppid()}",
        "elsewhere": ".tmp-jepa-00000001@another-host@1",
        "elsewhere long ago": ".tmp-jepa-00000002@another-host@1",
        "not ours": ".tmp-notes",
    }
    for name in left.values():
        (tmp_path / name).mkdir()
    os.utime(tmp_path / left["elsewhere long ago"], (0, 0))
    save_checkpoint(tmp_path, make(step=9))
    assert set(names(tmp_path)) == {left["living"], left["elsewhere"], left["not ours"], "jepa-00000009"}
