"""MAE (He et al., 2022) with the same encoder and recipe, and lightly's decoder: the bar for small data.

75 % of the patches are hidden at random, the encoder sees the rest, and a decoder of the predictor's shape predicts the
hidden patches' pixels, normalised per patch. There is no class token, as in I-JEPA: features are the mean over patches.
Optimizer, learning rate, weight decay, crops and order of images are those that the config gives I-JEPA. A regularizer reads
the features that it reads there: those of what is seen, pooled; over a micro-batch, not over the step.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastjepa.checkpoint.directory import latest_checkpoint
from fastjepa.checkpoint.restore import restore_checkpoint
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.checkpoint.state import TrainState
from fastjepa.config.load import load_config
from fastjepa.config.schema import Config
from fastjepa.data.pixels import normalise_pixels
from fastjepa.data.sources import open_source
from fastjepa.engine.adamw import apply_schedule, build_adamw
from fastjepa.engine.muon import MuonAdamW
from fastjepa.engine.precision import COMPUTE_DTYPES, autocast_of, settle_dtype
from fastjepa.engine.schedule import Schedule
from fastjepa.errors import UserError
from fastjepa.loader.loader import Loader
from fastjepa.loss.regularizers import RegularizerTerm, regularizer_term
from fastjepa.masks.packed import Packed
from fastjepa.model.vit import Encoder
from fastjepa.monitoring.log import Log, Peak
from fastjepa.plan.flops import count_flops
from fastjepa.plan.plan import workload_of
from fastjepa.ranks.world import join_world
from fastjepa.rng import MASK_STREAM, torch_seed
from fastjepa.run.build import apply_process_settings, build_networks, describe_run
from fastjepa.run.resume import last_good_checkpoint, start_directory
from fastjepa.run.stop import Stop

MASKED_SHARE = 0.75  # of the patches


class MaeDecoder(nn.Module):
    """Decoder made of lightly's parts, as wide and deep as the config's predictor."""

    def __init__(self, config: Config):
        super().__init__()
        modules, _ = lightly_modules()
        (rows, columns), meta, dim = config.grid, config.meta, config.encoder_shape[0]
        heads = meta.pred_num_heads or config.encoder_shape[2]
        self.embed = nn.Linear(dim, meta.pred_emb_dim)
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
            rows * columns, meta.pred_emb_dim, meta.pred_depth, heads, num_prefix_tokens=0
        )
        self.pixels = nn.Linear(meta.pred_emb_dim, config.patch_values)

    def forward(self, features: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """Predict pixels (B, M, p p C) of the patches `masked` (B, M) from features (B, K, D) of the patches `keep` (B, K)."""
        _, utils = lightly_modules()
        x = utils.repeat_token(self.decoder.mask_token, (len(features), self.decoder.sequence_length))
        x = self.decoder(utils.set_at_index(x, keep, self.embed(features).type_as(x)))
        return self.pixels(utils.get_at_index(x, masked))


def lightly_modules() -> tuple:
    """Return (lightly.models.modules, lightly.models.utils); UserError where lightly or timm is not installed."""
    try:
        from lightly.models import modules, utils
    except ImportError as error:
        raise UserError(f"MAE needs lightly and timm ({error}); pip install 'fastjepa[studies]'") from error
    return modules, utils


def train_mae(file: Path, folder: Path, steps: int) -> None:
    """Train an MAE with the config in `file`, or resume it, as `fastjepa train --output folder --max-steps steps` does I-JEPA.

    Its checkpoints are read as any run's: the encoder stands for the target encoder too, the decoder for the predictor.
    """
    cfg = load_config(file)
    world = join_world(cfg.runtime.device)
    dtype = settle_dtype(cfg.runtime.dtype, world.device)
    cfg = dataclasses.replace(cfg, runtime=dataclasses.replace(cfg.runtime, dtype=dtype))
    apply_process_settings(cfg)
    source = open_source(cfg.data.address)
    state, encoder, decoder = build_mae(cfg, world.device)
    state.record = describe_run(cfg, world, source)
    found = latest_checkpoint(folder / "checkpoints")
    restore_checkpoint(found, state) if found else start_directory(folder, state.record)
    loss, seed = cfg.loss, cfg.runtime.seed
    term = regularizer_term(loss.regularizer, loss.regularizer_weight, loss.covariance_weight, seed, world.device)
    schedule, images = Schedule(cfg.optimization, len(source) // cfg.data.batch_size), cfg.data.batch_size
    every = cfg.logging.checkpoint_every or schedule.steps_per_epoch
    with (
        Loader(cfg, source, world, state.step, max(steps, state.step)) as loader,
        Log(folder, steps, cfg.logging.every, Peak(mae_flops_per_image(cfg), 0.0), state.step) as log,
        Stop(cfg.runtime.timeout, partial(last_good_checkpoint, folder, "jepa")) as stop,
    ):
        while state.step < steps and not stop.received:
            apply_schedule(state.optimizer, schedule(state.step))
            batches = (batch.images for batch in loader.micro_batches(state.step))
            value = mae_step(encoder, decoder, state, batches, cfg, term)
            state.step += 1
            log.step(state.step, state.step // schedule.steps_per_epoch, {"loss": value}, images)
            if state.step % every == 0 and state.step < steps:
                with log.pause():
                    save_checkpoint(folder / "checkpoints", state, keep_last=cfg.logging.keep_last)
        save_checkpoint(folder / "checkpoints", state, keep_last=cfg.logging.keep_last)


def build_mae(cfg: Config, device: torch.device) -> tuple[TrainState, Encoder, MaeDecoder]:
    """Build state, encoder and decoder. Weights are a function of runtime.seed; the encoder starts as I-JEPA's does."""
    if cfg.loss.projector:
        raise UserError("loss.projector: the studies' MAE has none; leave it out")
    encoder = build_networks(cfg, device)[0].encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.runtime.seed)
        decoder = MaeDecoder(cfg).to(device)
    parts = {"encoder": encoder, "predictor": decoder, "target_encoder": encoder}
    build = MuonAdamW if cfg.optimization.optimizer == "muon" else build_adamw
    optimizer = build(encoder, decoder, cfg.optimization.pred_lr_scale)
    return TrainState(0, parts, optimizer), encoder, decoder


def mae_step(encoder: Encoder, decoder: MaeDecoder, state: TrainState, batches: Iterator[Tensor], cfg: Config,
             term: RegularizerTerm | None = None) -> Tensor:  # fmt: skip
    """Take one optimizer step on micro-batches of (b, C, H, W) uint8 images, and return the mean loss."""
    state.optimizer.zero_grad(set_to_none=True)
    total, pieces = 0.0, cfg.data.batch_size // cfg.micro_batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(cfg.runtime.seed, MASK_STREAM, state.step))
        for images in batches:
            keep, masked = random_keep(len(images), cfg, images.device)
            dtype, device = cfg.runtime.dtype, images.device
            with autocast_of(COMPUTE_DTYPES[dtype], device), attention_of(dtype, device):
                value, seen = mae_loss(encoder, decoder, images, keep, masked, cfg)
                value = value if term is None else value + term(seen.mean(dim=1).float(), state.step)
            (value / pieces).backward()
            total += value.detach() / pieces
    state.optimizer.step()
    return total


def attention_of(dtype: str, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which the decoder attends by the faster of torch's ways: on a CPU in bf16 plain products.

    Example, of one core of an AMD EPYC with other work beside it (LOG.md): a step of 64 images with 64 tokens each, 8 heads
    of 16, has 333 ms by the fused kernel and 249 ms by products.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and dtype == "bf16" else nullcontext()


def random_keep(images: int, cfg: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw for every image the patches that are kept, (b, K), and those that are hidden, (b, M), both int64."""
    rows, columns = cfg.grid
    keep, masked = lightly_modules()[1].random_token_mask((images, rows * columns), MASKED_SHARE, mask_class_token=True)
    return keep.to(device), masked.to(device)


def mae_loss(
    encoder: Encoder, decoder: MaeDecoder, images: Tensor, keep: Tensor, masked: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Return the mean square error on the pixels of hidden patches, normalised per patch (MAE, section 3), and the features
    (B, K, D) of what is seen.
    """
    _, utils = lightly_modules()
    seen = encoder(images, visible_sequences(keep, cfg)).view(*keep.shape, -1)
    patches = utils.patchify(normalise_pixels(images, cfg.mean_std), cfg.mask.patch_size)
    target = utils.normalize_mean_var(utils.get_at_index(patches, masked), dim=-1)
    return F.mse_loss(decoder(seen, keep, masked).float(), target), seen


def visible_sequences(keep: Tensor, cfg: Config) -> Packed:
    """Return patches (b, K) as b packed sequences of flat rows: patch p of image i is row i * N + p."""
    rows, columns = cfg.grid
    (images, kept), device = keep.shape, keep.device
    flat = keep + torch.arange(images, device=device)[:, None] * (rows * columns)
    starts = torch.arange(0, images * kept + 1, kept, dtype=torch.int32, device=device)
    return Packed(flat.flatten().to(torch.int32), starts, kept, kept)


def mae_flops_per_image(cfg: Config) -> float:
    """Return the FLOPs of training on one image, counted as in fastjepa/plan/flops.py."""
    rows, columns = cfg.grid
    tokens, width, dim = rows * columns, cfg.meta.pred_emb_dim, cfg.encoder_shape[0]
    kept = int(tokens * (1 - MASKED_SHARE))
    encoder = count_flops(workload_of(cfg), kept, 1, 1)
    # A block's four linear layers have 12 width^2 weights, 2 FLOPs each a token; attention has two N x N x width products.
    blocks = cfg.meta.pred_depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    pixels = cfg.patch_values
    decoder = blocks + 2 * kept * dim * width + 2 * (tokens - kept) * width * pixels
    return encoder.context_forward + encoder.context_backward + 3 * decoder
