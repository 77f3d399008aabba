"""benchmarks/step.py --breakdown: the time of each part of a step, its FLOPs, and the trace of it."""

import json
import time

import breakdown
import pytest
import step
import torch
from torch import Tensor
from work import TrainerStep, Work

from fastjepa.config.schema import Config
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.loader.loader import Loader
from fastjepa.masks.pack import pack
from fastjepa.model.predictor import Predictor
from fastjepa.model.vit import Encoder
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.plan import workload_of
from fastjepa.run import step as run_step

CPU = torch.device("cpu")
SMALL = ["--device=cpu", "--dtype=fp32", "--model=vit_tiny", "--size=32", "--batch=4", "meta.pred_depth=2", "--threads=1",
         "mask.patch_size=4", "mask.min_keep=4", "meta.pred_emb_dim=24", "meta.embed_dim=48", "meta.depth=2",
         "data.num_workers=0"]  # fmt: skip
PAUSE = 0.05


def config_of(*arguments: str) -> Config:
    return step.to_config(step.parse_options([*SMALL, *arguments]))


def shares(rows: list[dict]) -> dict[str, float]:
    return {row["part"]: row["share"] for row in rows}


def test_parts_make_up_the_step():
    """`share` is of the time between the first step's start and the last one's end, which no mark takes part in."""
    found = shares(breakdown.measure_parts(config_of(), rounds=8))
    assert list(found) == [*breakdown.PARTS, breakdown.REST, "step"]
    assert min(found[part] for part in breakdown.PARTS) > 0
    assert found.pop("step") == pytest.approx(sum(found.values()))
    assert sum(found.values()) == pytest.approx(1, abs=0.02)
    assert found[breakdown.REST] < 0.1  # of steps of milliseconds, on machines that do other things too


class Slow(torch.autograd.Function):
    """The identity, whose backward takes PAUSE."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        time.sleep(PAUSE)
        return gradient


def slower(method):
    def call(*args, **kwargs):
        time.sleep(PAUSE)
        return method(*args, **kwargs)

    return call


def slower_gradient(method):
    return lambda *args, **kwargs: Slow.apply(method(*args, **kwargs))


def slower_batches(method):
    def batches(self: Loader, number: int):
        time.sleep(PAUSE)
        yield from method(self, number)

    return batches


def only_trained(slow):
    """The target network is an Encoder too, but without gradients."""
    return lambda method: lambda self, *args, **kwargs: (
        slow(method) if self.norm.weight.requires_grad else method
    )(self, *args, **kwargs)  # fmt: skip


def only_averaged(method):
    return lambda self, *args, **kwargs: (
        method if self.norm.weight.requires_grad else slower(method)
    )(self, *args, **kwargs)  # fmt: skip


@pytest.mark.parametrize(
    "part, owner, name, slow",
    [
        ("data wait", Loader, "micro_batches", slower_batches),
        ("target forward", Encoder, "forward", only_averaged),
        ("context forward", Encoder, "forward", only_trained(slower)),
        ("predictor forward", Predictor, "forward", slower),
        ("loss", run_step, "jepa_loss", slower),
        ("loss", run_step, "jepa_loss", slower_gradient),
        ("predictor backward", Predictor, "forward", slower_gradient),
        ("context backward", Encoder, "forward", only_trained(slower_gradient)),
        ("optimizer", PlainEngine, "step", slower),
        ("EMA", Average, "update", slower),
    ],
)
def test_what_slows_a_part_down_is_found_in_it(part: str, owner, name: str, slow, monkeypatch: pytest.MonkeyPatch):
    """Two micro-batches a step."""
    monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    rows = breakdown.measure_parts(config_of("runtime.micro_batch=2"), rounds=1)
    least = 1000 * PAUSE * (1 if part in ("data wait", "optimizer", "EMA") else 2)
    assert next(row["ms"]["p20"] for row in rows if row["part"] == part) >= least


def test_marks_change_nothing_and_are_gone_afterwards():
    """The same losses and weights with and without them, with the regularizer and micro-batches."""
    config = config_of("runtime.micro_batch=2", "loss.regularizer=vicreg")
    batches = [batch.to(CPU) for batch in Work.draw(config, CPU, 0).packed(config)]
    plain, marked = (TrainerStep(config, CPU) for _ in range(2))
    for _ in range(2):
        plain.take(batches)
        with breakdown.PartMarks(marked) as marks:
            marks.take(batches)
    for one, other in zip(plain.jepa.parameters(), marked.jepa.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(plain.target_encoder.parameters(), marked.target_encoder.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not marked.jepa.encoder._forward_hooks and not marked.jepa.predictor._forward_pre_hooks
    assert "step" not in vars(marked.engine) and "update" not in vars(marked.average)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict:
    """The command prints and writes rows."""
    printed, file = [], tmp_path_factory.mktemp("breakdown") / "trace.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(breakdown.timing.SQUARE, "cpu", 128)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        code = step.main([*SMALL, "--rounds=3", f"--trace={file}", "--json"])
    return {"code": code, "rows": json.loads(printed[-1]), "trace": json.loads(file.read_text())["traceEvents"]}


def test_the_command_prints_rows(written: dict):
    assert written["code"] == 0
    assert [row["part"] for row in written["rows"]] == [*breakdown.PARTS, breakdown.REST, "step"]
    for row in written["rows"]:
        assert (row["dtype"], row["batch"], row["n"]) == ("fp32", 4, 3)
    counted = {row["part"]: row for row in written["rows"] if row["gflop"]}
    assert set(counted) == set(breakdown.NETWORK_PARTS)
    seconds = [row["gflop"] / row["gemm_gflops"] / row["of_gemm"] / row["share"] for row in counted.values()]
    assert seconds == pytest.approx([seconds[0]] * len(seconds))  # of the same step


def test_a_part_s_share_of_the_gemm_rate():
    """2 GFLOP in a millisecond on a machine that could do 4."""
    rows = list(breakdown.part_rows([dict.fromkeys(breakdown.PARTS, 1.0)], 0.009, {"target forward": 2e9}, 4e12))
    assert next(row["of_gemm"] for row in rows if row["part"] == "target forward") == pytest.approx(0.5)
    assert rows[-1]["share"] == pytest.approx(1) and rows[-1]["gflop"] is None


def test_flops_of_the_parts_are_in_the_order_of_their_names():
    work = Work.draw(config_of(), CPU, 0)
    counted = vars(flops_of_packed(workload_of(config_of()), *pack(work.context_mask, work.target_mask)))
    assert [name.replace("_", " ") for name in counted] == list(breakdown.NETWORK_PARTS)


def test_the_trace_names_the_parts_in_order(written: dict):
    marks = [event for event in written["trace"] if event.get("name", "").startswith("begins: ") and event.get("ph") == "X"]
    names = [mark["name"].removeprefix("begins: ") for mark in sorted(marks, key=lambda mark: mark["ts"])]
    a_step = ["data wait", *breakdown.PARTS[1:7], "data wait", "optimizer", "EMA"]
    assert [name for name in names if name != breakdown.REST] == breakdown.TRACED * a_step
    assert any(event.get("name") == "aten::addmm" for event in written["trace"])


@pytest.mark.parametrize(
    "wrong, named",
    [
        (["--breakdown", "runtime.cuda_graph=true"], "runtime.cuda_graph=false"),
        (["--breakdown", "runtime.compile=true"], "runtime.compile=false"),
        (["--breakdown", "loss.target=pixels"], "set loss.target=output"),
        (["--trace=/nowhere/trace.json"], "no folder /nowhere"),
        (["--breakdown", "data.source=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_a_sentence(wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert step.main([*SMALL, *wrong]) == 2
    assert named in capsys.readouterr().err
