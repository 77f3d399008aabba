"""Survey of this machine: what would run, why the rest would not, and what to install."""

import importlib.util
import platform
import shutil
import subprocess
from importlib import metadata

import torch

import fastjepa_kernels
from fastjepa import __version__
from fastjepa.data.decode_dali import dali_installed
from fastjepa.engine.precision import has_bf16
from fastjepa.engine.zero import deepspeed_ops
from fastjepa.loader.loader import choose_decoder
from fastjepa.loader.shared import free_and_total
from fastjepa.loader.workers import MIB, Crew

OPTIONAL_PACKAGES = {  # (distributions, any of which will do): (what needs them, what installs them)
    ("nvidia-dali-cuda130", "nvidia-dali-cuda120"): ("data.loader: dali", "pip install 'fastjepa[dali]'"),
    ("deepspeed",): ("runtime.zero: 1 to 3", "pip install 'fastjepa[deepspeed]'"),
    ("lightly",): ("loss.regularizer: sigreg, visreg; loss.projector", "pip install 'fastjepa[lightly]'"),
    ("tensorboard",): ("TensorBoard beside metrics.jsonl", "pip install 'fastjepa[tensorboard]'"),
    ("scikit-learn",): ("eval lowshot", "pip install 'fastjepa[eval]'"),
    ("timm",): ("eval finetune, folders that timm wrote", "pip install 'fastjepa[eval]'"),
    ("torchmetrics",): ("eval dense", "pip install 'fastjepa[eval]'"),
    ("pyarrow",): ("Parquet files", "pip install 'fastjepa[pyarrow]'"),
    ("tifffile",): ("TIFF and PNG files of any depth", "pip install 'fastjepa[tiff]'"),
    ("fsspec",): ("shards behind https:// and s3://", "pip install 'fastjepa[remote]'"),
    ("onnx",): ("convert --to onnx", "pip install 'fastjepa[onnx]'"),
}
DEEPSPEED_OPS = {  # {a compiled part of DeepSpeed: whether a run needs it}
    "fused_adam": "no run needs it: the optimizer is torch's AdamW",
    "cpu_adam": "no run needs it: an offloaded optimizer is torch's AdamW as well",
    "async_io": "for optimizer states on NVMe, which runtime.zero: 3 can be asked for",
}
ATTENTION_WAYS = ("flash", "varlen", "xformers", "short", "sdpa", "matmul")


def survey_machine(crew: Crew, item: int) -> dict[str, list[tuple[str, str, str]]]:
    """Return {topic: [(thing, state, reason)]}.

    Args:
        crew: processes that a run asks for, whose micro-batches of `item` bytes shall fit into shared memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": version_rows(device),
        "decoder": decoder_rows(),
        "shared memory": [shared_memory_row(crew, item, max(1, torch.cuda.device_count()))],
        "precision": [precision_row(device)],
        "attention": attention_rows(device),
        "kernels": kernel_rows(device),
        "DeepSpeed ops": deepspeed_op_rows(device),
        "packages": package_rows(),
    }


def version_rows(device: torch.device) -> list[tuple[str, str, str]]:
    """Return the versions of the packages, the GPU and its driver."""
    triton = "" if fastjepa_kernels.dispatch.ABSENT else fastjepa_kernels.dispatch.triton.__version__
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [
        ("fastjepa", __version__, f"Python {platform.python_version()}"),
        ("fastjepa-kernels", fastjepa_kernels.__version__, ""),
        ("torch", torch.__version__, built),
        ("triton", triton or "none", fastjepa_kernels.dispatch.ABSENT),
        ("GPU", *gpu_row(device)),
        ("driver", *driver_row(device)),
    ]


def gpu_row(device: torch.device) -> tuple[str, str]:
    """Return (name, count and memory) of the first GPU, or that there is none."""
    if device.type == "cpu":
        return "none", "torch finds none: runs take the CPU"
    about, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    return about.name, f"{count} here; sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB"


def driver_row(device: torch.device) -> tuple[str, str]:
    """Return the version that nvidia-smi states, and what to do where torch does not reach a GPU through that driver."""
    if not shutil.which("nvidia-smi"):
        return "none", "there is no nvidia-smi; where there is a GPU, install NVIDIA's driver"
    asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                           capture_output=True, text=True, check=False)  # fmt: skip
    said = (asked.stdout or asked.stderr).strip().splitlines() or [f"exit code {asked.returncode}"]
    if asked.returncode:
        return "no", f"nvidia-smi: {said[0]}"
    hidden = "torch reaches no GPU through it: unset CUDA_VISIBLE_DEVICES, or take a torch built for this driver's CUDA"
    return said[0], "" if device.type == "cuda" else hidden


def decoder_rows() -> list[tuple[str, str, str]]:
    """Return which decoder would turn files into images, and which are installed."""
    dali = ("yes", "on CPU threads or a GPU") if dali_installed() else ("no", "pip install 'fastjepa[dali]'")
    return [("auto", *choose_decoder("auto", "auto")), ("dali", *dali), ("torch", "yes", "Pillow, in the loader's processes")]


def shared_memory_row(crew: Crew, item: int, ranks: int) -> tuple[str, str, str]:
    """Return whether /dev/shm holds what the loaders of so many ranks ask for, in micro-batches of `item` bytes."""
    space = free_and_total()
    if space is None:
        return "/dev/shm", "none", "this system has none: its size is no limit"
    free, total = space[0] / MIB, space[1] / MIB
    asked = ranks * crew.most_items() * item / MIB
    sums = (
        f"{ranks} rank{'s' if ranks > 1 else ''} x {crew.most_items()} micro-batches of {item / MIB:.1f} MiB (data.num_workers "
        f"{crew.processes}, data.prefetch {crew.ahead}) ask for {asked:.0f} of {total:.0f} MiB, {free:.0f} free"
    )
    if asked <= free:
        return "/dev/shm", "enough", sums
    return "/dev/shm", "too small", f"{sums}: docker run --shm-size={asked + 1:.0f}m, or {crew.remedy}"


def precision_row(device: torch.device) -> tuple[str, str, str]:
    """Return the dtype that `runtime.dtype: auto` stands for on this device."""
    if has_bf16(device):
        return "auto", "bf16", "parameters and averages are fp32 all the same"
    return "auto", "fp32", f"this {'GPU' if device.type == 'cuda' else 'CPU'} has no bf16 instructions"


def attention_rows(device: torch.device) -> list[tuple[str, str, str]]:
    """Return what `runtime.attention: auto` would choose for each dtype, then which ways of attention can be used."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        way = fastjepa_kernels.attention_way("auto", device, dtype)
        found.append((f"auto, {str(dtype).removeprefix('torch.')}", way, "runtime.attention: auto"))
    for way in ATTENTION_WAYS:
        try:
            fastjepa_kernels.attention_way(way, device, torch.bfloat16)
            found.append((way, "usable", ""))
        except ValueError as error:
            found.append((way, "no", str(error).removeprefix(f"attention: {way} ")))
    return found


def kernel_rows(device: torch.device) -> list[tuple[str, str, str]]:
    """Return how each op of fastjepa_kernels would be computed."""
    return [(op, way, why) for op, (way, why) in fastjepa_kernels.plan(device.type).items()]


def deepspeed_op_rows(device: torch.device) -> list[tuple[str, str, str]]:
    """Return which of DeepSpeed's compiled parts can be used, and whether a run needs them."""
    if importlib.util.find_spec("deepspeed") is None:
        return [(op, "no", f"pip install 'fastjepa[deepspeed]'; {need}") for op, need in DEEPSPEED_OPS.items()]
    found = deepspeed_ops(device.type)
    return [(op, "usable" if usable else "no", "; ".join(filter(None, (why, DEEPSPEED_OPS[op])))) for op, usable, why in found]


def package_rows() -> list[tuple[str, str, str]]:
    """Return the version of each optional package, or how to install it."""
    found = []
    for names, (purpose, install) in OPTIONAL_PACKAGES.items():
        versions = [metadata.version(name) for name in names if any(metadata.distributions(name=name))]
        found.append((names[0], *((versions[0], purpose) if versions else ("no", f"{purpose}: {install}"))))
    return found
