"""K-means features against loops over patches, and what k-means finds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastjepa.data.pixels import Pixels
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from fastjepa.evals import kmeans
from fastjepa.evals.images import EvalImages
from fastjepa.evals.kmeans import kmeans_features, learned_kernel, pooled_responses, sampled_patches, spherical_kmeans
from tests.support.images import save_image


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> EvalImages:
    """12 colour images of two classes, 16 x 12 pixels."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(12):
        save_image(folder / "train" / "ab"[i % 2] / f"{i}.png", size=(16, 12), seed=i)
    return EvalImages(open_source(str(folder), "train"), (16, 12), Pixels(3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("parts", [1, 2])
def test_features_are_those_of_a_loop_over_patches(images, parts: int):
    train, test = kmeans_features(images, images, seed=3, parts=parts)
    assert torch.equal(train.x, test.x) and torch.equal(train.y, images.labels())
    kernel, offset = learned_kernel(sampled_patches(images, generator := seeded(3)), generator)
    image = F.pad(images[5].float()[None] / 255, (2, 2, 2, 2), mode="reflect")[0]
    found = np.zeros((128, 8, 6))
    for row in range(8):
        for column in range(6):
            patch = image[:, 2 * row : 2 * row + 6, 2 * column : 2 * column + 6].flatten()
            patch = (patch - patch.mean()) / (patch.var(correction=0) + 10 / 255**2).sqrt()
            response = kernel @ patch - offset
            found[:, row, column] = torch.cat((response - 0.5, -response - 0.5)).clamp(min=0)
    halves = [(slice(0, 4), slice(4, 8)), (slice(0, 3), slice(3, 6))]
    pooled = [found[:, rows, columns].mean(axis=(1, 2)) for rows in halves[0] for columns in halves[1]]
    expected = found.mean(axis=(1, 2)) if parts == 1 else np.stack(pooled, axis=1).reshape(-1)
    np.testing.assert_allclose(train.x[5], expected, atol=1e-5)


def test_the_kernel_is_whitening_and_centroids_in_one():
    patches = torch.randn(400, 12, generator=seeded()) @ torch.randn(12, 12, generator=seeded(1)) + 3
    kernel, offset = learned_kernel(patches, generator := seeded(2))
    generator.manual_seed(2)
    centred = patches - patches.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T.numpy()))
    white = torch.tensor(centred.numpy() @ (vectors / np.sqrt(values + 0.1)) @ vectors.T, dtype=torch.float32)
    expected = white @ spherical_kmeans(white, generator).T
    torch.testing.assert_close(patches @ kernel.T - offset, expected, atol=1e-3, rtol=1e-3)


def test_spherical_kmeans_finds_directions_of_either_sign(monkeypatch):
    monkeypatch.setattr(kmeans, "CENTROIDS", 3)
    axes = torch.eye(3)[torch.arange(600) % 3] * torch.where(torch.rand(600, 1, generator=seeded()) < 0.5, -1, 1)
    found = spherical_kmeans(axes + 0.05 * torch.randn(600, 3, generator=seeded(1)), seeded(4))
    assert sorted(found.abs().argmax(dim=1).tolist()) == [0, 1, 2]
    assert (found.abs().amax(dim=1) > 0.99).all()


def test_features_are_a_function_of_the_seed(images):
    one, again, other = (kmeans_features(images, images, seed)[0].x for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_flat_image_has_no_responses():
    kernel, offset = torch.randn(64, 108, generator=seeded()), torch.zeros(64)
    assert not pooled_responses(torch.full((1, 3, 16, 16), 0.3), kernel, offset, 1).any()


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    for i in range(3):
        save_image(tmp_path / "train" / "a" / f"{i}.png", size=(16, 12), seed=i)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    broken = EvalImages(open_source(str(tmp_path), "train"), (16, 12), Pixels(3))
    with pytest.raises((UserError, OSError), match=r"1.png: cannot be evaluated"):
        kmeans_features(broken, broken, 0)
