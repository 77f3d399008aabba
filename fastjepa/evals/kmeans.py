"""Features without a network: responses to k-means centroids of whitened patches (Coates, Ng and Lee, AISTATS 2011).

They take seconds, and on small images they are what a pretrained network has to beat.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.data.pixels import Pixels, normalise_pixels
from fastjepa.errors import UserError
from fastjepa.evals.images import EvalImages
from fastjepa.evals.scoring import Features

PATCH, STRIDE = 6, 2  # pixels
SAMPLED_PATCHES, CENTROIDS, ROUNDS = 20_000, 64, 15
CONTRAST_FLOOR, WHITENING_FLOOR = 10 / 255**2, 0.1  # added to the variance of a patch, and to the eigenvalues
THRESHOLD = 0.5  # responses below it count as 0
BATCH = 500  # images
ARRAY_STD = 0.25  # deviation that arrays are brought to, about that of pictures on [0, 1]: the floor means the same for both


def kmeans_features(train: EvalImages, test: EvalImages, seed: int, parts: int = 1) -> tuple[Features, Features]:
    """Return (train, test) features (n, 2 * CENTROIDS * parts**2), centroids learned on patches of the training images.

    Args:
        parts: 1 averages the responses over the whole image, 2 over each of its quadrants.
    """
    if min(train.size) < PATCH:
        size = "x".join(map(str, train.size))
        raise UserError(f"k-means learns patches of {PATCH} pixels a side, and these images are of {size}; leave it out")
    generator = torch.Generator().manual_seed(seed)
    kernel, offset = learned_kernel(sampled_patches(train, generator), generator)
    features = [
        torch.cat(
            [
                pooled_responses(comparable(block, images.pixels), kernel, offset, parts)
                for block in images.batches(BATCH, about="k-means")
            ]
        )  # fmt: skip
        for images in (train, test)
    ]
    return Features(features[0], train.labels()), Features(features[1], test.labels())


def sampled_patches(images: EvalImages, generator: torch.Generator) -> Tensor:
    """Return SAMPLED_PATCHES patches (m, C * PATCH**2) at random places of random images, each of equal contrast."""
    chosen, counts = torch.randint(len(images), (SAMPLED_PATCHES,), generator=generator).unique(return_counts=True)
    shown = EvalImages(images.source, images.size, images.pixels, images.rows[chosen.numpy()])
    seen = (image for block in shown.batches(BATCH, about="patches") for image in comparable(block, images.pixels))
    height, width = images.size
    patches = []
    for image, count in zip(seen, counts.tolist(), strict=True):
        places = torch.rand(count, 2, generator=generator) * torch.tensor([height - PATCH + 1, width - PATCH + 1])
        patches += [image[:, top : top + PATCH, left : left + PATCH] for top, left in places.int().tolist()]
    return equal_contrast(torch.stack(patches).flatten(1).T).T


def comparable(images: Tensor, pixels: Pixels) -> Tensor:
    """Return images (b, C, H, W) fp32 on one scale: pictures on [0, 1], each channel of arrays with deviation ARRAY_STD."""
    return images.float() / 255 if pixels.are_pictures else normalise_pixels(images, pixels.mean_std) * ARRAY_STD


def equal_contrast(patches: Tensor) -> Tensor:
    """Return patches (..., values, L) with mean 0 and, but for flat ones, variance 1."""
    variance, mean = torch.var_mean(patches, dim=-2, correction=0, keepdim=True)
    return (patches - mean) / (variance + CONTRAST_FLOOR).sqrt()


def learned_kernel(patches: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the centroids as a kernel (CENTROIDS, values) on patches that are not whitened, and its offset (CENTROIDS,).

    A whitened patch is (patch - mean) @ W, and its response to centroid c is (patch - mean) @ W @ c: kernel W @ c.
    """
    mean = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh((patches - mean).T.cov())
    whitening = vectors @ torch.diag((values + WHITENING_FLOOR).rsqrt()) @ vectors.T  # symmetric: ZCA
    kernel = spherical_kmeans((patches - mean) @ whitening, generator) @ whitening
    return kernel, kernel @ mean


def spherical_kmeans(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return CENTROIDS unit vectors (CENTROIDS, d) for rows (m, d).

    A row counts for the centroid of largest absolute response, with the response's sign; a centroid without rows stays.
    """
    centroids = F.normalize(torch.randn(CENTROIDS, x.shape[1], generator=generator))
    for _ in range(ROUNDS):
        responses = x @ centroids.T  # (m, CENTROIDS)
        best = responses.abs().argmax(dim=1)
        signs = responses.gather(1, best[:, None]).sign()
        centroids = F.normalize(centroids + torch.zeros_like(centroids).index_add(0, best, signs * x))
    return centroids


def pooled_responses(images: Tensor, kernel: Tensor, offset: Tensor, parts: int) -> Tensor:
    """Return features of images (b, C, H, W): responses of both signs above THRESHOLD, averaged over parts**2 parts.

    Images are fp32, as `comparable` makes them.
    """
    border = (PATCH - STRIDE) // 2
    padded = F.pad(images, (border,) * 4, mode="reflect")
    rows = (padded.shape[2] - PATCH) // STRIDE + 1
    responses = (kernel @ equal_contrast(F.unfold(padded, PATCH, stride=STRIDE)) - offset[:, None]).unflatten(2, (rows, -1))
    both = torch.cat((F.relu(responses - THRESHOLD), F.relu(-responses - THRESHOLD)), dim=1)
    return F.adaptive_avg_pool2d(both, parts).flatten(1)
