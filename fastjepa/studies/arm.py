"""Arms of a study: the things that are compared, and the names of an arm's files."""

from typing import Literal, NamedTuple

JOB_FILE, ROW_FILE, ARM_CONFIG = "job.json", "row.json", "arm.yaml"
PROBED_INPUT = {"ijepa": "target", "mae": "target", "random": "random", "pixels": "pixels", "kmeans": "kmeans",
                "kmeans_quadrants": "kmeans_quadrants"}  # {method: input of the probes}  # fmt: skip

Method = Literal["ijepa", "mae", "random", "pixels", "kmeans", "kmeans_quadrants"]


class Arm(NamedTuple):
    """One of the things compared.

    Arms of a group differ from the base in one thing, which the group is named after; only those of `together` differ in
    several.
    """

    name: str
    group: str
    overrides: tuple[str, ...] = ()  # section.key=value
    paper: float | None = None  # the paper's number in this place
    method: Method = "ijepa"  # all but ijepa and mae train nothing
    length: float = 1.0  # images seen, or minutes spent, as a multiple of the study's budget
    fraction: float = 1.0  # of the training images
