"""Colours are scikit-learn's components, outlines lie within their blocks, and every cell of a sheet is where it should be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA

from fastjepa.errors import UserError
from fastjepa.visualize.images import (
    HIDDEN_COLOUR,
    OUTLINE_COLOUR,
    captioned,
    hidden_patches,
    masks_sheet,
    outlined_block,
    picture_sheet,
    save_picture,
    zoomed,
)
from fastjepa.visualize.pca import pca_picture, principal_components, to_uint8

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def flat(height: int, width: int, colour=RED) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def features(b: int = 3, n: int = 24, dim: int = 8, seed: int = 0) -> torch.Tensor:
    spread = torch.arange(dim, 0, -1.0) ** 2  # axes of clearly different variance
    return torch.randn(b, n, dim, generator=torch.Generator().manual_seed(seed)) * spread


@given(st.integers(4, 60), st.integers(3, 12), st.integers(0, 5))
def test_components_are_those_of_scikit_learn_up_to_sign(n: int, dim: int, seed: int):
    x = features(1, n, dim, seed)[0]
    ours, theirs = principal_components(x).numpy(), PCA(3, svd_solver="full").fit_transform(x.double().numpy())
    signs = np.sign((ours * theirs).sum(axis=0))
    np.testing.assert_allclose(ours * signs, theirs, atol=1e-6 * np.abs(theirs).max())


def test_signs_do_not_depend_on_the_order_of_the_patches():
    x = features()[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(principal_components(x[order]), principal_components(x)[order])


def test_the_largest_entry_of_an_axis_is_positive():
    x = torch.tensor([[0.0, 0, 0], [0, -1, 0], [0, -9, 1], [1, -4, 0]])
    first = principal_components(x)[:, 0]
    assert first.argmin() == 2 and torch.equal(principal_components(x), principal_components(x.clone()))


def test_fewer_axes_than_colours_and_features_that_do_not_vary_are_mid_grey():
    assert torch.equal(principal_components(torch.randn(5, 2))[:, 2], torch.zeros(5, dtype=torch.float64))
    assert np.all(pca_picture(torch.ones(2, 4, 6), (2, 2), (8, 8)) == 128)


def test_colours_are_of_all_images_together_and_patches_are_squares():
    x = features(b=2, n=6)
    x[1] += 100  # the images differ far more than their patches: the first colour must tell them apart
    drawn = pca_picture(x, (2, 3), (8, 12))
    assert drawn.shape == (2, 8, 12, 3) and drawn.dtype == np.uint8
    assert abs(int(drawn[0, ..., 0].max()) - int(drawn[1, ..., 0].min())) > 100
    squares = drawn.reshape(2, 2, 4, 3, 4, 3)
    assert np.all(squares == squares[:, :, :1, :, :1])
    stretched = drawn.reshape(-1, 3)
    assert np.all(stretched.min(axis=0) == 0) and np.all(stretched.max(axis=0) == 255)


def test_one_wild_patch_does_not_flatten_the_colours_of_the_others():
    x = features(b=4, n=100)
    calm = pca_picture(x, (10, 10), (10, 10))[..., 0].std()
    x[0, 0] = 1000 * torch.eye(8)[0]
    assert pca_picture(x, (10, 10), (10, 10))[..., 0].std() > calm / 2


def test_masked_patches_are_grey_and_have_no_say():
    x, mask = features(), torch.rand(3, 24, generator=torch.Generator().manual_seed(2)) < 0.6
    drawn = pca_picture(x, (4, 6), (4, 6), mask)
    wild = torch.where(mask[..., None], x, 1e6 * torch.randn_like(x))
    assert np.array_equal(drawn, pca_picture(wild, (4, 6), (4, 6), mask))
    assert np.all(drawn.reshape(3, 24, 3)[~mask.numpy()] == HIDDEN_COLOUR)
    assert np.all(pca_picture(x, (4, 6), (4, 6), torch.zeros_like(mask)) == HIDDEN_COLOUR)


def test_features_of_another_grid_are_refused():
    with pytest.raises(UserError, match="24 patches do not fill a grid of 5x5"):
        pca_picture(features(), (5, 5), (10, 10))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_of_floats_comes_back(channels: int):
    pixels = torch.arange(2 * channels * 20 * 3).reshape(2, channels, 20, 3).to(torch.uint8)
    expected = pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    assert np.array_equal(to_uint8(pixels / 255), expected)
    assert np.array_equal(to_uint8(pixels), expected)
    assert to_uint8(torch.full((1, 1, 1, 1), 9.0)).max() == 255  # clipped, not wrapped


def test_zoom_is_a_whole_number_of_times():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert zoomed(image, 20).shape == (12, 18, 3) and np.array_equal(zoomed(image, 20)[::3, ::3], image)
    assert np.array_equal(zoomed(image, 3), image)


@given(st.integers(0, 2), st.integers(0, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3))
def test_an_outline_lies_within_its_block_and_goes_all_around(top: int, left: int, height: int, width: int, line: int):
    block = np.zeros((4, 5), bool)
    block[top : top + height, left : left + width] = True
    drawn = outlined_block(flat(40, 50, BLUE), block, line)
    marked = (drawn == OUTLINE_COLOUR).all(axis=2)
    inside = block.repeat(10, axis=0).repeat(10, axis=1)
    inner = np.zeros_like(inside)
    inner[10 * top + line : 10 * (top + height) - line, 10 * left + line : 10 * (left + width) - line] = True
    assert np.array_equal(marked, inside & ~inner)


def test_what_is_hidden_is_grey():
    shown = np.array([[True, False], [False, True]])
    drawn = hidden_patches(flat(4, 4), shown)
    assert np.array_equal((drawn == RED).all(axis=2), shown.repeat(2, axis=0).repeat(2, axis=1))
    assert np.all(drawn[0, 3] == HIDDEN_COLOUR)


def test_a_sheet_of_masks_shows_visible_patches_and_greys_the_rest():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 100, (3, 48, 64, 3), np.uint8)  # darker than grey
    context, target = draw.random((3, 2, 192)) < 0.5, draw.random((3, 4, 192)) < 0.5
    sheet = masks_sheet(images, context, target, grid=(12, 16))
    assert sheet.dtype == np.uint8 and sheet.shape[1] >= 7 * 64 + 6 * 4
    top, gap = sheet.shape[0] - (3 * 48 + 2 * 4), 4  # below the headings
    lefts = np.flatnonzero(np.diff(np.pad((sheet[top:] != 255).any(axis=(0, 2)).astype(int), 1)) == 1)
    shown = np.concatenate([np.ones((3, 1, 192), bool), context, target], axis=1).reshape(3, 7, 12, 16)
    assert top > 0 and len(lefts) == 7
    for i in range(3):
        for column, left in enumerate(lefts):
            tile = sheet[top + i * (48 + gap) :, left:][:48, :64]
            visible = np.kron(shown[i, column], np.ones((4, 4))).astype(bool)
            assert np.array_equal(tile[visible], images[i][visible]) and (tile[~visible] == HIDDEN_COLOUR).all()
    with pytest.raises(UserError, match="192 patches do not fill a grid of 6x8"):
        masks_sheet(images, context, target, grid=(6, 8))


def test_a_sheet_puts_each_image_at_its_cell():
    drawn = picture_sheet([[flat(10, 20), flat(8, 5, BLUE)], [flat(6, 4, BLUE)]], gap=3)
    assert drawn.shape == (10 + 3 + 6, 20 + 3 + 5, 3)
    expected = flat(*drawn.shape[:2], WHITE)
    expected[:10, :20], expected[:8, 23:], expected[13:, :4] = RED, BLUE, BLUE
    assert np.array_equal(drawn, expected)


def test_labels_and_headings_are_drawn_beside_the_images_never_on_them():
    rows = [[flat(30, 30), flat(30, 30)], [flat(30, 30), flat(30, 30)]]
    plain, drawn = picture_sheet(rows), picture_sheet(rows, labels=["first", "second one"], headings=["a", "a long heading"])
    red = (drawn == RED).all(axis=2)
    assert red.sum() == 4 * 900 and (plain == RED).all(axis=2).sum() == 4 * 900
    top, left = np.argwhere(red).min(axis=0)
    for number in range(2):  # ink left of each row, and above each column
        start = top + 34 * number
        assert (drawn[start : start + 30, :left] < 100).any()
    assert (drawn[:top, left : left + 30] < 100).any() and (drawn[:top, left + 34 :] < 100).any()
    assert drawn.shape[1] > plain.shape[1] + left  # widened for the long heading: no text is cut
    assert np.all(drawn[:, -1] == 255)


def test_a_label_too_many_is_refused():
    with pytest.raises(ValueError, match="2 labels for 1 rows"):
        picture_sheet([[flat(4, 4)]], labels=["a", "b"])


def test_a_caption_stands_below_and_is_not_cut():
    drawn = captioned(flat(10, 10), "rank 3 of 100")
    assert np.array_equal(drawn[:10, :10], flat(10, 10)) and drawn.shape[1] > 60
    assert (
        (drawn[10:] < 100).any() and np.all(drawn[:10, 10:] == 255) and np.all(drawn[-1] == 255) and np.all(drawn[:, -1] == 255)
    )


def test_a_saved_picture_is_the_array(tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_picture(image, tmp_path / "new" / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), image)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]
