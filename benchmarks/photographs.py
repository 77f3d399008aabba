"""JPEGs that decode like photographs, for benchmarks where no data set is at hand. Needs numpy and Pillow alone."""

from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image

SIZE = 500, 375  # width and height, about ImageNet's average; so are the bytes of a file


def photographs(count: int) -> Iterator[bytes]:
    """Waves of colour, an edge and grain: about 100 kB each, every one another image."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    for number in range(count):
        random, stream = np.random.default_rng(number), BytesIO()
        waves = [128 + 90 * np.sin(x / random.uniform(8, 60) + y / random.uniform(8, 60)) for _ in range(3)]
        pixels = np.stack(waves, -1) + random.normal(0, 10, (*x.shape, 1))
        pixels[y > x * random.uniform(0.3, 3)] *= 0.6
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=94)
        yield stream.getvalue()
