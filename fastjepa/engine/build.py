"""Building the engine that `runtime.zero` asks for."""

from pathlib import Path

from fastjepa.config.schema import Config
from fastjepa.engine.deepspeed_config import deepspeed_settings
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.zero import ZeroEngine
from fastjepa.errors import ConfigError
from fastjepa.model.jepa import Jepa
from fastjepa.ranks.world import World


def build_engine(jepa: Jepa, config: Config, world: World, given: Path | None = None) -> PlainEngine | ZeroEngine:
    """The engine that `runtime.zero` asks for; auto is 1 for several ranks and plain torch for one."""
    stage, scale = zero_stage(config, world), config.optimization.pred_lr_scale
    if stage == 0:
        if given:
            raise ConfigError(f"--deepspeed_config {given}: runtime.zero 0 runs without DeepSpeed; set it to 1, 2 or 3")
        return PlainEngine(jepa, world.size, config.data.batch_size // config.micro_batch, config.runtime.cuda_graph, scale)
    if stage == 3 and config.runtime.compile:
        raise ConfigError(
            "runtime.compile: not with runtime.zero 3, whose gathers a compiler cannot see; switch one of them off"
        )
    return ZeroEngine(jepa, deepspeed_settings(config, stage, given), world, scale)


def zero_stage(config: Config, world: World) -> int:
    return int(world.size > 1) if config.runtime.zero == "auto" else config.runtime.zero
