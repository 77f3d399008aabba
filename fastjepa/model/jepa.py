"""The pair that is trained, and its construction from a config."""

import copy

import torch
from torch import Tensor, nn

from fastjepa.config.schema import Config
from fastjepa.masks.packed import Blocks, Packed
from fastjepa.model.moments import RunningMoments
from fastjepa.model.predictor import Predictor
from fastjepa.model.vit import Encoder

NETWORKS = ("encoder", "predictor", "target_encoder")  # of a run, as checkpoints name them


class Jepa(nn.Module):
    """Pair that is trained: the context encoder and the predictor."""

    def __init__(self, encoder: Encoder, predictor: Predictor):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor

    def forward(self, images: Tensor, context: Packed, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Map images (b, C, H, W) to predictions (Q, D) and context features (T, D)."""
        features = self.encoder(images, context)
        return self.predictor(features, context, blocks), features


def build_pair(config: Config) -> tuple[Jepa, Encoder]:
    """Return the trained pair and the target encoder, its copy; weights are a function of runtime.seed alone."""
    dim, _, heads, _ = config.encoder_shape
    meta = config.meta
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        patch, channels = config.mask.patch_size, config.data.channels
        norm = "dyntanh" if config.loss.normalize == "dyntanh" else "layer"
        encoder = Encoder(config.grid, patch, channels, config.mean_std, config.encoder_shape, norm)
        pred_heads = meta.pred_num_heads or heads
        predictor = Predictor(config.grid, dim, meta.pred_emb_dim, meta.pred_depth, pred_heads, config.predicted_dim)
    if config.loss.normalize == "running":
        predictor.target_moments = RunningMoments(config.target_layers + (config.loss.layers == "mean"), config.target_dim)
    for network in (encoder, predictor):
        network.checkpointed = config.runtime.checkpoint_activations
    return Jepa(encoder, predictor), copy.deepcopy(encoder).requires_grad_(False)
