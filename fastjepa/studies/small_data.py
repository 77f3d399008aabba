"""Study of why I-JEPA learns little on small data, and what helps: each arm changes the base once, beside MAE and two floors.

The arms of `together` are several changes at once, chosen after the first seed of the others.
"""

from fastjepa.studies.arm import Arm

SMALL_PAPER = "none at this scale"

OVER_THE_BATCH = ("loss.normalize=batch",)
# fmt: off
SMALL_ARMS = (
    Arm("base", "base"),
    Arm("raw pixels", "floor", method="pixels"),
    Arm("random encoder", "floor", method="random"),
    Arm("MAE", "bar", method="mae"),
    Arm("VICReg", "regularizer", ("loss.regularizer=vicreg",)),
    Arm("VICReg x 10", "regularizer", ("loss.regularizer=vicreg", "loss.regularizer_weight=1.0")),
    Arm("SIGReg", "regularizer", ("loss.regularizer=sigreg",)),
    Arm("official cut", "context", ("mask.truncate=batch_min", "mask.truncate_group=64")),
    Arm("a quarter at random", "context", ("mask.truncate=fraction", "mask.context_fraction=0.25")),
    Arm("one mask a batch", "masks", ("mask.share=batch",)),
    Arm("momentum .99", "momentum", ("optimization.ema=[0.99,1.0]",)),
    Arm("momentum .9995", "momentum", ("optimization.ema=[0.9995,1.0]",)),
    Arm("lr 3e-4", "learning rate", ("optimization.lr=3e-4",)),
    Arm("lr 3e-3", "learning rate", ("optimization.lr=3e-3",)),
    Arm("predictor lr x 4", "predictor's learning rate", ("optimization.pred_lr_scale=4",)),
    Arm("predictor lr / 4", "predictor's learning rate", ("optimization.pred_lr_scale=0.25",)),
    Arm("targets as they are", "target normalisation", ("loss.normalize=none",)),
    Arm("targets over the batch", "target normalisation", OVER_THE_BATCH),
    Arm("predictor 16 x 1", "predictor", ("meta.pred_emb_dim=16", "meta.pred_depth=1")),
    Arm("predictor 64 x 4", "predictor", ("meta.pred_emb_dim=64", "meta.pred_depth=4")),
    Arm("crops .3 to 1", "augmentation", ("data.crop_scale=[0.3,1.0]",)),
    Arm("no crop", "augmentation", ("data.crop_scale=[1.0,1.0]",)),
    Arm("half the schedule", "schedule", length=0.5),
    Arm("twice the schedule", "schedule", length=2),
    Arm("over the batch, lr 3e-3", "together", (*OVER_THE_BATCH, "optimization.lr=3e-3")),
    Arm("over the batch, momentum .99", "together", (*OVER_THE_BATCH, "optimization.ema=[0.99,1.0]")),
    Arm("over the batch, a quarter at random", "together",
        (*OVER_THE_BATCH, "mask.truncate=fraction", "mask.context_fraction=0.25")),
    Arm("over the batch, VICReg", "together", (*OVER_THE_BATCH, "loss.regularizer=vicreg")),
    Arm("over the batch, lr 3e-3, VICReg / 5", "together",
        (*OVER_THE_BATCH, "optimization.lr=3e-3", "loss.regularizer=vicreg", "loss.regularizer_weight=0.02")),
    Arm("over the batch, lr 3e-3, random masks", "together",
        (*OVER_THE_BATCH, "optimization.lr=3e-3", "mask.strategy=random")),
    Arm("over the batch, lr 3e-3, momentum .9", "together",
        (*OVER_THE_BATCH, "optimization.lr=3e-3", "optimization.ema=[0.9,1.0]")),
    Arm("over the batch, lr 3e-3, predictor 64 x 4", "together",
        (*OVER_THE_BATCH, "optimization.lr=3e-3", "meta.pred_emb_dim=64", "meta.pred_depth=4")),
    Arm("over the batch, lr 3e-3, twice the schedule", "together", (*OVER_THE_BATCH, "optimization.lr=3e-3"), length=2),
)
