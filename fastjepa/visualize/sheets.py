"""The pictures of a checkpoint and a data set, a labelled sheet each: masks, principal components, nearest blocks, samples."""

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.sources import open_source
from fastjepa.errors import ConfigError
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Split, Subject
from fastjepa.evals.scoring import TEST_DRAW
from fastjepa.rng import SPLIT_STREAM, generator
from fastjepa.visualize.images import captioned, hidden_patches, outlined_block, pca_picture, picture_sheet, to_uint8, zoomed
from fastjepa.visualize.neighbours import BLOCK_BATCH, Found, Queries, draw_query_masks, patch_rows, prepared_networks
from fastjepa.visualize.samples import DrawnSamples
from fastjepa.weights.read import NETWORK_OF, is_foreign_weights, load_encoder, starting_networks

TILE_SIDE = 112  # pixels that a small image is enlarged to at most, in whole times


def open_drawn_split(data: str, name: str, count: int | None, seed: int, step: int = TEST_DRAW) -> Split:
    """At most `count` images of a split in random order: the first few are of many classes. Labels are not asked for."""
    source = open_source(data, name)
    return Split(data, name, source, generator(seed, SPLIT_STREAM, step).permutation(len(source))[:count])


def shown_images(subject: Subject, split: Split, count: int) -> Tensor:
    """(count, C, H, W) uint8: the first of a split; ConfigError when it has fewer."""
    if count > len(split.rows):
        raise ConfigError(f"{split.data}: {count} images were asked for and its {split.name} split has {len(split.rows)}; "
                          f"say --images {len(split.rows)}")  # fmt: skip
    stream = EvalImages(split.source, subject.size, subject.config.data.channels, split.rows[:count])
    return torch.cat(list(stream.batches(count, about="images")))


def masks_sheet(subject: Subject, shown: Tensor, seed: int) -> np.ndarray:
    """A row an image: whole, its contexts, its target blocks."""
    context, target = draw_query_masks(subject, len(shown), seed)
    whole = np.ones_like(context[:, :1])
    rows = [[_tile(hidden_patches(image, mask.reshape(subject.config.grid))) for mask in np.concatenate(masked)]
            for image, *masked in zip(to_uint8(shown), whole, context, target, strict=True)]  # fmt: skip
    names = [_numbered("context", context.shape[1]), _numbered("target", target.shape[1])]
    return picture_sheet(rows, headings=["image", *names[0], *names[1]])


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name} {i + 1}" for i in range(count)]


def encoders_to_show(subject: Subject) -> list[str]:
    """Those that can be shown: what the weights hold, and an untrained one of the same shape."""
    if not is_foreign_weights(subject.path):
        return [*NETWORK_OF, "random"]
    held = starting_networks(subject.path)
    both = all(network in held for network in NETWORK_OF.values())
    return [*(NETWORK_OF if both else ["own"]), "random"]


def pca_sheet(subject: Subject, shown: Tensor) -> np.ndarray:
    """A column an image: the image, then its patches coloured by principal components of each encoder's features."""
    pixels = to_uint8(shown)
    rows, labels = [[_tile(image) for image in pixels]], ["image"]
    for which in encoders_to_show(subject):
        own = load_encoder(subject.path) if which == "own" else subject.encoder(which)
        features = patch_rows(subject, prepared_networks(subject, own), shown)
        coloured = pca_picture(features, subject.config.grid, pixels.shape[1:3])
        rows.append([_tile(image) for image in coloured])
        labels.append(f"{own.which if which == 'own' else which} encoder")
    return picture_sheet(rows, labels=labels)


def neighbours_sheet(subject: Subject, queries: Queries, found: Found, bank: Split, count: int) -> np.ndarray:
    """A row for each of the first `count` queries: image, context, the true block outlined, the nearest blocks outlined.

    Below a neighbour stands its distance, below the true block its own and its rank among random blocks.
    """
    grid, k = subject.config.grid, found.row.shape[1]
    bank_rows = bank.rows[found.row[:count].flatten().numpy()]
    stream = EvalImages(bank.source, subject.size, subject.config.data.channels, bank_rows)
    near = to_uint8(torch.cat(list(stream.batches(BLOCK_BATCH, about="pictures")))).reshape(count, k, *subject.size, 3)
    rows = []
    for i, image in enumerate(to_uint8(queries.images[:count])):
        true = f"{float(queries.true[i]):.2f}, rank {found.rank['anywhere'][i]:g} of {found.candidates + 1}"
        cells = [_tile(image), _tile(hidden_patches(image, queries.context[i].reshape(grid))),
                 _outlined(image, queries.block[i].reshape(grid), true)]  # fmt: skip
        cells += [
            _outlined(near[i, j], found.block[i, j].reshape(grid), f"{float(found.distance[i, j]):.2f}") for j in range(k)
        ]
        rows.append(cells)
    return picture_sheet(rows, gap=6, headings=["image", "context", "true block", *_numbered("nearest", k)])


def samples_sheet(subject: Subject, samples: "DrawnSamples", count: int) -> np.ndarray:
    """A row for each of the first `count` images: truth, context, samples, their mean and deviation, and the baselines' first.

    The block is outlined in all but the context. The deviation is white where half of the samples are black and half are white.
    """
    grid, rows = subject.config.grid, []
    for i in range(count):
        block = samples.block[i].reshape(grid)
        own = samples.drawn["predictor"][i]
        baselines = [samples.drawn[name][i, 0] for name in ("shuffled", "untrained")]
        deviation = 2 * own.std(dim=0, correction=0)
        truth, *shown = to_uint8(torch.stack([samples.truth[i], *own, own.mean(dim=0), deviation, *baselines]))
        context = hidden_patches(truth, samples.context[i].reshape(grid))
        cells = [outlined_block(_tile(image), block) for image in (truth, *shown)]
        rows.append([cells[0], _tile(context), *cells[1:]])
    names = _numbered("sample", samples.drawn["predictor"].shape[1])
    return picture_sheet(rows, headings=["true block", "context", *names, "mean", "deviation", "other image", "untrained"])


def _tile(image: np.ndarray) -> np.ndarray:
    return zoomed(image, TILE_SIDE)


def _outlined(image: np.ndarray, block: np.ndarray, caption: str) -> np.ndarray:
    """The image enlarged, the block outlined, the caption below."""
    return captioned(outlined_block(_tile(image), block), caption)
