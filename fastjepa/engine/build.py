"""The engine of a ZeRO stage."""

from pathlib import Path

from fastjepa.config.schema import Config
from fastjepa.engine.deepspeed_config import deepspeed_settings
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.zero import ZeroEngine
from fastjepa.errors import ConfigError, UserError
from fastjepa.model.jepa import Jepa
from fastjepa.ranks.world import World


def build_engine(jepa: Jepa, config: Config, world: World, stage: int, given: Path | None = None) -> PlainEngine | ZeroEngine:
    """Build the engine of a ZeRO stage: 0 is torch alone, with DistributedDataParallel on several ranks.

    Args:
        stage: what `runtime.zero` says, or what was chosen where it is auto.
        given: a user's file with DeepSpeed's own options, for stages 1 to 3.
    """
    scale, muon = config.optimization.pred_lr_scale, config.optimization.optimizer == "muon"
    if stage == 0:
        if given:
            raise UserError(f"--deepspeed_config {given}: runtime.zero 0 runs without DeepSpeed; set it to 1, 2 or 3")
        pieces = config.data.batch_size // config.micro_batch
        return PlainEngine(jepa, world.size, pieces, config.runtime.cuda_graph, scale, muon)
    if stage == 3 and config.runtime.compile:
        raise ConfigError(
            "runtime.compile: not with runtime.zero 3, whose gathers a compiler cannot see; switch one of them off"
        )
    pieces = config.data.batch_size // config.micro_batch
    settings = deepspeed_settings(config.micro_batch, pieces, config.runtime.dtype, stage, given)
    return ZeroEngine(jepa, settings, world, scale)
