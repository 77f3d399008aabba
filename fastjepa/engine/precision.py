"""The dtype that networks compute in; parameters, moments and averages are fp32 whatever it is."""

import torch

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by runtime.dtype
EMULATED_BF16 = (
    "runtime.dtype: this CPU has no bf16 instructions and emulates them, up to 100 times slower; set it to fp32 or auto"
)


def settle_dtype(dtype: str, device: torch.device) -> str:
    """Return `runtime.dtype` with auto decided: bf16 where the device computes in it, else fp32."""
    if dtype != "auto":
        return dtype
    return "bf16" if has_bf16(device) else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for bf16; emulation is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(found for name, found in torch.cpu.get_capabilities().items() if "bf16" in name)


def autocast_of(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return the autocast that computes matrix products in bf16, where that is the dtype, or leaves all in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
