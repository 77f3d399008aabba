"""Pictures of a checkpoint and a data set, a labelled sheet each: masks, principal components, nearest blocks, samples."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.sources import Source, open_source
from fastjepa.errors import UserError
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Split, Subject
from fastjepa.evals.scoring import TEST_DRAW
from fastjepa.loader.micro_batches import BatchRecipe, MicroBatches
from fastjepa.masks.draw import draw_masks
from fastjepa.rng import SPLIT_STREAM, generator
from fastjepa.visualize.bands import ShownBands
from fastjepa.visualize.images import (
    captioned,
    hidden_patches,
    masks_sheet,
    numbered,
    outlined_block,
    picture_sheet,
    zoomed,
)
from fastjepa.visualize.neighbours import BLOCK_BATCH, Neighbours, Queries, draw_query_masks, patch_rows, prepared_network
from fastjepa.visualize.pca import pca_picture, to_uint8
from fastjepa.visualize.samples import DrawnSamples
from fastjepa.weights.read import NETWORK_OF, is_foreign_weights, load_encoder, starting_networks


def open_drawn_split(data: str, name: str, count: int | None, seed: int, step: int = TEST_DRAW) -> Split:
    """Draw at most `count` images of a split in random order, so that the first few are of many classes; needs no labels."""
    source = open_source(data, name)
    return Split(data, name, source, generator(seed, SPLIT_STREAM, step).permutation(len(source))[:count])


def shown_images(subject: Subject, split: Split, count: int) -> Tensor:
    """Return the first images of a split, (count, C, H, W) as they are decoded; UserError when it has fewer."""
    if count > len(split.rows):
        raise UserError(f"{split.data}: {count} images were asked for and its {split.name} split has {len(split.rows)}; "
                        f"say --images {len(split.rows)}")  # fmt: skip
    stream = EvalImages(split.source, subject.size, subject.pixels, split.rows[:count])
    return torch.cat(list(stream.batches(count, about="images")))


def drawn_masks_sheet(subject: Subject, shown: Tensor, seed: int, bands: ShownBands) -> np.ndarray:
    """Draw masks as the run does, and return their sheet over the images (b, C, H, W)."""
    return masks_sheet(bands.pictures(shown), *draw_query_masks(subject, len(shown), seed), subject.config.grid)


def encoders_to_show(subject: Subject) -> list[str]:
    """Return the names of the encoders that the weights hold, and "random": an untrained one of the same shape."""
    if not is_foreign_weights(subject.path):
        return [*NETWORK_OF, "random"]
    held = starting_networks(subject.path)
    both = all(network in held for network in NETWORK_OF.values())
    return [*(NETWORK_OF if both else ["own"]), "random"]


def run_masks_sheet(recipe: BatchRecipe, source: Source, most: int) -> np.ndarray:
    """Return the first images of a run, at most so many, cropped as it will see them, with their masks."""
    count, grid = min(most, len(source)), recipe.masking.grid
    recipe = replace(recipe, batch_size=count, micro_batch=count)
    images = MicroBatches(recipe, source, rank=0, ranks=1)[0].images
    drawn = draw_masks(recipe.masking, 0, range(count), count)
    return masks_sheet(ShownBands.of(recipe.pixels).pictures(images), *drawn, grid)


def pca_sheet(subject: Subject, shown: Tensor, bands: ShownBands) -> np.ndarray:
    """Return a sheet with a column for each image: the image, then its patches coloured by each encoder's features."""
    rows, labels = [[zoomed(image) for image in bands.pictures(shown)]], ["image"]
    for which in encoders_to_show(subject):
        own = load_encoder(subject.path) if which == "own" else subject.encoder(which)
        features = patch_rows(subject, prepared_network(subject, own), shown)
        coloured = pca_picture(features, subject.config.grid, tuple(shown.shape[2:]))
        rows.append([zoomed(image) for image in coloured])
        labels.append(f"{own.which if which == 'own' else which} encoder")
    return picture_sheet(rows, labels=labels)


def neighbours_sheet(
    subject: Subject, queries: Queries, found: Neighbours, bank: Split, count: int, bands: ShownBands
) -> np.ndarray:
    """Return a sheet with a row for each of the first `count` queries: image, context, true block, nearest blocks.

    Blocks are outlined. Below a neighbour stands its distance, below the true block its distance and its rank.
    """
    grid, k = subject.config.grid, found.row.shape[1]
    bank_rows = bank.rows[found.row[:count].flatten().numpy()]
    stream = EvalImages(bank.source, subject.size, subject.pixels, bank_rows)
    images = torch.cat([queries.images[:count], *stream.batches(BLOCK_BATCH, about="pictures")])  # k of a query together
    pictures, rows = bands.pictures(images), []
    for i, image in enumerate(pictures[:count]):
        true = f"{float(queries.true[i]):.2f}, rank {found.rank['anywhere'][i]:g} of {found.candidates + 1}"
        cells = [zoomed(image), zoomed(hidden_patches(image, queries.context[i].reshape(grid))),
                 _outlined(image, queries.block[i].reshape(grid), true)]  # fmt: skip
        near = pictures[count + i * k : count + (i + 1) * k]
        cells += [_outlined(near[j], found.block[i, j].reshape(grid), f"{float(found.distance[i, j]):.2f}") for j in range(k)]
        rows.append(cells)
    return picture_sheet(rows, gap=6, headings=["image", "context", "true block", *numbered("nearest", k)])


def samples_sheet(subject: Subject, samples: DrawnSamples, count: int) -> np.ndarray:
    """Return a sheet with a row for each of the first `count` images.

    Its columns are the truth, the context, the samples, their mean and deviation, and the first sample of each baseline.
    The block is outlined in all but the context. The deviation is white where half of the samples are black and half white.
    """
    grid, rows = subject.config.grid, []
    for i in range(count):
        block = samples.block[i].reshape(grid)
        own = samples.drawn["predictor"][i]
        baselines = [samples.drawn[name][i, 0] for name in ("shuffled", "untrained")]
        deviation = 2 * own.std(dim=0, correction=0)
        truth, *shown = to_uint8(torch.stack([samples.truth[i], *own, own.mean(dim=0), deviation, *baselines]))
        context = hidden_patches(truth, samples.context[i].reshape(grid))
        cells = [outlined_block(zoomed(image), block) for image in (truth, *shown)]
        rows.append([cells[0], zoomed(context), *cells[1:]])
    names = numbered("sample", samples.drawn["predictor"].shape[1])
    return picture_sheet(rows, headings=["true block", "context", *names, "mean", "deviation", "other image", "untrained"])


def _outlined(image: np.ndarray, block: np.ndarray, caption: str) -> np.ndarray:
    """Return the image enlarged, with the block outlined and the caption below."""
    return captioned(outlined_block(zoomed(image), block), caption)
