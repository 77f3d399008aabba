"""Steps of configs on a fake card: `python -m tests.gpu_path.steps cuda:1 'vit_base16 runtime.micro_batch=4' ...`."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from tests.support.fake_card import FakeCard, Wait, counted_graphs  # before torch

import torch  # isort: skip

from fastjepa.config.load import load_config
from fastjepa.config.schema import Config
from fastjepa.data.distortions import DISTORTION_BLOCKS, distorted
from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.engine.schedule import StepSettings
from fastjepa.loader.batch import Batch
from fastjepa.loader.loader import batch_recipe
from fastjepa.masks.layouts import Masking
from fastjepa.masks.packer import Packer
from fastjepa.monitoring.skips import Skips
from fastjepa.plan.plan import settle_teacher, workload_of
from fastjepa.ranks.collectives import max_over_ranks
from fastjepa.ranks.world import World
from fastjepa.run.build import (
    apply_process_settings,
    build_engine,
    build_networks,
    build_objective,
    build_runs,
    place_teacher,
)
from fastjepa.run.step import Step
from tests.support.card_cases import tell_faults
from tests.support.places import ROOT

STEPS, RAGGED_STEPS = 3, 6  # the latter under torch.compile


def micro_batches(config: Config, number: int) -> Iterator[Batch]:
    """Yield a step's micro-batches in pinned memory, with the masks that a run draws."""
    images, packer = config.data.batch_size, Packer(Masking.of(config))
    room = workload_of(config).padding_budget(images) if config.runtime.cuda_graph else None
    for start in range(0, images, config.micro_batch):
        packed = packer.packed(number, range(start, start + config.micro_batch), images, images, room)
        pixels = torch.zeros(config.micro_batch, config.data.channels, *config.image_size, dtype=torch.uint8)
        yield Batch(pixels, *packed, bad=()).pin_memory()


def distorted_on_card(batch: Batch, config: Config) -> Batch:
    """Distort the images of a batch as after DALI, with the numbers of as many samples."""
    distortions = batch_recipe(config).distortions
    if not (distortions.colour or distortions.blur):
        return batch
    uniforms = torch.rand(len(batch.images), 4 * DISTORTION_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = torch.tensor([distortions.draw(numbers) for numbers in uniforms])
    return replace(batch, images=distorted(batch.images, drawn))


def take_steps(card: FakeCard, config: Config, device: torch.device, steps: int) -> None:
    """Take steps as the loop of `train` does; AssertionError where the host waits in one, or a tensor is elsewhere."""
    world = World(0, device.index, 1, device)
    apply_process_settings(config)
    config, teacher = settle_teacher(config)
    place_teacher(teacher, config, device)
    jepa, target_encoder = build_networks(config, device)
    engine = build_engine(jepa, config, world, 0 if config.runtime.zero == "auto" else config.runtime.zero)
    average = engine.follow(target_encoder)
    objective, runs = build_objective(config, engine, average.target_encoder, world, teacher), build_runs(config, engine)
    step = Step(engine, average, objective, COMPUTE_DTYPES[config.runtime.dtype], runs)
    skips = Skips(device)
    card.waits.clear()
    for number in range(steps):
        moved = (distorted_on_card(batch.to(device, non_blocking=True), config) for batch in micro_batches(config, number))
        tally, finite = step(moved, StepSettings(1e-3, 0.04, 0.996, number))
        skips.update(finite)
        skips.poll()
        for tensor in (tally.loss, tally.features, finite, *jepa.parameters()):
            assert tensor.device == device, f"a tensor of {device} is on {tensor.device}"
        assert tally.loss.dtype == torch.float32
    ours = {str(wait) for wait in card.waits if not (config.runtime.zero in (1, 2, 3) and is_of_deepspeed(wait))}
    assert not ours, f"the host waits in {steps} steps: {ours}"
    assert max_over_ranks(number) == number  # the stop flag of ranks, which lies on the host


def is_of_deepspeed(wait: Wait) -> bool:
    """Return whether DeepSpeed waits: in the engine's calls for the gradients' norm, in its hooks for streams."""
    return "fastjepa/engine/zero.py" in wait.where or "synchronize" in wait.what


def take_case(case: str, device: torch.device) -> None:
    """Take steps of 'PRESET key=value ...'; under torch.compile each network is one graph whatever the shapes."""
    preset, *overrides = case.split()
    config = load_config(ROOT / "configs" / f"{preset}.yaml", ["runtime.dtype=bf16", *overrides])
    try:
        with FakeCard(device) as card:
            if not config.runtime.compile:
                stage_3 = config.runtime.zero == 3  # from its second step on DeepSpeed compares values over ranks
                return take_steps(card, config, device, 1 if stage_3 else STEPS)
            with counted_graphs() as graphs:
                take_steps(card, config, device, RAGGED_STEPS)
            assert len(graphs) == 2, f"{RAGGED_STEPS} ragged steps made the graphs {graphs}"
    finally:
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    tell_faults(sys.argv[2:], partial(take_case, device=torch.device(sys.argv[1])))
