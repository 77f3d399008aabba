"""Study of what cutting contexts to the shortest of a group costs or gives, at equal FLOPs: fewer tokens buy more images.

Targets are normalised over the batch, as without that nothing much is learned at this scale, cut or not.
"""

from fastjepa.studies.arm import Arm
from fastjepa.studies.small_data import OVER_THE_BATCH

TRUNCATION_PAPER = "none: nobody has published this"

TRUNCATION_ARMS = (
    Arm("none", "cut", OVER_THE_BATCH),
    *(
        Arm(f"batch_min of {n}", "cut", (*OVER_THE_BATCH, "mask.truncate=batch_min", f"mask.truncate_group={n}"))
        for n in (16, 128, 2048)
    ),
    Arm("fraction .25", "cut", (*OVER_THE_BATCH, "mask.truncate=fraction", "mask.context_fraction=0.25")),
)
