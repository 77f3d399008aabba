"""Model folders as the Hugging Face Hub holds them, of fastjepa, timm or transformers: config.json and model.safetensors.

Neither library is needed, but for one thing: a folder that timm wrote names its architecture, and only timm knows what it is.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastjepa.config.checks import normalisation_fault
from fastjepa.config.data_keys import DataConfig
from fastjepa.errors import CheckpointError, UserError
from fastjepa.weights.model_card import model_card
from fastjepa.weights.pretrained import (
    FILE_KEYS,
    LAYER_NORM_EPS,
    UNSTATED_WHICH,
    EncoderForm,
    Shape,
    bare_names,
    default_mean_std,
    require_official_attention,
)

CONFIG_FILE, CARD_FILE, PROCESSOR_FILE = "config.json", "README.md", "preprocessor_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FOLDER_KINDS = {"form": "fastjepa", "architecture": "timm", "model_type": "transformers"}  # by a key of config.json
# Of each part of a block: our name, and two of transformers, in the files of every version and in the memory of version 5.
LAYER = {
    "norm1": ("layernorm_before", "layernorm_before"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
STEMS = ("encoder.layer", "layers")
WHOLE = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
EXTRA = ("pooler.", "classifier.", "embeddings.mask_token", "head.")  # no part of an encoder
TIMM_NAMES = {  # the sizes that timm knows; every argument that matters is given beside the name
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_gap_224",
    "vit_giant": "vit_giant_patch16_gap_224",
    "vit_gigantic": "vit_gigantic_patch14_224",
}


class Loaded(NamedTuple):
    """An encoder as read: what it is, its weights by official name, and the names in its file that are no part of it."""

    form: EncoderForm
    tensors: dict[str, Tensor]
    left_out: list[str]


def folder_kind(folder: Path) -> str | None:
    """Return fastjepa, timm or transformers; None where config.json is not there; UserError for other models."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    said = read_json(folder / CONFIG_FILE)
    found = next((name for mark, name in FOLDER_KINDS.items() if mark in said), None)
    if found is None or said.get("model_type", "ijepa") != "ijepa":
        is_of = f"a {said['model_type']} model" if "model_type" in said else "an unknown model"
        remedy = "an IJepaModel, a timm ViT or a fastjepa encoder is read"
        raise UserError(f"{folder}: {CONFIG_FILE} is that of {is_of}; {remedy}")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Read an object of a JSON file; UserError for a file that is none."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a .safetensors file, or of a folder's files, and the form in their metadata ({} if none)."""
    if path.is_dir() and (path / INDEX_FILE).is_file():
        files = sorted(set(read_json(path / INDEX_FILE)["weight_map"].values()))
    else:
        files = [WEIGHTS_FILE] if path.is_dir() else [""]
    tensors, about = {}, {}
    for name in files:
        file = path / name
        try:
            with safe_open(file, "pt") as stored:
                tensors |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                about |= json.loads((stored.metadata() or {}).get("fastjepa", "{}"))
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{file}: not a readable safetensors file ({reason}); give one that is") from error
    return bare_names(tensors, str(path)), about


def settle_form(held: str, asked: str | None, where: Path) -> str:
    """Return which encoder a file of one encoder holds; the user's word counts where the file has none."""
    if asked in (None, held):
        return held
    if held == UNSTATED_WHICH:
        return asked
    raise UserError(f"{where}: holds the {held} encoder, not the {asked}; ask for the {held} one")


def read_lone_encoder(
    path: Path, tensors: dict[str, Tensor], about: Mapping[str, Any], which: str | None, shape: Shape, origin: str
) -> Loaded:
    """Describe an encoder alone; `about` is its form, or what little is known of it, and `shape` replaces or adds to it."""
    chosen = settle_form(about.get("which", UNSTATED_WHICH), which, path)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXTRA)}
    if isinstance(shape, EncoderForm):
        form = replace(shape, which=chosen, origin=origin)
    elif "embed_dim" in about:
        form = replace(EncoderForm.from_dict(about, str(path)), which=chosen)
    else:
        form = EncoderForm.of_weights(kept, str(path), chosen, origin, shape)
    return Loaded(form, kept, sorted(tensors.keys() - kept.keys()))


def read_folder(path: Path, which: str | None, shape: Shape) -> Loaded:
    """Read a folder of any of the three kinds."""
    said, (tensors, _) = read_json(path / CONFIG_FILE), read_tensors(path)
    found = folder_kind(path)
    if found == "fastjepa":
        return read_lone_encoder(path, tensors, said["form"], which, shape, path.name)
    if found == "transformers":
        tensors = from_transformers(tensors)
        about = transformers_form(path, said)
    else:
        about = said.get("fastjepa") or timm_form(path, said)
    return read_lone_encoder(path, tensors, about, which, shape, f"{found} folder {path.name}")


def timm_mean_std(path: Path, given: Mapping[str, Any], channels: int) -> dict[str, list[float]]:
    """Return the mean and the deviation that the pretrained_cfg of a timm folder gives, else ImageNet's."""
    file = path / CONFIG_FILE
    if given.keys() >= {"mean", "std"}:
        return checked_mean_std(file, given["mean"], given["std"], channels)
    mean, std = default_mean_std(channels, str(file), "add mean and std to pretrained_cfg")
    return checked_mean_std(file, given.get("mean", mean), given.get("std", std), channels)


def transformers_mean_std(folder: Path, channels: int, dtype: str) -> dict[str, list[float]]:
    """Return the mean and the deviation that do what a folder's image processor does; ImageNet's where it has none.

    The processor maps a value v to (f v - m) / s, by its rescale_factor f, image_mean m and image_std s. A pixel x = v / u, u
    being 255 of bytes, is mapped so by the mean m / (u f) and the deviation s / (u f). Without do_rescale f is 1; without
    do_normalize m is 0 and s is 1.
    """
    file = folder / PROCESSOR_FILE
    if not file.is_file():
        known = default_mean_std(channels, str(folder), f"add {PROCESSOR_FILE} with image_mean and image_std")
        return checked_mean_std(file, *known, channels)
    given = read_json(file)
    kind = given.get("image_processor_type") or given.get("feature_extractor_type") or "ViT"
    if given.get("do_normalize", True) and not given.keys() >= {"image_mean", "image_std"} and not kind.startswith("ViT"):
        raise UserError(f"{file}: image_mean or image_std is not there, and the defaults of {kind} are not known; add both")
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise UserError(f"{file}: rescale_factor: {factor!r} must be a number greater than 0; 1/255 is usual")
    mean, std = given.get("image_mean", 0.5), given.get("image_std", 0.5)  # 0.5 is the default of ViTImageProcessor
    mean, std = (mean, std) if given.get("do_normalize", True) else (0.0, 1.0)
    return checked_mean_std(file, mean, std, channels, DataConfig(dtype=dtype).unit * factor, dtype)


def checked_mean_std(
    file: Path, mean: Any, std: Any, channels: int, scale: float = 1.0, dtype: str = "uint8"
) -> dict[str, list[float]]:
    """Return {"mean": and "std": a number a channel} over `scale`; UserError, which names the file, for what cannot be.

    Args:
        mean, std: a number for all channels, or a list of one a channel.
        dtype: of pixels in files.
    """
    checked = {}
    for name, stated in (("mean", mean), ("std", std)):
        values = [stated] * channels if isinstance(stated, int | float) else stated
        numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if not numbers or len(values) != channels:
            raise UserError(f"{file}: {name}: {stated!r} must be {channels} numbers, one a channel")
        checked[name] = [value / scale for value in values]
        if fault := normalisation_fault(name, checked[name], dtype):
            raise UserError(f"{file}: {name}: {fault}")
    return checked


def timm_form(path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the form of a folder that timm wrote.

    The I-JEPA weights that timm publishes are context encoders; of other weights nothing is known.
    """
    architecture, given = said["architecture"], said.get("pretrained_cfg", {})
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{path}: only timm knows what {architecture} is; pip install 'fastjepa[timm]'") from error
    try:
        with torch.device("meta"):
            network = timm.create_model(architecture, pretrained=False, **said.get("model_args", {}) | {"num_classes": 0})
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: this timm cannot make {architecture} ({error}); use the version that wrote it") from error
    blocks, embed = getattr(network, "blocks", ()), getattr(network, "patch_embed", None)
    plain = type(network).__name__ == "VisionTransformer" and all(
        type(b).__name__ == "Block" and isinstance(b.norm1, nn.LayerNorm) and is_gelu(b.mlp.act) for b in blocks
    )
    if not plain:
        raise UserError(f"{path}: {architecture} is not a plain ViT with layer norm and GELU; only those are read")
    dim, channels, patch, _ = embed.proj.weight.shape
    return timm_mean_std(path, given, channels) | {
        "image_size": list(embed.img_size),
        "patch_size": patch,
        "channels": channels,
        "embed_dim": dim,
        "depth": len(blocks),
        "num_heads": blocks[0].attn.num_heads,
        "mlp_hidden": blocks[0].mlp.fc1.out_features,
        "layer_norm_eps": blocks[0].norm1.eps,
        "which": "context" if "ijepa" in f"{given.get('tag')} {given.get('hf_hub_id')}" else UNSTATED_WHICH,
        "origin": f"timm, {architecture}",
    }


def is_gelu(module: nn.Module) -> bool:
    """Tell whether an activation is the exact GELU."""
    return type(module).__name__ == "GELU" and getattr(module, "approximate", "none") == "none"


def transformers_form(path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the form of an IJepaModel folder; what is not in config.json has the library's default."""
    for name, needed in (("qkv_bias", True), ("hidden_act", "gelu")):
        if said.get(name, needed) != needed:
            raise UserError(f"{path}: {name} is {said[name]}, and an I-JEPA encoder's is {needed}; it cannot be read")
    image, patch, channels = said.get("image_size", 224), said.get("patch_size", 16), said.get("num_channels", 3)
    about = {"which": "context", "origin": f"transformers folder {path.name}"} | said.get("fastjepa", {})
    files = {name: about[name] for name in FILE_KEYS if name in about}
    return (
        transformers_mean_std(path, channels, about.get("dtype", "uint8"))
        | files
        | {
            "image_size": [image, image] if isinstance(image, int) else list(image),
            "patch_size": patch if isinstance(patch, int) else patch[0],
            "channels": channels,
            "embed_dim": said.get("hidden_size", 768),
            "depth": said.get("num_hidden_layers", 12),
            "num_heads": said.get("num_attention_heads", 12),
            "mlp_hidden": said.get("intermediate_size", 3072),
            "layer_norm_eps": said.get("layer_norm_eps", 1e-12),
            "which": about["which"],
            "origin": about["origin"],
        }
    )


def layer_aliases(depth: int) -> dict[str, str]:
    """Return {a name of transformers: ours}, q, k and v apart; where there are two names, the one of files comes first.

    Such as {"encoder.layer.0.layernorm_before.weight": "blocks.0.norm1.weight"}.
    """
    pairs = [(theirs, ours) for ours, theirs in WHOLE.items()]
    pairs += [(f"{STEMS[version]}.{i}.{names[version]}", f"blocks.{i}.{ours}")
              for version in (0, 1) for i in range(depth) for ours, names in LAYER.items()]  # fmt: skip
    named = {f"{theirs}.{p}": f"{ours}.{p}" for theirs, ours in pairs for p in ("weight", "bias")}
    return named | {"embeddings.position_embeddings": "pos_embed"}


def from_transformers(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors their official names and join q, k and v; a name that is not known stays as it is."""
    stored = {name.removeprefix("ijepa."): tensor for name, tensor in stored.items()}
    depth = len({name for name in stored if name.endswith("layernorm_before.weight")})
    known = layer_aliases(depth)
    tensors = {known.get(name, name): tensor for name, tensor in stored.items()}
    for i in range(depth):
        for p in ("weight", "bias"):
            parts = [f"blocks.{i}.attn.{part}.{p}" for part in "qkv"]
            if all(part in tensors for part in parts):
                tensors[f"blocks.{i}.attn.qkv.{p}"] = torch.cat([tensors.pop(part) for part in parts])
    return tensors


def to_transformers(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Give tensors the names that transformers' files have."""
    apart = dict(tensors)
    for name in [name for name in tensors if ".attn.qkv." in name]:
        for part, rows in zip("qkv", apart.pop(name).chunk(3), strict=True):
            apart[name.replace("attn.qkv", f"attn.{part}")] = rows
    names = {ours: theirs for theirs, ours in reversed(layer_aliases(depth).items())}
    return {names[name]: tensor for name, tensor in apart.items()}


def write_fastjepa(folder: Path, form: EncoderForm, tensors: Mapping[str, Tensor]) -> None:
    """Write a folder for `fastjepa.load_encoder`."""
    dtype = "normalised floats" if form.dtype == "float32" else form.dtype
    use = f"""import fastjepa
encoder = fastjepa.load_encoder("FOLDER")  # the {form.which} encoder
features = encoder.forward_features(images)  # (B, {form.channels}, H, W) {dtype} -> (B, N, {form.embed_dim})"""
    write_folder(folder, {"library_name": "fastjepa", "form": form.to_dict()}, form, tensors, "fastjepa", use)


def write_timm(folder: Path, form: EncoderForm, tensors: Mapping[str, Tensor]) -> None:
    """Write a ViT without class token that `timm.create_model` takes, by checkpoint_path or as "local-dir:FOLDER"."""
    if form.rotary:
        raise UserError(f"{form.origin}: timm's ViT has no rotary positions; use --to fastjepa, onnx or pt2")
    if form.layer_norm_eps != LAYER_NORM_EPS:
        difference = f"a layer norm's eps is {form.layer_norm_eps}, and {LAYER_NORM_EPS} in timm"
        raise UserError(f"{form.origin}: {difference}; it cannot be written so")
    name, arguments = timm_arguments(form)
    size = [form.channels, *form.image_size]
    shown = {"input_size": size, "mean": list(form.mean), "std": list(form.std), "num_classes": 0, "classifier": "head",
             "first_conv": "patch_embed.proj", "interpolation": "bilinear", "fixed_input_size": True}  # fmt: skip
    said = {"architecture": name, "num_classes": 0, "num_features": form.embed_dim, "global_pool": "avg"}
    spelled = ", ".join(f"{key}={tuple(value) if isinstance(value, list) else value!r}" for key, value in arguments.items())
    use = f"""import timm
model = timm.create_model("{name}", num_classes=0, checkpoint_path="FOLDER/{WEIGHTS_FILE}",
                          {spelled})
features = model.forward_features(images)  # normalised floats (B, {form.channels}, H, W) -> (B, N, {form.embed_dim})"""
    said |= {"model_args": arguments, "pretrained_cfg": shown, "fastjepa": form.to_dict()}
    write_folder(folder, said, form, tensors, "timm", use)


def timm_arguments(form: EncoderForm) -> tuple[str, dict[str, Any]]:
    """Return an architecture's name and the arguments that make it this encoder.

    fc_norm is off, for it would move the final norm behind the mean over patches.
    """
    ratio = form.mlp_hidden / form.embed_dim
    if int(form.embed_dim * ratio) < form.mlp_hidden:  # timm cuts where the quotient fell short
        ratio = math.nextafter(ratio, math.inf)
    return TIMM_NAMES.get(form.model_name or "vit_base", TIMM_NAMES["vit_base"]), {
        "img_size": list(form.image_size),
        "patch_size": form.patch_size,
        "in_chans": form.channels,
        "embed_dim": form.embed_dim,
        "depth": form.depth,
        "num_heads": form.num_heads,
        "mlp_ratio": ratio,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    } | ({"qk_norm": True} if form.qk_norm else {})


def write_transformers(folder: Path, form: EncoderForm, tensors: Mapping[str, Tensor]) -> None:
    """Write a folder for IJepaModel.from_pretrained, and for its image processor."""
    require_official_attention(form, "transformers' IJepaModel")
    height, width = form.image_size
    said = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "dtype": str(tensors["pos_embed"].dtype).removeprefix("torch."),
        "hidden_size": form.embed_dim,
        "num_hidden_layers": form.depth,
        "num_attention_heads": form.num_heads,
        "intermediate_size": form.mlp_hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": form.layer_norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": form.patch_size,
        "num_channels": form.channels,
        "qkv_bias": True,
        "fastjepa": {"which": form.which, "origin": form.origin} | form.file_keys,
    }
    shown = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": height, "width": width},
             "resample": 2, "do_rescale": True, "rescale_factor": 1 / form.unit, "do_normalize": True,
             "image_mean": list(form.mean), "image_std": list(form.std)}  # fmt: skip
    use = f"""from transformers import IJepaModel
model = IJepaModel.from_pretrained("FOLDER")
features = model(images).last_hidden_state  # normalised floats (B, {form.channels}, H, W) -> (B, N, {form.embed_dim})"""
    write_folder(folder, said, form, to_transformers(tensors, form.depth), "transformers", use)
    (folder / PROCESSOR_FILE).write_text(json.dumps(shown, indent=2) + "\n")


def write_folder(
    folder: Path, said: Mapping[str, Any], form: EncoderForm, tensors: Mapping[str, Tensor], library: str, use: str
) -> None:
    """Write config.json `said`, the tensors, and a model card for `library` with the lines of code `use`."""
    folder.mkdir(parents=True)
    metadata = {"format": "pt", "fastjepa": json.dumps(form.to_dict())}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE, metadata)
    (folder / CONFIG_FILE).write_text(json.dumps(said, indent=2) + "\n")
    (folder / CARD_FILE).write_text(model_card(form, library, use))
