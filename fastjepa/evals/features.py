"""From a checkpoint and labelled images to features: load the encoder, decode as for evaluation, pool, cache."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from fastjepa import attention, checkpoint, interop, model
from fastjepa.config import Config, ConfigError, from_dict, load
from fastjepa.decode_torch import DecodeError, decode
from fastjepa.evals.result import Features
from fastjepa.sources import Source

Which = Literal["target", "context", "random"]
Layers = Literal["last", "concat4"]
Augmentation = Callable[[Tensor, int, tuple[int, int]], Tensor]  # (image, its row of the source, size) -> image of that size
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
NETWORK = {"target": "target_encoder", "context": "encoder"}
FEW = 256  # images that are decoded sooner than processes start
MARGIN = 256 / 224  # the short side before the central crop, as a share of the crop

console = Console(stderr=True)  # standard output is for results


def read_config(path: Path) -> Config:
    """The config a checkpoint was trained with, that of a run directory without one yet, or what others' weights imply."""
    if interop.is_foreign(path):
        return interop.read(path).form.config()
    written = path / "config.yaml"
    if written.is_file() and not checkpoint.complete(path / "checkpoints", tag=None):
        return load(written)
    found = checkpoint.find(path)
    record = checkpoint.read_state(found)["record"]
    return (
        from_dict(record["config"], f"{found}/state.json") if "config" in record else load(found.parent.parent / "config.yaml")
    )


def load_encoder(path: str | Path, which: Which = "target", config: Config | None = None) -> nn.Module:
    """An encoder of a checkpoint or run directory (its latest), or of another's weights, frozen, on the CPU.

    Args:
        which: the target encoder (what the paper evaluates), the context encoder, or one with the run's seed, untrained.
        config: default: the one the checkpoint was trained with.
    """
    path = Path(path)
    if which != "random" and interop.is_foreign(path):
        return interop.load_encoder(path, which)
    config = config or read_config(path)
    _, encoder = model.build(config)
    if which != "random":
        try:
            encoder.load_state_dict(checkpoint.load_networks(path)[NETWORK[which]])
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ConfigError(f"{path}: its {NETWORK[which]} does not fit its config: {reason}") from error
    return encoder.eval().requires_grad_(False)


def extract(
    encoder: nn.Module,
    source: Source,
    size: tuple[int, int],
    channels: int,
    mean_std: MeanStd,
    device: str | torch.device = "cpu",
    batch: int = 256,
    workers: int | None = None,
    rows: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
    layers: Layers = "last",
    augment: Augmentation | None = None,
) -> Features:
    """Features of `source`: the mean over patches of the encoder's final-normed output, nothing on top.

    (n, D) of the last block or, with "concat4", (n, 4 D) of each of the last four (paper, appendix A.2).

    Args:
        size: (H, W) the images are brought to, a multiple of the patch.
        mean_std: per channel, on [0, 1].
        workers: decoding processes; default: none for few images and for pixels in memory, else up to 4.
        rows: the images to take, in this order; default: all, in the source's order.
        dtype: fp32, or bf16 for autocast.
        augment: what brings images to `size`; default: resized and cropped as usual for evaluation.

    Raises ConfigError when the encoder cannot take such images, or gives features that are not finite.
    """
    check_input(encoder, size, channels)
    encoder, device = encoder.to(device), torch.device(device)
    model.use_attention(encoder, attention.choose("auto", device, dtype))
    images, found = EvalImages(source, size, channels, rows, augment), []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for pixels in images.batches(batch, workers):
            found.append(pooled(encoder, normalise(pixels.to(device), mean_std), layers).cpu())
    features = Features(torch.cat(found), images.labels())
    if not bool(features.x.isfinite().all()):
        raise ConfigError("the encoder gives features that are not finite: its weights are broken, use an earlier checkpoint")
    return features


def pooled(encoder: nn.Module, images: Tensor, layers: Layers = "last") -> Tensor:
    """(b, C, H, W) -> (b, D) or, for "concat4", (b, 4 D) fp32: patches averaged, blocks side by side, the last one last."""
    if layers == "last":
        return encoder.features(images).float().mean(dim=1)
    if len(encoder.blocks) < 4:
        raise ConfigError(f"--layers concat4: the encoder has {len(encoder.blocks)} blocks; use --layers last")
    outputs: list[Tensor] = []  # (b * N, D) each
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in encoder.blocks[-4:]]
    try:
        encoder.features(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([encoder.norm(x).float().view(len(images), -1, x.shape[-1]).mean(dim=1) for x in outputs], dim=1)


def raw_pixels(
    source: Source,
    size: tuple[int, int],
    channels: int,
    mean_std: MeanStd,
    workers: int | None = None,
    rows: np.ndarray | None = None,
) -> Features:
    """The same images in the same order as in `extract`, normalised and flattened: (n, C * H * W)."""
    images = EvalImages(source, size, channels, rows)
    pixels = torch.cat([normalise(block, mean_std).flatten(1) for block in images.batches(1024, workers)])
    return Features(pixels, images.labels())


def check_input(encoder: nn.Module, size: tuple[int, int], channels: int) -> None:
    """ConfigError when `encoder` cannot take (channels, *size) images."""
    _, takes, height, width = encoder.get_parameter("patch_embed.proj.weight").shape
    if takes != channels:
        raise ConfigError(f"the encoder takes {takes}-channel images, not {channels}: set data.channels to {takes}")
    if size[0] % height or size[1] % width:
        raise ConfigError(
            f"images of {size[0]}x{size[1]} pixels do not divide into {height}x{width} patches: choose a multiple"
        )


class EvalImages(Dataset):
    """Images of a source as an evaluation sees them: (C, H, W) uint8, one view each."""

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        channels: int,
        rows: np.ndarray | None = None,
        augment: Augmentation | None = None,
    ):
        self.source, self.size, self.channels, self.augment = source, size, channels, augment
        self.rows = np.arange(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor | str:
        """The image, or what is wrong with it: an exception would arrive from a worker as its whole traceback."""
        row = int(self.rows[i])
        try:
            image = decode(self.source.read(row), self.channels)
            return self.augment(image, row, self.size) if self.augment else fit_to(image, self.size)
        except (DecodeError, OSError) as error:
            return f"{self.source.name(row)}: cannot be evaluated ({error}); repair or remove it"

    def labels(self) -> Tensor:
        """(n,) int64; ConfigError for an image without one."""
        found = [self.source.label(int(row)) for row in self.rows]
        if None in found:
            name = self.source.name(int(self.rows[found.index(None)]))
            raise ConfigError(f"{name}: has no label, and probes need labels; put the images into one folder per class")
        return torch.tensor(found, dtype=torch.int64)

    def batches(self, size: int, workers: int | None = None, about: str = "features") -> Iterator[Tensor]:
        """(b, C, H, W) uint8 blocks in order, with a progress bar on a terminal; OSError names a bad file."""
        if workers is None:
            here = len(self) < FEW or isinstance(self.source.read(int(self.rows[0])), np.ndarray)
            workers = 0 if here else min(4, os.cpu_count() or 1)
        loader = DataLoader(self, size, num_workers=workers, collate_fn=_stack)
        for block in watched(loader, about):
            if isinstance(block, str):
                raise OSError(block)
            yield block


def watched(items: Iterable, about: str) -> Iterable:
    """The same items, with a progress bar on a terminal that leaves nothing behind."""
    return track(items, about, console=console, transient=True, disable=not console.is_terminal)


def _stack(items: list[Tensor | str]) -> Tensor | str:
    return next((item for item in items if isinstance(item, str)), None) or torch.stack(items)


def fit_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) uint8 -> (C, *size): as it is when it has that size, else resized with a margin of 8/7 and centre-cropped.

    Antialiased bilinear; for a square `size` the short side becomes size * 256 / 224, rounded, as is usual on ImageNet.
    """
    shape = image.shape[1:]
    if tuple(shape) == tuple(size):
        return image
    wanted = [round(side * MARGIN) for side in size]
    tight = max((0, 1), key=lambda axis: wanted[axis] / shape[axis])  # the axis that bounds the scale
    resized = [int(wanted[tight] * side / shape[tight]) for side in shape]
    resized[tight] = wanted[tight]
    image = interpolate(image[None], size=resized, mode="bilinear", antialias=True)[0]
    top, left = (round((side - kept) / 2) for side, kept in zip(resized, size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def normalise(pixels: Tensor, mean_std: MeanStd) -> Tensor:
    """(b, C, H, W) uint8 -> fp32 with the given mean and standard deviation taken out."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in mean_std)
    return (pixels.float() / 255 - mean) / std


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of every name, shape and value of a network's weights, and of its norms' epsilons."""
    digest = hashlib.sha256(str([m.eps for m in network.modules() if isinstance(m, nn.LayerNorm)]).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(source: Source, rows: np.ndarray) -> str:
    """SHA-256 of the names and labels of the images taken: what a cache can know of data without reading it."""
    text = "".join(f"{source.name(int(row))}\t{source.label(int(row))}\n" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(make: Callable[[], Features], folder: Path | None, key: dict[str, Any]) -> Features:
    """What `make` returns, kept in `folder` under a name made of `key`; no folder, no cache.

    The key must name all that shapes the features. Pixels edited in place under an unchanged file name go unnoticed.
    """
    if folder is None:
        return make()
    text = json.dumps(key, sort_keys=True)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if not file.is_file():
        features = make()
        write_atomic(file, save({"x": features.x.contiguous(), "y": features.y}, {"key": text}))
        return features
    try:
        with safe_open(file, "pt") as stored:
            return Features(stored.get_tensor("x"), stored.get_tensor("y"))
    except SafetensorError as error:
        raise OSError(f"{file}: cached features cannot be read ({error}); delete the file") from error


def write_atomic(file: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    hidden = file.with_name(f".{file.name}.{os.getpid()}")
    with open(hidden, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    hidden.replace(file)
