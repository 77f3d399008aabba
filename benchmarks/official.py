"""The official I-JEPA code as a black box, from an unmodified clone that the user has.

Its licence (CC BY-NC 4.0) keeps it out of this repository. Its modules are imported from the clone and called in the order
in which its trainer calls them, in one process, without DistributedDataParallel.
"""

import contextlib
import copy
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from work import STEPS_PER_EPOCH

from fastjepa.config.schema import Config, LossConfig
from fastjepa.errors import UserError
from fastjepa.model.jepa import Jepa

MODULES = ("src.helper", "src.masks.utils", "src.utils.tensors", "src.utils.logging")


class Official:
    """The official networks, optimizer and schedules for a config; `step` trains on one batch."""

    def __init__(self, directory: str | Path, config: Config, device: torch.device):
        refuse_config(directory, config)
        self.config, self.device = config, device
        self.helper, self.masks, self.tensors, self.logging = import_clone(directory)
        meta, optimization = config.meta, config.optimization
        bf16 = config.runtime.dtype == "bf16"
        with quiet():
            self.encoder, self.predictor = self.helper.init_model(
                device=device, patch_size=config.mask.patch_size, model_name=meta.model_name,
                crop_size=config.image_size[0], pred_depth=meta.pred_depth, pred_emb_dim=meta.pred_emb_dim,
            )  # fmt: skip
            self.optimizer, self.scaler, *self.schedules = self.helper.init_opt(
                encoder=self.encoder, predictor=self.predictor, iterations_per_epoch=STEPS_PER_EPOCH,
                start_lr=optimization.start_lr, ref_lr=optimization.lr, final_lr=optimization.final_lr,
                warmup=optimization.warmup, num_epochs=optimization.epochs, ipe_scale=optimization.ipe_scale,
                wd=optimization.weight_decay, final_wd=optimization.final_weight_decay,
                use_bfloat16=bf16 and device.type == "cuda",  # its GradScaler is a CUDA one
            )  # fmt: skip
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.precision = lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def start_from(self, jepa: Jepa) -> None:
        """Take the weights of this package's networks: the parameter names are the same."""
        self.encoder.load_state_dict(jepa.encoder.state_dict())
        self.predictor.load_state_dict(jepa.predictor.state_dict())
        self.target_encoder.load_state_dict(jepa.encoder.state_dict())

    def step(self, images: Tensor, context_idx: list[Tensor], target_idx: list[Tensor],
             mark: Callable[[str], None] = lambda phase: None) -> float:  # fmt: skip
        """Train on (B, C, H, W) images and lists of (B, K) int64 patch indices; return the loss."""
        for schedule in self.schedules:
            schedule.step()
        with self.precision():
            target = self.targets(images, context_idx, target_idx)
            mark("target forward")
            features = self.encoder(images, context_idx)
            mark("context forward")
            prediction = self.predictor(features, context_idx, target_idx)
            mark("predictor forward")
            loss = F.smooth_l1_loss(prediction, target)
            mark("loss")
        self.backward_and_step(loss, mark)
        self.logging.grad_logger(self.encoder.named_parameters())
        self.optimizer.zero_grad()
        mark("grad_norms")
        self.follow()
        mark("EMA")
        return float(loss.detach())

    @torch.no_grad()
    def targets(self, images: Tensor, context_idx: list[Tensor], target_idx: list[Tensor]) -> Tensor:
        """Return (R*K*B, tokens of a block, D), in the order of the predictions."""
        whole = self.target_encoder(images)
        blocks = self.masks.apply_masks(F.layer_norm(whole, whole.shape[-1:]), target_idx)
        return self.tensors.repeat_interleave_batch(blocks, len(images), repeat=len(context_idx))

    def backward_and_step(self, loss: Tensor, mark: Callable[[str], None]) -> None:
        if self.scaler is None:
            loss.backward()
            mark("backward")
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            mark("backward")
            self.scaler.step(self.optimizer)
            self.scaler.update()
        mark("optimizer")

    @torch.no_grad()
    def follow(self) -> None:
        """Average as the official trainer does: a Python loop with a temporary for each parameter."""
        momentum = self.config.optimization.momentum_knots[0][1]
        for target, source in zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True):
            target.mul_(momentum).add_((1.0 - momentum) * source)


def refuse_config(directory: str | Path, config: Config) -> None:
    """Raise UserError for a directory without the official code, and for what only this package can do."""
    if not (Path(directory) / "src" / "helper.py").is_file():
        raise UserError(
            f"{directory}: no src/helper.py in it; clone https://github.com/facebookresearch/ijepa and pass its directory"
        )
    (height, width), meta = config.image_size, config.meta
    limits = {
        "data.crop_size: its images are square": height != width,
        "data.channels: its images have 3 channels": config.data.channels != 3,
        "meta.model_name: it has no such network": meta.model_name == "vit_gigantic",
        "meta: its networks have the shapes of their names": bool(meta.embed_dim or meta.depth or meta.num_heads),
        "meta.pred_num_heads: its predictor has the encoder's heads": meta.pred_num_heads
        not in (None, config.encoder_shape[2]),
        "loss: it has smooth_l1 alone, of normalised features": config.loss != LossConfig(),
        "optimization.pred_lr_scale: its networks learn alike": config.optimization.pred_lr_scale != 1,
        "runtime.micro_batch: it trains on whole batches": config.micro_batch != config.data.batch_size,
    }
    for limit, broken in limits.items():
        if broken:
            raise UserError(f"the official code cannot run this config ({limit}); change it, or leave out --reference")


def import_clone(directory: str | Path) -> list[ModuleType]:
    """Return MODULES of the clone, whose package is called `src`; sys.modules and sys.path are left as they were."""
    root = Path(directory).resolve()
    hidden = take_out_src()
    sys.path.insert(0, str(root))
    try:
        with quiet():
            return [importlib.import_module(name) for name in MODULES]
    except ImportError as error:
        raise UserError(f"{directory}: the official code cannot be imported ({error}); install what it needs") from error
    finally:
        sys.path.remove(str(root))
        take_out_src()
        sys.modules.update(hidden)


def take_out_src() -> dict[str, ModuleType]:
    """Remove every module of a package `src` from sys.modules and return them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name == "src" or name.startswith("src.")}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let nothing be printed or logged, and leave the root logger as it was, which the official modules configure."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)
