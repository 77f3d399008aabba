"""Study of the paper's ablations of masks, targets and predictor at the scale of CIFAR-10: each arm changes multi-block once.

The strategies are there once more with targets normalised over the batch, as with the paper's targets hardly anything is
learned at this scale.
"""

from fastjepa.studies.arm import Arm
from fastjepa.studies.small_data import OVER_THE_BATCH

MASKING_PAPER = "1 % linear on ImageNet of a ViT-B/16 after 300 epochs, or what its group says"

STRATEGIES = (
    Arm("multi-block", "strategy", (), 54.2),
    Arm("rasterized", "strategy", ("mask.strategy=rasterized",), 15.5),
    Arm("block", "strategy", ("mask.strategy=block",), 20.2),
    Arm("random", "strategy", ("mask.strategy=random",), 17.6),
)
THAT_LEARN = tuple(
    Arm(f"{arm.name}, over the batch", "strategy, targets over the batch", (*OVER_THE_BATCH, *arm.overrides), arm.paper)
    for arm in STRATEGIES
)
# fmt: off
KNOBS = (
    Arm("targets .075 to .2", "target scale", ("mask.pred_mask_scale=[0.075,0.2]",), 19.2),
    Arm("targets .1 to .2", "target scale", ("mask.pred_mask_scale=[0.1,0.2]",), 39.2),
    Arm("targets .125 to .2", "target scale", ("mask.pred_mask_scale=[0.125,0.2]",), 42.4),
    Arm("targets .2 to .25", "target scale", ("mask.pred_mask_scale=[0.2,0.25]",), 38.9),
    Arm("targets .2 to .3", "target scale", ("mask.pred_mask_scale=[0.2,0.3]",), 33.6),
    Arm("context .4 to 1", "context scale", ("mask.enc_mask_scale=[0.4,1.0]",), 31.2),
    Arm("context .65 to 1", "context scale", ("mask.enc_mask_scale=[0.65,1.0]",), 47.1),
    Arm("context .75 to 1", "context scale", ("mask.enc_mask_scale=[0.75,1.0]",), 49.3),
    Arm("1 target", "number of targets", ("mask.num_pred_masks=1",), 9.0),
    Arm("2 targets", "number of targets", ("mask.num_pred_masks=2",), 22.0),
    Arm("3 targets", "number of targets", ("mask.num_pred_masks=3",), 48.5),
    Arm("target: masked input", "target (paper: H/16, output 67.3)", ("loss.target=input",), 56.1),
    Arm("target: pixels", "target (paper: L/16, output 66.9)", ("loss.target=pixels",), 40.7),
    Arm("half the depth", "predictor depth (paper: L/16, base 66.9)", ("meta.pred_depth=1",), 64.0),
    Arm("twice the depth", "predictor depth (paper: L/16, base 66.9)", ("meta.pred_depth=4",)),
    Arm("the encoder's width", "predictor width (paper: L/16, 1 % fine-tuned, base 70.7)", ("meta.pred_emb_dim=64",), 68.4),
)
# fmt: on
MASKING_ARMS = STRATEGIES + THAT_LEARN + KNOBS
