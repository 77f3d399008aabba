"""A pretrained encoder on its own: the form it has, and the module that gives features."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.config.data_keys import DataConfig, MeanStd
from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import MODELS, Config
from fastjepa.errors import UserError
from fastjepa.masks.packed import Packed
from fastjepa.model.jepa import network_form
from fastjepa.model.positions import Positions
from fastjepa.model.vit import Encoder, NetworkForm
from fastjepa.weights.positions import grid_of_positions, possible_grids

LAYER_NORM_EPS = 1e-6  # in the layer norms of this trainer, the official code and timm
SAY_FORM = "name the run directory or model folder it belongs to, or its YAML with fastjepa convert --config"
FILE_KEYS = ("dtype", "bands", "pages", "nodata")  # of the config's section data
UNSTATED_WHICH = "unstated"  # `which`, where nothing says whether an encoder is the target or the context encoder


def bare_names(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Give tensors the names that they have in the network itself; UserError where two would have one name.

    DDP and DataParallel put "module." before them, once for each wrapping, and torch.compile "_orig_mod." at any place:
    "module._orig_mod.norm.weight" is "norm.weight".
    """
    bare = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):
        raise UserError(f"{where}: some weights are in it twice, with and without a wrapper's module. or _orig_mod.; keep one")
    return bare


def default_mean_std(channels: int, where: str, remedy: str) -> MeanStd:
    """Return ImageNet's (mean, std) per channel on [0, 1], or their average for one channel.

    UserError, which names the file `where` and the remedy, for other numbers of channels: theirs are not known.
    """
    found = DataConfig(channels=channels).mean_std
    if found is None:
        raise UserError(f"{where}: takes images of {channels} channels, and does not say their mean and deviation; {remedy}")
    return found


@dataclass(frozen=True)
class EncoderForm:
    """The shape, the input and the origin of an encoder; every file that is written carries them."""

    image_size: tuple[int, int]  # height and width in pixels
    patch_size: int
    channels: int
    mean: tuple[float, ...]  # per channel, where `unit` counts as 1: of bytes on [0, 1]
    std: tuple[float, ...]
    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    layer_norm_eps: float
    which: str  # target, context or UNSTATED_WHICH
    origin: str  # where the weights came from, in words
    norm: str = "layer"  # the last norm: layer or dyntanh
    rotary: bool = False  # positions turn queries and keys, in place of a code that is added
    qk_norm: bool = False  # queries and keys are normalised by head
    dtype: str = "uint8"  # of the images' files, and bands, pages and nodata: keys of the config's section data
    bands: tuple[int, ...] | None = None
    pages: str = "first"
    nodata: float | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Return (rows, columns) of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def mean_std(self) -> MeanStd:
        """Return the mean and the deviation of pixels together."""
        return self.mean, self.std

    @property
    def file_keys(self) -> dict[str, Any]:
        """Return {key: value} of the config's section data that say how images are read of files."""
        return {name: getattr(self, name) for name in FILE_KEYS}

    @property
    def unit(self) -> float:
        """Return the value of a pixel that counts as 1 in mean and deviation."""
        return DataConfig(dtype=self.dtype).unit

    @property
    def model_name(self) -> str | None:
        """Return the name this shape has in the configs, or None."""
        shapes = {(dim, depth, heads, round(dim * ratio)): name for name, (dim, depth, heads, ratio) in MODELS.items()}
        return shapes.get((self.embed_dim, self.depth, self.num_heads, self.mlp_hidden))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON writes them; `from_dict` reads them back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> "EncoderForm":
        """Make a form of what `to_dict` gave; UserError names the file `where` it is not whole."""
        fields = [field for field in dataclasses.fields(cls) if field.name in values or field.default is dataclasses.MISSING]
        names = [field.name for field in fields]
        if missing := [name for name in names if name not in values]:
            raise UserError(f"{where}: does not say the encoder's {', '.join(missing)}; convert the weights again")
        return cls(**{name: tuple(v) if isinstance(v := values[name], list) else v for name in names})

    @classmethod
    def of_config(cls, config: Config, which: str = UNSTATED_WHICH, origin: str = "a config") -> "EncoderForm":
        """Make the form of a run's encoder."""
        dim, depth, heads, ratio = config.encoder_shape
        files = {name: getattr(config.data, name) for name in FILE_KEYS}
        return cls(config.image_size, config.mask.patch_size, config.data.channels, *config.mean_std, dim, depth, heads,
                   round(dim * ratio), LAYER_NORM_EPS, which, origin, *network_form(config), **files)  # fmt: skip

    @classmethod
    def of_weights(
        cls, tensors: Mapping[str, Tensor], where: str, which: str, origin: str, grid: tuple[int, int] | None = None
    ) -> "EncoderForm":
        """Infer a form from weights alone: the grid of their positions, ImageNet's mean and deviation, a known model's heads.

        Args:
            grid: (rows, columns) of patches where positions were learned, which say nothing of it.
        """
        try:
            dim, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
            _, hidden = tensors["pos_embed"], tensors["blocks.0.mlp.fc1.weight"].shape[0]
        except (KeyError, ValueError) as error:
            remedy = "one with rotary positions needs its run directory or --config"
            raise UserError(f"{where}: not the weights of an I-JEPA encoder ({error} is not there; {remedy})") from error
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        heads = {(d, n, round(d * ratio)): heads for d, n, heads, ratio in MODELS.values()}.get((dim, depth, hidden))
        if heads is None:
            raise UserError(f"{where}: does not say the heads of width {dim}, depth {depth}; {SAY_FORM}")
        rows, columns = grid or told_grid(tensors, where)
        image = (rows * patch, columns * patch), patch, channels, *default_mean_std(channels, where, SAY_FORM)
        norm, qk_norm = "dyntanh" if "norm.alpha" in tensors else "layer", "blocks.0.attn.q_norm.weight" in tensors
        return cls(*image, dim, depth, heads, hidden, LAYER_NORM_EPS, which, origin, norm, qk_norm=qk_norm)

    def config(self) -> Config:
        """Return the config of such an encoder, all else at its default; UserError where none describes it."""
        found = self.model_name
        own = {"embed_dim": self.embed_dim, "depth": self.depth, "num_heads": self.num_heads}
        attention = {"positions": "rope" if self.rotary else "sincos", "qk_norm": self.qk_norm}
        if found is None and self.mlp_hidden != 4 * self.embed_dim:
            raise UserError(f"{self.origin}: an MLP {self.mlp_hidden} wide on {self.embed_dim} is in no config")
        return config_from_dict(
            {
                "data": {"crop_size": list(self.image_size), "channels": self.channels, "mean": self.mean, "std": self.std}
                | self.file_keys,
                "mask": {"patch_size": self.patch_size},
                "meta": ({"model_name": found} if found else own | {"pred_emb_dim": 4 * self.num_heads}) | attention,
            },
            self.origin,
        )


Shape = EncoderForm | tuple[int, int] | None  # what a user says of weights: their form, or their (rows, columns) alone


class PretrainedEncoder(Encoder):
    """An encoder that says what it is; `forward_features(images)` gives (b, N, D).

    Images are (b, C, H, W), of the dtype that those of its training had, or floats already normalised with `mean_std`; H and
    W any multiple of the patch.
    `other_positions` says what positions patches have in other sizes than `image_size`.
    """

    def __init__(self, form: EncoderForm):
        ratio = form.mlp_hidden / form.embed_dim
        shape = form.embed_dim, form.depth, form.num_heads, ratio
        own = NetworkForm(form.norm, form.rotary, form.qk_norm)
        super().__init__(form.grid, form.patch_size, form.channels, form.mean_std, shape, own)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = form.layer_norm_eps
        self.form, self.fixed_positions, self.chose_positions = form, True, False
        self.image_size, self.patch_size, self.channels = form.image_size, form.patch_size, form.channels
        self.mean_std, self.which, self.origin = form.mean_std, form.which, form.origin

    def forward(
        self,
        images: Tensor,
        visible: Packed | None = None,
        wanted: Packed | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return features as every encoder does; UserError for what is no batch of images that this one takes."""
        shape, patch = tuple(getattr(images, "shape", ())), self.patch_size
        good = isinstance(images, Tensor) and len(shape) == 4 and shape[0] > 0 and shape[1] == self.channels
        if not good or any(side < patch or side % patch for side in shape[2:]):
            given = f"of shape {shape}" if isinstance(images, Tensor) else f"{type(images).__name__}"
            one = "; images[None] makes a batch of one image" if len(shape) == 3 and shape[0] == self.channels else ""
            raise UserError(f"{self.origin}: images must be a tensor (b, {self.channels}, H, W), H and W multiples of {patch}, "
                            f"not {given}{one}")  # fmt: skip
        return super().forward(images, visible, wanted, layers)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return features (b, N, D) of images (b, C, H, W), after the final norm; UserError for another dtype."""
        own = getattr(torch, self.form.dtype)
        if isinstance(images, Tensor) and images.dtype != own and not images.is_floating_point():
            takes, unit = "floats" if own.is_floating_point else f"{self.form.dtype}, or floats", self.form.unit
            given = str(images.dtype).removeprefix("torch.")
            raise UserError(f"{self.origin}: images must be {takes} normalised with mean_std, {unit:g} counted as 1, not "
                            f"{given}; normalise them so")  # fmt: skip
        return self.features(images)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return positions (N, D) of a grid; UserError where they were learned for another, and are not interpolated.

        A warning says which positions another grid has where nobody chose them.
        """
        if grid != self.grid:
            height, width = self.image_size
            if not self.fixed_positions and self.other_positions != "interpolated":
                remedy = 'resize the images to that, or load with positions="interpolated" (--positions interpolated)'
                raise UserError(f"{self.origin}: positions were learned for {height}x{width} pixels; {remedy}")
            if not self.chose_positions and not torch.compiler.is_compiling():
                told = f"positions of {shown_grid(grid)} patches are {self.other_positions}, trained on {shown_grid(self.grid)}"
                warnings.warn(f"{self.origin}: {told}; load_encoder(..., positions=...) chooses and is quiet", stacklevel=2)
        return super().positions(grid)


def shown_grid(grid: tuple[int, int]) -> str:
    """Return (rows, columns) as a sentence names them: "8x32"."""
    return f"{grid[0]}x{grid[1]}"


def told_grid(tensors: Mapping[str, Tensor], where: str) -> tuple[int, int]:
    """Return the grid that sine-cosine positions are of; UserError, with the grids there may be, where they were learned."""
    stored = tensors["pos_embed"]
    if found := grid_of_positions(stored):
        return found
    if "cls_token" in tensors or grid_of_positions(stored[:, 1:]):
        remedy = "only ViTs without one are read (in timm class_token=False)"
        raise UserError(f"{where}: pos_embed has a row for a class token; {remedy}")
    grids = ", ".join(map(shown_grid, possible_grids(stored.shape[1])))
    remedy = "load_encoder(grid=(ROWS, COLUMNS)), or fastjepa convert --grid ROWSxCOLUMNS or --config YAML, says which"
    raise UserError(f"{where}: positions were learned, and its {stored.shape[1]} patches may lie as {grids}; {remedy}")


def require_official_attention(form: EncoderForm, where: str) -> None:
    """Raise UserError for an encoder whose attention `where` has not."""
    if form.rotary or form.qk_norm:
        own = "rotary positions" if form.rotary else "normalised queries and keys"
        raise UserError(f"{form.origin}: {where} has no {own}; use --to fastjepa, onnx or pt2")


def encoder_skeleton(form: EncoderForm) -> PretrainedEncoder:
    """Return an encoder without memory of its own: names and shapes."""
    with torch.device("meta"):
        return PretrainedEncoder(form)


def encoder_of_weights(
    form: EncoderForm, tensors: Mapping[str, Tensor], positions: Positions | None = None, antialias: bool = True
) -> PretrainedEncoder:
    """Return the encoder in fp32, frozen, on the CPU; `tensors` have been checked.

    UserError for `positions` of rotary ones, which follow any size by themselves.
    """
    if form.rotary and positions:
        raise UserError(f"{form.origin}: rotary positions follow any size by themselves; leave positions (--positions) out")
    encoder = encoder_skeleton(form)
    encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    encoder.patch_embed.mean, encoder.patch_embed.std = (torch.tensor(values) for values in form.mean_std)
    encoder.fixed_positions = form.rotary or grid_of_positions(tensors["pos_embed"]) == form.grid
    encoder.antialias, encoder.chose_positions = antialias, positions is not None
    encoder.other_positions = positions or encoder.other_positions
    return encoder.eval().requires_grad_(False)


def check_weights(form: EncoderForm, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError at the first name or shape that an encoder of this form has not."""
    expected = {name: tuple(tensor.shape) for name, tensor in encoder_skeleton(form).state_dict().items()}
    for name in [*tensors, *expected]:
        if name not in tensors:
            raise UserError(f"{where}: {name} is not there; these are not the whole weights of such an encoder")
        if name not in expected:
            raise UserError(f"{where}: {name} has no place in an I-JEPA encoder; only ViTs without class or register token, "
                              f"layer scale and fc_norm are read (in timm class_token=False, fc_norm=False)")  # fmt: skip
        if tuple(tensors[name].shape) != expected[name]:
            raise UserError(f"{where}: {name} is {tuple(tensors[name].shape)}, and {expected[name]} by its config")
    if form.rotary:
        return
    if (found := grid_of_positions(tensors["pos_embed"])) not in (None, form.grid):
        stated = f"{shown_grid(form.grid)} patches by its config or --grid"
        raise UserError(f"{where}: pos_embed holds the positions of {shown_grid(found)} patches, and there are {stated}; "
                        f"mend the image size there")  # fmt: skip
