"""The plain engine with adamw_ema_step_: one pass that is torch's AdamW and ema_update_, one after the other.

The kernel runs in Triton's interpreter, which must be chosen before triton is imported: in a process of its own.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("adamw_ema")  # three runs serve all
STEPS = """
import copy, json, sys
import torch
import fastjepa_kernels
from fastjepa.checkpoint.restore import restore_checkpoint
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.checkpoint.state import TrainState
from fastjepa.config.load import config_from_dict
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import StepSettings
from fastjepa.model.jepa import build_pair
from fastjepa.monitoring.ema_distance import EmaDistance

config = config_from_dict({
    "data": {"crop_size": 16, "batch_size": 2}, "mask": {"patch_size": 4},
    "meta": {"embed_dim": 16, "depth": 1, "num_heads": 2, "pred_depth": 1, "pred_emb_dim": 8}, "runtime": {"device": "cpu"},
})
way, steps, folder, restart = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
fastjepa_kernels.use("auto", adamw_ema_step=way)


def build():
    jepa, target_encoder = build_pair(config)
    engine = PlainEngine(jepa, pred_lr_scale=3.0)
    average = engine.follow(target_encoder)
    networks = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target_encoder}
    return engine, average, TrainState(0, networks, engine.optimizer)


engine, average, state = build()
distance, squares = EmaDistance(average, lambda step: True), []
for step in range(steps):
    if step == restart:  # through a checkpoint, into an engine that has not stepped
        written = save_checkpoint(folder, state)
        engine, average, state = build()
        restore_checkpoint(written, state)
        distance = EmaDistance(average, lambda step: True)
    random = torch.Generator().manual_seed(step)
    for p in engine.parameters:
        p.grad = torch.randn(p.shape, generator=random)
    if step in (3, 4):
        engine.parameters[2].grad.view(-1)[0] = float("nan")
    distance.keep(step)
    now = StepSettings(lr=1e-3 * (1 + step % 5), weight_decay=0.1 + 0.01 * step, ema_momentum=0.9 + 0.004 * step)
    average.update(now.ema_momentum, engine.step(now))
    squares.append(distance.after(step + 1).tolist())
    state.step += 1
saved = save_checkpoint(folder, state)
print(json.dumps({"optimizer": type(engine.optimizer).__name__, "average": type(average).__name__, "saved": str(saved),
                  "squares": squares}))
"""


def run_steps(way: str, folder, restart: int = -1) -> dict:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEPS, way, "20", str(folder), str(restart)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Twenty steps with schedules that move and two that are not finite: apart, in one pass, and in one pass with a restart."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in ("apart", "one pass", "resumed")}
    return {
        "apart": run_steps("torch", folders["apart"]),
        "one pass": run_steps("triton", folders["one pass"]),
        "resumed": run_steps("triton", folders["resumed"], restart=11),
    }


def test_runtime_kernels_chooses_the_pass(runs):
    assert (runs["apart"]["optimizer"], runs["apart"]["average"]) == ("AdamW", "Average")
    assert (runs["one pass"]["optimizer"], runs["one pass"]["average"]) == ("FusedAdamWEMA", "FollowedAverage")


@pytest.mark.parametrize("name", ["one pass", "resumed"])
def test_twenty_steps_in_one_pass_are_those_of_adamw_and_the_average(runs, name):
    """Weights, moments, counts and averages of the checkpoints agree to the rounding of fp32."""
    import torch
    from safetensors.torch import load_file

    for group in ("encoder", "predictor", "target_encoder", "optimizer"):
        expected, found = (load_file(f"{runs[run]['saved']}/{group}.safetensors") for run in ("apart", name))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=2e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
    apart, found = (torch.tensor(runs[run]["squares"]) for run in ("apart", name))
    torch.testing.assert_close(found, apart, rtol=1e-4, atol=0)
    assert [step for step, (_, update) in enumerate(found) if not update] == [3, 4], "what the distance is counted in"
    steps = {float(value) for key, value in expected.items() if key.endswith(".step")}
    assert steps == {18.0}, "two of the twenty were not finite"
