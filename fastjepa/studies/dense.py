"""Study of what patches know: segmentation, depth and counting on rendered scenes after equal minutes, beside MAE and floors.

V-JEPA 2.1 claims of its scale that several layers as targets and a loss on visible tokens lift dense results. All arms but
the first normalise targets over the batch, without which so small a network collapses.
"""

from fastjepa.studies.arm import Arm
from fastjepa.studies.equal_minutes import BEST_VICREG, FOUR_LAYERS, MUON
from fastjepa.studies.small_data import OVER_THE_BATCH

DENSE_PAPER = "none at this scale"

DENSE_SETTINGS = ("data.crop_size=64", "mask.patch_size=8")  # 64 patches, as many as the other studies have
VISIBLE = ("loss.visible_weight=0.5",)
# fmt: off
DENSE_ARMS = (
    Arm("I-JEPA", "base"),
    Arm("raw pixels", "floor", method="pixels"),
    Arm("random encoder", "floor", method="random"),
    Arm("MAE", "bar", method="mae"),
    Arm("MAE, Muon", "bar", MUON, method="mae"),
    Arm("targets over the batch", "targets", OVER_THE_BATCH),
    Arm("four layers over the batch", "layers", FOUR_LAYERS),
    Arm("over the batch, loss on visible tokens", "visible", (*OVER_THE_BATCH, *VISIBLE)),
    Arm("four layers over the batch, loss on visible tokens", "together", (*FOUR_LAYERS, *VISIBLE)),
    Arm("mean of four over the batch, random masks, Muon, VICReg / 5", "small presets", BEST_VICREG),
)
