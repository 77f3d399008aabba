"""DeepSpeed's configuration, made from ours and a user's file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastjepa.errors import ConfigError

BUCKET_ELEMENTS = 50_000_000  # elements of a reduction or gather: 200 MB of fp32, where DeepSpeed's default takes 2 GB


def deepspeed_settings(
    micro_batch: int, micro_batches: int, dtype: str, stage: int, given: Path | None = None
) -> dict[str, Any]:
    """Return DeepSpeed's configuration: what the config says, and the file `given` on top of what the config leaves open.

    Raises:
        ConfigError: a file that cannot be read, or that contradicts the config; the message names both keys.
    """
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # DeepSpeed's own default is a norm of 1
        "torch_autocast": {"enabled": dtype == "bf16", "dtype": "bfloat16"},
    }
    ours["torch_autocast"]["lower_precision_safe_modules"] = []  # which would reduce gradients in bf16
    defaults = {
        "zero_optimization": {"reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS},
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    theirs = _read_deepspeed_json(given) if given else {}
    for section, owner in REFUSED.items():
        if section in theirs:
            raise ConfigError(f"{given}: {section!r} is decided by {owner}; remove it there")
    _check_nvme(given, theirs.get("zero_optimization", {}), stage)
    _contradictions(given, theirs, ours)
    return _merged(_merged(defaults, theirs), ours)


def _check_nvme(given: Path | None, zero: Mapping[str, Any], stage: int) -> None:
    """Refuse what cannot be kept on NVMe: masters and moments at stage 3 can, as the average then reads the fp32 weights."""
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise ConfigError(f"{given}: offload_param to nvme hides the weights from the average; offload to cpu")
    optimizer = zero.get("offload_optimizer") or {}
    if optimizer.get("device") != "nvme":
        return
    if stage != 3:
        raise ConfigError(f"{given}: DeepSpeed takes offload_optimizer to nvme at stage 3 alone; set runtime.zero=3, or cpu")
    if not optimizer.get("nvme_path"):
        raise ConfigError(f"{given}: offload_optimizer to nvme needs nvme_path, a directory on the disk of this machine")


REFUSED = {"optimizer": "the optimization section", "scheduler": "the optimization section", "fp16": "runtime.dtype",
           "bf16": "runtime.dtype", "amp": "runtime.dtype", "gradient_clipping": "the recipe, which has none",
           "train_batch_size": "data.batch_size and the number of ranks"}  # fmt: skip
OWNERS = {"train_micro_batch_size_per_gpu": "runtime.micro_batch", "zero_optimization.stage": "runtime.zero",
          "gradient_accumulation_steps": "data.batch_size / runtime.micro_batch",
          "torch_autocast.enabled": "runtime.dtype", "torch_autocast.dtype": "runtime.dtype",
          "torch_autocast.lower_precision_safe_modules": "the recipe, which reduces in fp32,"}  # fmt: skip


def _contradictions(given: Path | None, theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in ours.items():
        if key in theirs and isinstance(value, Mapping):
            _contradictions(given, theirs[key], value, f"{key}.")
        elif prefix + key in OWNERS and theirs.get(key, value) not in (value, "auto"):
            owner = OWNERS[prefix + key]
            raise ConfigError(f"{given}: {prefix}{key} is {theirs[key]!r} and {owner} is {value!r}; make them agree")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], Mapping)}
    return {**base, **over, **both}


def _read_deepspeed_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a readable DeepSpeed configuration ({error}); give a JSON file") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: a DeepSpeed configuration is a JSON object, not {type(found).__name__}")
    return found
