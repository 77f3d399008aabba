"""Reading a config: a YAML file, overrides on top, and the check of every key."""

import logging
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastjepa.config.checks import check_config
from fastjepa.config.fields import did_you_mean, read_section
from fastjepa.config.schema import Config
from fastjepa.errors import ConfigError

# Keys that configs of earlier versions hold and nothing reads, each with the default it had, which is what happens anyway.
RETIRED_KEYS = {
    "data": {
        "device_memory_padding": 16 << 20,
        "host_memory_padding": 8 << 20,
        "preallocate_width_hint": 0,
        "preallocate_height_hint": 0,
    },
    "loss": {"pixel_weight": 0.0},
}
PACKAGED = Path(__file__).parent.parent / "configs"  # in a checkout a link to the configs/ beside this package


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and validate; ConfigError says what is wrong.

    `path` may also be the bare name of a config that comes with the package, such as "demo"; None is the default config.
    """
    if path is None:
        return config_from_dict(_override({}, overrides))
    path = find_config(Path(path))
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        remedy = f"pass --config FILE, or one of: {', '.join(sorted(file.stem for file in PACKAGED.glob('*.yaml')))}"
        raise ConfigError(f"{path}: cannot read the config ({error.strerror}); {remedy}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections ({', '.join(_sections())})")
    return config_from_dict(_override(raw, overrides), str(path))


def find_config(path: Path) -> Path:
    """Return `path` itself, or the packaged config of that name where there is no such file."""
    named = PACKAGED / f"{path}.yaml"
    return named if len(path.parts) == 1 and named.is_file() and not path.is_file() else path


def config_from_dict(raw: Mapping[str, Any], where: str = "config") -> Config:
    """Build and validate a Config from nested mappings; `where` names the origin in messages."""
    sections = _sections()
    built = {}
    for name, values in raw.items():
        if name not in sections:
            raise ConfigError(f"{where}: unknown section {name!r}{did_you_mean(name, sections)}")
        if values is not None and not isinstance(values, Mapping):
            raise ConfigError(f"{where}: section {name!r} must hold keys, not {values!r}")
        built[name] = read_section(sections[name], name, _without_retired(name, values or {}, where), where)
    return check_config(Config(**built), raw, where)


def _without_retired(section: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys of a section that are not retired; a retired one that asks for something is named in a warning."""
    retired = RETIRED_KEYS.get(section, {})
    for name in sorted(retired.keys() & values.keys()):
        if values[name] != retired[name]:
            logging.getLogger(__name__).warning(
                "%s: %s.%s: ignored, a key of earlier versions; delete it", where, section, name
            )
    return {name: value for name, value in values.items() if name not in retired}


def _sections() -> dict[str, type]:
    return typing.get_type_hints(Config)


def _is_text(section: str, name: str) -> bool:
    """Return whether a key holds text, or text or null."""
    cls = _sections().get(section)
    return cls is not None and typing.get_type_hints(cls).get(name) in (str, str | None)


def _override(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return the sections with overrides applied in their order, "data.batch_size=64" for one.

    The value of a key of text is taken as it stands: YAML would cut "/data/set #2" at the #, and read no and 2024 as other
    than text. Nothing after the = unsets it.
    """
    raw = {name: dict(section) if isinstance(section, Mapping) else section for name, section in raw.items()}
    for text in overrides:
        path, equals, value = text.partition("=")
        section, dot, name = path.partition(".")
        if not (equals and dot and section and name):
            raise ConfigError(f"override {text!r}: write section.key=value")
        if not isinstance(raw.get(section) or {}, Mapping):
            continue  # config_from_dict refuses the section
        try:
            given = (value or None) if _is_text(section, name) else yaml.safe_load(value)
            raw[section] = {**(raw.get(section) or {}), name: given}
        except yaml.YAMLError as error:
            raise ConfigError(f"override {text!r}: {value!r} is not a YAML value") from error
    return raw
