"""The configuration: YAML -> frozen dataclasses, strict about every key, type and range.

The sections `data`, `mask`, `meta`, `optimization` and `logging` carry the official I-JEPA keys under their
official names, so the official YAML files load unmodified; `loss` and `runtime` are this project's own.
An official key either acts or raises: nothing is accepted and ignored.
"""

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fastjepa import keys, rules
from fastjepa.keys import (
    Check,
    ConfigError,
    key,
    momentum_range,
    not_negative,
    one_of,
    positive,
    positive_range,
    share,
    share_or_none,
    share_range,
)

PACKAGED = Path(__file__).parent / "configs"  # in a checkout a link to the configs/ beside this package


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
class DataConfig:
    source: str | None = key(
        None, "a directory, or a data set's name (fashion-mnist, cifar10); replaces root_path + image_folder"
    )
    root_path: str | None = key(None, "official: directory that holds image_folder")
    image_folder: str | None = key(None, "official: image folder below root_path")
    batch_size: int = key(64, "images per rank per optimizer step", positive)
    crop_size: int | tuple[int, int] = key(224, "side of the square training image in pixels, or [height, width]")
    crop_scale: tuple[float, float] = key((0.3, 1.0), "area of the random resized crop as a share of the image", share_range)
    use_horizontal_flip: bool = key(False, "mirror every image with probability 1/2")
    use_color_distortion: bool = key(False, "official key", unsupported="I-JEPA trains without it; set it to false")
    use_gaussian_blur: bool = key(False, "official key", unsupported="I-JEPA trains without it; set it to false")
    color_jitter_strength: float = key(0.0, "official key", unsupported="there is no colour distortion; set it to 0.0")
    num_workers: int = key(8, "loader processes per rank; 0 loads in the training process", not_negative)
    pin_mem: bool = key(True, "page-locked host memory for asynchronous copies to the GPU")
    loader: Literal["auto", "dali", "torch"] = key(
        "auto",
        "which decoder makes images of files; auto: dali on a GPU where it is installed, else torch; idx files need none",
    )
    decode_threads: int | None = key(None, "dali: CPU threads that decode; default: as many as num_workers", positive)
    prefetch: int = key(2, "micro-batches that each loader process, and dali, makes ahead of the training step", positive)
    hw_decoder_load: float = key(
        0.65,
        "dali: share of the JPEGs given to a GPU's hardware decoder, where it has one",
        share_or_none,
    )
    device_memory_padding: int = key(
        16 << 20,
        "dali on a GPU: bytes of its memory that each decoding thread sets aside at the start, so that a larger image later "
        "need not wait for more; of no effect on a CPU, as the next three",
        not_negative,
    )
    host_memory_padding: int = key(
        8 << 20, "dali on a GPU: bytes of page-locked host memory that each decoding thread sets aside, twice", not_negative
    )
    preallocate_width_hint: int = key(
        0, "dali on a GPU: width in pixels of the largest image, for the hardware decoder's memory; 0: unknown", not_negative
    )
    preallocate_height_hint: int = key(0, "dali on a GPU: its height in pixels; 0: unknown", not_negative)
    max_bad: int = key(100, "undecodable files a run may meet before it stops", not_negative)
    channels: int = key(3, "image channels: 1 (grey) or 3 (RGB)", Check(lambda v: v in (1, 3), "1 or 3"))
    mean: tuple[float, ...] | None = key(None, "per-channel mean on [0, 1]; default: ImageNet's")
    std: tuple[float, ...] | None = key(None, "per-channel standard deviation on [0, 1]; default: ImageNet's")


@dataclass(frozen=True)
class MaskConfig:
    patch_size: int = key(16, "side of a patch in pixels", positive)
    num_enc_masks: int = key(1, "multiblock: context masks per image (K)", positive)
    num_pred_masks: int = key(4, "multiblock: target blocks per image (R)", positive)
    enc_mask_scale: tuple[float, float] = key(
        (0.85, 1.0), "multiblock: area of the context block as a share of the grid", share_range
    )
    pred_mask_scale: tuple[float, float] = key(
        (0.15, 0.2), "multiblock: area of a target block as a share of the grid", share_range
    )
    aspect_ratio: tuple[float, float] = key(
        (0.75, 1.5), "multiblock and block: height / width of a target block", positive_range
    )
    min_keep: int = key(10, "every mask holds more than this many patches", not_negative)
    allow_overlap: bool = key(False, "multiblock: whether a context may contain its own targets")
    strategy: Literal["multiblock", "block", "rasterized", "random"] = key(
        "multiblock",
        "how targets and context are laid out; the context of all but multiblock is what is no target: block, one block of .6 "
        "of the grid; rasterized, three quadrants, a target block each; random, .6 of the patches as one target block",
    )
    sampling: Literal["official", "uniform"] = key(
        "official", "multiblock: the official code's draws, or the paper's; the other strategies have one way to draw"
    )
    truncate: Literal["batch_min", "none", "fraction"] = key("batch_min", "how contexts are cut")
    truncate_group: int = key(128, "consecutive slots of the global batch that share one cut (batch_min)", positive)
    context_fraction: float = key(0.25, "patches kept at random, as a share of the grid (fraction)", keys.share)
    share: Literal["image", "batch"] = key("image", "masks drawn for every image, or once a step, for all of its images")

    @property
    def target_blocks(self) -> int:
        """Target blocks of an image (R)."""
        return {"multiblock": self.num_pred_masks, "rasterized": 3}.get(self.strategy, 1)


@dataclass(frozen=True)
class MetaConfig:
    model_name: str = key("vit_base", "one of " + ", ".join(MODELS), one_of(MODELS))
    embed_dim: int | None = key(None, "encoder width in place of model_name's", positive)
    depth: int | None = key(None, "encoder blocks in place of model_name's", positive)
    num_heads: int | None = key(None, "encoder heads in place of model_name's", positive)
    pred_depth: int = key(6, "predictor blocks", positive)
    pred_emb_dim: int = key(384, "predictor width", positive)
    pred_num_heads: int | None = key(None, "predictor heads; default: the encoder's", positive)
    predictor: Literal["per_block", "joint"] = key(
        "per_block",
        "per_block: the paper's, which sees the context once for every target block; joint, another objective: once, with "
        "the patches of all blocks, which attend to each other",
    )
    use_bfloat16: bool | None = key(None, "official: bf16 autocast; runtime.dtype says the same")
    load_checkpoint: bool = key(False, "official: resume, and fail when there is nothing to resume from")
    read_checkpoint: str | None = key(None, "official: the checkpoint in the output directory to resume from")
    copy_data: bool = key(
        False, "official key", unsupported="copy the data yourself and point data.source at it; set it to false"
    )


@dataclass(frozen=True)
class OptimizationConfig:
    epochs: int = key(300, "passes over the data", positive)
    warmup: float = key(40, "epochs of linear warm-up", not_negative)
    start_lr: float = key(2e-4, "learning rate at step 0", not_negative)
    lr: float = key(1e-3, "learning rate after the warm-up", not_negative)
    final_lr: float = key(1e-6, "learning rate at the end", not_negative)
    pred_lr_scale: float = key(1.0, "learning rate of the predictor over the encoder's", not_negative)
    weight_decay: float = key(0.04, "weight decay at the start", not_negative)
    final_weight_decay: float = key(0.4, "weight decay at the end", not_negative)
    ema: tuple[float, float] = key((0.996, 1.0), "momentum of the target encoder, first and last step", momentum_range)
    ipe_scale: float = key(1.0, "stretches the schedules beyond the run", positive)


@dataclass(frozen=True)
class LoggingConfig:
    folder: str | None = key(None, "official: the output directory when --output is not given")
    write_tag: str = key("jepa", "official: prefix of checkpoint names")
    every: int = key(10, "steps between logged lines", positive)
    monitor_every: int = key(100, "steps between collapse readings (feature spread, effective rank); 0: never", not_negative)
    probe_every: int | None = key(
        None, "steps between k-NN, RankMe and LiDAR of the target encoder; 0: never; default: by monitor_budget", not_negative
    )
    monitor_budget: float = key(0.01, "share of a run's time that those may take by default, as estimated from FLOPs", share)
    checkpoint_every: int = key(0, "steps between checkpoints; 0: once an epoch", not_negative)
    keep_last: int = key(2, "checkpoints kept", positive)


@dataclass(frozen=True)
class LossConfig:
    kind: Literal["smooth_l1", "l2"] = key("smooth_l1", "smooth_l1 (the official code, beta 1) or l2 (the paper)")
    target: Literal["output", "input", "pixels"] = key(
        "output",
        "what is predicted: the target network's output on the whole image; input: its output on each target block alone; "
        "pixels: those of the patch, without a target network, whose average goes on for evaluation",
    )
    normalize: Literal["layer", "none", "batch"] = key(
        "layer",
        "targets: each row to mean 0 and variance 1; none: as they are; batch: each feature, over all targets of a step, of "
        "every rank",
    )
    regularizer: Literal["none", "vicreg", "sigreg"] = key(
        "none", "term on the mean-pooled context features: vicreg, variance and covariance; sigreg, LeJEPA's"
    )
    regularizer_weight: float = key(0.1, "weight of the regularizer", not_negative)
    covariance_weight: float = key(0.04, "vicreg: weight of the covariance inside the regularizer", not_negative)


@dataclass(frozen=True)
class RuntimeConfig:
    seed: int = key(0, "seed of initial weights, masks, order and crops", Check(lambda v: 0 <= v < 2**64, "in [0, 2**64)"))
    dtype: Literal["auto", "fp32", "bf16"] = key(
        "auto", "compute dtype; auto: bf16 where the device has instructions for it; parameters, moments and EMA stay fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: CUDA where there is one")
    micro_batch: int | None = key(None, "images per forward; default: data.batch_size", positive)
    zero: Literal["auto", 0, 1, 2, 3] = key(
        "auto",
        "what DeepSpeed shards: 1 optimizer state, 2 and gradients, 3 and weights; 0: plain DDP; auto: 1 for several ranks",
    )
    kernels: str = key("auto", "which implementation of the ops runs: auto, triton or torch; by op: auto,target_loss=torch")
    attention: Literal["auto", "flash", "varlen", "xformers", "short", "sdpa", "matmul"] = key("auto", "which attention runs")
    compile: bool = key(False, "torch.compile of forward, loss and backward; on several ranks or with ZeRO of each network")
    cuda_graph: bool = key(
        False,
        "forward and backward as one CUDA graph, on one GPU: micro-batches are padded to one shape; one that does not fit "
        "runs without, and needs the memory of its activations beside the graph's",
    )
    token_budget: tuple[int, int, int] | None = key(
        None,
        "cuda_graph: rows of the contexts, of the target network's last block and of the predictor's queries that a "
        "micro-batch is padded to; default: the most of each in 1,000 draws",
        Check(lambda v: min(v) > 0, "three numbers greater than 0"),
    )
    target_fp8: bool = key(
        False, "the target network's linear layers in FP8, with a rounding error: from ViT-B and sm_89 on, beside dtype bf16"
    )
    checkpoint_activations: bool = key(False, "recompute activations in the backward pass")
    max_skipped: int = key(20, "non-finite steps in a row before the run stops", positive)
    timeout: float = key(600.0, "seconds that ranks wait for one that does not go on; more than a checkpoint takes", positive)
    deterministic: bool = key(False, "deterministic CUDA algorithms")
    threads: int | None = key(None, "CPU threads; default: torch's", positive)


@dataclass(frozen=True)
class Config:
    data: DataConfig = DataConfig()
    mask: MaskConfig = MaskConfig()
    meta: MetaConfig = MetaConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    logging: LoggingConfig = LoggingConfig()
    loss: LossConfig = LossConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of a training image in pixels."""
        size = self.data.crop_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_size
        return height // self.mask.patch_size, width // self.mask.patch_size

    @property
    def encoder_shape(self) -> tuple[int, int, int, float]:
        """(embed_dim, depth, num_heads, mlp_ratio), the overrides in `meta` applied."""
        dim, depth, heads, mlp_ratio = MODELS[self.meta.model_name]
        return self.meta.embed_dim or dim, self.meta.depth or depth, self.meta.num_heads or heads, mlp_ratio

    @property
    def micro_batch(self) -> int:
        return self.runtime.micro_batch or self.data.batch_size

    @property
    def joint(self) -> bool:
        """Whether the predictor sees all of an image's target blocks at once."""
        return self.meta.predictor == "joint"

    @property
    def separate(self) -> bool:
        """Whether the target network sees every target block by itself."""
        return self.loss.target == "input"

    @property
    def target_dim(self) -> int:
        """Width of a target: features, or the values of a patch."""
        pixels = self.data.channels * self.mask.patch_size**2
        return pixels if self.loss.target == "pixels" else self.encoder_shape[0]

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel (mean, std) on [0, 1]; ImageNet's, or their average for one channel, unless given."""
        grey = self.data.channels == 1
        mean = self.data.mean or ((0.449,) if grey else (0.485, 0.456, 0.406))
        std = self.data.std or ((0.226,) if grey else (0.229, 0.224, 0.225))
        return mean, std

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as YAML and JSON write them; `from_dict` reads them back."""
        return {name: {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
                for name, section in dataclasses.asdict(self).items()}  # fmt: skip


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and validate; ConfigError says what is wrong.

    `path` may also be the bare name of a config that comes with the package, such as "demo".
    """
    path = find(Path(path))
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        remedy = f"pass --config FILE, or one of: {', '.join(sorted(file.stem for file in PACKAGED.glob('*.yaml')))}"
        raise ConfigError(f"{path}: cannot read the config ({error.strerror}); {remedy}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections ({', '.join(_sections())})")
    return from_dict(_override(raw, overrides), str(path))


def find(path: Path) -> Path:
    """`path` itself, or the packaged config of that name where there is no such file."""
    named = PACKAGED / f"{path}.yaml"
    return named if len(path.parts) == 1 and named.is_file() and not path.is_file() else path


def from_dict(raw: Mapping[str, Any], where: str = "config") -> Config:
    """Build and validate a Config from nested mappings; `where` names the origin in messages."""
    sections = _sections()
    built = {}
    for name, values in raw.items():
        if name not in sections:
            raise ConfigError(f"{where}: unknown section {name!r}{keys.nearest(name, sections)}")
        if values is not None and not isinstance(values, Mapping):
            raise ConfigError(f"{where}: section {name!r} must hold keys, not {values!r}")
        built[name] = keys.section(sections[name], name, values or {}, where)
    return rules.apply(Config(**built), raw, where)


def _sections() -> dict[str, type]:
    return typing.get_type_hints(Config)


def _override(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    raw = {name: dict(section) if isinstance(section, Mapping) else section for name, section in raw.items()}
    for text in overrides:
        path, equals, value = text.partition("=")
        section, dot, name = path.partition(".")
        if not (equals and dot and section and name):
            raise ConfigError(f"override {text!r}: write section.key=value")
        if not isinstance(raw.get(section) or {}, Mapping):
            continue  # from_dict refuses the section
        try:
            raw[section] = {**(raw.get(section) or {}), name: yaml.safe_load(value)}
        except yaml.YAMLError as error:
            raise ConfigError(f"override {text!r}: {value!r} is not a YAML value") from error
    return raw
