"""The arms of a study: what is compared, and what a job of one arm says."""

from typing import Any, Literal, NamedTuple

from fastjepa.config.schema import Config

JOB_FILE, ROW_FILE, ARM_CONFIG = "job.json", "row.json", "arm.yaml"
MEANINGFUL_SECTIONS = ("data", "mask", "meta", "optimization", "loss")  # sections of a config that say what is trained
PROBED_INPUT = {"ijepa": "target", "mae": "target", "random": "random", "pixels": "pixels"}  # by method: what is evaluated

Method = Literal["ijepa", "mae", "random", "pixels"]


class Arm(NamedTuple):
    """What is compared. Arms of a group differ from the base in one thing, which the group is named after (but `together`)."""

    name: str
    group: str
    overrides: tuple[str, ...] = ()  # section.key=value
    paper: float | None = None  # what the paper has in this place
    method: Method = "ijepa"  # random and pixels train nothing
    length: float = 1.0  # images seen, as a multiple of the study's budget
    fraction: float = 1.0  # of the training images


def departures_from_default(config: Config) -> dict[str, dict[str, Any]]:
    """What is trained, as far as it differs from the defaults: keys that are added later change nothing."""
    default, given = Config().to_dict(), config.to_dict()
    return {name: {k: v for k, v in given[name].items() if v != default[name][k]} for name in MEANINGFUL_SECTIONS}
