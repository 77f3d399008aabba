"""The step outside the loop is the step inside it: same weights, same averages, to the bit."""

import pytest
import torch

from fastjepa.config.load import load_config
from fastjepa.data.sources import open_source
from fastjepa.engine.schedule import Schedule
from fastjepa.loader.loader import Loader
from fastjepa.run.build import build_run
from fastjepa.run.step import Step
from fastjepa.train import train

VARIANTS = {
    "vicreg in micro-batches": ["loss.regularizer=vicreg", "runtime.micro_batch=4"],
    "joint": ["meta.predictor=joint"],
    "pixels": ["loss.target=pixels"],
    "over the batch": ["loss.normalize=batch"],
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_steps_outside_the_loop_are_those_of_the_loop(toy_config, tmp_path, variant):
    config = load_config(toy_config, variant)
    train(config, tmp_path / "loop", max_steps=3)
    looped = build_run(config, tmp_path / "loop", "must", None, None)

    run = build_run(config, tmp_path / "apart", "auto", None, None)
    config, schedule = run.config, Schedule(run.config.optimization, len(run.source) // run.config.data.batch_size)
    step = Step(run.engine, run.average, run.objective)
    with Loader(config, open_source(config.data.address), run.world, 0, 3) as loader:
        for number in range(3):
            assert step(loader.micro_batches(number), schedule(number))[1].item()
    for name, network in run.state.networks.items():
        theirs = looped.state.networks[name].state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in network.state_dict().items()), name
