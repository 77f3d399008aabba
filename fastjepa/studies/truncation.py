"""What cutting contexts to the shortest of a group costs or gives, at equal FLOPs: fewer tokens buy more images."""

from fastjepa.studies.arm import Arm

PAPER = "none: nobody has published this"

ARMS = (
    Arm("none", "cut"),
    *(Arm(f"batch_min of {n}", "cut", ("mask.truncate=batch_min", f"mask.truncate_group={n}")) for n in (16, 128, 2048)),
    Arm("fraction .25", "cut", ("mask.truncate=fraction", "mask.context_fraction=0.25")),
)
