"""The dtype that networks compute in; parameters, moments and averages are fp32 whatever it is."""

import dataclasses

import torch

from fastjepa.config.schema import Config

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EMULATED_BF16 = (
    "runtime.dtype: this CPU has no bf16 instructions and emulates them, up to 100 times slower; set it to fp32 or auto"
)


def settle_dtype(config: Config, device: torch.device) -> Config:
    """The config with `runtime.dtype: auto` decided: bf16 where the device computes in it, else fp32."""
    if config.runtime.dtype != "auto":
        return config
    dtype = "bf16" if has_bf16(device) else "fp32"
    return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, dtype=dtype))


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; emulation is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(found for name, found in torch.cpu.get_capabilities().items() if "bf16" in name)


def compute_dtype(config: Config) -> torch.dtype:
    return COMPUTE_DTYPES[config.runtime.dtype]


def autocast_of(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(config) == torch.bfloat16)
