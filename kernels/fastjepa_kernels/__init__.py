"""Token ops for I-JEPA, each defined in PyTorch and implemented in Triton; needs torch alone, never `fastjepa`."""

__version__ = "0.1.0"
__all__: list[str] = []
