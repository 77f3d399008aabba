"""A diffusion decoder that shows what the predictor says, as I-JEPA's paper does with RCDM (Bordes et al., 2022).

The networks stay as they are. A condition is the predictor's output for one target block, averaged over the block's patches:
D numbers. From it and noise the decoder learns to draw the whole image. What samples of several noise seeds share was in the
D numbers; what differs from seed to seed was not, and the decoder made it up.

Everything drawn is a function of (seed, step), so a decoder that is stopped goes on from its one file, bit for bit.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastjepa.data.prepare.processes import console
from fastjepa.engine.precision import has_bf16
from fastjepa.engine.schedule import cosine_between
from fastjepa.errors import ConfigError
from fastjepa.evals.cache import weights_fingerprint
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Split, Subject
from fastjepa.files import write_atomic
from fastjepa.rng import ORDER_STREAM, SPLIT_STREAM, generator
from fastjepa.visualize.neighbours import draw_query_masks, load_predictor, predict_features, prepared_networks

DECODER_FILE = "decoder.safetensors"
DECODER_SIDE = 32  # pixels that the longer side of a drawn image has at most
DECODER_WIDTHS, UNSHUFFLE = (
    (32, 96),
    2,
)  # of the UNet's two levels, on 2 x 2 pixels a position: a quarter of the positions to convolve
DIFFUSION_TIMES = 1000  # noise levels
WARMUP_STEPS, AVERAGE_DECAY = 0.05, 0.999  # warm-up as a share of the steps; decay of the averaged weights, which draw
MEASURED_IMAGES = 1024  # conditions whose mean and deviation standardise all
SAVE_EVERY = 200  # steps
NOISE_STREAM = 1 << 36  # step of the SPLITS stream of step 0; fastjepa/evals/result.py names the others


@dataclass(frozen=True)
class DecoderSettings:
    """How a decoder is trained."""

    steps: int = 1500
    batch: int = 64
    lr: float = 1.5e-3
    seed: int = 0


class BlockDecoder(nn.Module):
    """Noisy images and a condition -> the velocity of diffusion (Salimans & Ho 2022)."""

    def __init__(self, dim: int, channels: int, size: tuple[int, int]):
        """`dim`: D of the condition; `size`: (H, W), multiples of 4."""
        super().__init__()
        embedded, depth = 4 * DECODER_WIDTHS[0], channels * UNSHUFFLE**2
        self.size, self.channels = size, channels
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.project = nn.Sequential(nn.Linear(dim, embedded), nn.SiLU(), nn.Linear(embedded, embedded))
        self.unet = diffusers().UNet2DModel(
            sample_size=tuple(side // UNSHUFFLE for side in size), in_channels=depth, out_channels=depth, layers_per_block=1,
            block_out_channels=DECODER_WIDTHS, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            class_embed_type="identity", resnet_time_scale_shift="scale_shift", norm_num_groups=16, attention_head_dim=32,
        )  # fmt: skip

    def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """(b, C, H, W) within about [-1, 1], (b,) int64, (b, D) -> (b, C, H, W)"""
        said = self.project((condition - self.mean) / self.std)
        return F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, UNSHUFFLE), times, class_labels=said).sample, UNSHUFFLE)


def diffusers():
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(f"the decoder needs diffusers ({error}); pip install 'fastjepa[viz]'") from error
    return diffusers


@dataclass(frozen=True)
class BlockPredictor:
    """A context encoder and a predictor, frozen: where conditions come from."""

    subject: Subject
    encoder: nn.Module
    predictor: nn.Module

    def __call__(self, images: Tensor, context: np.ndarray, block: np.ndarray) -> Tensor:
        """(b, C, H, W) uint8, (b, N) bool each -> (b, D) fp32: the prediction of the block, averaged over its patches."""
        rows = predict_features(self.subject, self.encoder, self.predictor, images, context, block)
        return torch.stack([one.mean(dim=0) for one in rows])

    def fingerprint(self) -> str:
        return weights_fingerprint(nn.ModuleList([self.encoder, self.predictor]))


def block_predictor(subject: Subject) -> BlockPredictor:
    """Of a checkpoint; ConfigError where it holds no predictor, or is not of the run's own image size."""
    networks = load_predictor(subject), subject.encoder("context")
    predictor, encoder = (prepared_networks(subject, network) for network in networks)
    return BlockPredictor(subject, encoder, predictor)


@dataclass
class DecoderState:
    """All that a training is at a step. `about` names what made it; a file made otherwise is not gone on from."""

    about: dict[str, Any]
    step: int
    decoder: BlockDecoder
    average: Any  # diffusers' EMAModel
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """{"<group>.<parameter or buffer>": tensor}, without the optimizer's before its first step."""
        names = [name for name, _ in self.decoder.named_parameters()]
        found = {f"weights.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        found |= {f"average.{name}": tensor for name, tensor in zip(names, self.average.shadow_params, strict=True)}
        for name, parameter in self.decoder.named_parameters():
            moments = self.optimizer.state[parameter]
            found |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq") if moments}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        self.step = self.average.optimization_step = step
        self.decoder.load_state_dict({name: tensors[f"weights.{name}"] for name in self.decoder.state_dict()})
        for (name, parameter), shadow in zip(self.decoder.named_parameters(), self.average.shadow_params, strict=True):
            shadow.copy_(tensors[f"average.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device)} | moments


def train_decoder(subject: Subject, split: Split, folder: Path, settings: DecoderSettings) -> Path:
    """Train a decoder on the images of `split`, or go on with the one in `folder`; the file.

    Raises:
        ConfigError: the checkpoint holds no predictor, or `folder` holds a decoder that was made otherwise.
    """
    talk, file = block_predictor(subject), folder / DECODER_FILE
    about = asdict(settings) | {"data": split.data, "images": len(split.rows), "networks": talk.fingerprint(),
                                "channels": subject.config.data.channels, "size": list(small_images(subject.size)),
                                "dim": subject.config.encoder_shape[0]}  # fmt: skip
    state = fresh_state(about, subject.device)
    if file.is_file():
        resume_decoder(file, state)
    else:
        state.decoder.mean, state.decoder.std = measure_conditions(talk, split, settings.seed)
    loss = None
    for images, condition in block_conditions(talk, split, settings, state.step, "decoder"):
        value = decoder_step(state, settings, images, condition)
        loss = value if loss is None else 0.98 * loss + 0.02 * value
        if state.step % SAVE_EVERY == 0 or state.step == settings.steps:
            keep_decoder(file, state)
            console.print(f"step {state.step} of {settings.steps}  loss {float(loss):.4f}", highlight=False)
    return file


def fresh_state(about: dict[str, Any], device: torch.device) -> DecoderState:
    """At step 0; weights are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(about["seed"])
        decoder = BlockDecoder(about["dim"], about["channels"], tuple(about["size"])).to(device)
    average = diffusers().training_utils.EMAModel(decoder.parameters(), decay=AVERAGE_DECAY)
    return DecoderState(
        about, 0, decoder, average, torch.optim.AdamW(decoder.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    )


def small_images(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the images that are drawn: those of the run, its longer side at most SIDE, both sides multiples of 4."""
    scale = min(1.0, DECODER_SIDE / max(size))
    return tuple(max(4, round(side * scale / 4) * 4) for side in size)


def measure_conditions(talk: BlockPredictor, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """(D,) mean and standard deviation of the conditions of MEASURED images, on the subject's device."""
    few = DecoderSettings(steps=1, batch=min(MEASURED_IMAGES, len(split.rows)), seed=seed)
    [(_, condition)] = block_conditions(talk, split, few, 0, "conditions")
    return standardise_conditions(condition)


def standardise_conditions(condition: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) -> (D,) mean and standard deviation; numbers that hardly vary are not blown up."""
    std, mean = torch.std_mean(condition, dim=0, correction=0)
    return mean, std.clamp_min(1e-3 * float(std.max()) + 1e-12)


def block_conditions(talk: BlockPredictor, split: Split, settings: DecoderSettings, start: int,
               about: str) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Images (b, C, H, W) uint8 and conditions (b, D) of the steps from `start` on, each under masks of its own."""
    batch = settings.batch
    epochs = -(-settings.steps * batch // len(split.rows))
    order = np.concatenate([generator(settings.seed, ORDER_STREAM, epoch).permutation(split.rows) for epoch in range(epochs)])
    order = order[start * batch : settings.steps * batch]
    if not len(order):
        return
    stream = EvalImages(split.source, talk.subject.size, talk.subject.config.data.channels, order)
    for number, images in enumerate(stream.batches(batch, about=about), start):
        context, block = draw_query_masks(talk.subject, len(images), settings.seed, number)
        yield images, talk(images, context[:, 0], block[:, 0]).to(talk.subject.device)


def decoder_step(state: DecoderState, settings: DecoderSettings, images: Tensor, condition: Tensor) -> Tensor:
    """One optimizer step; the loss, a mean over images and pixels."""
    decoder, device = state.decoder, condition.device
    random = generator(settings.seed, SPLIT_STREAM, NOISE_STREAM + state.step)
    truth = reduced_loss(images, decoder.size).to(device) * 2 - 1
    noise = torch.from_numpy(random.standard_normal(truth.shape, np.float32)).to(device)
    times = torch.from_numpy(random.integers(0, DIFFUSION_TIMES, len(truth))).to(device)
    scheduler = diffusion_schedule("DDPMScheduler")
    with decoder_autocast(device):
        velocity = decoder(scheduler.add_noise(truth, noise, times), times, condition)
    loss = F.mse_loss(velocity.float(), scheduler.get_velocity(truth, noise, times))
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
    for group in state.optimizer.param_groups:
        group["lr"] = decoder_lr(settings, state.step)
    state.optimizer.step()
    state.average.step(decoder.parameters())
    state.step += 1
    return loss.detach()


def decoder_lr(settings: DecoderSettings, step: int) -> float:
    """Linear to `lr` over the first WARMUP of the steps, then half a cosine down to nothing."""
    warmup = max(1, round(WARMUP_STEPS * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return cosine_between(settings.lr, 0.0, (step - warmup) / max(1, settings.steps - warmup))


def diffusion_schedule(name: str):
    """One of diffusers' schedulers, for the noise levels and the target of this decoder."""
    return getattr(diffusers(), name)(DIFFUSION_TIMES, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def decoder_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def reduced_loss(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, C, H, W) uint8 -> (b, C, *size) fp32 in [0, 1]."""
    images = images.float() / 255
    return images if images.shape[2:] == size else F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)


def keep_decoder(file: Path, state: DecoderState) -> None:
    """All of it in one file, there whole or not at all; one entry of metadata, as several are written in any order."""
    write_atomic(file, save(state.tensors(), {"decoder": json.dumps({"about": state.about, "step": state.step})}))


def resume_decoder(file: Path, state: DecoderState) -> None:
    """Make `state` what `file` holds."""
    about, step, tensors = read_decoder(file)
    if other := [key for key in state.about if about.get(key) != state.about[key]]:
        key = other[0]
        values = "" if key == "networks" else f": {about.get(key)}, not {state.about[key]}"
        raise ConfigError(f"{file}: a decoder of other {key}{values}; give another --output, or remove it")
    state.restore(tensors, step)
    console.print(f"going on after step {step} of {file}", highlight=False)


def read_decoder(file: Path) -> tuple[dict[str, Any], int, dict[str, Tensor]]:
    """(about, step, tensors); ConfigError where it is no decoder."""
    try:
        with safe_open(file, "pt") as stored:
            header, names = json.loads((stored.metadata() or {})["decoder"]), list(stored.keys())
            return header["about"], header["step"], {name: stored.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise ConfigError(f"{file.parent}: holds no decoder; `fastjepa decoder` trains one") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{file}: is not a decoder, or is damaged ({error}); remove it and train one") from error


def load_decoder(folder: Path, talk: BlockPredictor) -> tuple[BlockDecoder, int]:
    """The averaged weights, to draw with, and the step they are of; ConfigError where it is not of these networks."""
    about, step, tensors = read_decoder(folder / DECODER_FILE)
    if about["networks"] != talk.fingerprint():
        raise ConfigError(f"{folder}: its decoder is of other networks than {talk.subject.path}; train one of these")
    if step < about["steps"]:
        console.print(f"{folder}: its decoder is at step {step} of {about['steps']}", highlight=False)
    decoder = BlockDecoder(about["dim"], about["channels"], tuple(about["size"]))
    averaged = {name: tensors[f"average.{name}"] for name, _ in decoder.named_parameters()}
    decoder.load_state_dict({name: tensors[f"weights.{name}"] for name, _ in decoder.named_buffers()} | averaged)
    return decoder.to(talk.subject.device).eval().requires_grad_(False), step
