"""Checks that span the keys of a config."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastjepa.config.data_keys import UNITS
from fastjepa.config.schema import Config
from fastjepa.errors import ConfigError

FP8_WIDTH = 768  # the narrowest encoder for runtime.target_fp8
# Keys that mean nothing to the other strategies: these have one context, which is all that is no target.
MULTIBLOCK = ("num_enc_masks", "num_pred_masks", "enc_mask_scale", "pred_mask_scale", "allow_overlap")


def check_config(config: Config, raw: Mapping[str, Any], where: str) -> Config:
    """Return the config, the official use_bfloat16 folded into runtime.dtype.

    Args:
        raw: the sections as they were given, which tell a key that was set from a default.
        where: the origin of the config, for messages.

    Raises:
        ConfigError: keys that do not go together.
    """
    data, mask, meta, runtime = config.data, config.mask, config.meta, config.runtime

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(f"{where}: {message}")

    if meta.use_bfloat16 is not None:
        official = "bf16" if meta.use_bfloat16 else "fp32"
        require("dtype" not in (raw.get("runtime") or {}) or runtime.dtype in (official, "auto"),
                f"meta.use_bfloat16: {meta.use_bfloat16} contradicts runtime.dtype: {runtime.dtype}; drop one")  # fmt: skip
        config = dataclasses.replace(config, runtime=dataclasses.replace(runtime, dtype=official))
    height, width = config.image_size
    require(min(height, width) > 0 and height % mask.patch_size == 0 and width % mask.patch_size == 0,
            f"data.crop_size: {height}x{width} must be a positive multiple of mask.patch_size: {mask.patch_size}")  # fmt: skip
    dim, _, heads, _ = config.encoder_shape
    for width_key, width_value, heads_key, head_count in (
        ("meta.embed_dim", dim, "meta.num_heads", heads),
        ("meta.pred_emb_dim", meta.pred_emb_dim, "meta.pred_num_heads", meta.pred_num_heads or heads),
    ):
        require(width_value % head_count == 0, f"{width_key}: {width_value} must be a multiple of {heads_key}: {head_count}")
        require(width_value % 4 == 0, f"{width_key}: {width_value} must be a multiple of 4 (2-d sine-cosine positions)")
        require(meta.positions != "rope" or width_value // head_count % 4 == 0,
                f"meta.positions: rope needs heads of a multiple of 4 channels, not {width_value // head_count} ({width_key} "
                f"over {heads_key})")  # fmt: skip
    require(data.batch_size % config.micro_batch == 0,
            f"runtime.micro_batch: {config.micro_batch} must divide data.batch_size: {data.batch_size}")  # fmt: skip
    require(not runtime.target_fp8 or dim >= FP8_WIDTH,
            f"runtime.target_fp8: an encoder {dim} wide is below ViT-B's {FP8_WIDTH}, where rounding costs more than it "
            "saves; switch it off")  # fmt: skip
    _check_objective(config, require)
    _check_optimizer(config, require)
    config = _check_pixels(config, raw, require)
    _check_distortions(config, require)
    require(not (data.source and (data.root_path or data.image_folder)),
            "data.source and data.root_path / image_folder are both given; keep one")  # fmt: skip
    return config


def _check_pixels(config: Config, raw: Mapping[str, Any], require: Callable[[bool, str], None]) -> Config:
    """Return the config with as many channels as it names bands; refuse values that no image of its dtype has."""
    data = config.data
    if data.bands is not None:
        count = len(data.bands)
        require("channels" not in (raw.get("data") or {}) or data.channels == count,
                f"data.channels: {data.channels} contradicts the {count} of data.bands; make it {count}, or leave it "
                "out")  # fmt: skip
        data = dataclasses.replace(data, channels=count)
    whole = data.nodata is None or data.dtype == "float32" or data.nodata in range(int(data.unit) + 1)
    require(whole, f"data.nodata: {data.nodata:g} is no value of {data.dtype}; give a whole number from 0 to {data.unit:g}"
            if not whole else "")  # fmt: skip
    for name in ("mean", "std"):
        values = getattr(data, name)
        require(values is None or len(values) == data.channels,
                f"data.{name}: needs {data.channels} numbers, one a channel, not {len(values or ())}; `fastjepa data stats` "
                "prints those of a data set")  # fmt: skip
        fault = normalisation_fault(name, values or (), data.dtype, data.scale)
        require(not fault, f"data.{name}: {fault}")
    return dataclasses.replace(config, data=data)


def _check_distortions(config: Config, require: Callable[[bool, str], None]) -> None:
    """Refuse colour distortion of what has no colours, and a strength that nothing reads."""
    data = config.data
    require(not data.use_color_distortion or (data.channels, data.dtype) == (3, "uint8"),
            f"data.use_color_distortion: hue and saturation are of RGB in 8 bits, not of {data.channels} channels of "
            f"{data.dtype}; set it to false (data.use_gaussian_blur takes any)")  # fmt: skip
    require(data.use_color_distortion or data.color_jitter_strength == 0,
            "data.color_jitter_strength: acts with data.use_color_distortion alone; switch that on, or set 0.0")  # fmt: skip


def normalisation_fault(name: str, values: Sequence[float], dtype: str = "uint8", scale: float | None = None) -> str:
    """Return what is wrong with the "mean" or "std" of pixels of a dtype, and the remedy; "" if nothing is.

    Args:
        scale: the value that counts as 1; default: the greatest of the dtype, so that pixels count from 0 to 1.

    Floats may have any mean, and any deviation above 0. Of whole numbers no deviation is above half of the range, but twice the
    range passes: of 0 to 1 a deviation of 1 leaves pixels as they are. The least is about a tenth of one of the steps between
    black and white, 255 of uint8.
    """
    if dtype == "float32":
        return "must be greater than 0" if name == "std" and min(values, default=1) <= 0 else ""
    top = UNITS[dtype]
    scale = scale or top
    white, step = top / scale, float(f"{0.1 / scale:.1g}")
    least, most = {"mean": (0.0, white), "std": (step, 2 * white)}[name]
    if any(value < least for value in values):
        bound = f"greater than {least:g}" if least else "0 or greater"
        return f"{min(values):g} must be {bound}, as pixels count from 0 to {white:g}"
    if any(value > most for value in values):
        divided = ", ".join(f"{value / scale:.3f}" for value in values)
        remedy = f"divide values of 0..{top:g} by {scale:g}: [{divided}]" if scale > 1 else "see data.scale"
        return f"{max(values):g} is not of pixels that count from 0 to {white:g}; {remedy}"
    return ""


def _check_optimizer(config: Config, require: Callable[[bool, str], None]) -> None:
    """Refuse an optimizer where it cannot run."""
    optimization, zero = config.optimization, config.runtime.zero
    require(optimization.optimizer == "adamw" or zero in ("auto", 0),
            f"optimization.optimizer: muon needs whole matrices, and runtime.zero {zero} shards them (DeepSpeed's own Muon is "
            "another one); set runtime.zero 0, or optimizer adamw")  # fmt: skip
    require(optimization.optimizer == "adamw" or optimization.lr > 0,
            "optimization.lr: 0 has no schedule for optimization.muon_lr to follow; set it above 0")  # fmt: skip


def _check_objective(config: Config, require: Callable[[bool, str], None]) -> None:
    """Refuse masks, targets and losses that do not go together."""
    mask, loss, runtime = config.mask, config.loss, config.runtime
    unread = {"multiblock": ("hidden_share",), "block": MULTIBLOCK, "random": (*MULTIBLOCK, "aspect_ratio"),
              "rasterized": (*MULTIBLOCK, "aspect_ratio", "hidden_share")}[mask.strategy]  # fmt: skip
    for name in unread:
        default = getattr(type(mask), name)
        require(getattr(mask, name) == default,
                f"mask.{name}: means nothing to mask.strategy {mask.strategy}; leave it out, or at {default}")  # fmt: skip
    require(not runtime.cuda_graph or loss.regularizer == "none",
            "runtime.cuda_graph: not with loss.regularizer, which would pool the padding; switch one of them off")  # fmt: skip
    require(not loss.projector or loss.regularizer != "none",
            "loss.projector: projects features for loss.regularizer, which is none; set that, or leave it out")  # fmt: skip
    require(not runtime.cuda_graph or loss.target != "input" and loss.normalize not in ("batch", "running"),
            "runtime.cuda_graph: its padding knows no loss.target input and no loss.normalize batch or running; "
            "switch it off")  # fmt: skip
    require(not (config.meta.predictor == "joint" and loss.target == "input"),
            "meta.predictor: joint has one target for a patch, and loss.target input one for each of its blocks; "
            "change one of them")  # fmt: skip
    _check_layers(config, require)
    _check_teacher(config, require)
    _check_context_use(config, require)
    require(loss.normalize != "dyntanh" or loss.target != "pixels" and loss.target_layers == "last",
            "loss.normalize: dyntanh is the last norm of the target network, which loss.target pixels and the blocks of "
            "loss.target_layers do not pass; change one of them")  # fmt: skip
    require(not runtime.target_fp8 or loss.target != "pixels",
            "runtime.target_fp8: loss.target pixels has no target network to speed up; switch it off")  # fmt: skip


def _check_layers(config: Config, require: Callable[[bool, str], None]) -> None:
    """Refuse layers of the target network that it has not, or that nobody reads."""
    loss, meta = config.loss, config.meta
    require(loss.layers == "each" or loss.target_layers != "last",
            "loss.layers: mean means nothing to loss.target_layers last; leave it out, or name the layers")  # fmt: skip
    require(loss.target != "pixels" or loss.target_layers == "last",
            "loss.target_layers: loss.target pixels has no target network whose layers could be predicted; "
            "leave one of them out")  # fmt: skip
    if meta.teacher is None or meta.teacher_shape:  # else the teacher's blocks are known once its file has been read
        depth, network = config.target_network[0][1], "a teacher" if meta.teacher else "an encoder"
        require(config.target_depth <= depth,
                f"loss.target_layers: {config.target_depth} is no block of {network} of {depth}; "
                f"name blocks from 1 to {depth}")  # fmt: skip


def _check_teacher(config: Config, require: Callable[[bool, str], None]) -> None:
    """Refuse a frozen teacher beside what replaces or ignores it."""
    meta, loss = config.meta, config.loss
    require(meta.teacher is not None or meta.teacher_shape is None,
            "meta.teacher_shape: means nothing without meta.teacher; leave it out")  # fmt: skip
    require(meta.teacher is None or loss.target != "pixels",
            "meta.teacher: loss.target pixels asks no network for targets; leave one of them out")  # fmt: skip
    require(meta.teacher is None or loss.normalize != "dyntanh",
            "loss.normalize: dyntanh is the last norm of the run's own encoder, and meta.teacher gives the targets; "
            "change one of them")  # fmt: skip
    require(meta.teacher is None or not config.runtime.target_fp8,
            "runtime.target_fp8: meta.teacher replaces the target network that it is for; switch it off")  # fmt: skip


def _check_context_use(config: Config, require: Callable[[bool, str], None]) -> None:
    """Refuse a predictor that sees less, or predicts what is visible, where that cannot be."""
    meta, loss = config.meta, config.loss
    require(meta.predictor_repeats == 1 or meta.predictor_context < 1,
            f"meta.predictor_repeats: {meta.predictor_repeats} draws of a whole context are all the same; lower "
            "meta.predictor_context or leave it at 1")  # fmt: skip
    for name, used in (
        ("meta.predictor_context", meta.predictor_context < 1),
        ("loss.visible_weight", loss.visible_weight > 0),
    ):
        require(not (used and config.runtime.cuda_graph),
                f"runtime.cuda_graph: its padding knows no {name}; switch it off, or leave that out")  # fmt: skip
    require(loss.visible_weight == 0 or loss.target != "input",
            "loss.visible_weight: loss.target input shows the target network the target blocks alone, so context patches have "
            "no target; leave one of them out")  # fmt: skip
