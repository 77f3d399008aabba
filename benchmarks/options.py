"""What the benchmarks' options share: numbers by commas, and the config that they make."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from fastjepa.config.load import load_config
from fastjepa.config.schema import Config
from fastjepa.engine.precision import settle_dtype
from fastjepa.ranks.world import join_world


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def config_of(keys: Mapping[str, Any], overrides: Iterable[str]) -> Config:
    """The default config with these keys (None: as by default), then the overrides, and runtime.dtype decided."""
    given = (f"{key}={'null' if value is None else value}" for key, value in keys.items())
    config = load_config(os.devnull, [*given, *overrides])
    return settle_dtype(config, join_world(config.runtime.device).device)
