"""ZeRO on real ranks: the run of one process, whatever the stage; an exact average; skipped steps; other ranks on resuming."""

import json
import sys
from functools import partial
from math import inf, nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastjepa import train as trainer
from fastjepa.checkpoint.directory import find_checkpoint
from fastjepa.checkpoint.restore import load_networks
from fastjepa.checkpoint.shard_files import StoredGroup, shard_name, write_shard_file
from fastjepa.checkpoint.state import read_state
from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.engine import zero
from fastjepa.engine.deepspeed_config import BUCKET_ELEMENTS, deepspeed_settings
from fastjepa.engine.zero import deepspeed_ops
from fastjepa.errors import ConfigError, UserError
from fastjepa.model.jepa import build_pair
from fastjepa.ranks.collectives import rank_count, this_rank
from fastjepa.ranks.shard import Piece
from fastjepa.ranks.world import World
from fastjepa.run.build import build_engine
from tests.support import ranks
from tests.support.runs import TINY, distances, lines, losses, trained

WHOLE = ["optimization.epochs=4", "optimization.pred_lr_scale=4"]  # 20 steps of 8 images; groups of different rates
ONE = World(0, 0, 1, torch.device("cpu"))


def sharded(config: Path, output: Path, count: int, stage: int, *arguments: object) -> list[dict]:
    """Train with a global batch of 8 on `count` ranks; return the logged lines."""
    ranks.succeeded(started(config, output, count, stage, *WHOLE, *arguments))
    return lines(output)


def started(config: Path, output: Path, count: int, stage: int, *arguments: object, **how: object) -> list[ranks.Process]:
    words = ["--config", config, "--output", output, f"runtime.zero={stage}", f"data.batch_size={8 // count}"]
    return ranks.train(count, *words, *arguments, **how)


def displacement_error(run: Path, reference: Path) -> float:
    """How far the target encoder's way from its start is from the reference's, relative to the reference's."""
    ours, theirs = (load_networks(path)["target_encoder"] for path in (run, reference))
    _, start = build_pair(config_from_dict(read_state(find_checkpoint(reference))["record"]["config"]))
    way = torch.cat([(theirs[name] - p).flatten() for name, p in start.named_parameters()])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name, _ in start.named_parameters()])
    return float(apart.norm() / way.norm())


@pytest.fixture(scope="module")
def one(toy_config, tmp_path_factory):
    """The run of one process without DeepSpeed, in fp32."""
    output = tmp_path_factory.mktemp("one")
    return output, trained(toy_config, output, *WHOLE)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "stage"), [(1, 1), (2, 1), (2, 2), (2, 3), (4, 3)])
def test_every_stage_gives_the_run_of_one_process(toy_config, one, tmp_path, count, stage):
    entries = sharded(toy_config, tmp_path, count, stage, *(["runtime.micro_batch=2"] if count == 2 else []))
    assert losses(entries) == pytest.approx(losses(one[1]), rel=1e-5)
    assert distances(entries) == pytest.approx(distances(one[1]), rel=1e-3)
    assert displacement_error(tmp_path, one[0]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_of_any_norm_are_stepped_as_they_are(toy_config, tmp_path, stage):
    """The recipe clips none; those of this loss have norms above 1."""
    keys = ["loss.kind=l2", "loss.normalize=none", "data.num_workers=0"]
    expected = trained(toy_config, tmp_path / "one", *WHOLE, *keys)
    assert losses(sharded(toy_config, tmp_path / "many", 2, stage, *keys)) == pytest.approx(losses(expected), rel=1e-5)


BF16 = ["runtime.dtype=bf16", "logging.monitor_every=0", "logging.probe_every=0"]  # readings take long where bf16 is emulated


@pytest.fixture(scope="module")
def one_bf16(toy_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("one_bf16")
    return output, trained(toy_config, output, *WHOLE, *BF16)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "stage"), [(2, 1), (2, 3)])  # bf16 crawls on CPUs without its instructions
def test_in_bf16_only_the_order_of_sums_differs(toy_config, one_bf16, tmp_path, count, stage):
    entries = sharded(toy_config, tmp_path, count, stage, *BF16)
    apart = max(abs(a / b - 1) for a, b in zip(losses(entries), losses(one_bf16[1]), strict=True))
    moved = displacement_error(tmp_path, one_bf16[0])
    print(f"ZeRO-{stage} on {count} ranks, bf16: losses within {apart:.1e}, the target encoder's way within {moved:.1e}")
    assert apart < 2e-3 and moved < 3e-2


def test_an_average_of_bf16_weights_would_be_seen():
    """The bound on the displacement has a purpose: rounding what is averaged, or the average itself, breaks it by far."""
    torch.manual_seed(0)
    weight, ways = torch.randn(4096), {}
    for kind in ("fp32", "bf16 weights", "bf16 average"):
        average, online = weight.clone(), weight.clone()
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            online += 1e-3 * torch.randn(4096, generator=generator)
            average.lerp_(online if kind == "fp32" else online.bfloat16().float(), 0.01)
            average = average.bfloat16().float() if kind == "bf16 average" else average
        ways[kind] = average - weight
    for kind in ("bf16 weights", "bf16 average"):
        assert (ways[kind] - ways["fp32"]).norm() / ways["fp32"].norm() > 0.1


def poisoned(bad: dict[int, float], words: list[str]) -> int:
    """Train with the gradients of the last rank multiplied by `bad[step]`."""
    real, calls = trainer.jepa_loss, iter(range(1000))

    def loss(prediction: torch.Tensor, *rest: object) -> torch.Tensor:
        number = next(calls)
        if number in bad and this_rank() == rank_count() - 1:
            prediction.register_hook(lambda gradient: gradient * bad[number])
        return real(prediction, *rest)

    trainer.jepa_loss = loss
    return main(words)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every bit of a checkpoint, by its files' names."""
    found = {f"{file.name}/{name}": tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_a_non_finite_gradient_of_one_rank_touches_nothing_on_any(toy_config, tmp_path, stage, dtype):
    ranks.succeeded(started(toy_config, tmp_path, 2, stage, f"runtime.dtype={dtype}", "logging.checkpoint_every=1",
                            "logging.keep_last=9", "--max-steps", 6, function=partial(poisoned, {2: nan, 4: inf})))  # fmt: skip
    at = [None, *(tensors(tmp_path / f"checkpoints/jepa-{step:08d}") for step in range(1, 7))]
    for before, after, same in ((1, 2, False), (2, 3, True), (3, 4, False), (4, 5, True), (5, 6, False)):
        equal = [torch.equal(at[before][name], tensor) for name, tensor in at[after].items()]
        assert all(equal) if same else sum(equal) < len(equal) / 2, (before, after)
    assert [entry["skipped"] for entry in lines(tmp_path)] == [0, 0, 1, 1, 2, 2]
    assert len({entry["context_tokens"] for entry in lines(tmp_path)}) > 1 and len({e["lr"] for e in lines(tmp_path)}) == 6


@pytest.mark.slow
def test_past_the_limit_every_rank_stops_with_the_same_message(toy_config, tmp_path):
    bad = partial(poisoned, {0: nan, 1: nan, 2: nan})
    done = ranks.ended(started(toy_config, tmp_path, 2, 2, "runtime.max_skipped=3", function=bad))
    assert [process.returncode for process in done] == [2, 2]
    first, second = ([line for line in process.stderr.splitlines() if "3 steps in a row" in line] for process in done)
    assert first == second and first[0].startswith("fastjepa train: step 3: 3 steps in a row"), done[0].stderr


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_another_stage(toy_config, one, tmp_path):
    """2 ranks, 4, 2 at stage 3, one process without DeepSpeed, one with it and no launcher: each from the last one's state."""
    sharded(toy_config, tmp_path, 2, 1, "--max-steps", 5)
    sharded(toy_config, tmp_path, 4, 2, "--max-steps", 9)
    sharded(toy_config, tmp_path, 2, 3, "--max-steps", 13)
    trained(toy_config, tmp_path, *WHOLE, "--max-steps", 16)
    alone = ranks.command("train", "--config", toy_config, "--output", tmp_path, *WHOLE, "runtime.zero=3")
    ranks.succeeded([alone])
    entries = lines(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, 21))
    assert losses(entries) == pytest.approx(losses(one[1]), rel=1e-5)
    assert displacement_error(tmp_path, one[0]) < 1e-3


@pytest.mark.slow
def test_a_damaged_shard_is_refused_by_every_rank(toy_config, tmp_path):
    sharded(toy_config, tmp_path, 2, 2, "--max-steps", 2)
    shard = tmp_path / "checkpoints/jepa-00000002/predictor-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    done = ranks.ended(started(toy_config, tmp_path, 2, 2, *WHOLE))
    assert [process.returncode for process in done] == [2, 2]
    assert all(process.stderr.count("predictor-00001-of-00002.safetensors: damaged") == 1 for process in done), done[0].stderr


def offload(file: Path, device: str, **more: str) -> list[object]:
    """Arguments of a stage 3 run whose groups are large enough for NVMe: DeepSpeed leaves less than a megabyte in memory."""
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": device} | more}}))
    return ["--deepspeed_config", file, "meta.embed_dim=128", "meta.depth=4", "--max-steps", 8]


@pytest.mark.long
def test_optimizer_states_on_nvme_change_no_loss_and_travel_with_checkpoints(toy_config, tmp_path):
    """Real files, by DeepSpeed's async_io, which the first such run compiles; in the middle it goes on from a checkpoint."""
    swap, place = tmp_path / "swap", tmp_path / "run"
    arguments = offload(tmp_path / "nvme.json", "nvme", nvme_path=str(swap))
    if not dict(row[:2] for row in deepspeed_ops("cpu"))["async_io"]:
        done = ranks.ended(started(toy_config, place, 2, 3, *WHOLE, *arguments))
        assert done[0].returncode == 2 and "apt-get install libaio-dev" in done[0].stderr
        return
    expected = sharded(toy_config, tmp_path / "cpu", 2, 3, *offload(tmp_path / "cpu.json", "cpu"))
    sharded(toy_config, place, 2, 3, *arguments, "--max-steps", 3)
    assert sum(file.stat().st_size for file in swap.rglob("*.swp")) > 2 * 3 * 2**20, "masters and moments of both ranks"
    entries = sharded(toy_config, place, 2, 3, *arguments)
    assert losses(entries) == losses(expected)
    at = {run: tensors(run / "checkpoints/jepa-00000008") for run in (place, tmp_path / "cpu")}
    assert all(torch.equal(tensor, at[place][name]) for name, tensor in at[tmp_path / "cpu"].items())


def test_stored_reads_any_range_of_pieces(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    flat = whole.view(-1)
    for rank, (start, end) in enumerate(((0, 7), (7, 8), (8, 24))):
        fixed = {"pos": Piece.all_of(torch.ones(2))}
        write_shard_file(tmp_path / shard_name("encoder", rank, 3), fixed | {"w": Piece(flat[start:end], start, (4, 6))}, rank)
    with StoredGroup(tmp_path, "encoder") as stored:
        assert torch.equal(stored.read("w"), whole) and torch.equal(stored.read("pos"), torch.ones(2))
        for start in range(24):
            for end in range(start + 1, 25):
                assert torch.equal(stored.read("w", start, end - start), flat[start:end])
    (tmp_path / shard_name("encoder", 1, 3)).unlink()
    with pytest.raises(Exception, match="w is not whole in 2 files"):
        StoredGroup(tmp_path, "encoder")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage is 3 and runtime\.zero is 2"),
        (
            {"gradient_accumulation_steps": 4},
            r"gradient_accumulation_steps is 4 and data\.batch_size / runtime\.micro_batch is 2",
        ),
        ({"torch_autocast": {"enabled": True}}, r"torch_autocast\.enabled is True and runtime\.dtype is False"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param to nvme hides the weights"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            r"offload_optimizer to nvme at stage 3 alone; set runtime\.zero=3",
        ),
        ({"torch_autocast": {"dtype": "float16"}}, r"torch_autocast\.dtype is 'float16' and runtime\.dtype is 'bfloat16'"),
        (
            {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}},
            "the recipe, which reduces in fp32, is",
        ),
        ({"bf16": {"enabled": True}}, r"'bf16' is decided by runtime\.dtype"),
        ({"optimizer": {"type": "Adam"}}, r"'optimizer' is decided by the optimization section"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_config_is_refused(tmp_path, given, message):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    with pytest.raises(ConfigError, match=message):
        deepspeed_settings(4, 2, "fp32", 2, file)


def test_a_deepspeed_file_decides_what_the_config_leaves_open(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        '{"zero_optimization": {"stage": "auto", "overlap_comm": true, "reduce_bucket_size": 5}, "dump_state": true}'
    )
    settings = deepspeed_settings(8, 1, "fp32", 2, file)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (2, True, 5)
    assert settings["dump_state"] is True and zero["allgather_bucket_size"] == BUCKET_ELEMENTS
    file.write_text("{")
    with pytest.raises(ConfigError, match="not a readable DeepSpeed configuration"):
        deepspeed_settings(8, 1, "fp32", 2, file)


def test_one_rank_on_a_card_reduces_tensors_of_the_host_too(monkeypatch):
    """Ranks agree about a signal with tensors of the host, also where there is one rank: a group of "nccl" alone refuses
    them.
    """
    card, asked = torch.device("cuda", 0), {}
    monkeypatch.setattr(zero.dist, "init_process_group", lambda *backend, **given: asked.update(given, positional=backend))
    monkeypatch.setenv("LOCAL_RANK", "0")
    zero._join_alone(card)
    assert (asked["backend"], asked["device_id"], asked["world_size"]) == ("cpu:gloo,cuda:nccl", card, 1)
    assert not asked["positional"]


def test_engines_refuse_what_cannot_be(tmp_path):
    jepa, _ = build_pair(config_from_dict(TINY))
    with pytest.raises(UserError, match=r"runtime\.zero 0 runs without DeepSpeed"):
        build_engine(jepa, config_from_dict(TINY), ONE, 0, tmp_path / "ds.json")
    compiled = config_from_dict(TINY | {"runtime": {"zero": 3, "compile": True}})
    with pytest.raises(ConfigError, match=r"runtime\.compile: not with runtime\.zero 3"):
        build_engine(jepa, compiled, ONE, 3)


def test_sharding_without_deepspeed_says_what_to_install(toy_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert main(["train", "--config", str(toy_config), "--output", str(tmp_path), "runtime.zero=1"]) == 2
    assert "pip install 'fastjepa[deepspeed]' or set it to 0" in capsys.readouterr().err
