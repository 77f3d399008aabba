"""Weights in the formats of others: a small state, an official file, conversions."""

from pathlib import Path

import torch

from fastjepa.checkpoint.state import TrainState
from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import Schedule
from fastjepa.model.jepa import build_pair

SHAPE = {
    "data": {"crop_size": [32, 48], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    "mask": {"patch_size": 8},
    "meta": {"embed_dim": 32, "depth": 2, "num_heads": 4, "pred_depth": 1, "pred_emb_dim": 16},
    "runtime": {"dtype": "fp32", "device": "cpu"},
}


def make_state(config: Config, step: int = 7) -> TrainState:
    """Three networks that differ everywhere, and an optimizer that has stepped."""
    jepa, target = build_pair(config)
    torch.manual_seed(1)
    for network in (jepa, target):
        for p in network.parameters():
            p.data += 0.1 * torch.randn_like(p)
    engine = PlainEngine(jepa)
    for p in jepa.parameters():
        p.grad = torch.randn_like(p)
    engine.step(Schedule(config.optimization, 5)(0))
    networks = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target}
    record = {"config": config.to_dict(), "world": 2, "steps_per_epoch": 5}
    return TrainState(step, networks, engine.optimizer, record=record)


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def official_file(path: Path, prefix: str = "module.", meta: dict | None = None, patch: int = 8) -> tuple[Path, TrainState]:
    """As the official code writes it, with nothing of ours inside: a ViT-T on 32x32 pixels."""
    shape = {"model_name": "vit_tiny", "pred_depth": 1, "pred_emb_dim": 12} | (meta or {})
    state = make_state(config_from_dict(SHAPE | {"data": {"crop_size": 32}, "mask": {"patch_size": patch}, "meta": shape}))
    networks = {name: {prefix + k: v for k, v in net.state_dict().items()} for name, net in state.networks.items()}
    torch.save(
        networks | {"opt": {}, "scaler": None, "epoch": 300, "loss": 0.1, "batch_size": 8, "world_size": 1, "lr": 1.0}, path
    )
    return path, state


def same_networks(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours
    )


IJEPA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "patch_size": 8}
