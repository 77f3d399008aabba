"""Replay of reference trajectories through the trainer's own parts: `fastjepa verify FILE...`.

A reference file holds images, masks and every intermediate result of a few steps of I-JEPA training in fp32.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.engine.average import Average
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.schedule import Schedule
from fastjepa.errors import UserError
from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.objective import choose_objective
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import NETWORKS, build_pair
from fastjepa.model.vit import Encoder
from fastjepa.run.step import Step

VERIFY_TOLERANCE, FINAL_TOLERANCE = 1e-5, 1e-4


class ReferenceFile:
    """A reference file: its metadata as a `Config`, its tensors by key.

    Raises:
        UserError: a file that is none.
    """

    def __init__(self, path: str | Path):
        try:
            file = safe_open(path, "pt")
            self.meta, self.keys = file.metadata() or {}, set(file.keys())
            self.tensors = {name: file.get_tensor(name) for name in self.keys}
            blocks = sum(name.startswith("step0.target_idx.") for name in self.keys)
            self.config = reference_config(self.meta, blocks)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path}: not a reference file ({error}); see tests/reference for the format") from error

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose keys begin with a prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def masks(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the context masks (B, K, N) and the target masks (B, R, N) of a step."""
        tokens = int(np.prod(self.config.grid))
        return tuple(
            np.stack([to_mask(self[f"step{step}.{kind}_idx.{i}"], tokens) for i in range(count)], axis=1)
            for kind, count in (("context", self.config.mask.num_enc_masks), ("target", self.config.mask.num_pred_masks))
        )


def reference_config(meta: dict[str, str], blocks: int) -> Config:
    """Return the config of a reference file with so many target blocks, from its metadata."""
    number = {name: int(meta[name]) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "batch", "epochs",
              "predictor_embed_dim", "predictor_depth", "num_enc_masks", "warmup_steps", "ipe")}  # fmt: skip
    if float(meta.get("mlp_ratio", 4)) != 4.0:
        raise UserError(f"reference files of mlp_ratio 4 are understood, not {meta['mlp_ratio']}")
    return config_from_dict(
        {
            "data": {"crop_size": number["img_size"], "batch_size": number["batch"]},
            "mask": {
                "patch_size": number["patch_size"],
                "num_enc_masks": number["num_enc_masks"],
                "num_pred_masks": blocks,
            },
            "meta": {
                "embed_dim": number["embed_dim"],
                "depth": number["depth"],
                "num_heads": number["num_heads"],
                "pred_depth": number["predictor_depth"],
                "pred_emb_dim": number["predictor_embed_dim"],
            },
            "optimization": {"epochs": number["epochs"], "warmup": number["warmup_steps"] / number["ipe"]},
            "runtime": {"dtype": "fp32", "device": "cpu"},
        },
        "reference metadata",
    )


def to_mask(idx: Tensor, tokens: int) -> np.ndarray:
    """Turn patch indices (B, K) into masks (B, N) bool: of 5 tokens [[0, 3]] is [[True, False, False, True, False]]."""
    mask = np.zeros((len(idx), tokens), dtype=bool)
    np.put_along_axis(mask, idx.numpy(), True, axis=1)
    return mask


def reference_batch(images: Tensor, context_mask: np.ndarray, target_mask: np.ndarray) -> Batch:
    """Pack masks (B, K, N) and (B, R, N) as the trainer does."""
    context, target, blocks = pack(context_mask, target_mask)
    return Batch(images, context, target, blocks, bad=())


def verify_file(path: str | Path) -> dict[str, float]:
    """Return the error of each quantity: max|a - b| / max|b|, the worst of its tensors; `errors_pass` judges them."""
    reference = ReferenceFile(path)
    errors = first_step_errors(reference)
    errors |= trajectory_errors(reference)
    if "varlen.loss" in reference.keys:
        errors |= variable_length_errors(reference)
    return errors


def tolerance_of(quantity: str) -> float:
    """Return the largest error that passes; weights after all steps have added up the rounding of each."""
    return FINAL_TOLERANCE if quantity == "final_weights" else VERIFY_TOLERANCE


def errors_pass(errors: dict[str, float]) -> bool:
    """Return whether every quantity is within its tolerance."""
    return all(error <= tolerance_of(name) for name, error in errors.items())


def restored_networks(reference: ReferenceFile) -> tuple[PlainEngine, Encoder]:
    """Return an engine and a target encoder that hold the reference's initial weights."""
    jepa, target_encoder = build_pair(reference.config)
    for network, name in zip((jepa.encoder, jepa.predictor, target_encoder), NETWORKS, strict=True):
        network.load_state_dict(reference.below(f"init.{name}."))
    return PlainEngine(jepa), target_encoder


def first_step_errors(reference: ReferenceFile) -> dict[str, float]:
    """Return the errors of every intermediate result of the first step."""
    engine, target_encoder = restored_networks(reference)
    batch = reference_batch(reference["step0.images"], *reference.masks(0))
    with torch.no_grad():
        whole = target_encoder.features(batch.images)
        target = target_encoder(batch.images, wanted=batch.target)
    prediction, context, _ = engine(batch.images, batch.context, batch.blocks)
    loss = jepa_loss(prediction, target, batch.blocks)
    engine.backward(loss)
    normalised = torch.nn.functional.layer_norm(target, target.shape[-1:])
    return {
        "target_features": relative_error(
            torch.nn.functional.layer_norm(whole, whole.shape[-1:]), reference["step0.target_features"]
        ),
        "context_features": relative_error(context, reference["step0.context_features"]),
        "predictions": relative_error(prediction, reference["step0.predictions"]),
        "targets": relative_error(normalised[batch.blocks.target_rows], reference["step0.targets"]),
        "loss": relative_error(loss, reference["losses"][0]),
        "gradients": gradient_error(engine, reference.below("step0.grad.")),
    }


def trajectory_errors(reference: ReferenceFile) -> dict[str, float]:
    """Return the errors of losses, schedule and final weights after every step of the file, taken as the trainer does."""
    engine, target_encoder = restored_networks(reference)
    average = Average(target_encoder, engine.jepa.encoder)
    schedule = Schedule(reference.config.optimization, int(reference.meta["ipe"]))
    take_step, losses, nows = Step(engine, average, choose_objective(reference.config.loss, NoRegularizer())), [], []
    for step in range(int(reference.meta["steps"])):
        now = schedule(step)
        batch = reference_batch(reference[f"step{step}.images"], *reference.masks(step))
        tally, _ = take_step([batch], now)
        losses.append(tally.loss)
        nows.append([now.lr, now.weight_decay, now.ema_momentum])
    networks = zip(NETWORKS, (engine.jepa.encoder, engine.jepa.predictor, target_encoder), strict=True)
    ours = {f"{name}.{key}": value for name, network in networks for key, value in network.state_dict().items()}
    final = reference.below("final.")
    schedules, expected = torch.tensor(nows, dtype=torch.float64), reference["lr_wd_momentum"]
    return {
        "schedule": max(relative_error(schedules[:, i], expected[:, i]) for i in range(3)),
        "losses": max(relative_error(ours_, theirs) for ours_, theirs in zip(losses, reference["losses"], strict=True)),
        "final_weights": max(relative_error(ours[key], value) for key, value in final.items()),
    }


def variable_length_errors(reference: ReferenceFile) -> dict[str, float]:
    """Return the errors of a step in which every image keeps its own context length."""
    engine, target_encoder = restored_networks(reference)
    tokens = int(np.prod(reference.config.grid))
    lengths = reference["varlen.context_len"].tolist()
    context = np.concatenate([to_mask(idx[None], tokens) for idx in reference["varlen.context_idx"].split(lengths)])
    target = np.stack([to_mask(idx, tokens) for idx in reference["varlen.target_idx"].unbind(1)], axis=1)
    batch = reference_batch(reference["varlen.images"], context[:, None], target)
    with torch.no_grad():
        features = target_encoder(batch.images, wanted=batch.target)
    prediction, *_ = engine(batch.images, batch.context, batch.blocks)
    loss = jepa_loss(prediction, features, batch.blocks)
    engine.backward(loss)
    return {
        "varlen_loss": relative_error(loss, reference["varlen.loss"]),
        "varlen_gradients": gradient_error(engine, reference.below("varlen.grad.")),
    }


def gradient_error(engine: PlainEngine, expected: dict[str, Tensor]) -> float:
    """Return the largest error among the gradients of the trained networks."""
    ours = {name: parameter.grad for name, parameter in engine.jepa.named_parameters()}
    return max(relative_error(ours[name], value) for name, value in expected.items())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return max|a - b| / max|b|, NaN counted as infinite."""
    ours, theirs = ours.detach().double().reshape(-1), theirs.double().reshape(-1)
    worst = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return worst if worst == worst else float("inf")
