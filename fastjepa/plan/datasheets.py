"""Facts of cards: dense peaks, memory and bandwidth of NVIDIA's data sheets (SXM), and what was measured of one of them."""

from typing import NamedTuple


class Datasheet(NamedTuple):
    """A card, in FLOP/s, bytes a second and GB (1e9 bytes)."""

    bf16: float
    fp32: float
    bandwidth: float
    memory: float
    gemm: float | None = None  # measured, of large bf16 products
    copied: float | None = None  # measured, bytes read and written by a copy

    def peak(self, dtype: str) -> float:
        """Return the dense FLOP/s of the data sheet for runtime.dtype."""
        return self.fp32 if dtype == "fp32" else self.bf16


DATASHEETS = {
    "h200": Datasheet(989e12, 67e12, 4.8e12, 141.0, gemm=788e12, copied=4.3e12),
    "h100": Datasheet(989e12, 67e12, 3.35e12, 80.0),
    "a100": Datasheet(312e12, 19.5e12, 2.039e12, 80.0),
}
