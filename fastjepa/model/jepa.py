"""The pair that is trained, and its construction from a config."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastjepa.config.schema import Config
from fastjepa.masks.packed import Blocks, Packed
from fastjepa.model.moments import RunningMoments
from fastjepa.model.predictor import Predictor
from fastjepa.model.projector import build_projector, pool_sequences
from fastjepa.model.vit import Encoder, NetworkForm

NETWORKS = ("encoder", "predictor", "target_encoder")  # of a run, as checkpoints name them


def network_form(config: Config) -> NetworkForm:
    """Return the form of both networks that a config asks for."""
    norm = "dyntanh" if config.loss.normalize == "dyntanh" else "layer"
    return NetworkForm(norm, config.meta.positions == "rope", config.meta.qk_norm)


@dataclass(frozen=True)
class NetworkShape:
    """Shape of a run's networks, and of what they read and predict."""

    grid: tuple[int, int]  # rows and columns of patches
    patch_size: int  # pixels
    channels: int  # of an image
    encoder: tuple[int, int, int, float]  # width, depth, heads, hidden units of the MLP over the width
    predictor: tuple[int, int, int]  # width, depth, heads
    target_dim: int  # width of a layer's targets
    target_layers: int  # layers of the target network that are targets
    target_depth: int  # blocks of the target network that are run
    predicted_dim: int  # width of a prediction
    form: NetworkForm
    projector: tuple[int, ...]  # widths of its layers; none: ()
    teacher: tuple[tuple[int, int, int, float], int] | None = None  # as `encoder`, and its patch size in pixels

    @classmethod
    def of(cls, config: Config) -> "NetworkShape":
        """Return the shape that a config asks for."""
        meta, encoder = config.meta, config.encoder_shape
        predictor = meta.pred_emb_dim, meta.pred_depth, meta.pred_num_heads or encoder[2]
        targets = config.target_dim, config.target_layers, config.target_depth, config.predicted_dim
        form = network_form(config)
        projector, teacher = config.loss.projector or (), config.target_network if meta.teacher else None
        own = config.grid, config.mask.patch_size, config.data.channels
        return cls(*own, encoder, predictor, *targets, form, projector, teacher)

    @property
    def tokens(self) -> int:
        """Return the patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def target_network(self) -> tuple[tuple[int, int, int, float], int]:
        """Return the shape of the network that makes the targets, and its patch size: the teacher's, else the encoder's."""
        return self.teacher or (self.encoder, self.patch_size)

    @property
    def patch_values(self) -> int:
        """Return the values of a patch, over its pixels and channels."""
        return self.channels * self.patch_size**2


class Jepa(nn.Module):
    """Pair that is trained: the context encoder and the predictor; a regularizer reads features pooled where `pools`."""

    def __init__(self, encoder: Encoder, predictor: Predictor, pools: bool = False):
        super().__init__()
        self.encoder, self.predictor, self.pools = encoder, predictor, pools

    def forward(self, images: Tensor, context: Packed, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
        """Map images (b, C, H, W) to predictions (Q, D), context features (T, D) and those pooled, as `pooled` has them."""
        features = self.encoder(images, context)
        return self.predictor(features, context, blocks), features, self.pooled(features, context)

    def pooled(self, features: Tensor, context: Packed) -> Tensor | None:
        """Return what a regularizer reads: the fp32 means (S, D) of the contexts, or (S, P) behind a projector; else None.

        Example: two images with one context each give two rows, whatever their patches.
        """
        return self.predictor.projector(pool_sequences(features, context)).float() if self.pools else None


def build_pair(config: Config) -> tuple[Jepa, Encoder]:
    """Return the trained pair and the target encoder, its copy; weights are a function of runtime.seed alone."""
    shape = NetworkShape.of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        encoder = Encoder(shape.grid, shape.patch_size, shape.channels, config.mean_std, shape.encoder, shape.form)
        predictor = Predictor(shape.grid, shape.encoder[0], shape.predictor, shape.predicted_dim, shape.form)
        if shape.projector:
            predictor.projector = build_projector(shape.encoder[0], shape.projector)
    if config.loss.normalize == "running":
        averages = config.loss.layers == "mean"  # which has moments of its own
        predictor.target_moments = RunningMoments(shape.target_layers + averages, shape.target_dim)
    for network in (encoder, predictor):
        network.checkpointed = config.runtime.checkpoint_activations
    pools = config.loss.regularizer != "none"
    return Jepa(encoder, predictor, pools), copy.deepcopy(encoder).requires_grad_(False)
