"""Training of a classifier by gradient descent: the learning rate is chosen on training images, interrupted work resumes."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastjepa.engine.precision import autocast_of
from fastjepa.errors import UserError
from fastjepa.evals.scoring import PROBE_DRAW, Labelled, Result, choose_setting, score_predictions
from fastjepa.files import write_atomic
from fastjepa.rng import SPLIT_STREAM, generator

TrainedStates = Callable[[str], Path | None]  # the name of a training -> the file that keeps its state after each epoch


@dataclass(frozen=True)
class TrainingPlace:
    """The seed and the device of a training, and the files that keep its unfinished work."""

    seed: int = 0
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32  # bf16: autocast
    states: TrainedStates = lambda name: None


@dataclass(frozen=True)
class SupervisedTask:
    """A classifier and its images, which are named by their place among the training or the test images.

    `inputs(rows, epoch)` gives the inputs of the classifier, in blocks on its device: the training images `rows` as epoch
    `epoch` sees them or, for epoch None, as they would be tested.
    """

    train: Labelled
    test: Labelled
    build: Callable[[float], tuple[nn.Module, torch.optim.Optimizer]]  # from a learning rate
    inputs: Callable[[Tensor, int | None], Iterable[Tensor]]
    test_inputs: Callable[[], Iterable[Tensor]]
    epochs: int
    batch: int  # images of a block
    dtype: torch.dtype  # bf16: autocast
    label_smoothing: float = 0.0


def supervised_accuracy(task: SupervisedTask, lrs: Sequence[float], seed: int, states: TrainedStates) -> Result:
    """Train and test. Of several learning rates, the best on a sixth of the training images is taken for a training on all."""

    def attempt(fit: Tensor, held: Tensor) -> dict[float, Tensor]:
        def classify(lr: float) -> Tensor:
            fitted = fit_epochs(task, fit, lr, seed, states(f"lr-{lr:g}"))
            return supervised_classify(fitted, task.inputs(held, None), task.dtype)

        return {lr: classify(lr) for lr in lrs}

    lr, validation_accuracy = lrs[0], None
    if len(lrs) > 1:
        lr, validation_accuracy = choose_setting(task.train.y, 6, seed, attempt, remedy=", or give one --lr")
    classifier = fit_epochs(task, torch.arange(len(task.train.y)), lr, seed, states("final"))
    predicted = supervised_classify(classifier, task.test_inputs(), task.dtype)
    return score_predictions(predicted, task.train, task.test, {"lr": lr}, validation_accuracy)


def fit_epochs(task: SupervisedTask, rows: Tensor, lr: float, seed: int, state: Path | None = None) -> nn.Module:
    """Train a classifier on the training images `rows`; learning rates fall along half a cosine to 0, step by step.

    Args:
        state: a file written after each epoch, from which an interrupted training goes on.

    Raises:
        UserError: the loss is no longer finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier, optimizer = task.build(lr)
    device, steps = next(classifier.parameters()).device, math.ceil(len(rows) / task.batch)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(_resume_state(classifier, optimizer, state), task.epochs):
        order = rows[torch.from_numpy(generator(seed, SPLIT_STREAM, PROBE_DRAW + epoch).permutation(len(rows)))]
        classes = task.train.y[order].to(device).split(task.batch)
        for number, inputs in enumerate(task.inputs(order, epoch)):
            progress = (epoch * steps + number) / (task.epochs * steps)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * progress))
            with autocast_of(task.dtype, device):
                logits = classifier(inputs)
            loss = nn.functional.cross_entropy(logits.float(), classes[number], label_smoothing=task.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not bool(loss.isfinite()):
            raise UserError(f"--lr {lr:g}: the loss of epoch {epoch + 1} is {loss.item()}; choose a lower one")
        _keep_state(classifier, optimizer, epoch + 1, state)
    return classifier


@torch.inference_mode()
def supervised_classify(classifier: nn.Module, inputs: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the classes (n,) int64 of all inputs, on the host."""
    device, found = next(classifier.parameters()).device, []
    for block in inputs:
        with autocast_of(dtype, device):
            found.append(classifier(block).argmax(dim=1).cpu())
    return torch.cat(found)


def _keep_state(classifier: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, state: Path | None) -> None:
    if state is not None:
        content = io.BytesIO()
        torch.save({"epoch": epoch, "classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}, content)
        write_atomic(state, content.getvalue())


def _resume_state(classifier: nn.Module, optimizer: torch.optim.Optimizer, state: Path | None) -> int:
    """Restore what `_keep_state` wrote and return the epoch to go on with; 0 where there is no state."""
    if state is None or not state.is_file():
        return 0
    try:
        saved = torch.load(state, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises whatever its reader meets first
        raise OSError(f"{state}: cannot be read ({type(error).__name__}), so nothing resumes; delete the file") from error
    classifier.load_state_dict(saved["classifier"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["epoch"]
