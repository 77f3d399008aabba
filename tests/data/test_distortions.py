"""Colour distortion and blur: torchvision's changes, SimCLR's odds, and the same bits for a sample wherever it is shown."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageFilter
from scipy.stats import chisquare, ks_1samp, ks_2samp, uniform
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomGrayscale
from torchvision.transforms.v2 import functional as F

from fastjepa.config.load import config_from_dict
from fastjepa.data import distortions
from fastjepa.data.distortions import (
    DISTORTION_BLOCKS,
    JITTER_ORDERS,
    ORDER,
    WEIGHTS,
    Distortions,
    blur_weights,
    blurred,
    distorted,
)
from fastjepa.data.sources import open_source
from fastjepa.errors import ConfigError
from fastjepa.loader.loader import batch_recipe
from fastjepa.loader.micro_batches import MicroBatches
from fastjepa.rng import DISTORTION_STREAM, generator
from tests.support.batches import load, settings
from tests.support.images import save_image, write_idx_pairs

OFFICIAL = {"use_color_distortion": True, "color_jitter_strength": 1.0, "use_gaussian_blur": True}
THEIRS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
NONE = [-1, 1, 1, 1, 0, 0] + [0.0] * 7  # numbers that distort nothing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """26 images."""
    for i in range(26):
        save_image(tmp_path / "images" / f"{i:02d}.png", seed=i)
    return tmp_path / "images"


def pictures(count: int, size: tuple[int, int] = (40, 48)) -> Tensor:
    """Waves and noise, with black, white, grey and pure colours in each."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    waves = [[128 + 90 * np.sin(x / random.uniform(3, 9) + y / random.uniform(3, 9)) for _ in range(3)] for _ in range(count)]
    images = np.clip(np.array(waves) + random.normal(0, 12, (count, 3, *size)), 0, 255).astype(np.uint8)
    images[:, :, :4, :4], images[:, :, :4, 4:8], images[:, :, :4, 8:12] = 0, 255, 77
    for channel in range(3):
        images[:, :, :4, 12 + 4 * channel : 16 + 4 * channel] = 0
        images[:, channel, :4, 12 + 4 * channel : 16 + 4 * channel] = 200
    return torch.from_numpy(images)


def official_draws(count: int, seed: int = 0, **kinds) -> Tensor:
    """Numbers of so many crops, from any uniforms."""
    kind = Distortions(**{"colour": True, "strength": 1.0, "blur": True} | kinds)
    return torch.tensor([kind.draw(row) for row in np.random.default_rng(seed).random((count, 12)).tolist()])


def sigma_of(numbers: Tensor) -> float:
    """The deviation of a Gaussian by its first two weights: w1 / w0 = exp(-1 / (2 sigma^2))."""
    return float((-0.5 / (numbers[WEIGHTS][1].double() / numbers[WEIGHTS][0].double()).log()).sqrt())


def by_torchvision(image: Tensor, numbers: Tensor) -> Tensor:
    """One image (3, H, W) as torchvision's functions change it by the same numbers, in fp32 on [0, 255]."""
    image = image / 255
    for which in JITTER_ORDERS[int(numbers[ORDER])] if numbers[ORDER] >= 0 else ():
        image = THEIRS[which](image, float(numbers[1 + which]))
    if numbers[5]:
        image = F.rgb_to_grayscale(image, 3)
    if numbers[6] > 0:
        edged = F.pad(image, [6] * 4, padding_mode="edge")
        image = F.gaussian_blur(edged, [13, 13], [sigma_of(numbers)] * 2)[:, 6:-6, 6:-6]
    return image * 255


@pytest.mark.parametrize("which", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_is_torchvisions(which: int):
    images = pictures(4)
    for factor in (0.0, 0.3, 1.0, 1.8) if which < 3 else (-0.5, -0.2, 0.0, 0.1, 0.5):
        ours = distortions.JITTERS[which](images.float(), torch.full((4, 1, 1, 1), factor))
        assert (ours - THEIRS[which](images / 255, factor) * 255).abs().max() < 0.001, factor
        assert (ours - THEIRS[which](images, factor)).abs().max() < 2  # on bytes torchvision cuts what follows the point


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [(40, 48), (5, 1)])
def test_blur_is_a_gaussian_of_that_deviation(size: tuple[int, int], sigma: float):
    """Equal to torchvision's beside an edge that goes on; any number of channels, any size."""
    images = torch.rand(2, 5, *size) * 1000
    ours = blurred(images, torch.tensor(blur_weights(sigma))[None, :, None, None])
    theirs = F.gaussian_blur(F.pad(images, [6] * 4, padding_mode="edge"), [13, 13], [sigma] * 2)[..., 6:-6, 6:-6]
    assert ours.shape == images.shape and (ours - theirs).abs().max() < 0.001


def test_crops_are_torchvisions_by_the_same_numbers():
    drawn = official_draws(120)
    assert {int(row) for row in drawn[:, ORDER]} == {-1, *range(24)}  # every order
    images = pictures(len(drawn))
    ours = distorted(images, drawn)
    theirs = torch.stack([by_torchvision(*pair) for pair in zip(images, drawn, strict=True)])
    assert ours.dtype == torch.uint8 and (ours - theirs).abs().max() < 0.502  # half a level is the rounding
    assert (ours.float() - images).abs().mean() > 10


def test_crops_are_near_those_of_pillow_which_the_official_code_uses():
    """Pillow rounds after each change and blurs by boxes: 1.2 levels on average, measured here."""
    drawn, images = official_draws(120), pictures(120)
    off = (distorted(images, drawn).float() - torch.stack(list(map(by_pillow, images, drawn)))).abs()
    assert off.mean() < 1.5 and off.mean(dim=(1, 2, 3)).max() < 6


def by_pillow(image: Tensor, numbers: Tensor) -> Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    for which in JITTER_ORDERS[int(numbers[ORDER])] if numbers[ORDER] >= 0 else ():
        picture = THEIRS[which](picture, float(numbers[1 + which]))
    if numbers[5]:
        picture = picture.convert("L").convert("RGB")
    if numbers[6] > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(sigma_of(numbers)))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


@pytest.mark.parametrize("strength", [0.4, 2.0])
def test_numbers_are_drawn_as_torchvision_draws_them(tmp_path: Path, strength: float):
    """4,000 samples against as many draws of torchvision's; p above 0.001 in each of 14 tests with fixed seeds."""
    write_idx_pairs(tmp_path)
    keys = OFFICIAL | {"color_jitter_strength": strength}
    dataset = MicroBatches(batch_recipe(settings(tmp_path, **keys)), open_source(tmp_path), 0, 1)
    drawn = dataset._distortion_draws(3, list(range(4000)))
    torch.manual_seed(0)
    jitter = ColorJitter(*(strength * np.array([0.8, 0.8, 0.8, 0.2])).tolist())
    asked = [ColorJitter.get_params(*(getattr(jitter, name) for name in ("brightness", "contrast", "saturation", "hue")))
             for _ in range(4000)]  # fmt: skip
    for which in range(4):
        assert ks_2samp(drawn[:, 1 + which], [params[1 + which] for params in asked]).pvalue > 0.001
    jittered, grey, blur = drawn[:, ORDER] >= 0, drawn[:, 5] > 0, drawn[:, 6] > 0
    for found, share in ((jittered, 0.8), (grey, RandomGrayscale(0.2).p), (blur, 0.5)):
        assert abs(float(found.float().mean()) - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert chisquare(np.bincount(drawn[jittered][:, ORDER].int(), minlength=24)).pvalue > 0.001
    # A weight at distance 1 rises with sigma: where sigma is below 0.2 it is 0 in fp32, and says nothing.
    sigmas = np.array([sigma_of(row) for row in drawn[blur] if row[7] > 1e-30])
    assert ks_1samp(sigmas[sigmas > 0.2], uniform(0.2, 1.8).cdf).pvalue > 0.001
    assert len(sigmas[sigmas > 0.2]) / blur.sum() == pytest.approx(1.8 / 1.9, abs=0.02)
    together = np.corrcoef(np.stack([jittered, *drawn[:, 1:6].T, blur]))
    assert abs(together - np.eye(7)).max() < 4.5 / 4000**0.5


def test_a_crop_that_nothing_is_drawn_for_stays_as_it_is():
    images = pictures(2)
    assert torch.equal(distorted(images, torch.tensor([NONE] * 2)), images)
    grey_alone = official_draws(50, strength=0.0, blur=False)
    assert (grey_alone[:, ORDER] == -1).all() and 0 < grey_alone[:, 5].sum() < 50 and not grey_alone[:, WEIGHTS].any()


def test_a_crop_has_the_same_bits_in_any_batch_by_any_number_of_threads(monkeypatch):
    """So it has on any ranks, micro-batches and workers; 190 x 190 pixels are more than torch gives to one thread."""
    images, drawn = pictures(4, (190, 190)).float(), official_draws(4, seed=4)  # floats are not rounded at the end
    together = distorted(images, drawn)
    monkeypatch.setattr(distortions, "CACHED_VALUES", 1 << 30)
    assert torch.equal(distorted(images, drawn), together)
    monkeypatch.setattr(distortions, "CACHED_VALUES", 0)
    last_channels = images.contiguous(memory_format=torch.channels_last)  # as DALI's memory lies
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(distorted(last_channels, drawn), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_blur_keeps_the_dtype_and_its_depth(dtype: torch.dtype):
    images = (torch.arange(4 * 9 * 9).reshape(1, 4, 9, 9) % 251 * (1 if dtype == torch.uint8 else 201)).to(dtype)
    drawn = torch.tensor([NONE[:6] + blur_weights(1.5)])
    ours, exact = distorted(images, drawn), blurred(images.float(), drawn[:, WEIGHTS, None, None])
    assert ours.dtype == dtype and (ours.float() - exact).abs().max() <= 0.5
    assert len(ours.unique()) > (100 if dtype == torch.uint8 else 150)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_sample_is_distorted_alike_on_any_ranks_workers_and_after_a_resume(folder: Path, loader: str):
    keys = OFFICIAL | {"loader": loader, "use_horizontal_flip": True}
    whole = load(settings(folder, batch_size=8, **keys), range(6))
    helped = load(settings(folder, batch_size=8, **keys | {"num_workers": 1}), range(4, 6), stop=6)
    ranks = [load(settings(folder, batch_size=4, micro_batch=2, **keys), range(6), rank, world=2) for rank in (0, 1)]
    for step in range(6):
        parts = [batch.images for rank in ranks for batch in rank[step]]
        assert torch.equal(torch.cat(parts), whole[step][0].images)
    assert all(torch.equal(a[0].images, b[0].images) for a, b in zip(helped, whole[4:], strict=True))


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_distortions_follow_crop_and_flip_which_stay_where_they_were(folder: Path, loader: str):
    plain, shown = (
        load(settings(folder, loader=loader, use_horizontal_flip=True, **keys), range(12)) for keys in ({}, OFFICIAL)
    )
    order = MicroBatches(batch_recipe(settings(folder)), open_source(folder), 0, 1)
    for step in range(12):
        starts = [generator(5, DISTORTION_STREAM, step // 6, int(i) * DISTORTION_BLOCKS) for i in order.samples(step, 0, 4)]
        drawn = torch.tensor([Distortions(True, 1.0, True).draw(start.random(12).tolist()) for start in starts])
        assert torch.equal(shown[step][0].images, distorted(plain[step][0].images, drawn))


def test_both_loaders_show_the_same_distorted_pictures(tmp_path: Path):
    for i, picture in enumerate(pictures(8, (90, 121))):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    ours, theirs = (load(settings(tmp_path, loader=loader, **OFFICIAL), range(8)) for loader in ("torch", "dali"))
    off = torch.cat([(a[0].images.float() - b[0].images).abs() for a, b in zip(ours, theirs, strict=True)])
    assert off.mean() < 0.5 and (off > 8).float().mean() < 0.001


def test_a_substitute_is_distorted_by_the_numbers_of_the_bad_sample(folder: Path):
    keys = OFFICIAL | {"batch_size": 13}
    good = load(settings(folder, **keys), range(4))
    source, setting = open_source(folder), settings(folder, **keys)
    Path(source.name(9)).write_bytes(b"no image")
    spoilt, plain = load(setting, range(4)), load(settings(folder, batch_size=13), range(4))
    dataset = MicroBatches(batch_recipe(setting), source, 0, 1)
    for step in range(4):
        samples = dataset.samples(step, 0, 13).tolist()
        mine = torch.tensor([sample == 9 for sample in samples])
        assert torch.equal(spoilt[step][0].images[~mine], good[step][0].images[~mine])
        expected = distorted(plain[step][0].images, dataset._distortion_draws(step // 2, samples))
        assert torch.equal(spoilt[step][0].images, expected)


@pytest.mark.parametrize(
    "data, words",
    [
        ({"use_color_distortion": True, "channels": 1}, ["use_color_distortion", "RGB in 8 bits, not of 1 channels of uint8"]),
        ({"color_jitter_strength": 0.5}, ["color_jitter_strength", "data.use_color_distortion alone"]),
        ({"use_color_distortion": True, "color_jitter_strength": 2.6}, ["color_jitter_strength", "in [0, 2.5]"]),
        ({"use_color_distortion": True, "color_jitter_strength": -1}, ["color_jitter_strength", "in [0, 2.5]"]),
    ],
)
def test_what_cannot_act_is_refused(data: dict, words: list[str]):
    with pytest.raises(ConfigError) as refused:
        config_from_dict({"data": data})
    assert all(word in str(refused.value) for word in words)


def test_grey_images_can_be_blurred(tmp_path: Path):
    write_idx_pairs(tmp_path)
    plain, shown = (load(settings(tmp_path, channels=1, use_gaussian_blur=blur), range(2)) for blur in (False, True))
    changed = [
        not torch.equal(*pair) for a, b in zip(plain, shown, strict=True) for pair in zip(a[0].images, b[0].images, strict=True)
    ]
    assert 0 < sum(changed) < 8


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_bands_of_any_depth_can_be_blurred(tmp_path: Path, dtype: str):
    """Normalised floats too: a blur of what is normalised is what is blurred, normalised."""
    for i in range(8):
        bands = np.random.default_rng(i).integers(0, 5000, (5, 40, 36)).astype(dtype)
        tifffile.imwrite(tmp_path / f"{i}.tif", bands, photometric="minisblack", planarconfig="separate")
    keys = {"channels": 5, "dtype": dtype, "scale": 1, "mean": [2500] * 5, "std": [1400] * 5}
    plain, shown = (load(settings(tmp_path, use_gaussian_blur=blur, **keys), range(2)) for blur in (False, True))
    order = MicroBatches(batch_recipe(settings(tmp_path, use_gaussian_blur=True, **keys)), open_source(tmp_path), 0, 1)
    for step in range(2):
        drawn = order._distortion_draws(0, order.samples(step, 0, 4).tolist())
        ours, before = shown[step][0].images, plain[step][0].images
        assert str(ours.dtype) == f"torch.{dtype}" and torch.equal(ours, distorted(before, drawn))
        assert torch.equal((ours.float() != before.float()).flatten(1).any(1), drawn[:, 6] > 0)
