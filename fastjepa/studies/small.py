"""Why I-JEPA learns little on small data, and what helps: each arm one change of the base, then MAE and two floors."""

from fastjepa.studies.arm import Arm

PAPER = "none at this scale"

# fmt: off
ARMS = (
    Arm("base", "base"),
    Arm("raw pixels", "floor", method="pixels"),
    Arm("random encoder", "floor", method="random"),
    Arm("MAE", "bar", method="mae"),
    Arm("MAE, wide decoder", "bar", ("meta.pred_emb_dim=64", "meta.pred_depth=4"), method="mae"),
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
    Arm("targets over the batch", "target normalisation", ("loss.normalize=batch",)),
    Arm("predictor 16 x 1", "predictor", ("meta.pred_emb_dim=16", "meta.pred_depth=1")),
    Arm("predictor 64 x 4", "predictor", ("meta.pred_emb_dim=64", "meta.pred_depth=4")),
    Arm("crops .3 to 1", "augmentation", ("data.crop_scale=[0.3,1.0]",)),
    Arm("no crop", "augmentation", ("data.crop_scale=[1.0,1.0]",)),
    Arm("no flip", "augmentation", ("data.use_horizontal_flip=false",)),
    Arm("half the schedule", "schedule", length=0.5),
    Arm("twice the schedule", "schedule", length=2),
    Arm("four times the schedule", "schedule", length=4),
)
# fmt: on
