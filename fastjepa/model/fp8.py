"""Linear layers of the target network in FP8: e4m3 with a scale for each row and each output channel, made at every call.

Only the target network: it has no backward, its features are layer-normalised before anyone compares with them, and it is
about half of a ViT-H's FLOPs. The query, key and value products of its last block, which are taken apart, stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.errors import ConfigError

E4M3_MAX = 448.0  # of torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # the first CUDA capability with FP8 products


def check_fp8(device: torch.device, dtype: str) -> None:
    """Raise ConfigError where FP8 products would not run or not be faster."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    if not able or dtype != "bf16":
        raise ConfigError(
            "runtime.target_fp8: it needs a GPU of sm_89 or newer (Ada, Hopper) and runtime.dtype bf16; switch it off"
        )


class Linear8(nn.Linear):
    """A linear layer without gradient whose products are of FP8 numbers; parameters and state dict are nn.Linear's."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, D_in) to (T, D_out) bf16."""
        return fp8_linear(x, self.weight, self.bias)


def use_fp8(network: nn.Module) -> None:
    """Take the linear layers of all blocks in FP8; parameters stay the same objects."""
    for module in network.blocks.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear8


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply x (T, D_in) with weight (D_out, D_in), in FP8: (T, D_out) bf16; widths must be multiples of 16."""
    x, x_scale = quantise(x)
    weight, weight_scale = quantise(weight)
    wide = bias.to(torch.bfloat16)
    return torch._scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=weight_scale.t(), bias=wide, out_dtype=torch.bfloat16)


def fp8_linear_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Define `fp8_linear`: the same in fp32 but for the rounding of its inputs."""
    x, weight = (rows.float() * scale for rows, scale in map(quantise, (x, weight)))
    return F.linear(x, weight, bias.float())


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (M, K) in e4m3 and the (M, 1) fp32 scale of each row, whose largest number becomes E4M3_MAX.

    Example: the row 1, -2 has the scale 2 / 448 and becomes 224, -448.
    """
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale
