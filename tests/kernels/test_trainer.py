"""The trainer on the kernels: a request by `runtime.kernels` runs or is refused, and trains alike."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fastjepa_kernels
from fastjepa.cli.main import main
from fastjepa.errors import ConfigError
from fastjepa.run.build import use_kernels

PACKAGE = Path(fastjepa_kernels.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn"),
    *("randperm", "scalar_tensor", "tensor", "zeros"),
}  # functions of torch that take the default device where they are given none
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
    """Train ten steps in a process where Triton's interpreter stands ready; return their losses."""
    command = [sys.executable, "-m", "fastjepa.cli", "train", "--config", config, "--output", output, "--max-steps", "10"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    words = [*map(str, command), f"runtime.kernels={kernels}"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
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


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def kernels_of(path: Path) -> set[str]:
    """Return the names of a file's Triton kernels."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    jitted = (f.name for f in functions if any("jit" in ast.unparse(decorator) for decorator in f.decorator_list))
    return {name for name in jitted if name.endswith("_kernel")}  # the others are what kernels call


def interpreted(code: str) -> str:
    """Run code in a process where Triton's interpreter stands ready; return its output."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_tensor_is_made_on_a_named_device():
    """A default device of the user, as `torch.set_default_device` sets it, must not decide where a table lies."""
    unnamed = [
        f"{path.name}:{call.lineno}"
        for path in sorted(PACKAGE.glob("*.py"))
        if path.name != "cases.py"  # its tensors are meant to follow the default
        for call in calls(path)
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in FACTORIES
        and not {"device"} & {keyword.arg for keyword in call.keywords}
    ]
    assert unnamed == []


UNDER_A_DEFAULT_DEVICE = """
import torch, fastjepa_kernels
from fastjepa_kernels.cases import CASES
from fastjepa_kernels.layers import FusedAdamWEMA, MaskedPatchEmbed, ModelEma

def outcome(make, variant, device):
    torch.manual_seed(0)
    case = make(*variant)
    for leaf in case.leaves:
        leaf.requires_grad_()
    with torch.device(device):
        out = case.call()
        results = [] if out is None else [out]
        results += torch.autograd.grad(out, case.leaves, torch.ones_like(out)) if case.leaves else []
    return [*results, *case.writes]

def trained(device):
    torch.manual_seed(0)
    embed = MaskedPatchEmbed(4, embed_dim=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    target, average = (MaskedPatchEmbed(4, embed_dim=8) for _ in range(2))
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.device(device):
        optimizer = FusedAdamWEMA(embed.parameters(), targets=zip(embed.parameters(), target.parameters()))
        ema = ModelEma(average, decay=0.5)
        for _ in range(2):
            embed(images).square().sum().backward()
            optimizer.step(momentum=0.9)
            ema.update(embed)
        state = optimizer.state_dict()
        state["state"][0]["step"] = 2.0  # as files of older AdamWs have it
        optimizer.load_state_dict(state)
        optimizer.step(momentum=0.9)
    return [*embed.parameters(), *target.parameters(), *ema.parameters()]

for way in ("torch", "triton"):
    fastjepa_kernels.use(way)
    for op, (make, variants) in CASES.items():
        for a, b in zip(*(outcome(make, variants[-1], device) for device in ("cpu", "meta")), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(trained("cpu"), trained("meta"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
"""


@pytest.mark.slow
def test_a_default_device_changes_nothing():
    """The device meta stands for a card: a table that is made on either fails alike."""
    interpreted(UNDER_A_DEFAULT_DEVICE)


UNDER_A_RECORDER = """
import contextlib, json, torch, fastjepa_kernels
from fastjepa_kernels import dispatch
from fastjepa_kernels.cases import CASES
from triton.runtime.interpreter import InterpretedFunction

held, launches, run = [], [], InterpretedFunction.run

@contextlib.contextmanager
def recorder(device):
    held.append(device)
    yield
    held.pop()

def watched(self, *args, **options):
    devices = {x.device for x in args if isinstance(x, torch.Tensor)}
    launches.append((self.fn.__name__, devices == set(held)))
    return run(self, *args, **options)

dispatch.on_device, InterpretedFunction.run = recorder, watched
fastjepa_kernels.use("triton")
for make, variants in CASES.values():
    case = make(*variants[-1])
    for leaf in case.leaves:
        leaf.requires_grad_()
    out = case.call()
    if case.leaves:
        torch.autograd.grad(out, case.leaves, torch.ones_like(out))
print(json.dumps(launches))
"""


def test_every_launch_is_on_the_device_of_its_tensors():
    """Triton launches on the current card, whatever card the tensors are on: every launch has to change it."""
    launches = json.loads(interpreted(UNDER_A_RECORDER))
    assert {kernel for kernel, _ in launches} == set().union(*map(kernels_of, PACKAGE.glob("*.py")))
    assert [kernel for kernel, guarded in launches if not guarded] == []


def test_kernels_are_launched_through_the_guard_alone():
    """A launch is a call of a subscript, kernel[grid](...): `dispatch.launch` alone has one."""
    named = {name for path in PACKAGE.glob("*.py") for name in kernels_of(path)}
    direct = [
        f"{path.name}:{call.lineno}"
        for path in PACKAGE.glob("*.py")
        for call in calls(path)
        if isinstance(call.func, ast.Subscript) and ast.unparse(call.func.value) in named
    ]
    assert len(named) >= 15 and direct == []


def test_the_guard_is_nothing_on_a_cpu_and_the_tensors_card_on_a_gpu(monkeypatch):
    made = []
    monkeypatch.setattr("torch.cuda.device", lambda device: made.append(device))
    with fastjepa_kernels.dispatch.on_device(torch.device("cpu")):
        assert made == []
    fastjepa_kernels.dispatch.on_device(torch.device("cuda:1"))
    assert made == [torch.device("cuda:1")]
