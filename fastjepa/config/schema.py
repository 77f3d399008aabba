"""Sections and keys of a config: YAML -> frozen dataclasses, strict about every key, type and range.

The sections `data`, `mask`, `meta`, `optimization` and `logging` carry the official I-JEPA keys under their
official names, so the official YAML files load unmodified; `loss` and `runtime` are this project's own.
An official key either acts or raises: nothing is accepted and ignored.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from fastjepa.config.data_keys import DataConfig, MeanStd
from fastjepa.config.fields import (
    ValueCheck,
    config_key,
    is_momentum_range_or_knots,
    is_not_negative,
    is_not_negative_pair,
    is_one_of,
    is_positive,
    is_positive_range,
    is_share,
    is_share_range,
    with_lists,
)
from fastjepa.errors import ConfigError

# name -> (embed_dim, depth, num_heads, mlp_ratio)
MODELS = {
    "vit_tiny": (192, 12, 3, 4.0),
    "vit_small": (384, 12, 6, 4.0),
    "vit_base": (768, 12, 12, 4.0),
    "vit_large": (1024, 24, 16, 4.0),
    "vit_huge": (1280, 32, 16, 4.0),
    "vit_giant": (1408, 40, 16, 48 / 11),
    "vit_gigantic": (1664, 48, 16, 64 / 13),
}


@dataclass(frozen=True)
class MaskConfig:
    """Patches, target blocks and contexts."""

    patch_size: int = config_key(16, "side of a patch in pixels", is_positive)
    num_enc_masks: int = config_key(1, "multiblock: context masks per image (K)", is_positive)
    num_pred_masks: int = config_key(4, "multiblock: target blocks per image (R)", is_positive)
    enc_mask_scale: tuple[float, float] = config_key(
        (0.85, 1.0), "multiblock: area of the context block as a share of the grid", is_share_range
    )
    pred_mask_scale: tuple[float, float] = config_key(
        (0.15, 0.2), "multiblock: area of a target block as a share of the grid", is_share_range
    )
    aspect_ratio: tuple[float, float] = config_key(
        (0.75, 1.5), "multiblock and block: height / width of a target block", is_positive_range
    )
    min_keep: int = config_key(10, "every mask holds more than this many patches", is_not_negative)
    allow_overlap: bool = config_key(False, "multiblock: whether a context may contain its own targets")
    strategy: Literal["multiblock", "block", "rasterized", "random"] = config_key(
        "multiblock",
        "how targets and context are laid out; the context of all but multiblock is what is no target: block, one block of "
        "hidden_share; rasterized, three quadrants, a target block each; random, patches anywhere as one target block",
    )
    hidden_share: float = config_key(0.6, "block and random: area of the target block as a share of the grid", is_share)
    sampling: Literal["official", "uniform"] = config_key(
        "official", "multiblock: the official code's draws, or the paper's; the other strategies have one way to draw"
    )
    truncate: Literal["batch_min", "none", "fraction"] = config_key("batch_min", "how contexts are cut")
    truncate_group: int = config_key(128, "consecutive slots of the global batch that share one cut (batch_min)", is_positive)
    context_fraction: float = config_key(0.25, "patches kept at random, as a share of the grid (fraction)", is_share)
    share: Literal["image", "batch"] = config_key("image", "masks drawn for every image, or once a step, for all of its images")

    @property
    def target_blocks(self) -> int:
        """Return the number of target blocks of an image (R)."""
        return {"multiblock": self.num_pred_masks, "rasterized": 3}.get(self.strategy, 1)


@dataclass(frozen=True)
class MetaConfig:
    """The networks."""

    model_name: str = config_key("vit_base", "one of " + ", ".join(MODELS), is_one_of(MODELS))
    embed_dim: int | None = config_key(None, "encoder width in place of model_name's", is_positive)
    depth: int | None = config_key(None, "encoder blocks in place of model_name's", is_positive)
    num_heads: int | None = config_key(None, "encoder heads in place of model_name's", is_positive)
    pred_depth: int = config_key(6, "predictor blocks", is_positive)
    pred_emb_dim: int = config_key(384, "predictor width", is_positive)
    pred_num_heads: int | None = config_key(None, "predictor heads; default: the encoder's", is_positive)
    predictor: Literal["per_block", "joint"] = config_key(
        "per_block",
        "per_block: the paper's, which sees the context once for every target block; joint, another objective: once, with "
        "the patches of all blocks, which attend to each other",
    )
    positions: Literal["sincos", "rope"] = config_key(
        "sincos",
        "sincos: the official code, added to the patches; rope: rotary, which turns queries and keys in every block of encoder "
        "and predictor",
    )
    qk_norm: bool = config_key(False, "layer norm of queries and keys by head, in encoder and predictor")
    predictor_context: float = config_key(
        1.0, "share of a context's patches that the predictor sees, drawn at random; the encoder sees all of them", is_share
    )
    predictor_repeats: int = config_key(
        1, "of predictor_context: how often a context is drawn, each time to predict all target blocks", is_positive
    )
    teacher: str | None = config_key(
        None,
        "a frozen encoder whose features are the targets, in place of the target network's: whatever fastjepa.load_encoder "
        "reads, of any width, depth and patch size; the average of the run's own encoder goes on for evaluation",
    )
    teacher_shape: tuple[int, int, int, int, int] | None = config_key(
        None,
        "of teacher: width, blocks, heads, width of its MLPs, patch size; a run fills it in from the file, so that its "
        "checkpoints are read without it",
        ValueCheck(lambda v: min(v) > 0, "five numbers greater than 0"),
    )
    use_bfloat16: bool | None = config_key(None, "official: bf16 autocast; runtime.dtype says the same")
    load_checkpoint: bool = config_key(False, "official: resume, and fail when there is nothing to resume from")
    read_checkpoint: str | None = config_key(None, "official: the checkpoint in the output directory to resume from")
    copy_data: bool = config_key(
        False, "official key", unsupported="copy the data yourself and point data.source at it; set it to false"
    )


@dataclass(frozen=True)
class OptimizationConfig:
    """The length of the run, and the schedules of learning rate, weight decay and average."""

    epochs: int = config_key(300, "passes over the data", is_positive)
    warmup: float = config_key(40, "epochs of linear warm-up", is_not_negative)
    start_lr: float = config_key(2e-4, "learning rate at step 0", is_not_negative)
    lr: float = config_key(1e-3, "learning rate after the warm-up", is_not_negative)
    final_lr: float = config_key(1e-6, "learning rate at the end", is_not_negative)
    pred_lr_scale: float = config_key(1.0, "learning rate of the predictor over the encoder's", is_not_negative)
    weight_decay: float = config_key(0.04, "weight decay at the start", is_not_negative)
    final_weight_decay: float = config_key(0.4, "weight decay at the end", is_not_negative)
    optimizer: Literal["adamw", "muon"] = config_key(
        "adamw",
        "muon: Muon for hidden matrices (2-d weights) of encoder and predictor, AdamW for the rest; one rank, or plain DDP",
    )
    muon_lr: float = config_key(
        0.005, "muon: learning rate after the warm-up; it rises and falls in proportion to AdamW's", is_positive
    )
    muon_weight_decay: tuple[float, float] = config_key(
        (0.05, 0.05), "muon: weight decay of the hidden matrices, first and last step", is_not_negative_pair
    )
    ema: tuple[float, float] | tuple[tuple[float, float], ...] = config_key(
        (0.996, 1.0),
        "momentum of the target encoder, first and last step; or knots [share of the run, momentum], joined by straight lines",
        is_momentum_range_or_knots,
    )
    ipe_scale: float = config_key(
        1.0,
        "length of the schedules over that of the run; below 1 they end before it, and stay at their last values",
        is_positive,
    )

    @property
    def momentum_knots(self) -> tuple[tuple[float, float], ...]:
        """Return the knots (share of the run, momentum) of `ema`, by rising share: two numbers are those at 0 and 1."""
        return tuple(zip((0.0, 1.0), self.ema, strict=True)) if not isinstance(self.ema[0], tuple) else self.ema


@dataclass(frozen=True)
class LoggingConfig:
    """Lines, readings and checkpoints of a run."""

    folder: str | None = config_key(None, "official: the output directory when --output is not given")
    write_tag: str = config_key("jepa", "official: prefix of checkpoint names")
    every: int = config_key(10, "steps between logged lines", is_positive)
    monitor_every: int = config_key(
        100,
        "steps between collapse readings (feature spread, effective rank, distance of the average); 0: never",
        is_not_negative,
    )
    probe_every: int | None = config_key(
        None,
        "steps between k-NN, RankMe and LiDAR of the target encoder, also taken at the start, the end and at least twice "
        "between; 0: never; default: by monitor_budget",
        is_not_negative,
    )
    monitor_budget: float = config_key(
        0.01,
        "share of a run's time that those may take by default, as estimated from FLOPs; short runs take them of fewer images",
        is_share,
    )
    checkpoint_every: int = config_key(0, "steps between checkpoints; 0: once an epoch", is_not_negative)
    keep_last: int = config_key(2, "checkpoints kept", is_positive)


@dataclass(frozen=True)
class LossConfig:
    """The objective: target, distance and regularizer."""

    kind: Literal["smooth_l1", "l2"] = config_key("smooth_l1", "smooth_l1 (the official code, beta 1) or l2 (the paper)")
    target: Literal["output", "input", "pixels"] = config_key(
        "output",
        "what is predicted: the target network's output on the whole image; input: its output on each target block alone; "
        "pixels: those of the patch, without a target network, whose average goes on for evaluation",
    )
    target_layers: Literal["last"] | tuple[int, ...] = config_key(
        "last",
        "blocks of the target network, counted from 1, whose outputs are the targets, such as [2, 4]; last: the output of the "
        "final norm",
        ValueCheck(
            lambda v: v == "last" or bool(v) and v[0] > 0 and all(map(int.__lt__, v, v[1:])), "last or rising block numbers"
        ),
    )
    layers: Literal["each", "mean"] = config_key(
        "each",
        "of target_layers: each, all are predicted, and the loss is the mean of theirs; mean: the average of the normalised "
        "layers, normalised again",
    )
    normalize: Literal["layer", "none", "batch", "running", "dyntanh"] = config_key(
        "layer",
        "targets: each row to mean 0 and variance 1; none: as they are; batch: each feature, over all targets of a step, of "
        "every rank; running: each feature, by its mean and variance averaged over steps; dyntanh: as they are, and the "
        "encoder's last norm is an element-wise tanh of learned scale",
    )
    visible_weight: float = config_key(
        0.0,
        "weight of a loss on the context's patches too, each divided by the root of its distance in patches to the nearest "
        "target; 0: none",
        is_not_negative,
    )
    visible_rise: tuple[float, float] = config_key(
        (0.1, 0.2),
        "shares of the run between which that weight rises from 0",
        ValueCheck(lambda v: 0 <= v[0] <= v[1] <= 1, "two rising numbers in [0, 1]"),
    )
    regularizer: Literal["none", "vicreg", "sigreg", "visreg"] = config_key(
        "none",
        "term on the mean-pooled context features: vicreg, variance and covariance; sigreg, LeJEPA's; visreg, scale, centre "
        "and the shape of a Gaussian",
    )
    projector: tuple[int, ...] | None = config_key(
        None,
        "widths of an MLP that the pooled features pass before the regularizer, such as [256, 64]; default: none",
        ValueCheck(lambda v: bool(v) and min(v) > 0, "widths greater than 0"),
    )
    regularizer_weight: float = config_key(0.1, "weight of the regularizer", is_not_negative)
    covariance_weight: float = config_key(0.04, "vicreg: weight of the covariance inside the regularizer", is_not_negative)


@dataclass(frozen=True)
class RuntimeConfig:
    """The computation of a run: seed, dtype, devices, sharding and kernels."""

    seed: int = config_key(
        0, "seed of initial weights, masks, order and crops", ValueCheck(lambda v: 0 <= v < 2**64, "in [0, 2**64)")
    )
    dtype: Literal["auto", "fp32", "bf16"] = config_key(
        "auto", "compute dtype; auto: bf16 where the device has instructions for it; parameters, moments and EMA stay fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = config_key("auto", "auto: CUDA where there is one")
    micro_batch: int | None = config_key(None, "images per forward; default: data.batch_size", is_positive)
    zero: Literal["auto", 0, 1, 2, 3] = config_key(
        "auto",
        "what DeepSpeed shards: 1 optimizer state, 2 and gradients, 3 and weights; 0: plain DDP; auto: 0 where the model fits "
        "the memory, else the lowest that fits",
    )
    kernels: str = config_key(
        "auto", "which implementation of the ops runs: auto, triton or torch; by op: auto,target_loss=torch"
    )
    attention: Literal["auto", "flash", "varlen", "xformers", "short", "sdpa", "matmul"] = config_key(
        "auto", "which attention runs"
    )
    compile: bool = config_key(
        False, "torch.compile of forward, loss and backward; on several ranks or with ZeRO of each network"
    )
    cuda_graph: bool = config_key(
        False,
        "forward and backward as one CUDA graph, on one GPU: micro-batches are padded to one shape; one that does not fit "
        "runs without, and needs the memory of its activations beside the graph's",
    )
    token_budget: tuple[int, int, int] | None = config_key(
        None,
        "cuda_graph: rows of the contexts, of the target network's last block and of the predictor's queries that a "
        "micro-batch is padded to; default: the most of each in 1,000 draws",
        ValueCheck(lambda v: min(v) > 0, "three numbers greater than 0"),
    )
    target_fp8: bool = config_key(
        False, "the target network's linear layers in FP8, with a rounding error: from ViT-B and sm_89 on, beside dtype bf16"
    )
    checkpoint_activations: bool = config_key(False, "recompute activations in the backward pass")
    max_skipped: int = config_key(20, "non-finite steps in a row before the run stops", is_positive)
    timeout: float = config_key(
        600.0,
        "seconds that a run waits for data, and ranks for one that stands still; more than a checkpoint takes",
        is_positive,
    )
    deterministic: bool = config_key(
        False, "CUDA algorithms that sum in a fixed order, so that a run continues bit for bit on a GPU too"
    )
    threads: int | None = config_key(None, "CPU threads; default: torch's", is_positive)


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run, in seven sections of keys."""

    data: DataConfig = DataConfig()
    mask: MaskConfig = MaskConfig()
    meta: MetaConfig = MetaConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    logging: LoggingConfig = LoggingConfig()
    loss: LossConfig = LossConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def image_size(self) -> tuple[int, int]:
        """Return (height, width) of a training image in pixels."""
        size = self.data.crop_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """Return (rows, columns) of patches."""
        height, width = self.image_size
        return height // self.mask.patch_size, width // self.mask.patch_size

    @property
    def encoder_shape(self) -> tuple[int, int, int, float]:
        """Return the encoder's (embed_dim, depth, num_heads, mlp_ratio), the overrides in `meta` applied."""
        dim, depth, heads, mlp_ratio = MODELS[self.meta.model_name]
        return self.meta.embed_dim or dim, self.meta.depth or depth, self.meta.num_heads or heads, mlp_ratio

    @property
    def target_network(self) -> tuple[tuple[int, int, int, float], int]:
        """Return the shape of the target network, as `encoder_shape` is, and its patch size: a teacher's where there is one."""
        if self.meta.teacher is None:
            return self.encoder_shape, self.mask.patch_size
        if self.meta.teacher_shape is None:
            raise ConfigError("meta.teacher_shape: is not known here, where the file of meta.teacher is not read; give it")
        width, depth, heads, hidden, patch_size = self.meta.teacher_shape
        return (width, depth, heads, hidden / width), patch_size

    @property
    def head_dims(self) -> tuple[int, int]:
        """Return the channels of a head of the encoder and of the predictor."""
        dim, _, heads, _ = self.encoder_shape
        return dim // heads, self.meta.pred_emb_dim // (self.meta.pred_num_heads or heads)

    @property
    def micro_batch(self) -> int:
        """Return the images of a forward on one rank."""
        return self.runtime.micro_batch or self.data.batch_size

    @property
    def target_dim(self) -> int:
        """Return the width of a target: features, or the values of a patch."""
        return self.patch_values if self.loss.target == "pixels" else self.target_network[0][0]

    @property
    def patch_values(self) -> int:
        """Return the values of a patch, over its pixels and channels."""
        return self.data.channels * self.mask.patch_size**2

    @property
    def target_layers(self) -> int:
        """Return how many layers of the target network are targets."""
        return 1 if self.loss.target_layers == "last" else len(self.loss.target_layers)

    @property
    def target_depth(self) -> int:
        """Return how many blocks of the target network are run."""
        return self.target_network[0][1] if self.loss.target_layers == "last" else self.loss.target_layers[-1]

    @property
    def predicted_dim(self) -> int:
        """Return the width of a prediction: that of a target, or of those of all layers."""
        return self.target_dim * (self.target_layers if self.loss.layers == "each" else 1)

    @property
    def mean_std(self) -> MeanStd:
        """Return per-channel (mean, std), where 255 counts as 1 of uint8, 65535 of uint16, and 1 of float32.

        ConfigError where they are not given and have no default.
        """
        found = self.data.mean_std
        if found is None:
            raise ConfigError(f"data.mean and data.std: {self.data.channels} channels of {self.data.dtype} have no default; "
                              "`fastjepa data stats` prints those of a data set")  # fmt: skip
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists, as YAML and JSON write them; `config_from_dict` reads them back."""
        return {name: {key: with_lists(value) for key, value in section.items()}
                for name, section in dataclasses.asdict(self).items()}  # fmt: skip
