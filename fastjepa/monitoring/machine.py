"""The machine's rate of matrix products, and the memory of this process."""

import math
import sys
import time

import torch

GEMM_SHAPES = {"cpu": ((1024, 1024, 1024), (2048, 1024, 2048), (4096, 1024, 1024)), "cuda": ((4096,) * 3, (8192,) * 3)}


@torch.inference_mode()
def gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the rate of matrix products in FLOP/s: the best of several large shapes in `dtype`, on one device with its
    current threads.
    """
    best = 0.0
    shapes = GEMM_SHAPES[device.type]
    for m, k, n in shapes:
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
        out = torch.mm(a, b)  # warms up
        end = time.perf_counter() + seconds / len(shapes)
        while True:
            _synchronize(device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            _synchronize(device)
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
            if time.perf_counter() > end:
                break
    return best


def memory_gib() -> float:
    """Return the peak memory of this process in GiB: allocated on the GPU where CUDA is in use, else resident (workers
    excluded).

    NaN, null in the log, on a CPU under Windows, which does not say.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
