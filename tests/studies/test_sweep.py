"""Studies: what is planned, one arm from its first step to its row, and sweeps of processes that are killed and go on."""

import dataclasses
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
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastjepa.cli import main as main_module
from fastjepa.cli.sweep import arm_names
from fastjepa.config.load import config_from_dict, load_config
from fastjepa.data.prepare.write_scenes import write_scenes
from fastjepa.engine.schedule import Schedule
from fastjepa.errors import UserError
from fastjepa.masks.check import check_masks
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.studies import worker
from fastjepa.studies.arm import ARM_CONFIG, JOB_FILE, Arm
from fastjepa.studies.measures import OF_PIXELS, looked_up
from fastjepa.studies.subset import subset_of
from fastjepa.studies.sweep import (
    BASE_CONFIG,
    STUDIES,
    ArmJob,
    RunningJobs,
    Sweep,
    departures_from_default,
    job_rows,
    plan_jobs,
    run_jobs,
)
from fastjepa.studies.token_variance import variance_shares
from fastjepa.studies.worker import main, scheduled_config, train_ijepa
from tests.support.images import write_idx
from tests.support.runs import same_weights, weights

EVERY = [(name, each) for name, study in STUDIES.items() for each in study.arms]
TINY = ["data.channels=1", "data.batch_size=8", "meta.embed_dim=32", "meta.depth=2", "meta.pred_emb_dim=16",
        "runtime.dtype=fp32", "runtime.device=cpu", "logging.every=1", "logging.monitor_every=0",
        "logging.checkpoint_every=2"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """60 training and 20 test images of four classes, as idx files."""
    folder, draw = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", draw.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 4)
    return str(folder)


def planned(data: str, output: Path, *arms: str, budget: int = 32, seeds: int = 1, more: tuple[str, ...] = ()):
    return plan_jobs(Sweep("small", output, data, seeds, budget, arms, [*TINY, *more]))


def work(job: ArmJob) -> dict:
    """The row of a job, made in this process."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / JOB_FILE).write_text(json.dumps(job.asked))
    assert main(job.folder) == 0
    return json.loads(job.row.read_text())


@pytest.mark.parametrize("study, each", EVERY, ids=[f"{name}-{each.name}" for name, each in EVERY])
def test_every_arm_is_a_config_that_runs_and_differs_from_the_base(study: str, each: Arm):
    settings = STUDIES[study].settings
    base, config = load_config(BASE_CONFIG, settings), load_config(BASE_CONFIG, (*settings, *each.overrides))
    check_masks(Masking.of(config), config.data.batch_size)
    changes = (
        departures_from_default(config) != departures_from_default(base)
        or each.length != 1
        or each.fraction != 1
        or each.method != "ijepa"
    )
    assert changes == (each.name not in ("multi-block", "base", "I-JEPA"))


@pytest.mark.parametrize("study", STUDIES)
def test_arms_have_names_of_their_own_and_groups_lie_together(study: str):
    arms = STUDIES[study].arms
    assert len({each.name for each in arms}) == len(arms)
    groups = [each.group for each in arms]
    assert [group for i, group in enumerate(groups) if group in groups[:i] and groups[i - 1] != group] == []


@given(st.integers(1, 300), st.integers(1, 8), st.integers(8, 60))
def test_schedules_end_with_the_budget_whatever_an_epoch_is(steps: int, batch: int, size: int):
    class Images(list):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "open_source", lambda data: Images(range(size)))
        base = load_config(BASE_CONFIG, [f"data.batch_size={batch}", "optimization.ema=[0.5,1.0]"])
        config, found = scheduled_config(base, "somewhere", steps * batch + batch - 1)
    schedule = Schedule(config.optimization, size // batch)
    assert found == steps <= schedule.total_steps
    assert schedule(steps - 1).lr == pytest.approx(config.optimization.final_lr)
    assert schedule(steps).ema_momentum == pytest.approx(1.0)
    if steps > 20:
        assert max(range(steps), key=lambda step: schedule(step).lr) == pytest.approx(0.1 * steps, abs=2)


def test_another_setting_is_another_run_and_the_same_is_the_same(data, tmp_path):
    (base,), (again,) = (planned(data, tmp_path, "base") for _ in range(2))
    others = [*planned(data, tmp_path, "base", budget=64), *planned(data, tmp_path, "base", more=("optimization.lr=1e-4",)),
              planned(data, tmp_path, "base", seeds=2)[1], *planned(data, tmp_path, "momentum .99")]  # fmt: skip
    assert base.folder == again.folder
    assert len({job.folder for job in (base, *others)}) == 1 + len(others)
    (slow,) = planned(data, tmp_path, "base", more=("logging.every=7", "runtime.threads=2", "data.num_workers=1"))
    assert slow.folder.name != base.folder.name  # data.num_workers is of the data
    (told,) = planned(data, tmp_path, "base", more=("logging.every=7", "runtime.threads=2"))
    assert told.folder == base.folder


def test_minutes_given_are_the_same_run_as_those_of_the_study(tmp_path):
    minutes = STUDIES["minutes"].minutes
    by_default, given = (plan_jobs(Sweep("minutes", tmp_path, "cifar10", 1, minutes=each)) for each in (None, float(minutes)))
    assert [job.folder for job in by_default] == [job.folder for job in given]


def test_what_changes_an_arms_numbers_is_in_its_folders_name(data, tmp_path):
    """Numbers of another dtype, and minutes that were counted by another base, are not taken for this run's."""
    (plain,) = planned(data, tmp_path, "base")
    (rounded,) = planned(data, tmp_path, "base", more=("runtime.dtype=bf16",))
    (pieces,) = planned(data, tmp_path, "base", more=("runtime.micro_batch=4",))
    assert len({job.folder for job in (plain, rounded, pieces)}) == 3
    (beside_plain,) = plan_jobs(Sweep("minutes", tmp_path, data, 1, None, ["VICReg"]))
    (beside_itself,) = plan_jobs(Sweep("minutes", tmp_path, data, 1, None, ["VICReg"], ["loss.regularizer=vicreg"]))
    assert beside_plain.folder != beside_itself.folder


@pytest.mark.parametrize("key", ["optimization.warmup", "data.source", "runtime.seed"])
def test_a_key_that_the_sweep_sets_is_refused(tmp_path, key: str):
    with pytest.raises(UserError, match=f"{key}: a sweep sets it itself"):
        plan_jobs(Sweep("small", tmp_path, "cifar10", 1, overrides=[f"{key}=1"]))


def test_equal_flops_are_no_minutes(tmp_path):
    with pytest.raises(UserError, match="--minutes: the study truncation gives its arms equal FLOPs"):
        plan_jobs(Sweep("truncation", tmp_path, "cifar10", 1, minutes=4))


def test_the_same_run_in_two_studies_is_done_once(tmp_path):
    first, second = (plan_jobs(Sweep(name, tmp_path, "cifar10", 1, 1000, [arm]))[0] for name, arm in
                     (("masking", "multi-block"), ("small", "base")))  # fmt: skip
    assert first.folder == second.folder
    first.folder.mkdir(parents=True)
    first.row.write_text(json.dumps(first.asked | {"mark": 1}))
    (row,) = job_rows([second])
    assert (row["study"], row["arm"], row["group"], row["mark"]) == ("small", "base", "base", 1)


def test_one_seed_of_all_arms_comes_before_the_next(data, tmp_path):
    jobs = planned(data, tmp_path, "base", "VICReg", seeds=2)
    assert [job.label for job in jobs] == ["base, seed 0", "VICReg, seed 0", "base, seed 1", "VICReg, seed 1"]


def test_a_batch_smaller_than_its_group_is_cut_as_the_first_part_of_one():
    mask = load_config(BASE_CONFIG, ["mask.truncate=batch_min", "mask.truncate_group=256"]).mask
    context, target = draw_masks(Masking(mask, (8, 8), 0), 3, range(64), 64)
    whole_context, whole_target = draw_masks(Masking(mask, (8, 8), 0), 3, range(256), 256)
    assert np.array_equal(context, whole_context[:64]) and np.array_equal(target, whole_target[:64])


def test_equal_flops_buy_more_images_of_shorter_contexts(tmp_path):
    jobs = plan_jobs(Sweep("truncation", tmp_path, "cifar10", 2, 100_000))
    for seed in range(2):
        images = {job.asked["arm"]: job.asked["images"] for job in jobs if job.asked["seed"] == seed}
        assert images["none"] == 100_000 < images["batch_min of 16"] < images["batch_min of 128"] < images["batch_min of 2048"]


def test_an_arm_trains_and_its_row_says_what_it_rests_on(data, tmp_path):
    (job,) = planned(data, tmp_path, "momentum .99")
    row = work(job)
    assert (row["study"], row["arm"], row["seed"], row["images"]) == ("small", "momentum .99", 0, 32)
    assert row["changed"]["optimization"]["ema"] == [0.99, 1.0] and row["hash"] == job.asked["hash"]
    assert row["flops"] > 0 and row["seconds"] > 0 and row["made_by"]["torch"] == torch.__version__
    for probe in ("knn", "linear", "linear_bn"):
        low, high = row["probe"][probe]["ci95"]
        assert low <= row["probe"][probe]["accuracy"] <= high
    assert [path.name for path in (job.folder / "checkpoints").iterdir()] == ["jepa-00000004"]


@pytest.mark.parametrize("arm", ["VICReg", pytest.param("MAE", marks=pytest.mark.slow)])
def test_an_arm_within_minutes_trains_on_what_it_reaches_in_them(data, tmp_path, monkeypatch, arm: str):
    """Minutes of a core on which the base reaches 64 images/s; stopped and continued, an arm keeps its schedule."""
    monkeypatch.setattr(worker, "PACE_STEPS", 12)
    monkeypatch.setattr(worker, "PACE_ROUNDS", 2)
    job, other_seed = plan_jobs(Sweep("minutes", tmp_path, data, 2, None, [arm], TINY, 1 / 60))
    assert "images" not in job.asked and job.asked["minutes"] == 1 / 60
    job.asked["base_pace"] = other_seed.asked["base_pace"] = 64.0
    row = work(job)
    file = job.folder.parent / job.asked["pace_file"]
    pace = json.loads(file.read_text())
    of_base, of_arm = zip(*pace["cpu_s_of_base_and_arm"], strict=True)
    assert len(of_base) == 2 and pace["over_base"] == min(of_base) / min(of_arm)
    assert row["images"] == round(64 * pace["over_base"]) // 8 * 8 and row["pace"] == 64 * pace["over_base"]
    assert not (job.folder / "pace").exists() and not {"base", "pace_file"} & row.keys()
    file.write_text(json.dumps({"over_base": 0.5}))
    monkeypatch.setattr(worker, "trial_seconds", None)  # nothing is timed again
    for one in (job, other_seed):
        assert worker.images_within(one.asked, load_config(BASE_CONFIG), data, one.folder) == 32


def test_an_arm_has_one_pace_whatever_its_seed_and_length(data, tmp_path):
    """Arms differ in pace by what they train, not by how long; the same arm in another budget is not timed again."""
    names = ["MAE, Muon", "MAE, Muon, 20 minutes", "MAE", "Muon"]
    jobs = plan_jobs(Sweep("minutes", tmp_path, data, 2, None, names, TINY))
    files = {name: {job.asked["pace_file"] for job in jobs if job.asked["arm"] == name} for name in names}
    assert all(len(found) == 1 for found in files.values())
    assert files["MAE, Muon"] == files["MAE, Muon, 20 minutes"]
    assert len(set.union(*files.values())) == 3


def test_the_base_is_as_fast_as_itself(data, tmp_path):
    (job,) = plan_jobs(Sweep("minutes", tmp_path, data, 1, None, ["base"], TINY, 2))
    assert worker.images_within(job.asked, load_config(BASE_CONFIG), data, tmp_path) == 2 * 60 * 374


def test_minutes_are_another_length_and_floors_have_none(data, tmp_path):
    arms = ["base", "random encoder"]
    images = plan_jobs(Sweep("small", tmp_path, data, 1, 32, arms, TINY))
    first, second = (plan_jobs(Sweep("minutes", tmp_path, data, 1, None, arms, TINY, minutes)) for minutes in (1, 2))
    assert len({job[0].folder for job in (images, first, second)}) == 3
    assert len({job[1].folder for job in (images, first, second)}) == 1
    (studied,) = plan_jobs(Sweep("minutes", tmp_path, data, 1, None, ["base"], TINY))
    assert studied.asked["minutes"] == STUDIES["minutes"].minutes


def test_an_arm_that_has_its_row_does_nothing(data, tmp_path):
    (job,) = planned(data, tmp_path, "random encoder")
    first = work(job)
    job.row.write_text(json.dumps(first | {"mark": 1}))
    assert work(job)["mark"] == 1


def test_an_arm_whose_row_is_among_the_kept_ones_is_not_run(data, tmp_path):
    """As where docs/studies was committed and the runs' folders are gone; it may be another study's row."""
    jobs = planned(data, tmp_path / "new", "raw pixels", "random encoder")
    (tmp_path / "masking.json").write_text(json.dumps([work(job) for job in planned(data, tmp_path / "old", "random encoder")]))
    assert run_jobs(jobs, 1, Console(), tmp_path) == []
    assert [job.row.is_file() for job in jobs] == [True, False]
    assert [row["arm"] for row in job_rows(jobs, tmp_path)] == ["raw pixels", "random encoder"]


def test_where_an_arm_cannot_be_started_no_other_is_begun(data, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        begun.append(1)
        raise OSError("No space left on device")

    begun: list[int] = []
    monkeypatch.setattr(RunningJobs, "run", full)
    with pytest.raises(OSError, match="No space left"):
        run_jobs(planned(data, tmp_path, "base", seeds=6), 1, Console())
    assert len(begun) <= 2  # the next one may have begun before the first was seen to fail


def test_too_few_images_for_a_step_are_said_in_one_sentence(data, tmp_path, capsys):
    (job,) = planned(data, tmp_path, "base", more=("data.batch_size=64",))
    job.folder.mkdir(parents=True)
    (job.folder / JOB_FILE).write_text(json.dumps(job.asked))
    assert main(job.folder) == 2
    assert "the data holds 60 images, fewer than one global batch of 64" in capsys.readouterr().out


def test_an_mae_refuses_the_projector_that_it_has_not(data, tmp_path, capsys):
    (job,) = planned(data, tmp_path, "MAE", more=("loss.regularizer=sigreg", "loss.projector=[16,8]"))
    job.folder.mkdir(parents=True)
    (job.folder / JOB_FILE).write_text(json.dumps(job.asked))
    assert main(job.folder) == 2
    assert "loss.projector: the studies' MAE has none" in capsys.readouterr().out


def test_every_arm_can_be_named_on_the_command_line():
    for study in STUDIES.values():
        listed = [each.name for each in study.arms]
        assert arm_names(",".join(listed)) == listed


def test_floors_train_nothing(data, tmp_path):
    jobs = plan_jobs(Sweep("minutes", tmp_path, data, 1, None, ["raw pixels", "random encoder", "k-means, quadrants"], TINY))
    pixels, random, kmeans = map(work, jobs)
    assert random["images"] == random["flops"] == pixels["flops"] == kmeans["cpu_seconds"] == 0 and kmeans["shares"] is None
    assert pixels["probe"]["effective_rank"] > random["probe"]["effective_rank"]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["random encoder", "I-JEPA"])
def test_a_row_of_the_dense_study_is_measured_by_pixels(tmp_path, monkeypatch, arm: str):
    """Segmentation, depth and counting of what the arm trained; and no path, as rows are read elsewhere."""
    write_scenes(tmp_path / "scenes", 32, {"train": 40, "val": 16}, workers=1)
    for name, small in (("DENSE_BANK", 50), ("DENSE_STEPS", 5), ("PACE_STEPS", 12), ("PACE_ROUNDS", 1)):
        monkeypatch.setattr(worker, name, small)
    settings = [*TINY, "data.channels=3", "mask.min_keep=0"]
    (job,) = plan_jobs(Sweep("dense", tmp_path, str(tmp_path / "scenes"), 1, None, [arm], settings, 1 / 60))
    row = work(job)
    assert all(0 <= measure.of(row) <= 100 for measure in OF_PIXELS.columns)
    assert looked_up(row, OF_PIXELS.tested) == row["counting"]["n_test"] == 16
    assert str(job.folder) not in json.dumps(row)


def test_a_row_says_what_tokens_are_made_of(data, tmp_path):
    pixels, random = (work(job)["shares"] for job in planned(data, tmp_path, "raw pixels", "random encoder"))
    assert pixels is None and sum(random.values()) == pytest.approx(1)


@pytest.mark.parametrize("part", ["common", "position", "image", "local"])
def test_shares_find_the_part_that_tokens_were_made_of(part: str):
    shape = {"common": (1, 1, 8), "position": (1, 30, 8), "image": (50, 1, 8), "local": (50, 30, 8)}[part]
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)).expand(50, 30, 8)
    found = variance_shares(tokens)
    assert sum(found.values()) == pytest.approx(1) and max(found, key=found.get) == part and found[part] > 0.75


def test_an_arm_goes_on_from_its_checkpoint(data, tmp_path):
    (whole,), (parts,) = planned(data, tmp_path / "a", "base"), planned(data, tmp_path / "b", "base")
    expected = work(whole)
    parts.folder.mkdir(parents=True)
    config, steps = scheduled_config(config_from_dict(parts.asked["config"]), data, 32)
    (parts.folder / ARM_CONFIG).write_text((whole.folder / ARM_CONFIG).read_text())
    train_ijepa(parts.folder / ARM_CONFIG, parts.folder, 2)  # and there it was killed
    found = work(parts)
    assert steps == 4 and found["probe"] == expected["probe"]
    assert same_weights(weights(whole.folder, 4), weights(parts.folder, 4))


def test_an_arm_stopped_by_a_signal_has_no_row(data, tmp_path, monkeypatch):
    (job,) = planned(data, tmp_path, "base")
    job.folder.mkdir(parents=True)
    (job.folder / JOB_FILE).write_text(json.dumps(job.asked))
    ijepa = train_ijepa
    monkeypatch.setattr(worker, "train_ijepa", lambda config, folder, steps: ijepa(config, folder, steps - 1))
    assert main(job.folder) == 130 and not job.row.exists()


def test_a_fraction_is_a_folder_of_links(tmp_path):
    from PIL import Image

    for label in "ab":
        for i in range(10):
            file = tmp_path / "images/train" / label / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file)
    source = str(tmp_path / "images")
    roots = [Path(subset_of(source, 0.25, tmp_path / name)) for name in ("one", "two", "one")]
    linked = [sorted(str(path.relative_to(root)) for path in root.rglob("*.png")) for root in roots]
    assert len(linked[0]) == 5 and linked[0] == linked[1] == linked[2]
    assert all(path.resolve().is_file() for path in roots[0].rglob("*.png"))
    assert subset_of(source, 1.0, tmp_path / "all") == source


def test_a_fraction_of_idx_files_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="image files alone"):
        subset_of(data, 0.5, tmp_path)


def test_an_unknown_arm_is_refused_with_the_known_ones(data, tmp_path, capsys):
    assert main_module.main(["sweep", "--study", "truncation", "--arms", "half", "--report", "--output", str(tmp_path)]) == 2
    assert "--arms 'half': no arm of this study; choose of: none, batch_min of 16" in capsys.readouterr().err


def test_a_sweep_without_its_data_is_refused_before_it_starts(tmp_path, capsys):
    assert (
        main_module.main(["sweep", "--study", "small", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
        == 2
    )
    assert "none" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_refused_before_any_arm_is_trained(data, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no block here\n")
    asked = ["sweep", "--study", "small", "--data", data, "--output", str(tmp_path / "out")]
    assert main_module.main([*asked, "--pages", str(page)]) == 2
    assert "page.md: has no block `<!-- study: small -->`" in capsys.readouterr().err
    assert main_module.main([*asked, "--arms", "base", "--write", str(tmp_path)]) == 2
    assert "--arms: a part of a table is shown, not kept" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def command(data: str, output: Path, arms: str, budget: int) -> list[str]:
    options = ["--study", "small", "--arms", arms, "--seeds", "1", "--jobs", "2", "--data", data, "--budget", str(budget)]
    return [sys.executable, "-m", "fastjepa.cli", "sweep", *options, "--output", str(output), *TINY]


@pytest.mark.slow
def test_a_sweep_that_is_killed_does_only_what_is_missing(data, tmp_path):
    """SIGKILL to the sweep and to its arms, in the middle of one of them."""
    words = command(data, tmp_path, "base,random encoder", 1600)
    first = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)
    base, random = plan_jobs(Sweep("small", tmp_path, data, 1, 1600, ["base", "random encoder"], TINY))
    wait_for(lambda: random.row.is_file() and list((base.folder / "checkpoints").glob("jepa-*")) and not base.row.is_file())
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    made = random.row.stat().st_mtime_ns
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert random.row.stat().st_mtime_ns == made
    assert "resuming from" in (base.folder / "log.txt").read_text()
    assert json.loads(base.row.read_text())["images"] == 1600


@pytest.mark.slow
def test_sigterm_reaches_the_arms_which_save_and_go_on_later(data, tmp_path):
    words = command(data, tmp_path, "base", 100_000)
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    (base,) = plan_jobs(Sweep("small", tmp_path, data, 1, 100_000, ["base"], TINY))
    wait_for(lambda: list((base.folder / "checkpoints").glob("jepa-*")))
    first.terminate()
    assert first.wait(60) == 130
    assert "stopped by SIGTERM" in (base.folder / "log.txt").read_text() and not base.row.exists()


@pytest.mark.slow
def test_an_arm_that_fails_is_named_and_the_others_go_on(data, tmp_path):
    (base, _) = plan_jobs(Sweep("small", tmp_path, data, 1, 32, ["base", "random encoder"], TINY))
    (base.folder / ARM_CONFIG).mkdir(parents=True)  # in the way
    done = subprocess.run(command(data, tmp_path, "base,random encoder", 32), capture_output=True, text=True, timeout=280)
    assert done.returncode == 2 and "1 of 2 runs failed, base, seed 0 first" in done.stderr
    assert "random encoder, seed 0: k-NN" in done.stdout


def wait_for(holds, seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_a_study_is_a_config_and_nothing_else_changes_with_its_arms():
    """Sections that say how a run is logged or executed are the same for all arms of a study, so that minutes compare."""
    for _, each in EVERY:
        base, config = load_config(BASE_CONFIG), load_config(BASE_CONFIG, each.overrides)
        assert (dataclasses.asdict(base.logging), dataclasses.asdict(base.runtime)) == (
            dataclasses.asdict(config.logging), dataclasses.asdict(config.runtime))  # fmt: skip
