"""The plan against what it plans: tensors that real ranks hold and send, what the loss holds; and its words."""

import dataclasses
import gc
import json
import time
import warnings
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastjepa.cli.main import main
from fastjepa.cli.plan import MEMORY_ROWS
from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import LossConfig, OptimizationConfig
from fastjepa.engine.adamw import build_adamw
from fastjepa.engine.deepspeed_config import BUCKET_ELEMENTS
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import COMPUTE_DTYPES, autocast_of
from fastjepa.engine.schedule import StepSettings
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.normalizations import NORMALIZATIONS, RunningNormalization
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.masks.packer import Packer
from fastjepa.model.jepa import NetworkShape, build_pair
from fastjepa.model.moments import RunningMoments
from fastjepa.plan.datasheets import DATASHEETS
from fastjepa.plan.flops import flops_per_image, muon_flops
from fastjepa.plan.memory import (
    FP32_BYTES,
    ZERO_STAGES,
    RowCounts,
    activation_bytes,
    network_sizes,
    state_bytes,
)
from fastjepa.plan.plan import Cards, largest_micro_batch, plan_run, plan_traffic, workload_of
from fastjepa.plan.sharding import RESERVED_SHARE
from fastjepa.plan.traffic import INFINIBAND_RATE, NVLINK_RATE, TOTAL_BATCH, bytes_sent
from fastjepa.ranks import collectives
from fastjepa.ranks.world import join_world
from fastjepa.run.build import build_engine, build_networks
from tests.support import ranks
from tests.support.places import ROOT
from tests.support.plans import PROJECTED, small

STATES = ("parameters", "gradients", "moments", "master_weights", "ema", "target_copy")
SHARDED = {0: (), 1: ("moments", "master_weights", "ema"), 2: ("gradients", "moments", "master_weights", "ema")}
DDP, FEW = (2, 0, "fp32"), [(2, 1, "bf16"), (2, 2, "fp32"), (2, 3, "fp32")]
MORE = [pytest.param(case, marks=pytest.mark.slow) for case in [(2, 1, "fp32"), (4, 2, "fp32"), (4, 3, "bf16")]]
ALONE = [pytest.param(case, marks=pytest.mark.slow) for case in [(1, 0, "fp32"), (1, 3, "fp32")]]


# What ranks hold and send


@cache
def reports(count: int, stage: int, dtype: str) -> list[dict]:
    """Return what each rank of a case held and sent, of real processes that train a small network."""
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in ranks.run(tell, count, stage, dtype, count=count)]


def tell(*case: object) -> None:
    print(json.dumps(report(*case)))


def report(count: int, stage: int, dtype: str) -> dict:
    """Train two steps on this rank; bytes held while the second accumulates gradients, and sent during it."""
    c = small(dtype, stage)
    sent = spy()
    world = join_world("cpu")
    context, target, blocks = pack(*draw_masks(Masking.of(c), 0, range(2), 2))
    images, now = torch.rand(2, 3, 64, 64), StepSettings(1e-4, 0.04, 0.99)
    before = storages()
    jepa, target_encoder = build_networks(c, world.device)
    fixed = {b.untyped_storage().data_ptr() for network in (jepa, target_encoder) for b in network.buffers()}
    network = build_engine(jepa, c, world, stage)
    average = network.follow(target_encoder)
    for step in range(2):
        for micro_batch in range(2):
            with autocast_of(COMPUTE_DTYPES[c.runtime.dtype], world.device):
                with torch.no_grad():
                    features = target_encoder(images, wanted=target)
                prediction, seen, _ = network(images, context, blocks)
                value = jepa_loss(prediction, features, blocks)
            network.backward(value)
            del features, prediction, seen, value
            if micro_batch == 0:
                time.sleep(0.5)  # gloo's threads let go of what they sent a moment after a collective has returned
                held = {key: size for key, size in storages().items() if key not in before and key not in fixed}
        average.update(now.ema_momentum, network.step(now))
        if step == 0:
            first = dict(sent)
    sent = {name: sent[name] - first.get(name, 0) for name in sent}
    bucket = FP32_BYTES * BUCKET_ELEMENTS
    return {"held": sum(size for size in held.values() if size != bucket), "sent": sent,
            "buckets": sum(size for size in held.values() if size == bucket)}  # fmt: skip


def storages() -> dict[int, int]:
    """{address: bytes} of the storage of every tensor in this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects dislike to be asked what they are
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    plain = (t.untyped_storage() for t in tensors if t.layout == torch.strided and t.device.type == "cpu")
    return {storage.data_ptr(): storage.nbytes() for storage in plain}


def spy() -> dict[str, float]:
    """From here on, the bytes that collectives called from Python are about: {"reduce", "scatter", "gather"}."""
    sent = {"reduce": 0, "scatter": 0, "gather": 0}

    def watched(collective, kind: str, place: int):
        def call(*args, **kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            sent[kind] += tensors[place].nbytes
            return collective(*args, **kwargs)

        return call

    kinds = {"all_reduce": ("reduce", 0), "reduce_scatter_tensor": ("scatter", 1), "all_gather_into_tensor": ("gather", 0)}
    for name, about in kinds.items():
        setattr(dist, name, watched(getattr(dist, name), *about))
    collectives.ALL_GATHER = watched(collectives.ALL_GATHER, "gather", 0)
    return sent


@pytest.mark.xdist_group("plan")  # what is measured once serves both tests
@pytest.mark.parametrize("case", [DDP] + FEW + MORE + ALONE, ids=lambda case: f"{case[0]} ranks, ZeRO-{case[1]}, {case[2]}")
def test_states_are_what_ranks_hold(case):
    """Every tensor of the process but the batch, positions and the reduction's bucket: the fullest rank's within 2 %."""
    count, stage, dtype = case
    planned = sum(state_bytes(network_sizes(NetworkShape.of(small())), dtype, count, stage).values())
    assert max(one["held"] for one in reports(*case)) == pytest.approx(planned, rel=0.02)
    for one in reports(*case):
        assert one["held"] == pytest.approx(planned, rel=0.05)  # shards of whole tensors differ
        assert one["buckets"] in (0, FP32_BYTES * BUCKET_ELEMENTS)
        assert stage or not one["buckets"]


@pytest.mark.xdist_group("plan")  # what is measured once serves both tests
@pytest.mark.parametrize("case", FEW + MORE, ids=lambda case: f"{case[0]} ranks, ZeRO-{case[1]}, {case[2]}")
def test_traffic_is_what_ranks_send(case):
    """Payloads of collectives, as a ring would carry them; DDP's (stage 0) are not called from Python."""
    count, stage, dtype = case
    planned = bytes_sent(network_sizes(NetworkShape.of(small())), dtype, count, stage, micro_batches=2)
    for one in reports(*case):
        ring = {kind: size * (count - 1) / count for kind, size in one["sent"].items()}
        assert 2 * ring["reduce"] + ring["scatter"] == pytest.approx(planned["gradients"], rel=0.02)
        assert ring["gather"] == pytest.approx(planned["parameters"] + planned["target_copy"], rel=0.02)


# What the forms promise


@pytest.mark.parametrize("stage", ZERO_STAGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_twice_the_ranks_halve_what_is_sharded_and_nothing_else(stage: int, dtype: str):
    size = network_sizes(NetworkShape.of(small()))
    two, four = (state_bytes(size, dtype, gpus, stage) for gpus in (2, 4))
    for name in STATES:
        sharded = name in SHARDED.get(stage, SHARDED[2])
        if (name, stage) == ("gradients", 2):  # whole tensors at the ends of a shard
            assert two[name] / 2 <= four[name] <= two[name]
        elif (name, stage) == ("parameters", 3):
            whole = FP32_BYTES * size.small
            assert four[name] - whole == pytest.approx((two[name] - whole) / 2, abs=8)
        elif name == "target_copy" and stage in (1, 2):  # the shards of the average that have its dtype lie in it
            shared = FP32_BYTES * (size.encoder if dtype == "fp32" else size.encoder - size.matrices)
            assert four[name] + shared / 4 == pytest.approx(two[name] + shared / 2, abs=8)
        else:
            assert four[name] == pytest.approx(two[name] / (2 if sharded else 1), abs=8)


SEVERAL = {"target_layers": (1, 2, 4)}


@pytest.mark.parametrize("normalize", ["none", "batch", "running"])
@pytest.mark.parametrize(
    "keys",
    [{"target": "output"}, {"target": "input"}, {"target": "pixels"}, SEVERAL, SEVERAL | {"layers": "mean"}],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
def test_the_loss_holds_what_is_planned_for_it(normalize: str, keys: dict):
    """Targets, what autograd keeps of the loss, and the gradient that a backward makes; `layer` is the fused kernel's."""
    micro = dataclasses.replace(small(), loss=LossConfig(normalize=normalize, **keys))
    c = dataclasses.replace(micro, runtime=dataclasses.replace(micro.runtime, micro_batch=None))
    _, seen, blocks = Packer(Masking.of(c)).packed(0, range(2), 2)
    features = tuple(torch.randn(len(seen.idx), c.target_dim) for _ in range(c.target_layers))
    prediction = torch.randn(len(blocks.target_rows), c.predicted_dim, requires_grad=True)
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()  # of a part, those of the whole
        return tensor

    moments = RunningMoments(c.target_layers + 1, c.target_dim)
    normalization = RunningNormalization(moments) if normalize == "running" else NORMALIZATIONS[normalize]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        jepa_loss(prediction, features, blocks, normalization=normalization)
    one = features[0].nbytes  # the average is one more, and standardised another
    averaged = one if c.loss.layers == "mean" else 0
    standard = len(features) * one + averaged if normalize != "none" else 0
    held = sum(kept.values()) + len(features) * one + averaged + standard + prediction.nbytes
    rows = RowCounts(1, len(seen.idx), 1, len(blocks.target_rows))
    assert activation_bytes(workload_of(c), rows).loss == held
    kept = standard if normalize == "batch" else 0  # of each of the two micro-batches of a step
    assert activation_bytes(workload_of(micro), rows).loss == held + kept


@pytest.mark.parametrize("keys", [{}, PROJECTED], ids=str)
def test_muons_moments_and_products_are_those_of_its_step(keys: dict):
    c = dataclasses.replace(small(), loss=LossConfig(**keys), optimization=OptimizationConfig(optimizer="muon"))
    jepa, target = build_pair(c)
    engine = PlainEngine(jepa, muon=True)
    for p in engine.parameters:
        p.grad = torch.zeros_like(p)
    with FlopCounterMode(display=False) as counter:
        engine.step(StepSettings(lr=1e-3, weight_decay=0.0, ema_momentum=0.9))
    held = sum(t.nbytes for state in engine.optimizer.state.values() for name, t in state.items() if name != "step")
    assert state_bytes(network_sizes(NetworkShape.of(c), muon=True), "fp32", 1, 0)["moments"] == held
    assert muon_flops(NetworkShape.of(c)) == counter.get_total_flops()
    (said,) = plan_run(c, Cards())["notes"]
    assert said.startswith(f"Muon takes {muon_flops(NetworkShape.of(c)) / 1e12:.3g} TFLOP a step, shared by the GPUs")


@pytest.mark.parametrize("gpus", [2, 8, 512])
def test_each_stage_holds_no_more_than_the_one_before(gpus: int):
    size = network_sizes(NetworkShape.of(config_from_dict({"meta": {"model_name": "vit_huge"}})))
    held = [sum(state_bytes(size, "bf16", gpus, stage).values()) for stage in ZERO_STAGES]
    assert held == sorted(held, reverse=True)


@pytest.mark.parametrize("change", [{}, {"pred_depth": 1, "pred_emb_dim": 64}, {"model_name": "vit_giant", "depth": 2}])
@pytest.mark.parametrize(
    "keys",
    [{"target": "output"}, {"target": "pixels"}, {"target_layers": (1, 2)}, {"normalize": "dyntanh"}, PROJECTED],
    ids=str,
)
def test_sizes_are_the_networks(change: dict, keys: dict):
    """Tensor by tensor, in the optimizer's groups and order."""
    c = dataclasses.replace(small(), loss=LossConfig(**keys))
    c = dataclasses.replace(c, meta=dataclasses.replace(c.meta, **change))
    jepa, target = build_pair(c)
    size = network_sizes(NetworkShape.of(c))
    groups = [[p.numel() for p in group["params"]] for group in build_adamw(jepa.encoder, jepa.predictor).param_groups]
    assert sorted(map(sorted, size.groups)) == sorted(map(sorted, groups))
    assert [group[0] for group in size.groups] == [group[0] for group in groups]
    assert size.trained == sum(p.numel() for p in jepa.parameters())
    assert size.encoder == sum(p.numel() for p in target.parameters())
    assert size.matrices == sum(p.numel() for p in target.parameters() if p.ndim > 1)
    assert size.linear == sum(m.weight.numel() for m in jepa.modules() if isinstance(m, torch.nn.Linear))


def test_one_rank_sends_nothing_and_many_a_ring():
    size = network_sizes(NetworkShape.of(small()))
    for stage in ZERO_STAGES:
        assert set(bytes_sent(size, "bf16", 1, stage).values()) == {0.0}
        two, many = (sum(bytes_sent(size, "bf16", gpus, stage).values()) for gpus in (2, 10**6))
        assert many == pytest.approx(2 * two, rel=1e-5)
    assert bytes_sent(size, "fp32", 2, 0) == {"gradients": 4.0 * size.trained, "parameters": 0.0, "target_copy": 0.0}


@pytest.mark.parametrize("stage, times", [(0, 1), (1, 1), (2, 4), (3, 4)])
def test_stages_2_and_3_send_gradients_for_every_micro_batch(stage: int, times: int):
    one, four = (bytes_sent(network_sizes(NetworkShape.of(small())), "fp32", 8, stage, count)["gradients"] for count in (1, 4))
    assert four == times * one


def test_traffic_binds_where_bytes_take_as_long_as_flops():
    c = small("bf16")
    peak = DATASHEETS["a100"].bf16 / 2
    for row in plan_traffic(c, Cards(name="a100", utilisation=0.5), (8, 16)):
        assert row["binding_batch"] * flops_per_image(workload_of(c)) / peak == pytest.approx(row["seconds"])
        assert row["total"] == sum(row[name] for name in ("gradients", "parameters", "target_copy"))
        compute = row["images"] * row["seconds"] / row["binding_batch"]
        assert row["exposed"] == pytest.approx(row["seconds"] / (row["seconds"] + compute))
        assert row["binds"] == (compute < row["seconds"])
        assert row["images"] * row["gpus"] == TOTAL_BATCH
    near, far = (plan_traffic(c, Cards(), (gpus,))[1] for gpus in (8, 16))
    assert far["seconds"] / near["seconds"] == pytest.approx((15 / 16) / (7 / 8) * NVLINK_RATE / INFINIBAND_RATE)


def test_a_part_missing_from_the_total_would_show():
    found = plan_run(small(), Cards(2))
    parts = [name for name in MEMORY_ROWS if not name.startswith(("total", "activations"))]
    for needs in found["stages"].values():
        fixed = sum(needs[name] for name in parts)
        assert needs["total"] == fixed + needs["activations"]
        assert needs["total_checkpointed"] == fixed + needs["activations_checkpointed"]
        assert needs["activations_checkpointed"] < needs["activations"]
    assert found["hours"] * found["gpus"] == pytest.approx(found["gpu_hours"])


@pytest.mark.parametrize("batch, limit, largest", [(128, 128, 128), (128, 100, 64), (96, 50, 48), (100, 30, 25), (8, 0, 0)])
def test_the_largest_micro_batch_divides_the_batch(batch: int, limit: int, largest: int):
    assert largest_micro_batch(batch, lambda m: m <= limit) == largest


def test_less_memory_asks_for_more():
    """From room for everything to none: plain DDP, a higher stage, checkpointing, smaller micro-batches, nothing."""
    c = config_from_dict({"data": {"batch_size": 16}, "meta": {"model_name": "vit_large"}})
    needs = plan_run(c, Cards(8, 80.0))["stages"]
    reserve = (1 - RESERVED_SHARE) * 1e9
    between = (needs[1]["total"] + needs[2]["total"]) / 2 / reserve
    reasons = [plan_run(c, Cards(8, memory_gb)) for memory_gb in (80.0, between, 4.8, 4.0, 1.0)]
    assert [found["recommended_stage"] for found in reasons[:2]] == [0, 2]
    assert "checkpoint_activations=true" in reasons[2]["why"] and "micro_batch" not in reasons[2]["why"]
    assert "runtime.micro_batch=" in reasons[3]["why"]
    assert reasons[4]["recommended_stage"] is None and "No stage" in reasons[4]["why"]
    assert plan_run(c, Cards(1, 80.0))["recommended_stage"] == 0


# The command


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text("data: {crop_size: 64, batch_size: 12}\nmask: {patch_size: 8, min_keep: 4}\n"
                    "meta: {model_name: vit_tiny, pred_emb_dim: 96, pred_depth: 2}\n")  # fmt: skip
    return str(path)


def test_json_and_table_name_the_same_parts(file, capsys):
    assert main(["plan", "--config", file, "--gpus", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["stages"]) == ["0", "1", "2", "3"]
    assert found["stages"]["1"].keys() >= MEMORY_ROWS.keys()
    assert main(["plan", "--config", file, "--gpus", "4"]) == 0
    shown = capsys.readouterr().out
    for name in MEMORY_ROWS:
        assert (name if name != "ema" else "EMA").replace("_", " ").split()[0] in shown
    assert "989 TFLOP/s" in shown and "estimate" in shown and "Recommended: plain DDP (runtime.zero=0)" in shown


def test_a_warm_up_longer_than_the_run_is_said(file, capsys):
    says = "40 epochs of warm-up in a run of 3: the learning rate ends at 0.00026"
    for words, times in ((["optimization.epochs=3"], 1), (["optimization.epochs=41"], 0)):
        assert main(["plan", "--config", file, *words]) == 0
        assert capsys.readouterr().out.count(says) == times
        assert main(["plan", "--config", file, "--json", *words]) == 0
        assert len(json.loads(capsys.readouterr().out)["notes"]) == times


def test_options_reach_the_plan(file, capsys):
    words = "--gpus 2 --gpu-memory 24 --zero 3 --micro-batch 6 --card a100 --utilisation 0.5 --images 1000 --json"
    assert main(["plan", "--config", file, *words.split(), "optimization.epochs=7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["stages"]) == ["3"] and found["recommended_stage"] == 3
    assert (found["gpu_memory"], found["micro_batch"], found["peak_flops"]) == (24e9, 6, 312e12)
    assert found["hours"] == pytest.approx(found["flops_per_image"] * 7000 / (2 * 312e12 * 0.5) / 3600)


@pytest.mark.parametrize(("card", "memory", "peak"), [("h200", 141e9, 989e12), ("h100", 80e9, 989e12), ("a100", 80e9, 312e12)])
def test_a_card_brings_its_memory_and_peak(card, memory, peak, file, capsys):
    assert main(["plan", "--config", file, "--zero", "0", "--json", "--card", card]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["card"], found["gpu_memory"], found["peak_flops"]) == (card, memory, peak)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "0"], "--gpus: 0 must be at least 1"),
        (["--zero", "4"], "invalid choice: 4"),
        (["--gpu-memory", "0"], "must be a finite number above 0"),
        (["--utilisation", "1.5"], "must be in (0, 1]"),
        (["--micro-batch", "5"], "runtime.micro_batch: 5 must divide data.batch_size: 12"),
        (["mask.min_keep=60"], "min_keep"),
    ],
)
def test_a_mistake_is_one_sentence(file, words, sentence, capsys):
    try:
        code = main(["plan", "--config", file, *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "fastjepa plan --config" in capsys.readouterr().out.partition("examples")[2]


def test_traffic_is_the_table_of_the_docs(capsys):
    """docs/scaling.md holds what the commands in it print."""
    text = (ROOT / "docs/scaling.md").read_text()
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("fastjepa plan --config")]
    assert len(commands) == 4
    for command in commands:
        assert main([str(ROOT / word) if word.startswith("configs/") else word for word in command]) == 0
        assert capsys.readouterr().out.strip() in text
