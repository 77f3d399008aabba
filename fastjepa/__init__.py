"""fastjepa: a fast trainer for I-JEPA (Assran et al., CVPR 2023)."""

__version__ = "0.1.0"


def load_encoder(path, which="target"):
    """A run's encoder for inference: `load_encoder("runs/demo").features(images)` is (b, N, D).

    Args:
        path: run directory or checkpoint.
        which: "target" (what the paper evaluates), "context" or "random".
    """
    from fastjepa.evals.features import load_encoder

    return load_encoder(path, which)
