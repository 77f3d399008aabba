"""The trainer on the kernels: what `runtime.kernels` asks for runs or is refused, and trains alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import fastjepa_kernels
from fastjepa.cli.main import main
from fastjepa.errors import ConfigError
from fastjepa.run.build import use_kernels

TINY = {
    "data": {"batch_size": 4, "crop_size": 32, "num_workers": 0},
    "mask": {"patch_size": 8, "min_keep": 0, "truncate": "none", "pred_mask_scale": [0.15, 0.3]},
    "meta": {"model_name": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "pred_depth": 2, "pred_emb_dim": 24},
    "optimization": {"epochs": 4, "warmup": 1, "ema": [0.9, 1.0]},
    "logging": {"every": 1},
    "runtime": {"dtype": "fp32", "device": "cpu", "threads": 1},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(directory / f"{i:02}.png")
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"source": str(directory)}}))
    return file


def losses(config: Path, output: Path, kernels: str) -> list[float]:
    """Ten steps in a process where Triton's interpreter stands ready."""
    command = [sys.executable, "-m", "fastjepa.cli", "train", "--config", config, "--output", output, "--max-steps", "10"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    words = [*map(str, command), f"runtime.kernels={kernels}"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_ten_steps_on_the_kernels_give_the_losses_of_the_definitions(config, tmp_path):
    plain, fast = (losses(config, tmp_path / kernels, kernels) for kernels in ("torch", "triton"))
    assert len(plain) == 10 and plain[0] != plain[-1]
    assert fast == pytest.approx(plain, rel=1e-5)


@pytest.fixture
def as_it_was():
    yield
    fastjepa_kernels.use("auto")


def test_ops_are_chosen_one_by_one(as_it_was):
    use_kernels("auto,target_loss=torch")
    assert fastjepa_kernels.plan("cuda")["target_loss"] == ("torch", "asked for")
    assert fastjepa_kernels.plan("cuda")["gather_tokens"][0] == "triton"
    use_kernels("torch")
    assert {way for way, _ in fastjepa_kernels.plan("cuda").values()} == {"torch"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("triton", "needs a GPU, or TRITON_INTERPRET=1"),
        ("auto,target_loss=triton", "target_loss: the Triton kernel cannot run here"),
        ("fast", "fast is no implementation; use one of auto, triton, torch"),
        ("auto,gather=torch", "no op gather; it has gather_tokens"),
    ],
)
def test_what_cannot_run_is_refused(asked, says, monkeypatch, as_it_was):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"runtime.kernels: .*{says}"):
        use_kernels(asked)
    assert {way for way, why in fastjepa_kernels.plan("cpu").values()} == {"torch"}, "a refusal changes nothing"


def test_the_doctor_says_what_would_run_and_why(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kernels = {name: (state, why) for name, state, why in found["kernels"]}
    assert kernels.keys() == set(fastjepa_kernels.dispatch.OPS)
    assert dict(row[:2] for row in found["attention"])["sdpa"] == "usable"
    assert dict(row[:2] for row in found["packages"])["lightly"] != "no"
    assert main(["doctor"]) == 0
    assert "patchify_tokens" in capsys.readouterr().out


def test_the_definitions_need_no_triton(tmp_path):
    """On macOS and Windows there is none: `import triton` fails, every definition still runs, and asking for it is refused."""
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    code = (
        "import torch, fastjepa_kernels as k\n"
        "assert k.gather_tokens(torch.eye(3), torch.tensor([2], dtype=torch.int32)).tolist() == [[0, 0, 1]]\n"
        "assert all(way == 'torch' for way, _ in k.plan('cuda').values())\n"
        "try: k.use('triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert "triton is not installed (no triton here)" in result.stdout, result.stderr
