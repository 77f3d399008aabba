"""A training step of every method, small on a CPU: ours, and each on timm's ViT in the same loop (all: gpu_hours.py)."""

import gpu_hours
import pytest
from protocol import ROUNDS
from timing import Spread

ROWS = {
    "ijepa packed": ("ijepa", "packed"),
    "ijepa same": ("ijepa", "same"),
    "mae same": ("mae", "same"),
    "ibot same": ("ibot", "same"),
}
SIZES = {
    "cuda": ["--models=vit_base", "--batch=64"],
    "cpu": ["--models=vit_tiny", "--batch=4"],
    "toy": ["--models=vit_tiny", "--batch=2", "--size=64", "mask.patch_size=8", "mask.min_keep=4", "meta.depth=2"],
}


@pytest.mark.parametrize("provider", ROWS)
def test_step(provider: str, benchmark, request: pytest.FixtureRequest):
    setting = request.config.setting
    options = gpu_hours.parse([f"--device={setting.device.type}", *SIZES[setting.scale]])
    config = gpu_hours.to_config(options, options.models[0])
    method, column = ROWS[provider]
    device = gpu_hours.start(config)
    run = gpu_hours.build(gpu_hours.Row(method, options.models[0], column), config, device, gpu_hours.DISTINCT)
    rounds, warmup = ROUNDS[setting.scale]
    for number in range(max(warmup, gpu_hours.DISTINCT)):
        run(number)
    seconds, numbers = [], iter(range(rounds))
    benchmark.pedantic(lambda: seconds.append(setting.clock.run(lambda: run(next(numbers)), device)), rounds=rounds)
    spread = Spread.of(seconds)
    benchmark.extra_info |= {
        "op": "step", "provider": provider, "device": device.type, "toy": setting.toy, "rounds": rounds,
        "median_s": spread.median, "p20_s": spread.p20, "p80_s": spread.p80,
        "images_per_s": config.data.batch_size / spread.median, "gflop_per_image": sum(run.flops) / len(run.flops) / 1e9,
    }  # fmt: skip
