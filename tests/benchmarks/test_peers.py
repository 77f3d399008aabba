"""benchmarks/peers.py: peers in processes of their own, their environments, and what their rows say of both."""

import importlib.metadata
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import peer_process
import peers
import pytest
import torch
from peer_process import PeerError, PeerProcess, Request, counted_flops

from fastjepa.config.schema import Config
from fastjepa.plan.flops import official_flops
from fastjepa.plan.plan import workload_of

TOY = ["--device=cpu", "--dtype=fp32", "--models=vit_tiny", "--size=64", "--batch=2", "--rounds=2", "--threads=1"]
TOY += ["mask.patch_size=8", "mask.min_keep=4", "meta.pred_emb_dim=48", "meta.depth=3", "meta.pred_depth=2"]
WIDTH, BATCH = 12, 5


def toy_request(fault: str = "") -> Request:
    """Two batches of ones for tests/support/toy_peer.py."""
    batches = [(np.ones((BATCH, 3, 2, 2), np.float32), np.zeros((BATCH, 1), np.int64), np.zeros((1, BATCH, 1), np.int64))] * 2
    rates = {"lr": 0.1, "weight_decay": 0.0, "ema_momentum": 0.9}
    place = "toy", "tests.support.toy_peer", "torch", "cpu", "fp32", 1
    return Request(*place, {"width": WIDTH}, rates, batches, [0, 1], {"fault": fault}, None)


def config_of(*arguments: str) -> Config:
    return peers.config_of(peers.parse_options([*TOY, *arguments]), meta__model_name="vit_tiny")


def test_a_peer_takes_its_steps_in_a_process_of_its_own():
    """A linear layer and its weight's gradient: so many FLOPs, a loss for each batch, which training lowers."""
    with PeerProcess(sys.executable, toy_request()) as run:
        assert run.facts["flops"] == [4 * BATCH * WIDTH] * 2
        assert run.facts["torch"] == torch.__version__ and run.facts["version"] == importlib.metadata.version("torch")
        assert 0 < run.facts["peak_bytes"] < run.facts["process_bytes"] and run.process.poll() is None
        first, other = run(0), run(1)
        assert other == pytest.approx(first + 10, abs=2)
        assert run(2) < first and run(3) < other
        assert list(phases := run.phases(0)) == ["forward", "backward", "optimizer", "EMA"] and min(phases.values()) > 0
        run.process.kill()
        run.process.wait()
        with pytest.raises(PeerError, match="^toy: its process ended; it said last: a library that prints"):
            run(0)


@pytest.mark.slow
@pytest.mark.parametrize("fault, patience, says", [
    ("raises", 60, "RuntimeError: no such width"),
    ("dies", 60, "its process ended; it said last: killed by a library"),
    ("", 0.01, "no answer in 0.01 seconds"),
])  # fmt: skip
def test_a_peer_that_fails_says_why_and_leaves(fault: str, patience: float, says: str, monkeypatch):
    monkeypatch.setattr(peer_process, "PATIENCE", patience)
    before = set(children())
    with pytest.raises(PeerError) as caught:
        PeerProcess(sys.executable, toy_request(fault))
    assert str(caught.value) == says
    assert set(children()) <= before


def children() -> list[str]:
    return Path("/proc/self/task").joinpath(str(peer_process.os.getpid()), "children").read_text().split()


def timed(seconds: list[float], spent: list[int], peak: int) -> peers.Timed:
    facts = {"flops": spent, "peak_bytes": peak, "process_bytes": 2 * peak, "torch": "2", "version": None}
    return peers.Timed(seconds, spent, facts, [{"forward": 1.0}, {"forward": 3.0}])


def test_ratios_are_those_of_the_rounds():
    """The peer needs 1.5 times the time for 3 times the FLOPs: ours is ahead in images/s, and half as fast at equal FLOPs."""
    ours, theirs = timed([2.0, 4.0], [100, 100], 10), timed([3.0, 6.0], [300, 300], 25)
    found = theirs.ratios(ours)
    assert found["ratio"]["median"] == pytest.approx(1.5)
    assert found["ratio_at_equal_flops"]["median"] == pytest.approx(0.5)
    assert found["memory_ratio"] == pytest.approx(2.5)
    row = theirs.row(images=8, rates=[200.0, 200.0])
    assert row["images_per_s"]["median"] == pytest.approx((8 / 3 + 8 / 6) / 2) and row["n"] == 2
    assert row["share_of_gemm"]["median"] == pytest.approx((0.5 + 0.25) / 2)
    assert row["ms"] == {"forward": 2.0} and row["gflop_per_image"] == pytest.approx(300 / 8 / 1e9)
    assert row["peak_bytes"] == 25 and "flops" not in row


def test_parts_of_a_step_are_four_phases():
    ours = {"target forward": 1.0, "loss": 2.0, "predictor backward": 4.0, "optimizer": 8.0, "EMA": 16.0, "grad_norms": 32.0}
    assert peers.phases_of(ours) == {"forward": 3.0, "backward": 4.0, "optimizer": 40.0, "EMA": 16.0}


def test_peers_get_the_trainers_images_and_masks():
    config = config_of()
    requests = {name: peers.request_for(name, peer, config, "there") for name, peer in (peers.OURS | peers.PEERS).items()}
    (images, context, blocks), other = requests["lightly"].batches
    assert images.shape == (2, 3, 64, 64) and context.shape[0] == 2 and blocks.shape[:2] == (4, 2)
    for seen, hidden in zip(context, blocks.swapaxes(0, 1), strict=True):
        assert not set(seen) & set(hidden.flatten())
    assert (images != other[0]).any()
    assert {name for name, request in requests.items() if request.clone} == {"official"}
    settings = {name: (one.config["mask"]["truncate"], one.config["meta"]["predictor"]) for name, one in requests.items()}
    assert settings["fastjepa"] == settings["official"] and settings["fastjepa"][0] == "batch_min"
    assert settings["fastjepa whole"][0] == "none" and settings["fastjepa joint"][1] == "joint"


def test_lightlys_step_is_an_ijepa_step():
    """It costs what the paper's does, but for a class token in the encoders; it learns, and its average follows."""
    from peer_steps.lightly_ijepa import build

    config = config_of()
    request = peers.request_for("lightly", peers.PEERS["lightly"], config, None)
    torch.manual_seed(0)
    run = build(request)
    context, blocks = request.batches[0][1:]
    expected = official_flops(workload_of(config), context.shape[1], blocks.shape[2]).total
    assert counted_flops(run, 0) / config.data.batch_size == pytest.approx(expected, rel=0.02)
    before = [parameter.clone() for parameter in run.target_encoder.parameters()]
    losses = [float(run(0)) for _ in range(8)]
    assert losses[-1] < losses[0]
    moved = [old for old, new in zip(before, run.target_encoder.parameters(), strict=True) if (old != new).any()]
    assert len(moved) > len(before) / 2


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch) -> Path:
    """A folder in which pip finds the package `toypeer`, and nowhere else."""
    name, about = "toypeer-1.0", "Metadata-Version: 2.1\nName: toypeer\nVersion: 1.0\n"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toypeer.py", "HERE = True\n")
        wheel.writestr(f"{name}.dist-info/METADATA", about)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_an_environment_has_the_peer_and_our_packages(shelf: Path):
    assert peers.environment(peers.Peer(""), shelf) == peers.environment(peers.PEERS["lightly"], shelf) == sys.executable
    python = peers.environment(peers.Peer("", package="toypeer==1.0"), shelf / "made")
    code = "import toypeer, torch; print(toypeer.__file__); print(torch.__file__)"
    peer, ours = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert Path(peer).is_relative_to(shelf / "made") and ours == torch.__file__
    with pytest.raises(PeerError, match=r"pip cannot install toypeer==2.0: .*toypeer==2.0"):
        peers.environment(peers.Peer("", package="toypeer==2.0"), shelf / "made")


@pytest.mark.slow
def test_what_cannot_be_measured_is_named(shelf: Path, capsys, monkeypatch):
    """Ours and lightly take turns; the official code without a clone, and a package that pip does not find, have no row."""
    monkeypatch.setitem(peers.PEERS, "stable-pretraining", peers.Peer("", package="nowhere==1.0"))
    before = set(children())
    assert peers.main([*TOY, "--json"]) == 0
    assert set(children()) <= before
    found = json.loads(capsys.readouterr().out)
    assert [row["peer"] for row in found["rows"]] == [*peers.OURS, "lightly"]
    reasons = {gap["what"]: gap["reason"] for gap in found["not_measured"]}
    assert list(reasons) == ["official vit_tiny", "stable-pretraining vit_tiny"]
    assert "--reference" in reasons["official vit_tiny"] and "nowhere==1.0" in reasons["stable-pretraining vit_tiny"]
    cut, whole, joint, lightly = found["rows"]
    assert joint["gflop_per_image"] < cut["gflop_per_image"] < whole["gflop_per_image"]
    assert lightly["beside"] == "fastjepa" and lightly["ratio"]["p20"] > 0 and lightly["version"]
    assert all(0 < row["share_of_gemm"]["median"] < 2 and row["peak_bytes"] > 0 for row in found["rows"])
