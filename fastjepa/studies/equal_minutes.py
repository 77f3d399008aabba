"""Study of which objective learns most on small data in equal CPU minutes, beside MAE and floors that need no training.

An image costs MAE less than half of what it costs I-JEPA here, so that equal images are not equal work. Every arm's
schedule ends with the images that it reaches in its minutes: 4, and 20 and 60 of those that decide something.
"""

from fastjepa.studies.arm import Arm
from fastjepa.studies.small_data import OVER_THE_BATCH

MINUTES_PAPER = "none at this scale"

MUON = ("optimization.optimizer=muon", "optimization.muon_lr=8e-3", "optimization.lr=4e-3")
FOUR_LAYERS = (*OVER_THE_BATCH, "loss.target_layers=[1,2,3,4]")
MEAN_OF_FOUR = (*FOUR_LAYERS, "loss.layers=mean", "optimization.ema=[0.98,1.0]")
A_FIFTH_OF_VICREG = ("loss.regularizer=vicreg", "loss.regularizer_weight=0.02")
RANDOM_JOINT = ("mask.strategy=random", "mask.hidden_share=0.75", "meta.predictor=joint")  # 16 patches seen, 48 predicted
# fmt: off
BEST = (*MEAN_OF_FOUR, *RANDOM_JOINT, *MUON)
BEST_VICREG = (*BEST, *A_FIFTH_OF_VICREG)
MINUTES_ARMS = (
    Arm("base", "base"),
    Arm("raw pixels", "floor", method="pixels"),
    Arm("random encoder", "floor", method="random"),
    Arm("k-means", "floor", method="kmeans"),
    Arm("k-means, quadrants", "floor", method="kmeans_quadrants"),
    Arm("MAE", "bar", method="mae"),
    Arm("MAE, Muon", "bar", MUON, method="mae"),
    Arm("MAE, Muon, VICReg / 5", "bar", (*MUON, *A_FIFTH_OF_VICREG), method="mae"),
    Arm("Muon", "optimizer", MUON),
    Arm("targets over the batch", "targets", OVER_THE_BATCH),
    Arm("running moments", "targets", ("loss.normalize=running",)),
    Arm("dyntanh", "targets", ("loss.normalize=dyntanh",)),
    Arm("four layers", "targets", ("loss.target_layers=[1,2,3,4]",)),
    Arm("rotary positions", "positions", ("meta.positions=rope",)),
    Arm("random masks, joint predictor", "masks", RANDOM_JOINT),
    Arm("a quarter for the predictor, four times", "predictor", ("meta.predictor_context=0.25", "meta.predictor_repeats=4")),
    Arm("loss on visible tokens", "visible", ("loss.visible_weight=0.5",)),
    Arm("VICReg", "regularizer", ("loss.regularizer=vicreg",)),
    Arm("over the batch, Muon", "together", (*OVER_THE_BATCH, *MUON)),
    Arm("four layers over the batch", "together", FOUR_LAYERS),
    Arm("mean of four over the batch", "together", MEAN_OF_FOUR),
    Arm("mean of four over the batch, Muon", "together", (*MEAN_OF_FOUR, *MUON)),
    Arm("mean of four over the batch, random masks, Muon", "together", BEST),
    Arm("mean of four over the batch, random masks, Muon, rotary positions", "together", (*BEST, "meta.positions=rope")),
    Arm("mean of four over the batch, random masks, Muon, VICReg / 5", "together", BEST_VICREG),
    *(Arm(f"{name}, 20 minutes", "time", overrides, method=method, length=5)
      for name, method, overrides in (
          ("base", "ijepa", ()), ("MAE, Muon", "mae", MUON), ("MAE, Muon, VICReg / 5", "mae", (*MUON, *A_FIFTH_OF_VICREG)),
          ("mean of four", "ijepa", BEST), ("mean of four, VICReg / 5", "ijepa", BEST_VICREG))),
    *(Arm(f"{name}, 60 minutes", "time", overrides, method=method, length=15)
      for name, method, overrides in (
          ("base", "ijepa", ()), ("MAE, Muon", "mae", MUON), ("mean of four, VICReg / 5", "ijepa", BEST_VICREG))),
)
