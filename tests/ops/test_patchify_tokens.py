"""patchify_tokens against its definition, an unfold in float64, and the convolution it stands for."""

import pytest
import torch
from checks import DTYPES, compiles_whole, equal, some_rows
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from fastjepa_kernels import patchify_tokens, patchify_tokens_ref
from fastjepa_kernels.patchify_tokens import _alignment

LAYOUTS = ["NCHW", "NHWC"]
WHOLE = [torch.uint8, torch.uint16]


def some_images(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "NCHW") -> Tensor:
    """Make (B, C, H, W) images; NHWC ones are a permuted view."""
    if dtype.is_floating_point:
        images = torch.randn(shape, device=device).to(dtype)
    else:
        images = torch.randint(torch.iinfo(dtype).max + 1, shape, device=device, dtype=torch.int32).to(dtype)
    return images if layout == "NCHW" else images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def statistics(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor([0.485, 0.456, 0.406], device=device), torch.tensor([0.229, 0.224, 0.225], device=device)
    return mean.repeat(-(-channels // 3))[:channels], std.repeat(-(-channels // 3))[:channels]


def unfolded(
    images: Tensor, idx: Tensor | None, mean: Tensor | None, std: Tensor | None, patch_size: int, unit: float | None = None
) -> Tensor:
    """Make the rows in float64, by another way."""
    x = images.double() / (unit or (1 if images.is_floating_point() else torch.iinfo(images.dtype).max))
    if mean is not None:
        x = (x - mean.double()[:, None, None]) / std.double()[:, None, None]
    rows = F.unfold(x, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
    return rows if idx is None else rows[idx.long()]


def right(
    images: Tensor, idx: Tensor | None, mean: Tensor | None, std: Tensor | None, patch_size: int, dtype, unit=None
) -> None:
    """The house's tolerance against float64: at most twice the definition's error, or two units in the last place."""
    given = (images, idx, mean, std, patch_size)
    ours, plain = (op(*given, dtype, unit) for op in (patchify_tokens, patchify_tokens_ref))
    truth = unfolded(*given, unit)
    assert ours.dtype == plain.dtype == dtype and ours.shape == plain.shape == truth.shape
    floor = 2 * torch.finfo(dtype).eps * truth.abs().max()
    own = (plain.double() - truth).abs().max()
    assert own <= floor
    assert (ours.double() - truth).abs().max() <= 2 * own + floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*WHOLE, *DTYPES])
@pytest.mark.parametrize("patch_size", [16, 14])
def test_takes_and_normalises_the_visible_patches(patch_size, kind, layout, dtype, device):
    images = some_images((3, 3, 2 * patch_size, 3 * patch_size), kind, device, layout)
    idx = some_rows(18, 7, device)
    right(images, idx, *statistics(3, device), patch_size, dtype)
    right(images, None, *statistics(3, device), patch_size, dtype)
    right(images, idx, None, None, patch_size, dtype)


@pytest.mark.parametrize("kind", [*WHOLE, torch.float32])
def test_the_caller_may_say_which_value_counts_as_1(kind, device):
    """Twelve bands, as of Sentinel-2, whose reflectance 1 is 10000."""
    images, idx = some_images((2, 12, 12, 8), kind, device), some_rows(12, 5, device)
    for unit in (10000, 4095.5):
        right(images, idx, *statistics(12, device), 4, torch.float32, unit)
        right(images, idx, None, None, 4, torch.float32, unit)
    given = (images, idx, *statistics(12, device), 4)
    own = {torch.uint8: 255, torch.uint16: 65535}.get(kind, 1)
    assert torch.equal(patchify_tokens(*given), patchify_tokens(*given, unit=own))
    assert not torch.equal(patchify_tokens(*given), patchify_tokens(*given, unit=2 * own))


# (images, channels, height, width, patch): one channel, many, patches wider than a tile, one patch, single pixels
ODD = [
    (2, 1, 15, 10, 5),
    (1, 13, 8, 12, 4),
    (5, 4, 6, 4, 2),
    (1, 130, 32, 64, 32),
    (1, 3, 80, 160, 80),
    (2, 3, 16, 16, 16),
    (1, 2, 3, 7, 1),
    (1, 5000, 2, 2, 1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ODD)
def test_takes_any_shape(shape, layout, device):
    *shape, patch_size = shape
    images = some_images(tuple(shape), torch.uint8, device, layout)
    patches = shape[0] * shape[2] * shape[3] // patch_size**2
    right(images, some_rows(patches, max(1, patches - 1), device), *statistics(shape[1], device), patch_size, torch.float32)
    right(images, None, None, None, patch_size, torch.float32)


@pytest.mark.parametrize("kind", [*WHOLE, torch.float32])
def test_is_the_convolution_at_those_patches(kind, device):
    images = some_images((2, 3, 32, 48), kind, device, "NHWC")
    conv = torch.nn.Conv2d(3, 20, 16, stride=16, device=device)
    mean, std = statistics(3, device)
    unit = 1 if kind == torch.float32 else torch.iinfo(kind).max
    every = conv((images / unit - mean[:, None, None]) / std[:, None, None]).flatten(2).transpose(1, 2).flatten(0, 1)
    idx = some_rows(12, 5, device)
    rows = patchify_tokens(images, idx, mean, std, 16)
    torch.testing.assert_close(rows @ conv.weight.flatten(1).T + conv.bias, every[idx.long()], rtol=1e-4, atol=1e-5)


def test_all_patches_are_in_raster_order(device):
    """Image by image, row by row; a patch may also be asked for twice, in any order."""
    images = some_images((2, 3, 8, 12), torch.uint8, device)
    every = patchify_tokens(images, None, *statistics(3, device), 4)
    idx = torch.tensor([11, 3, 3, 0, 7], dtype=torch.int32, device=device)
    assert torch.equal(patchify_tokens(images, torch.arange(12, device=device).int(), *statistics(3, device), 4), every)
    assert torch.equal(patchify_tokens(images, idx, *statistics(3, device), 4), every[idx.long()])


def views(kind: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Make (2, 3, 32, 48) images as loaders and augmentations leave them in memory."""
    wide, deep = some_images((2, 3, 41, 63), kind, device), some_images((2, 4, 32, 48), kind, device, "NHWC")
    return {
        "a crop": wide[:, :, 3:35, 5:53],
        "an aligned crop of odd lines": some_images((2, 3, 33, 71), kind, device)[:, :, 1:, 16:64],
        "three of four interleaved channels": deep[:, :3],
        "every other channel": some_images((2, 6, 32, 48), kind, device)[:, ::2],
        "every other pixel": some_images((2, 3, 64, 96), kind, device)[:, :, ::2, ::2],
        "turned": some_images((2, 3, 48, 32), kind, device).transpose(2, 3),
        "one image expanded": some_images((1, 3, 32, 48), kind, device).expand(2, 3, 32, 48),
        "grey expanded": some_images((2, 1, 32, 48), kind, device).expand(2, 3, 32, 48),
    }


@pytest.mark.parametrize("kind", [*WHOLE, torch.float16])
@pytest.mark.parametrize("name", views(torch.uint8, torch.device("cpu")))
def test_reads_images_as_they_lie(name, kind, device):
    images = views(kind, device)[name]
    assert images.shape == (2, 3, 32, 48)
    right(images, some_rows(12, 7, device), *statistics(3, device), 16, torch.float32)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float16])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
def test_promises_no_alignment_that_is_not_there(patch_size, kind):
    """The interpreter ignores the promise, a GPU does not: every line of every patch starts at a multiple of it."""
    cpu = torch.device("cpu")
    for images in [*views(kind, cpu).values(), *(some_images((2, 3, 32, 48), kind, cpu, layout) for layout in LAYOUTS)]:
        promised = _alignment(images, patch_size)
        image, _, line, pixel = images.stride()
        starts = [b * image + h * line + w * pixel for b in (0, 1) for h in range(32) for w in range(0, 48, patch_size)]
        assert all(start % promised == 0 for start in starts)
    assert _alignment(torch.zeros(2, 3, 224, 224, dtype=torch.uint8), 16) == 16
    assert _alignment(torch.zeros(2, 3, 72, 72, dtype=torch.bfloat16), 8) == 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_floats_without_statistics_are_moved_exactly(layout, dtype, device):
    images = some_images((2, 3, 32, 16), dtype, device, layout)
    equal(
        lambda *given: patchify_tokens(*given, dtype=dtype),
        lambda *given: patchify_tokens_ref(*given, dtype=dtype),
        images, some_rows(4, 3, device),
    )  # fmt: skip
    assert torch.equal(patchify_tokens(images, dtype=dtype).double(), unfolded(images, None, None, None, 16))


def test_every_word_becomes_its_65535th(device):
    """0 is 0 and 65535 is 1, exactly, and none is taken for a negative number."""
    images = torch.arange(1 << 16, dtype=torch.int32, device=device).to(torch.uint16).view(1, 1, 256, 256)
    rows = patchify_tokens(images, patch_size=256)
    truth = torch.arange(1 << 16, device=device) / 65535.0
    torch.testing.assert_close(rows[0].double(), truth, rtol=2e-7, atol=0, check_dtype=False)
    assert rows[0, 0] == 0 and rows[0, -1] == 1


def test_every_byte_becomes_its_255th(device):
    """0 is 0 and 255 is 1, exactly."""
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
    rows = patchify_tokens(images)
    torch.testing.assert_close(rows[0].double(), torch.arange(256, device=device) / 255.0, rtol=2e-7, atol=0, check_dtype=False)
    assert rows[0, 0] == 0 and rows[0, 255] == 1


def test_takes_strided_indices_and_statistics(device):
    images = some_images((2, 3, 32, 48), torch.uint8, device)
    mean, std = torch.rand(3, 2, device=device)[:, 1], torch.rand(6, device=device)[::2] + 0.5
    right(images, some_rows(12, 10, device)[::2], mean, std, 16, torch.float32)


@pytest.mark.parametrize("op", [patchify_tokens, patchify_tokens_ref])
def test_nothing_gives_nothing(op, device):
    none = torch.zeros(0, dtype=torch.int32, device=device)
    for kind in (torch.uint8, torch.float32):
        images = some_images((2, 3, 32, 48), kind, device)
        assert op(images, none, *statistics(3, device), 16, torch.bfloat16).shape == (0, 768)
        assert op(images[:0], none, None, None, 16).shape == op(images[:0]).shape == (0, 768)
        assert op(images[:, :0]).shape == (12, 0)
        assert op(images[:, :, :0]).shape == (0, 768)


@pytest.mark.parametrize("op", [patchify_tokens, patchify_tokens_ref])
def test_the_result_is_never_the_images(op, device):
    """One patch an image: here the rows could be the images' own memory."""
    images = some_images((3, 1, 16, 16), torch.float32, device)
    before = images.clone()
    for given in [(None, None), tuple(x[:1] for x in statistics(3, device))]:
        op(images, None, *given).fill_(7)
        op(images, torch.arange(3, device=device).int(), *given).fill_(7)
    assert torch.equal(images, before)


def test_registered_with_torch(device):
    mean, std = statistics(3, device)
    for kind in (torch.uint16, torch.float32):
        images = some_images((2, 3, 8, 12), kind, device, "NHWC")
        idx = some_rows(12, 5, device)
        op = torch.ops.fastjepa_kernels.patchify_tokens_fwd.default
        opcheck(op, (images, idx, mean, std, 4, torch.bfloat16))
        opcheck(op, (images, None, None, None, 4, torch.float32, 100.0))
        compiles_whole(lambda images, idx: patchify_tokens(images, idx, mean, std, 4, torch.bfloat16), images, idx)
        compiles_whole(lambda images: patchify_tokens(images, None, mean, std, 4), images)
        compiles_whole(lambda images: patchify_tokens_ref(images, None, mean, std, 4), images)


IMAGES, MEAN = torch.zeros(2, 3, 32, 48), torch.zeros(3)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"images": torch.zeros(3, 32, 48)}, ValueError, r"images must be \(B, C, H, W\), not \(3, 32, 48\)"),
        ({"images": IMAGES.int()}, TypeError, "images must be uint8, uint16, float32, bfloat16 or float16, not"),
        ({"unit": 0.0}, ValueError, "unit must be finite and greater than 0, not 0.0"),
        ({"images": IMAGES.clone().requires_grad_()}, ValueError, "no gradient; detach them"),
        ({"patch_size": 14}, ValueError, r"multiples of patch_size 14, not \(32, 48\); resize"),
        ({"patch_size": 32}, ValueError, "multiples of patch_size 32"),
        ({"patch_size": 0}, ValueError, "multiples of patch_size 0"),
        ({"mean": MEAN}, ValueError, "std is missing; give mean and std, or neither"),
        ({"std": MEAN}, ValueError, "mean is missing"),
        ({"mean": MEAN, "std": MEAN[:2]}, ValueError, r"std must be float32 \(3,\), not torch.float32 \(2,\)"),
        ({"mean": MEAN.bfloat16(), "std": MEAN}, ValueError, r"mean must be float32 \(3,\), not torch.bfloat16"),
        ({"mean": MEAN.clone().requires_grad_(), "std": MEAN}, ValueError, "images, mean and std have no gradient"),
        ({"mean": MEAN, "std": MEAN.to("meta")}, ValueError, "std is on meta"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float32, bfloat16 or float16, not torch.float64"),
        ({"idx": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, r"idx must be \(T,\), not \(2, 3\); add image \* 6"),
        ({"idx": torch.zeros(2, dtype=torch.int64)}, TypeError, "int32"),
        ({"idx": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "idx is on meta"),
        ({"idx": torch.tensor([0, 12], dtype=torch.int32)}, IndexError, "from 0 to 12, outside the 12 rows"),
        ({"idx": torch.tensor([-1], dtype=torch.int32)}, IndexError, "from -1 to -1"),
        ({"images": torch.zeros(1, 1, 1, 1).expand(2**31, 1, 1, 1), "patch_size": 1}, ValueError, "split the batch"),
    ],
)
def test_says_what_is_wrong(given, error, says):
    with pytest.raises(error, match=says):
        patchify_tokens(**{"images": IMAGES, **given})
