"""benchmarks/gpu_hours.py: every method does the work of the library it is made of, and is counted and projected as stated."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import gpu_hours
import ibot
import ijepa
import mae
import pytest
import step
import timing
import torch
import torch.nn.functional as F
import vit
from torch import Tensor, nn

from fastjepa.config.schema import Config
from fastjepa.engine.precision import has_bf16
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.plan.flops import flops_per_image, official_flops
from fastjepa.plan.plan import workload_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
TOY = ["--device=cpu", "--dtype=fp32", "--models=vit_tiny", "--size=64", "--batch=2", "--rounds=2"]
TOY += ["mask.patch_size=8", "mask.min_keep=4", "meta.pred_emb_dim=48", "meta.depth=3", "meta.pred_depth=2"]
STEPS = range(3)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")


@pytest.fixture(autouse=True)
def small_heads(monkeypatch: pytest.MonkeyPatch):
    """MAE's decoder and iBOT's head dwarf a toy encoder."""
    for module, name, value in ((mae, "WIDTH", 64), (mae, "DEPTH", 2), (mae, "HEADS", 4)):
        monkeypatch.setattr(module, name, value)
    for name, value in (("HIDDEN", 96), ("BOTTLENECK", 32), ("PROTOTYPES", 160)):
        monkeypatch.setattr(ibot, name, value)


def options_of(*arguments: str) -> Namespace:
    return gpu_hours.parse_options([*TOY, *arguments])


def config_of(*arguments: str) -> Config:
    return gpu_hours.to_config(options_of(*arguments), "vit_tiny")


def contender(method: str, config: Config) -> vit.MethodStep:
    torch.manual_seed(0)
    kind = gpu_hours.METHODS[method]
    return vit.MethodStep(kind, config, CPU, [kind.draw(config, CPU, number) for number in range(2)])


def losses(run: vit.MethodStep) -> list[float]:
    """The random depths of the first steps are those of iBOT's student drawn from the same seeds."""
    found = []
    for number in STEPS:
        torch.manual_seed(number)
        found.append(float(run(number)))
    return found


def test_flops_that_torch_counts_are_those_of_the_formula():
    """`fastjepa.flops` has a closed form of the official step, which I-JEPA on timm's ViT computes."""
    config = config_of()
    batch = ijepa.IJepa.draw(config, CPU, 0)
    expected = official_flops(workload_of(config), batch[1].shape[1], batch[2].shape[2]).total
    assert vit.count_flops(ijepa.IJepa, config, [batch]) == [pytest.approx(expected, rel=1e-6)]


def test_ijepa_on_timm_is_our_ijepa():
    """From the same perturbed weights, on the same masks: the same losses, weights and averages, step after step."""
    config = config_of()
    works = [ijepa.draw_work(config, CPU, number) for number in range(2)]
    ours, theirs = step.OurStep(config, CPU, works), contender("ijepa", config)
    step.perturb(ours.jepa)
    ours.target_encoder.load_state_dict(ours.jepa.encoder.state_dict())
    for network in (theirs.method.encoder, theirs.method.target_encoder):
        network.vit.load_state_dict({n: v for n, v in ours.jepa.encoder.state_dict().items() if n in network.vit.state_dict()})
    theirs.method.predictor.load_state_dict(ours.jepa.predictor.state_dict())
    assert losses(theirs) == pytest.approx([float(ours(number)) for number in STEPS], rel=1e-5)
    for mine, average in ((ours.jepa.encoder, theirs.method.encoder), (ours.target_encoder, theirs.method.target_encoder)):
        for name, value in mine.named_parameters():
            torch.testing.assert_close(average.vit.get_parameter(name), value, rtol=1e-4, atol=1e-5)


def test_contexts_are_cut_as_the_official_batch_of_a_gpu_is():
    config = config_of()
    small, whole = (
        ijepa.draw_work(config, CPU, 3),
        draw_masks(Masking.of(config), 3, range(128), 128),
    )
    assert (small.context_mask == whole[0][:2]).all() and (small.target_mask == whole[1][:2]).all()
    assert len(ijepa.draw_work(config_of("--batch=130"), CPU, 0).images) == 130


def test_typical_batches_cost_what_the_mean_costs():
    config = config_of()
    drawn = [ijepa.IJepa.draw(config, CPU, number) for number in range(ijepa.TRIED)]
    costs = [official_flops(workload_of(config), context.shape[1], blocks.shape[2]).total for _, context, blocks in drawn]
    chosen = ijepa.typical_batches(config, 2)
    mean = sum(costs) / len(costs)
    assert sorted(chosen) == sorted(sorted(range(ijepa.TRIED), key=lambda number: abs(costs[number] - mean))[:2])


class Documented:
    """The common part of lightly's examples: AdamW, here with the groups and the rates that the loop has."""

    def __init__(self, method: str, config: Config, like: vit.MethodStep):
        self.model = gpu_hours.METHODS[method](config, CPU)
        self.model.load_state_dict(like.method.state_dict())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if (p.ndim > 1) == decayed], "weight_decay": decayed * like.now.weight_decay}
                  for decayed in (True, False)]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=like.now.lr)
        self.momentum = like.now.ema_momentum

    def losses(self, batches: list) -> list[float]:
        return [self.step(number, batches[number % len(batches)]) for number in STEPS]

    def step(self, number: int, batch) -> float:
        torch.manual_seed(number)
        loss = self.loss(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.follow()
        return loss.item()

    def follow(self) -> None:
        """MAE has no average."""
        assert not self.model.averaged


class DocumentedMae(Documented):
    """lightly's MAE example, with the normalised pixels of the published models."""

    def loss(self, images: Tensor, idx_keep: Tensor, idx_mask: Tensor) -> Tensor:
        from lightly.models import utils

        backbone, decoder, embed, head = (
            self.model.encoder, self.model.predictor.decoder, self.model.predictor.embed, self.model.predictor.pixels
        )  # fmt: skip
        x_encoded = backbone.encode(images=images, idx_keep=idx_keep)
        x_masked = utils.repeat_token(decoder.mask_token, (len(images), backbone.sequence_length))
        x_masked = utils.set_at_index(x_masked, idx_keep, embed(x_encoded).type_as(x_masked))
        prediction = head(utils.get_at_index(decoder.decode(x_masked + decoder.pos_embed), idx_mask))
        target = utils.get_at_index(utils.patchify(images, 8), idx_mask - 1)
        return nn.MSELoss()(prediction, utils.normalize_mean_var(target))


class DocumentedIbot(Documented):
    """lightly's iBOT example."""

    def loss(self, global_views: Tensor, local_views: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        student, teacher = self.model.student, self.model.teacher
        block_mask = mask[:, 1:].reshape(len(mask), *self.model.grid)
        with torch.no_grad():
            teacher_features = teacher.encoder.encode(global_views)
            teacher_cls_out = teacher.head.forward(teacher_features[:, 0])
            teacher_masked_out = teacher.head.forward(teacher_features[mask])
        features = student.encoder.encode(global_views, mask=mask)
        student_global_cls_out = student.head.forward(features[:, 0])
        student_global_masked_out = student.head.forward(features[mask])
        student_local_cls_out = student.head.forward(student.encoder.encode(local_views)[:, 0])
        student_cls_out = torch.cat([student_global_cls_out, student_local_cls_out])
        dino_loss = self.model.class_loss(
            teacher_out=teacher_cls_out.chunk(2), student_out=student_cls_out.chunk(12), teacher_temp=0.07
        )
        return dino_loss + self.model.patch_loss(
            teacher_out=teacher_masked_out, student_out=student_global_masked_out, mask=block_mask, teacher_temp=0.07
        )

    def follow(self) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.model.student, self.model.teacher, m=self.momentum)


@pytest.mark.parametrize("method, documented", [("mae", DocumentedMae), ("ibot", DocumentedIbot)])
def test_a_step_is_that_of_the_librarys_documentation(method: str, documented: type):
    config = config_of()
    run = contender(method, config)
    theirs = documented(method, config, run).losses(run.batches)
    assert losses(run) == pytest.approx(theirs, rel=1e-5)
    assert len(set(theirs)) == len(theirs)


@pytest.mark.parametrize("method", gpu_hours.METHODS)
def test_attention_is_fused_where_ours_is(method: str, monkeypatch: pytest.MonkeyPatch):
    def fused(*args, **options):
        raise AssertionError("fused attention")

    runs = [contender(method, config_of(f"--dtype={dtype}")) for dtype in ("fp32", "bf16")]
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    with pytest.raises(AssertionError, match="fused attention"):
        runs[0](0)
    runs[1](0)  # on a CPU products are faster, for our attention too


def test_ibot_views_and_masks_are_the_published_ones():
    """Half of the large views are masked, 10 to 50 % of each; small views are 96 pixels at patch 16; python's dice stay."""
    import random

    state = random.getstate()
    views = ibot.Ibot.draw(config_of("--size=224", "--batch=8", "mask.patch_size=16"), CPU, 0)
    assert random.getstate() == state
    assert views.images.shape == (16, 3, 224, 224) and views.local.shape == (80, 3, 96, 96)
    share = views.mask[:, 1:].float().mean(dim=1)
    assert int((share > 0).sum()) == 8 and float(share.max()) <= 0.5
    assert not views.mask[:, 0].any()
    assert torch.equal(views.rows, views.mask.flatten().nonzero().flatten())
    again = ibot.Ibot.draw(config_of("--size=224", "--batch=8", "mask.patch_size=16"), CPU, 0)
    assert all(map(torch.equal, views, again))


def test_mae_keeps_a_quarter():
    _, keep, masked = mae.Mae.draw(config_of("--size=224", "mask.patch_size=16"), CPU, 0)
    assert keep.shape == (2, 1 + 49) and masked.shape == (2, 147)
    assert (keep[:, 0] == 0).all()
    assert (torch.cat((keep, masked), dim=1).sort().values == torch.arange(197)).all()


def test_rows_are_those_asked_for():
    asked = gpu_hours.asked_rows(options_of("--models=vit_tiny,vit_small"))
    assert len(asked) == 2 * (2 + 1 + 1)
    assert [str(row) for row in gpu_hours.asked_rows(options_of("--columns=packed", "--reference=there"))] == [
        "ijepa vit_tiny packed", "ijepa vit_tiny reference",
    ]  # fmt: skip


def test_hours_follow_the_formula():
    found = gpu_hours.projected(gpu_hours.Row("ijepa", "vit_huge", "packed"), 770.0)
    assert found["hours"] == pytest.approx(300 * 1281167 / 770 / 3600)
    assert found["hours_per_point"] == pytest.approx(found["hours"] / 79.3)
    assumed = gpu_hours.projected(gpu_hours.Row("mae", "vit_tiny", "same"), 10.0)
    assert (assumed["epochs"], assumed["epochs_published"], assumed["accuracy"]) == (1600, False, None)


@pytest.mark.parametrize("model, gigaflops", [("vit_small", 38), ("vit_huge", 654)])
def test_flops_of_the_paper_are_those_derived_elsewhere(model: str, gigaflops: float):
    options = gpu_hours.parse_options(["--estimate=h100", f"--models={model}", "--batch=2"])
    config = gpu_hours.to_config(options, model)
    assert gpu_hours.counted_flops(gpu_hours.Row("ijepa", model, "same"), config) / 1e9 == pytest.approx(gigaflops, rel=0.03)
    packed = gpu_hours.counted_flops(gpu_hours.Row("ijepa", model, "packed"), config)
    assert packed == pytest.approx(flops_per_image(workload_of(config), 128), rel=0.05)


def test_datasheets():
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert gpu_hours.datasheet_flops(name, "bf16") == 989e12
    assert gpu_hours.datasheet_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert gpu_hours.datasheet_flops("cpu", "bf16") is None


def test_a_card_measures_each_method_by_itself():
    asked = gpu_hours.asked_rows(options_of("--models=vit_tiny,vit_small"))
    assert gpu_hours.groups_of_turns(asked, CPU) == [asked]
    groups = gpu_hours.groups_of_turns(asked, torch.device("cuda"))
    assert [len(group) for group in groups] == [2, 1, 1, 2, 1, 1]
    assert sum(groups, []) == asked


@pytest.fixture
def no_peaks(monkeypatch: pytest.MonkeyPatch):
    """Peak memory takes a process for each row; here iBOT does not fit."""
    monkeypatch.setattr(timing, "in_fresh_process", lambda peak, row, *rest: None if row.method == "ibot" else 2**20)


def test_json_rows_hold_what_was_promised(no_peaks, capsys: pytest.CaptureFixture[str]):
    assert gpu_hours.main([*TOY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["column"]) for row in found["rows"]] == [
        ("ijepa", "packed"), ("ijepa", "same"), ("mae", "same"),
    ]  # fmt: skip
    assert [one["reason"] for one in found["not_measured"]] == ["out of memory"]
    for row in found["rows"]:
        assert {
            "method",
            "model",
            "column",
            "images_per_s",
            "gflop_per_image",
            "mfu",
            "epochs",
            "hours",
            "device",
        } <= row.keys()
        assert row["n"] == 2 and row["p20"] <= row["images_per_s"] <= row["p80"]
        assert row["hours"] == pytest.approx(row["epochs"] * 1281167 / row["images_per_s"] / 3600)
        assert 0 < row["mfu"] < 1.5 and row["share_of_datasheet"] is None
    assert all(row["peak_bytes"] == 2**20 for row in found["rows"]) and "hours = epochs x 1281167" in found["formula"]


def test_a_machine_that_slows_down_is_in_the_spread_of_images_but_not_in_that_of_the_share_of_gemm():
    slowed, config = [1.0, 1.2, 1.5, 2.0, 3.0], config_of()
    rates = [1e9 / slow for slow in slowed]
    rounds = gpu_hours.Rounds([1e8] * 5, slowed, rates)
    row = gpu_hours.measured_row(gpu_hours.Row("mae", "vit_tiny", "same"), rounds, config, CPU)
    assert row["spread"] > 0.5 and row["mfu_spread"] == pytest.approx(0)
    assert row["mfu"] == pytest.approx(0.2) and row["images_per_s"] == pytest.approx(config.data.batch_size / 1.5)


def test_every_round_of_as_many_steps_as_there_are_batches_does_the_same_work():
    assert gpu_hours.means_of_rounds([1.0, 3.0, 1.0, 3.0].__getitem__, rounds=2, steps=2) == [2.0, 2.0]
    assert gpu_hours.means_of_rounds([1.0, 3.0].__getitem__, rounds=2, steps=1) == [1.0, 3.0]


def test_the_official_code_is_a_column(stand_in: Path, no_peaks):
    options = options_of("--methods=ijepa", "--columns=packed", f"--reference={stand_in}", "meta.depth=null")
    found = gpu_hours.measure_rows(options)
    assert [row["column"] for row in found["rows"]] == ["packed", "reference"]
    assert found["rows"][1]["gflop_per_image"] > found["rows"][0]["gflop_per_image"]


def test_estimates_show_their_arithmetic(capsys: pytest.CaptureFixture[str]):
    assert gpu_hours.main(["--estimate=h100", "--models=vit_tiny", "--batch=2", "--methods=ijepa,mae", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["method"], row["column"]) for row in rows] == [("ijepa", "packed"), ("ijepa", "same"), ("mae", "same")]
    for row in rows:
        assert row["estimate"] and "40% of 989 TFLOP/s" in row["arithmetic"]
        assert row["hours"] == pytest.approx(row["epochs"] * 1281167 * row["gflop_per_image"] * 1e9 / (0.4 * 989e12) / 3600)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (["--methods=mae", "--columns=packed"], "no such row"),
        (["--reference=nowhere", "meta.depth=null"], "nowhere: no src/helper.py"),
        (["mask.min_keep=60"], "min_keep"),
    ],
)
def test_a_mistake_is_a_sentence(wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert gpu_hours.main([*TOY, *wrong]) == 2
    assert named in capsys.readouterr().err


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        gpu_hours.main(["--methods=ijepa,dino"])
    assert "'dino' is none of ijepa, mae, ibot" in capsys.readouterr().err
    assert gpu_hours.main(["--estimate=h100", "--share=2"]) == 2
    assert "--share 2.0: give a number above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_command_runs_as_a_script():
    """MAE is measured with its real decoder, peak memory and all, from any directory."""
    arguments = [*TOY, "--methods=mae", "--columns=same", "--rounds=1", "--threads=1", "--json"]
    command = [sys.executable, str(BENCHMARKS / "gpu_hours.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    (row,) = json.loads(run.stdout)["rows"]
    assert 2**24 < row["peak_bytes"] < 2**31


def test_columns_of_ours_are_the_keys_they_say():
    base = config_of()
    for column in gpu_hours.OURS:
        ours = gpu_hours.varied(
            gpu_hours.Row("ijepa", "vit_base", column), gpu_hours.to_config(options_of("meta.embed_dim=768"), "vit_base")
        )
        assert ours.runtime.compile == (column in ("compile", "fp8")) and ours.runtime.cuda_graph == (column == "graph")
        assert (ours.meta.predictor == "joint") == (column == "joint") and ours.mask.num_enc_masks == (
            4 if column == "views4" else 1
        )
        assert ours.runtime.target_fp8 == (column == "fp8")
    assert base.meta.predictor == "per_block" and not base.runtime.compile


def test_what_cannot_run_here_is_not_measured_for_a_reason(no_peaks):
    found = gpu_hours.measure_rows(options_of("--methods=ijepa", "--columns=graph,fp8,views4,joint"))
    assert [(one["column"], one["objective"], one["views"]) for one in found["rows"]] == [
        ("views4", "another", 4), ("joint", "another", 1)]  # fmt: skip
    reasons = {one["what"]: one["reason"] for one in found["not_measured"]}
    assert "needs a CUDA device" in reasons["ijepa vit_tiny graph"] and "below ViT-B" in reasons["ijepa vit_tiny fp8"]
    views, joint = found["rows"]
    assert views["gflop_per_view"] == views["gflop_per_image"] / 4
    assert not views["epochs_published"] and joint["accuracy"] is None


def test_a_view_is_cheaper_and_a_joint_predictor_too():
    packed, views, joint = gpu_hours.estimate_rows(
        gpu_hours.parse_options(["--estimate=h100", "--models=vit_small", "--methods=ijepa", "--columns=packed,views4,joint"])
    )
    assert (
        views["gflop_per_view"] < 0.85 * packed["gflop_per_view"]
        and joint["gflop_per_image"] < 0.75 * packed["gflop_per_image"]
    )


def test_the_dtype_is_what_the_device_computes_in_and_named():
    config = gpu_hours.to_config(gpu_hours.parse_options(["--device=cpu", "--models=vit_tiny"]), "vit_tiny")
    assert config.runtime.dtype == ("bf16" if has_bf16(CPU) else "fp32")
    assert gpu_hours.to_config(gpu_hours.parse_options(["--estimate=h100"]), "vit_tiny").runtime.dtype == "bf16"
