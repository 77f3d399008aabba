"""The request of an evaluation: which weights, which images, and where it runs."""

from dataclasses import dataclass
from pathlib import Path

from fastjepa.evals.features import Layers
from fastjepa.evals.held_out import HeldOutName
from fastjepa.evals.inputs import Inputs, Split, Subject, open_splits, open_subject
from fastjepa.model.positions import Positions


@dataclass(frozen=True)
class EvalRequest:
    """One evaluation as it is asked for; what only some evaluations have is handed over beside it."""

    checkpoint: str | Path  # a run directory (its latest checkpoint), a checkpoint, or weights that `load_encoder` reads
    data: str | None  # a data set's name or path, with a train split and a val or test split; None: no data set has the images
    encoder: Inputs = "target"  # target, context, random (untrained), or pixels (none at all)
    layers: Layers = "last"  # or concat4: the last four blocks side by side
    image_size: int | None = None  # side of the square images; None: the run's
    positions: Positions | None = None  # of patches, in another size than the run's; None: the default
    n_train: int | None = None  # at most this many images, drawn by `seed`, some of each class; None: all
    n_test: int | None = None
    seed: int = 0
    device: str = "auto"
    cache: bool = True  # keep features below the run directory, and reuse them
    split: HeldOutName | None = None  # to test on; None: test where its images have labels of training classes, else val

    def splits(self) -> tuple[Split, Split]:
        """Open the training and the test images."""
        return open_splits(self.data, self.n_train, self.n_test, self.seed, self.split)

    def subject(self) -> Subject:
        """Open the run or the weights."""
        return open_subject(self.checkpoint, self.device, self.cache, self.image_size, self.positions)
