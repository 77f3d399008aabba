"""Diffusion decoder that shows what the predictor says, as I-JEPA's paper does with RCDM (Bordes et al., 2022).

The networks stay as they are. A condition is the predictor's output for one target block, averaged over the block's patches:
D numbers. From it and noise the decoder learns to draw the whole image. What samples of several noise seeds share was in the
D numbers; what differs from seed to seed was not, and the decoder made it up.

Every random number is a function of (seed, step), so a decoder that is stopped goes on from its one file, bit for bit.
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
from fastjepa.engine.precision import autocast_of, has_bf16
from fastjepa.engine.schedule import cosine_between
from fastjepa.errors import UserError
from fastjepa.evals.cache import weights_fingerprint
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Split, Subject
from fastjepa.files import write_atomic
from fastjepa.rng import ORDER_STREAM, SPLIT_STREAM, generator
from fastjepa.visualize.neighbours import draw_query_masks, load_predictor, predict_features, prepared_network

DECODER_FILE = "decoder.safetensors"
DECODER_SIDE = 32  # pixels that the longer side of a drawn image has at most
DECODER_WIDTHS = (32, 96)  # channels of the UNet's two levels
UNSHUFFLE = 2  # pixels a side that become channels of one position: a quarter of the positions to convolve
DIFFUSION_TIMES = 1000  # noise levels
WARMUP_STEPS, AVERAGE_DECAY = 0.05, 0.999  # warm-up as a share of the steps; decay of the averaged weights, which draw
MEASURED_IMAGES = 1024  # conditions whose mean and deviation standardise all
SAVE_EVERY = 200  # steps
NOISE_STREAM = 1 << 36  # step of SPLIT_STREAM for training step 0; fastjepa/evals/scoring.py lists the others


@dataclass(frozen=True)
class DecoderSettings:
    """Settings of a decoder's training: steps, images a step, peak learning rate, seed of every draw."""

    steps: int = 1500
    batch: int = 64
    lr: float = 1.5e-3
    seed: int = 0


class BlockDecoder(nn.Module):
    """UNet that predicts the velocity of diffusion (Salimans & Ho 2022) from noisy images and a condition."""

    def __init__(self, dim: int, channels: int, size: tuple[int, int]):
        """Build the network for conditions of `dim` numbers and images of `size` (H, W), multiples of 4."""
        super().__init__()
        embedded, depth = 4 * DECODER_WIDTHS[0], channels * UNSHUFFLE**2
        self.size, self.channels = size, channels
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.project = nn.Sequential(nn.Linear(dim, embedded), nn.SiLU(), nn.Linear(embedded, embedded))
        self.unet = import_diffusers().UNet2DModel(
            sample_size=tuple(side // UNSHUFFLE for side in size), in_channels=depth, out_channels=depth, layers_per_block=1,
            block_out_channels=DECODER_WIDTHS, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            class_embed_type="identity", resnet_time_scale_shift="scale_shift", norm_num_groups=16, attention_head_dim=32,
        )  # fmt: skip

    def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """Predict velocities (b, C, H, W) of images (b, C, H, W) within about [-1, 1] at noise levels (b,) int64."""
        embedded = self.project((condition - self.mean) / self.std)  # (b, D) -> (b, 4 * 32), added to the time's
        positions = F.pixel_unshuffle(x, UNSHUFFLE)  # (b, C, H, W) -> (b, 4 C, H / 2, W / 2)
        return F.pixel_shuffle(self.unet(positions, times, class_labels=embedded).sample, UNSHUFFLE)


def import_diffusers():
    """Return the package diffusers; UserError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"the decoder needs diffusers ({error}); pip install 'fastjepa[viz]'") from error
    return diffusers


@dataclass(frozen=True)
class BlockPredictor:
    """Frozen context encoder and predictor, which give the conditions."""

    subject: Subject
    encoder: nn.Module
    predictor: nn.Module

    def __call__(self, images: Tensor, context: np.ndarray, block: np.ndarray) -> Tensor:
        """Predict one block of each image and average over its patches: (b, D) fp32 on the host.

        `images` (b, C, H, W) uint8; `context`, which the encoder sees, and `block`, which is predicted: (b, N) bool.
        """
        rows = predict_features(self.subject, self.encoder, self.predictor, images, context, block)
        return torch.stack([one.mean(dim=0) for one in rows])

    def fingerprint(self) -> str:
        """Return a digest of both networks' weights."""
        return weights_fingerprint(nn.ModuleList([self.encoder, self.predictor]))


def block_predictor(subject: Subject) -> BlockPredictor:
    """Load the two networks.

    UserError where the weights hold no predictor, are not of the run's own image size, or take no pictures of 8 bits.
    """
    if not subject.pixels.are_pictures:
        raise UserError(f"{subject.path}: takes arrays ({subject.pixels}), and a decoder draws pictures alone, 1 or 3 "
                        "channels of 8 bits; `fastjepa visualize --what masks,pca,neighbours` shows the others")  # fmt: skip
    predictor, encoder = load_predictor(subject), subject.encoder("context")
    return BlockPredictor(subject, prepared_network(subject, encoder), prepared_network(subject, predictor))


@dataclass
class DecoderState:
    """State of a decoder's training at a step. `about` names what made it: a file made otherwise is not gone on from."""

    about: dict[str, Any]
    step: int
    decoder: BlockDecoder
    average: Any  # diffusers' EMAModel
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Return {"<group>.<parameter or buffer>": tensor} on the host; moments are there after the first step."""
        names = [name for name, _ in self.decoder.named_parameters()]
        found = {f"weights.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        found |= {f"average.{name}": tensor for name, tensor in zip(names, self.average.shadow_params, strict=True)}
        for name, parameter in self.decoder.named_parameters():
            moments = self.optimizer.state[parameter]
            found |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq") if moments}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take over what `tensors` gave at `step`."""
        self.step = self.average.optimization_step = step
        self.decoder.load_state_dict({name: tensors[f"weights.{name}"] for name in self.decoder.state_dict()})
        for (name, parameter), shadow in zip(self.decoder.named_parameters(), self.average.shadow_params, strict=True):
            shadow.copy_(tensors[f"average.{name}"])
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device)} | moments


def train_decoder(subject: Subject, split: Split, folder: Path, settings: DecoderSettings) -> Path:
    """Train a decoder on the images of `split`, or go on with the one in `folder`; return its file.

    Raises:
        UserError: the checkpoint holds no predictor, or `folder` holds a decoder that was made otherwise.
    """
    predict, file = block_predictor(subject), folder / DECODER_FILE
    about = asdict(settings) | {"data": split.data, "images": len(split.rows), "networks": predict.fingerprint(),
                                "channels": subject.config.data.channels, "size": list(drawn_size(subject.size)),
                                "dim": subject.config.encoder_shape[0]}  # fmt: skip
    state = initial_state(about, subject.device)
    if file.is_file():
        resume_decoder(file, state)
    else:
        state.decoder.mean, state.decoder.std = measure_conditions(predict, split, settings.seed)
    loss = None
    for images, condition in block_conditions(predict, split, settings, state.step, "decoder"):
        value = decoder_step(state, settings, images, condition)
        loss = value if loss is None else 0.98 * loss + 0.02 * value
        if state.step % SAVE_EVERY == 0 or state.step == settings.steps:
            save_decoder(file, state)
            console.print(f"step {state.step} of {settings.steps}  loss {float(loss):.4f}", highlight=False)
    return file


def initial_state(about: dict[str, Any], device: torch.device) -> DecoderState:
    """Return the state at step 0; its weights are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(about["seed"])
        decoder = BlockDecoder(about["dim"], about["channels"], tuple(about["size"])).to(device)
    average = import_diffusers().training_utils.EMAModel(decoder.parameters(), decay=AVERAGE_DECAY)
    return DecoderState(
        about, 0, decoder, average, torch.optim.AdamW(decoder.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    )


def drawn_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of the drawn images: the run's, the longer side at most DECODER_SIDE, both sides multiples of 4."""
    scale = min(1.0, DECODER_SIDE / max(size))
    return tuple(max(4, round(side * scale / 4) * 4) for side in size)


def measure_conditions(predict: BlockPredictor, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """Return the (D,) mean and deviation of the conditions of MEASURED_IMAGES images, on the subject's device."""
    few = DecoderSettings(steps=1, batch=min(MEASURED_IMAGES, len(split.rows)), seed=seed)
    [(_, condition)] = block_conditions(predict, split, few, 0, "conditions")
    return mean_and_deviation(condition)


def mean_and_deviation(condition: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (D,) mean and standard deviation of (n, D) conditions.

    A deviation is at least a thousandth of the largest, so that numbers that hardly vary are not blown up when divided by it.
    """
    std, mean = torch.std_mean(condition, dim=0, correction=0)
    return mean, std.clamp_min(1e-3 * float(std.max()) + 1e-12)


def block_conditions(
    predict: BlockPredictor, split: Split, settings: DecoderSettings, start: int, about: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (b, C, H, W) uint8 and conditions (b, D) of the steps from `start` on, each under masks of its own."""
    batch = settings.batch
    epochs = -(-settings.steps * batch // len(split.rows))
    order = np.concatenate([generator(settings.seed, ORDER_STREAM, epoch).permutation(split.rows) for epoch in range(epochs)])
    order = order[start * batch : settings.steps * batch]  # all epochs in one row: step s has images s * batch and on
    if not len(order):
        return
    stream = EvalImages(split.source, predict.subject.size, predict.subject.pixels, order)
    for number, images in enumerate(stream.batches(batch, about=about), start):
        context, block = draw_query_masks(predict.subject, len(images), settings.seed, number)
        yield images, predict(images, context[:, 0], block[:, 0]).to(predict.subject.device)


def decoder_step(state: DecoderState, settings: DecoderSettings, images: Tensor, condition: Tensor) -> Tensor:
    """Take one optimizer step, and return the loss, a mean over images and pixels."""
    decoder, device = state.decoder, condition.device
    random = generator(settings.seed, SPLIT_STREAM, NOISE_STREAM + state.step)
    truth = reduced_images(images, decoder.size).to(device) * 2 - 1  # (b, C, H, W) in [-1, 1]
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
    """Return the rate of a step: linear to `lr` over the first WARMUP_STEPS of the steps, then half a cosine to zero."""
    warmup = max(1, round(WARMUP_STEPS * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return cosine_between(settings.lr, 0.0, (step - warmup) / max(1, settings.steps - warmup))


def diffusion_schedule(name: str):
    """Return one of diffusers' schedulers, with the noise levels and the target of this decoder."""
    return getattr(import_diffusers(), name)(DIFFUSION_TIMES, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def decoder_autocast(device: torch.device) -> torch.autocast:
    """Compute in bf16 where the device has instructions for it."""
    return autocast_of(torch.bfloat16 if has_bf16(device) else torch.float32, device)


def reduced_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Reduce images (b, C, H, W) uint8 to (b, C, *size) fp32 in [0, 1]."""
    images = images.float() / 255
    return images if images.shape[2:] == size else F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)


def save_decoder(file: Path, state: DecoderState) -> None:
    """Write the state into one file. Its metadata has one entry, as safetensors writes several in any order."""
    write_atomic(file, save(state.tensors(), {"decoder": json.dumps({"about": state.about, "step": state.step})}))


def resume_decoder(file: Path, state: DecoderState) -> None:
    """Make `state` what `file` holds; UserError where it was made otherwise."""
    about, step, tensors = read_decoder(file)
    if other := [key for key in state.about if about.get(key) != state.about[key]]:
        key = other[0]
        values = "" if key == "networks" else f": {about.get(key)}, not {state.about[key]}"
        raise UserError(f"{file}: a decoder of other {key}{values}; give another --output, or remove it")
    state.restore(tensors, step)
    console.print(f"going on after step {step} of {file}", highlight=False)


def read_decoder(file: Path) -> tuple[dict[str, Any], int, dict[str, Tensor]]:
    """Return (about, step, tensors) of a file; UserError where it is no decoder."""
    try:
        with safe_open(file, "pt") as stored:
            header, names = json.loads((stored.metadata() or {})["decoder"]), list(stored.keys())
            return header["about"], header["step"], {name: stored.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise UserError(f"{file.parent}: holds no decoder; `fastjepa decoder` trains one") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{file}: is not a decoder, or is damaged ({error}); remove it and train one") from error


def decoder_folder(subject: Subject) -> Path:
    """Return where a decoder lies unless told otherwise: in the run directory, or here for weights that lie in none."""
    return (subject.home or Path()) / "decoder"


def load_decoder(folder: Path, predict: BlockPredictor) -> tuple[BlockDecoder, int]:
    """Return the decoder with averaged weights, and the step they are of; UserError where it is not of these networks."""
    about, step, tensors = read_decoder(folder / DECODER_FILE)
    if about["networks"] != predict.fingerprint():
        raise UserError(f"{folder}: its decoder is of other networks than {predict.subject.path}; train one of these")
    if step < about["steps"]:
        console.print(f"{folder}: its decoder is at step {step} of {about['steps']}", highlight=False)
    decoder = BlockDecoder(about["dim"], about["channels"], tuple(about["size"]))
    averaged = {name: tensors[f"average.{name}"] for name, _ in decoder.named_parameters()}
    decoder.load_state_dict({name: tensors[f"weights.{name}"] for name, _ in decoder.named_buffers()} | averaged)
    return decoder.to(predict.subject.device).eval().requires_grad_(False), step
