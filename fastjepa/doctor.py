"""What would run on this machine, why the rest would not, and what to install: one screen."""

import platform
from importlib import metadata

import torch

import fastjepa
import fastjepa_kernels

EXTRAS = {  # distributions, any of which will do -> what they are for, what installs them
    ("nvidia-dali-cuda130", "nvidia-dali-cuda120"): ("data.loader: dali", "pip install 'fastjepa[dali]'"),
    ("deepspeed",): ("runtime.zero: 1 to 3", "pip install 'fastjepa[deepspeed]'"),
    ("lightly",): ("loss.regularizer", "pip install 'fastjepa[lightly]'"),
    ("tensorboard",): ("TensorBoard beside metrics.jsonl", "pip install 'fastjepa[tensorboard]'"),
}
ATTENTION = ("flash", "varlen", "xformers", "short", "sdpa", "matmul")


def survey() -> dict[str, list[tuple[str, str, str]]]:
    """{topic: [(what, state, why)]}."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"versions": versions(device), "attention": attention(device), "kernels": kernels(device), "packages": packages()}


def versions(device: torch.device) -> list[tuple[str, str, str]]:
    triton = "" if fastjepa_kernels.dispatch.ABSENT else fastjepa_kernels.dispatch.triton.__version__
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    why = f"driver for CUDA {torch.version.cuda}" if device.type == "cuda" else f"torch was built for CUDA {torch.version.cuda}"
    return [
        ("fastjepa", fastjepa.__version__, f"Python {platform.python_version()}"),
        ("torch", torch.__version__, ""),
        ("triton", triton or "none", fastjepa_kernels.dispatch.ABSENT),
        ("GPU", gpu, why),
    ]


def attention(device: torch.device) -> list[tuple[str, str, str]]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        way = fastjepa_kernels.attention_way("auto", device, dtype)
        found.append((f"auto, {str(dtype).removeprefix('torch.')}", way, "runtime.attention: auto"))
    for way in ATTENTION:
        try:
            fastjepa_kernels.attention_way(way, device, torch.bfloat16)
            found.append((way, "usable", ""))
        except ValueError as error:
            found.append((way, "no", str(error).removeprefix(f"attention: {way} ")))
    return found


def kernels(device: torch.device) -> list[tuple[str, str, str]]:
    return [(op, way, why) for op, (way, why) in fastjepa_kernels.plan(device.type).items()]


def packages() -> list[tuple[str, str, str]]:
    found = []
    for names, (purpose, install) in EXTRAS.items():
        versions = [metadata.version(name) for name in names if any(metadata.distributions(name=name))]
        found.append((names[0], *((versions[0], purpose) if versions else ("no", f"{purpose}: {install}"))))
    return found
