"""One optimizer step over its micro-batches."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.config.schema import Config, LossConfig
from fastjepa.engine.average import Average
from fastjepa.engine.cuda_graph import CudaGraph, MicroStep
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import autocast_of
from fastjepa.engine.schedule import StepSettings
from fastjepa.loader.batch import Batch
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.regularizers import BatchRegularizer, pool_sequences
from fastjepa.loss.targets import TARGETS_OF
from fastjepa.masks.padding import padding_budget
from fastjepa.model.vit import Encoder


class TakenStep(NamedTuple):
    """A step that was taken."""

    loss: Tensor  # 0-dim, on the device; this rank's mean
    finite: Tensor  # 0-dim bool, on the device
    target: Tensor  # (U, D) target features of the last micro-batch; those of the context where pixels are predicted
    context_tokens: float  # mean length of a context mask in the last micro-batch
    target_tokens: float  # mean length of a target block, or, with a joint predictor, of their union


def take_step(engine: PlainEngine, average: Average, batches: Iterable[Batch], now: StepSettings, config: Config,
         spread: BatchRegularizer | None = None, micro: MicroStep | None = None) -> TakenStep:  # fmt: skip
    """One optimizer step over its micro-batches; nothing in it waits for the device. `micro`: as from `micro_step`."""
    micro = micro or micro_step(engine, average, config, spread=spread)
    if spread:
        spread.step = now.step
        if spread.pieces > 1:
            batches = list(batches)
            spread.survey([pooled_context(engine, batch, config) for batch in batches])
    total = 0.0
    for batch in batches:
        loss, target = micro(batch)
        total += loss
    finite = engine.step(now)
    average.update(now.ema_momentum, finite)
    return TakenStep(total, finite, target, batch.context.mean_len, batch.blocks.queries.mean_len)


def micro_step(
    engine: PlainEngine, average: Average, config: Config, ranks: int = 1, spread: BatchRegularizer | None = None
) -> MicroStep:
    """`learn` on a micro-batch, compiled and captured as the config asks."""
    # What an exchange of ranks divides is compiled in parts, as assembly.networks does.
    whole = config.runtime.compile and ranks == 1 and isinstance(engine, PlainEngine)
    run = torch.compile(forward_losses, dynamic=True) if whole else forward_losses

    def learn(batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward and backward: the loss and the features to watch, both detached."""
        with autocast_of(config, batch.images.device):
            loss, target, context = run(engine, average.target_encoder, batch, config.loss)
        total = loss + spread(pool_sequences(context, batch.context)) if spread else loss
        engine.backward(total)
        return loss.detach(), context.detach() if config.loss.target == "pixels" else target

    if not config.runtime.cuda_graph:
        return learn
    return CudaGraph(learn, padding_budget(config, config.data.batch_size), engine.parameters, engine.micro_batches)


def forward_losses(
    engine: PlainEngine, target_encoder: Encoder, batch: Batch, how: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The two branches of the paper's figure and the loss between them; also (U, D) target and (T, D) context features."""
    with torch.no_grad():
        target = TARGETS_OF[how.target](target_encoder, batch)
    prediction, context = engine(batch.images, batch.context, batch.blocks)
    return jepa_loss(prediction, target, batch.blocks, how.kind, how.normalize), target, context


def pooled_context(engine: PlainEngine, batch: Batch, config: Config) -> Tensor:
    """(S, D) pooled context features of a micro-batch, without gradient."""
    with autocast_of(config, batch.images.device):
        return pool_sequences(engine.features(batch.images, batch.context, batch.blocks), batch.context)
