"""Warnings that name a collapse, its likely cause and the key to turn."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fastjepa.engine.schedule import StepSettings

INITIAL_STD = 0.02  # of every weight matrix


class AlarmSettings(NamedTuple):
    """Settings of a run that the likely cause of a collapse is read from."""

    peak_lr: float
    regularized: bool  # whether loss.regularizer is any
    warmup_steps: float = 0  # until when a k-NN may stand where it stood at the start
    averaged: bool = True  # whether the average makes the targets, rather than pixels or a frozen teacher


class CollapseSign(NamedTuple):
    """A reading that must not fall below `floor` times its value at the start."""

    name: str
    floor: float
    meaning: str


COLLAPSE_SIGNS = (
    CollapseSign("feature_std", 0.25, "complete collapse, every patch is getting the same features"),
    CollapseSign("image_std", 0.25, "complete collapse, every image is getting the same features"),
    CollapseSign("effective_rank", 0.5, "dimensional collapse, the features are shrinking to a few directions"),
    CollapseSign("lidar", 0.5, "dimensional collapse, few directions tell images apart"),
)
JUMP = 2.0  # a loss this many times all of the three readings before
STILL = 0.01  # k-NN accuracy above that at the start which is none
LEARNING_STEPS = 100  # in fewer steps nothing need have been learned
SHORT_MEMORY = 10  # steps: a target encoder that averages fewer follows the context encoder at once
# Updates. Adam averages gradients with b = 0.9; where these are independent, an average of momentum m is
# m sqrt((1 + m b) / ((1 - m^2)(1 - m b))) updates from the encoder: 0.9 with m = 0.5, 6.4 with 0.9, 11 with 0.95, 29 with 0.99.
NEAR = 10.0
FAR_AFTER = 4 * SHORT_MEMORY  # steps: before, no average need be far
ENOUGH_MOMENTUM = 0.99
BIG_STEP = 0.25  # Adam moves a weight by about the learning rate a step: this share of its initial size is much


def collapse_alarms(history: Sequence[Mapping[str, float]], now: StepSettings, settings: AlarmSettings) -> list[str]:
    """Return sentences for what the last of the readings confirms: the step, what was seen, the likely cause, the key to turn.

    Every kind warns at its second bad reading in a row and not again until it has recovered, so one odd batch never
    warns and a long collapse warns once. Readings that are not finite are bad.

    Args:
        history: readings by name, and `step` and `loss`, in the order they were taken; a name may be missing in some.
        now: the schedules' values, of which the likely cause is read.
    """
    if not history:
        return []
    last, found = history[-1], []
    for sign in COLLAPSE_SIGNS:
        start, *values = readings_of(history, sign.name) or [0.0]
        bad = [not value >= sign.floor * start for value in values]
        if sign.name in last and start > 0 and is_confirmed(bad):
            share = f"{values[-1] / start:.0%} of its value at the start, {start:.3g}"
            found.append(f"{sign.meaning} ({sign.name} {values[-1]:.3g}, {share}); {likely_remedy(history, now, settings)}")
    if settings.averaged and "ema_distance" in last and is_confirmed(near_averages(history)):
        ranks = readings_of(history, "effective_rank")
        found.append(f"the target encoder stays {last['ema_distance']:.2g} updates from the context encoder (ema_distance) and "
                     f"the features do not recover (effective_rank {ranks[-1]:.3g}, {ranks[0]:.3g} at the start); "
                     f"{likely_remedy(history, now, settings)}")  # fmt: skip
    if "knn" in last and is_confirmed(stagnant_probes(history, settings.warmup_steps)):
        start = readings_of(history, "knn")[0]
        found.append(f"stagnation, a k-NN on the features finds {last['knn']:.1%} after the warm-up, {start:.1%} at the "
                     f"start: nothing is learned; {likely_remedy(history, now, settings, stuck=True)}")  # fmt: skip
    if is_confirmed(loss_jumps(readings_of(history, "loss"))):
        found.append(f"the loss jumped to {last['loss']:.3g} and stayed; the steps are too large: lower optimization.lr "
                     f"(now {now.lr:.2g}) or raise optimization.warmup")  # fmt: skip
    return [f"step {last['step']}: {sentence}" for sentence in found]


def readings_of(history: Iterable[Mapping[str, float]], name: str) -> list[float]:
    """Return all readings of that name; NaN where one was not finite."""
    return [math.nan if entry[name] is None else entry[name] for entry in history if name in entry]


def is_confirmed(bad: Sequence[bool]) -> bool:
    """Return whether the last reading is the second bad one in a row."""
    return list(bad[-2:]) == [True, True] and list(bad[-3:]) != [True] * 3


def near_averages(history: Sequence[Mapping[str, float]]) -> list[bool]:
    """Return for each distance of the average, from FAR_AFTER steps on, whether it is near while the features have fewer
    directions than at the start.
    """
    start = (readings_of(history, "effective_rank") or [0.0])[0]
    watched = [entry for entry in history if {"ema_distance", "effective_rank"} <= entry.keys() and entry["step"] >= FAR_AFTER]
    pairs = zip(readings_of(watched, "ema_distance"), readings_of(watched, "effective_rank"), strict=True)
    return [distance < NEAR and not rank >= start for distance, rank in pairs]


def stagnant_probes(history: Sequence[Mapping[str, float]], warmup_steps: float) -> list[bool]:
    probed = [entry for entry in history if "knn" in entry]
    start, *later = readings_of(probed, "knn")
    steps = [entry["step"] for entry in probed[1:]]
    enough = min(start + STILL, 1 - STILL)  # what is classified without an error cannot be done better
    first = max(warmup_steps, LEARNING_STEPS - 1)
    return [not knn > enough for step, knn in zip(steps, later, strict=True) if step > first]


def loss_jumps(losses: Sequence[float]) -> list[bool]:
    """Return for each loss from the fourth on whether it lies above JUMP times all of the three before the jump, or is not
    finite.
    """
    bad: list[bool] = []
    for i in range(3, len(losses)):
        before = i - 1 if bad and bad[-1] else i  # a jump that lasts is measured from where it began
        bad.append(not losses[i] <= JUMP * max(losses[max(0, before - 3) : before]))
    return bad


def likely_remedy(
    history: Sequence[Mapping[str, float]], now: StepSettings, settings: AlarmSettings, stuck: bool = False
) -> str:
    """Return the likely cause of a collapse and the key to turn, by what can be told apart: momentum, learning rate,
    objective.
    """
    memory = 1 / max(1 - now.ema_momentum, 1e-9)  # steps
    near = near_averages(history)[-1:] == [True] and now.ema_momentum < ENOUGH_MOMENTUM
    if settings.averaged and (memory < SHORT_MEMORY or near):
        return (f"the target encoder follows the context encoder within {memory:.0f} steps: raise optimization.ema "
                f"(now {now.ema_momentum:.3g}) to {ENOUGH_MOMENTUM} or more")  # fmt: skip
    peak = settings.peak_lr
    if peak > BIG_STEP * INITIAL_STD or any(loss_jumps(readings_of(history, "loss"))):
        return f"the steps are too large: lower optimization.lr (peak {peak:.2g}) or raise optimization.warmup"
    if settings.regularized and stuck:
        return "train longer (optimization.epochs), or raise optimization.lr"
    regularizer = "raise loss.regularizer_weight" if settings.regularized else "set loss.regularizer=vicreg"
    if not settings.averaged:
        return f"{regularizer} or lower optimization.lr"
    return f"{regularizer}, lower optimization.lr or raise optimization.ema"
