"""A batch from our loader, of files and of shards, and from its two rivals, decoded in this process (data.py has them all)."""

import os
from pathlib import Path

import pytest
from loaders import Contender, Sets, open_batches, prepare
from protocol import ROUNDS, missing
from timing import Spread

from fastjepa.config.load import load_config

CONTENDERS = {
    "folder torch": Contender("folder", "torch", 0),
    "shards torch": Contender("shards", "torch", 0),
    "folder torchvision": Contender("folder", "torchvision", 0),
    "shards webdataset": Contender("shards", "webdataset", 0),
}
IMAGES, BATCH = 64, 16


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    return prepare(None, IMAGES, 2, Path(tmp_path_factory.mktemp("images")))


@pytest.mark.parametrize("provider", CONTENDERS)
def test_batch(provider: str, benchmark, sets: Sets, request: pytest.FixtureRequest):
    setting, one = request.config.setting, CONTENDERS[provider]
    benchmark.extra_info.update(op="data", provider=provider, device=setting.device.type, toy=setting.toy)
    if reason := missing("webdataset") if one.loader == "webdataset" else "":
        benchmark.extra_info["not_measured"] = reason
        benchmark.pedantic(lambda: None)
        return
    config = load_config(os.devnull, [f"data.batch_size={BATCH}", f"runtime.device={setting.device.type}"])
    rounds, warmup = ROUNDS[setting.scale]
    seconds = []
    with open_batches(one, config, sets, setting.device) as batches:
        for _ in range(warmup):
            next(batches)
        benchmark.pedantic(lambda: seconds.append(setting.clock.run(lambda: next(batches), setting.device)), rounds=rounds)
    spread = Spread.of(seconds)
    benchmark.extra_info |= {"rounds": rounds, "median_s": spread.median, "p20_s": spread.p20, "p80_s": spread.p80,
                             "images_per_s": BATCH / spread.median}  # fmt: skip
