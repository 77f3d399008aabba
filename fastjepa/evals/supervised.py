"""Evaluations that train a classifier by gradient descent: the learning rate is chosen on training images, work resumes."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastjepa.errors import ConfigError
from fastjepa.evals.scoring import PROBE_DRAW, Labelled, Result, score_predictions, validation_split
from fastjepa.files import write_atomic
from fastjepa.rng import SPLIT_STREAM, generator

TrainedStates = Callable[[str], Path | None]  # the name of a training -> the file that keeps its state after each epoch


@dataclass(frozen=True)
class SupervisedTask:
    """What is trained and on what. Images are named by their place among the training or the test images.

    `inputs(rows, epoch)` gives what the classifier takes, in blocks on its device: the training images `rows` as epoch
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
    lr, validation_accuracy = choose_rate(task, lrs, seed, states) if len(lrs) > 1 else (lrs[0], None)
    classifier = fit_epochs(task, torch.arange(len(task.train.y)), lr, seed, states("final"))
    predicted = supervised_classify(classifier, task.test_inputs(), task.dtype)
    return score_predictions(predicted, task.train, task.test, {"lr": lr}, validation_accuracy)


def choose_rate(task: SupervisedTask, lrs: Sequence[float], seed: int, states: TrainedStates) -> tuple[float, float]:
    """The learning rate that does best on a sixth of the training images, and its accuracy there."""
    rows, held = validation_split(task.train.y, 6, seed)
    accuracies = []
    for lr in lrs:
        classifier = fit_epochs(task, rows, lr, seed, states(f"lr-{lr:g}"))
        predicted = supervised_classify(classifier, task.inputs(held, None), task.dtype)
        accuracies.append(float((predicted == task.train.y[held]).double().mean()))
    best = max(range(len(lrs)), key=accuracies.__getitem__)
    return lrs[best], accuracies[best]


def fit_epochs(task: SupervisedTask, rows: Tensor, lr: float, seed: int, state: Path | None = None) -> nn.Module:
    """A classifier trained on the training images `rows`; learning rates fall along half a cosine to 0, step by step.

    Args:
        state: a file written after each epoch, from which an interrupted training goes on.

    Raises:
        ConfigError: the loss is no longer finite.
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
            with torch.autocast(device.type, torch.bfloat16, enabled=task.dtype == torch.bfloat16):
                logits = classifier(inputs)
            loss = nn.functional.cross_entropy(logits.float(), classes[number], label_smoothing=task.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not bool(loss.isfinite()):
            raise ConfigError(f"--lr {lr:g}: the loss of epoch {epoch + 1} is {loss.item()}; choose a lower one")
        _keep_state(classifier, optimizer, epoch + 1, state)
    return classifier


@torch.inference_mode()
def supervised_classify(classifier: nn.Module, inputs: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Classes (n,) int64 of all inputs, on the host."""
    device, found = next(classifier.parameters()).device, []
    for block in inputs:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(classifier(block).argmax(dim=1).cpu())
    return torch.cat(found)


def _keep_state(classifier: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, state: Path | None) -> None:
    if state is not None:
        content = io.BytesIO()
        torch.save({"epoch": epoch, "classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}, content)
        write_atomic(state, content.getvalue())


def _resume_state(classifier: nn.Module, optimizer: torch.optim.Optimizer, state: Path | None) -> int:
    """The epoch to go on with; 0 where there is no state."""
    if state is None or not state.is_file():
        return 0
    try:
        saved = torch.load(state, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises whatever its reader meets first
        raise OSError(f"{state}: cannot be read ({type(error).__name__}), so nothing resumes; delete the file") from error
    classifier.load_state_dict(saved["classifier"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["epoch"]
