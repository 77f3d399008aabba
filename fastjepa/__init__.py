"""fastjepa: a fast trainer for I-JEPA (Assran et al., CVPR 2023)."""

__version__ = "0.1.0"


def load_encoder(path, which=None, positions=None, grid=None):
    """Load an encoder for inference: `load_encoder("runs/demo").forward_features(images)` is (b, N, D).

    Args:
        path: a run or checkpoint, an official .pth.tar, a .safetensors file of weights, or a folder of `fastjepa convert`,
            timm or transformers (IJepaModel).
        which: "target" (what the paper evaluates) or "context"; default: target where there is a choice, else the one
            there is. The encoder's `which` says it; its other attributes are image_size, patch_size, channels, mean_std
            and origin.
        positions: those that patches of images of another size have: "computed" (the default, with a warning), "interpolated"
            or "scaled"; docs/evaluation.md compares them.
        grid: (rows, columns) of patches, for a file that does not say them.
    """
    from fastjepa.weights import read

    return read.load_encoder(path, which, positions, grid)
