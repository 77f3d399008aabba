"""What the benchmarks' options share: numbers by commas, and the config that they make."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from fastjepa import config as configs
from fastjepa import distributed, precision
from fastjepa.config import Config


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def config_of(keys: Mapping[str, Any], overrides: Iterable[str]) -> Config:
    """The default config with these keys (None: as by default), then the overrides, and runtime.dtype decided."""
    given = (f"{key}={'null' if value is None else value}" for key, value in keys.items())
    config = configs.load(os.devnull, [*given, *overrides])
    return precision.settled(config, distributed.init(config.runtime.device).device)
