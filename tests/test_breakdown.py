"""benchmarks/step.py --breakdown: what each part of a step takes, what it must take, and the trace of it."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastjepa import train
from fastjepa.config.schema import Config
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.errors import ConfigError
from fastjepa.loader.loader import Loader
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.pack import pack
from fastjepa.model.predictor import Predictor
from fastjepa.model.vit import Encoder
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.memory import RowCounts, activation_bytes, network_sizes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))  # as `python benchmarks/step.py` has it

import breakdown  # noqa: E402  (only importable from here on)
import roofline  # noqa: E402
import step  # noqa: E402
import timeline  # noqa: E402
import timing  # noqa: E402

CPU = torch.device("cpu")
SMALL = ["--device=cpu", "--dtype=fp32", "--model=vit_tiny", "--size=32", "--batch=4", "--pred-depth=2", "--threads=1",
         "mask.patch_size=4", "mask.min_keep=4", "meta.pred_emb_dim=24", "meta.embed_dim=48", "meta.depth=2",
         "data.num_workers=0"]  # fmt: skip
PAUSE = 0.1


def config_of(*arguments: str) -> Config:
    return step.to_config(step.parse([*SMALL, *arguments]))


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(timing.SQUARE, "cpu", 256)
    monkeypatch.setitem(timing.COPIED, "cpu", 1 << 22)


def shares(rows: list[dict]) -> dict[str, float]:
    return {row["part"]: row["share"] for row in rows}


def test_parts_make_up_the_step():
    """`share` is of the time between the first step's start and the last one's end, which no mark takes part in."""
    found = shares(breakdown.measure(config_of(), rounds=8))
    assert list(found) == [*breakdown.PARTS, breakdown.REST, "step"]
    assert min(found[part] for part in breakdown.PARTS) > 0
    assert found.pop("step") == pytest.approx(sum(found.values()))
    assert sum(found.values()) == pytest.approx(1, abs=0.02)
    assert found[breakdown.REST] < 0.05  # of steps of milliseconds, on machines that do other things too


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
        ("loss", train, "jepa_loss", slower),
        ("loss", train, "jepa_loss", slower_gradient),
        ("predictor backward", Predictor, "forward", slower_gradient),
        ("context backward", Encoder, "forward", only_trained(slower_gradient)),
        ("optimizer", PlainEngine, "step", slower),
        ("EMA", Average, "update", slower),
    ],
)
@pytest.mark.parametrize("pieces", [1, 2])
def test_what_slows_a_part_down_is_found_in_it(part: str, owner, name: str, slow, pieces: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    rows = breakdown.measure(config_of(f"runtime.micro_batch={4 // pieces}"), rounds=2)
    once = part in ("data wait", "optimizer", "EMA")
    least = 1000 * PAUSE * (1 if once else pieces)
    assert next(row["ms"]["p20"] for row in rows if row["part"] == part) >= least


def test_the_dissected_step_is_the_trainer_s():
    """The same losses and weights as `train.step` on the same batches, with the regularizer and micro-batches."""
    config = config_of("runtime.micro_batch=2", "loss.regularizer=vicreg")
    works = [step.Work.draw(config, CPU, 0)]
    plain, dissected = (step.Ours(config, CPU, works) for _ in range(2))
    for number in range(2):
        plain(number)
        dissected.phases(number)
    for one, other in zip(plain.jepa.parameters(), dissected.jepa.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(plain.target_encoder.parameters(), dissected.target_encoder.parameters(), strict=True):
        assert torch.equal(one, other)


def micro_batch(config: Config, batch: int) -> tuple:
    drawn = draw_masks(config.mask, config.grid, 0, 0, range(batch), batch)
    return pack(*drawn)


def test_work_of_the_parts_is_that_of_the_step():
    """FLOPs are those of flops.py; of the bytes, weights are read once a micro-batch, and optimizer and EMA run once a step."""
    config = config_of()
    one = micro_batch(config, 4)
    found, twice = roofline.works(config, [one], 1), roofline.works(config, [one, one], 1)
    assert set(found) == set(breakdown.PARTS) - {"data wait"}
    assert sum(work.flops for work in found.values()) == pytest.approx(4 * flops_of_packed(config, *one).total)
    size = network_sizes(config)
    assert found["optimizer"] == (0, 32 * size.trained) == twice["optimizer"]
    assert found["EMA"] == (0, 12 * size.encoder) == twice["EMA"]
    for part in roofline.NETWORK_PARTS:
        assert twice[part] == pytest.approx([2 * quantity for quantity in found[part]])
    saved = activation_bytes(config, RowCounts.of(*one)).saved
    weights = 4 * size.trained
    forward = found["context forward"].moved + found["predictor forward"].moved
    assert forward == pytest.approx(2 * saved + weights, rel=0.1)  # the ends of the networks are left out
    backward = found["context backward"].moved + found["predictor backward"].moved
    assert backward == pytest.approx(3 * saved + 2 * weights, rel=0.1)


def test_bytes_shrink_with_the_dtype_where_activations_rule():
    wide = ["--batch=64", "mask.truncate_group=64"]
    fp32, bf16 = (config_of(*wide, f"--dtype={dtype}") for dtype in ("fp32", "bf16"))
    one = micro_batch(fp32, 64)
    assert (
        0.5
        < roofline.works(bf16, [one], 1)["target forward"].moved / roofline.works(fp32, [one], 1)["target forward"].moved
        < 0.8
    )


@pytest.mark.parametrize("work, named, seconds", [((8e9, 1e6), "GEMM", 4.0), ((8e9, 1e10), "memory", 10.0)])
def test_the_slower_rate_is_the_bound(work: tuple[float, float], named: str, seconds: float):
    assert roofline.bound(roofline.Work(*work), roofline.Machine(gemm=2e9, copy=1e9)) == (named, seconds)


def test_copy_rate_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(100))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert timing.copy_rate(CPU) == 2 * (1 << 22)


def test_launch_gaps_are_what_no_kernel_covers():
    """100 ms forward of which kernels take 70, 10 of 10 waiting for data: 30 ms are gaps, and the sum stays."""
    parts = dict.fromkeys((*breakdown.PARTS, breakdown.REST), 0.0) | {"data wait": 10.0, "target forward": 100.0, "EMA": 5.0}
    found = breakdown.apart(parts, {"target forward": 70.0, "EMA": 6.0})
    assert found["target forward"] == 70 and found[breakdown.GAPS] == 30
    assert found["EMA"] == 5  # a profile that is slower makes no negative gap
    assert sum(found.values()) == pytest.approx(sum(parts.values()))
    assert breakdown.apart(parts, {}) == parts


def test_kernels_belong_to_the_part_that_launched_them():
    """They run later than that, and overlap; what is launched outside of all parts counts for none."""

    def event(cat: str, name: str, ts: float, dur: float, correlation: int) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}

    marks = [{"ph": "X", "cat": "user_annotation", "name": timeline.MARK + name, "ts": ts, "dur": 1}
             for name, ts in (("target forward", 100), ("optimizer", 200), ("end", 300))]  # fmt: skip
    launches = [event("cuda_runtime", "cudaLaunchKernel", ts, 1, i) for i, ts in enumerate((50, 110, 120, 210))]
    launches += [event("cuda_driver", "cuLaunchKernel", 220, 1, 4)]
    kernels = [event("kernel", "k", ts, dur, i)
               for i, (ts, dur) in enumerate([(60, 10), (500, 1000), (1000, 1000), (3000, 500), (4000, 500)])]  # fmt: skip
    kernels += [event("gpu_memcpy", "copy", 9000, 4000, 1)]
    events = [*marks, *launches, *kernels, {"ph": "M", "name": "process_name"}]
    ranges = timeline.parts(events)
    assert [(one["name"], one["ts"], one["dur"]) for one in ranges] == [("target forward", 100, 100), ("optimizer", 200, 100)]
    assert timeline.busy(events, ranges) == {"target forward": 1.5, "optimizer": 1.0}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict:
    """What the command prints and writes."""
    folder, printed = tmp_path_factory.mktemp("breakdown"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.SQUARE, "cpu", 256)
        patch.setitem(timing.COPIED, "cpu", 1 << 22)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        files = {name: folder / f"breakdown.{name}" for name in ("svg", "json")}
        code = step.main([*SMALL, "--rounds=3", f"--picture={files['svg']}", f"--trace={files['json']}", "--json"])
    return {"code": code, "rows": json.loads(printed[-1]), **files}


def test_the_command_prints_rows(written: dict):
    assert written["code"] == 0
    assert [row["part"] for row in written["rows"]] == [*breakdown.PARTS, breakdown.REST, "step"]
    for row in written["rows"]:
        assert (row["dtype"], row["batch"], row["n"]) == ("fp32", 4, 3)
    work = {row["part"]: row for row in written["rows"] if row.get("bound")}
    assert set(work) == set(breakdown.PARTS) - {"data wait"}
    for row in work.values():
        rates = row["gflop"] / row["gemm_gflops"], row["moved_bytes"] / row["copy_gb_s"] / 1e9
        assert row["bound_ms"] == pytest.approx(1000 * max(rates))
    shown = list(breakdown.report(written["rows"]))
    assert len(shown) == 2 + len(written["rows"]) and "EMA" in shown[-3] and "memory" in shown[-3]


def test_the_trace_names_the_parts_in_order(written: dict):
    trace = json.loads(written["json"].read_text())
    ranges = [event for event in trace["traceEvents"] if event.get("cat") == "part"]
    names = [one["name"] for one in ranges if one["name"] != breakdown.REST]
    a_step = ["data wait", *breakdown.PARTS[1:7], "data wait", "optimizer", "EMA"]
    assert names == breakdown.TRACED * a_step
    for one, after in zip(ranges, ranges[1:], strict=False):
        assert one["ts"] + one["dur"] == pytest.approx(after["ts"])
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::addmm"]
    target = next(one for one in ranges if one["name"] == "target forward")
    assert any(target["ts"] <= event["ts"] <= target["ts"] + target["dur"] for event in products)
    assert not any(timeline.is_mark(event) for event in trace["traceEvents"])


def test_the_picture_names_the_parts(written: dict):
    drawn = written["svg"].read_text()
    assert drawn.startswith("<?xml") and "<svg" in drawn
    for part in breakdown.PARTS:
        assert f"<!-- {part} -->" in drawn


@pytest.mark.parametrize(
    "wrong, named",
    [
        (["--breakdown", "runtime.cuda_graph=true"], "runtime.cuda_graph=false"),
        (["--breakdown", "loss.target=pixels"], "set loss.target=output"),
        (["--trace=/nowhere/trace.json"], "no folder /nowhere"),
        (["--picture=breakdown.mp3"], "must end with one of"),
        (["--breakdown", "data.source=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_a_sentence(wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert step.main([*SMALL, *wrong]) == 2
    assert named in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'fastjepa\[bench\]'"):
        roofline.canvas(Path("x.svg"))


@pytest.mark.slow
def test_parts_of_a_compiled_step(monkeypatch: pytest.MonkeyPatch):
    """Three networks are compiled, each for itself; the graphs run uncompiled here, to save minutes."""
    compiled, compile_it = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda what, **how: compiled.append(what) or compile_it(what, backend="eager", **how))
    rows = breakdown.measure(config_of("meta.depth=1", "--pred-depth=1", "runtime.compile=true"), rounds=2)
    assert [type(one).__name__ for one in compiled[-2:]] == ["Encoder", "Predictor"]
    assert min(row["ms"]["median"] for row in rows) > 0
