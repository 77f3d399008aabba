"""A config whose plan is held against what a run of it holds."""

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config

PROJECTED = {"regularizer": "vicreg", "projector": (512, 384, 64)}


def small(dtype: str = "fp32", stage: int = 0, **runtime: object) -> Config:
    """Large enough that the padding of shards is lost in it; two micro-batches a step."""
    return config_from_dict(
        {
            "data": {"crop_size": 64, "batch_size": 4},
            "mask": {"patch_size": 8, "min_keep": 4},
            "meta": {"embed_dim": 256, "depth": 4, "num_heads": 4, "pred_depth": 2, "pred_emb_dim": 128},
            "runtime": {"dtype": dtype, "device": "cpu", "attention": "sdpa", "micro_batch": 2, "zero": stage} | runtime,
        }
    )
