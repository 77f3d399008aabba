"""Ways to call a case of fastjepa_kernels.cases, which must agree: plainly, by its definition, compiled, from a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor

import fastjepa_kernels
from fastjepa_kernels.cases import CASES, Case

Way = Callable[[Case], list[Tensor]]


def outcome(op: str, variant: int, way: Way) -> list[Tensor]:
    """Return the result of a case, its gradients and what it writes; its inputs are the same for every way."""
    torch.manual_seed(0)
    make, variants = CASES[op]
    case = make(*variants[variant])
    for leaf in case.leaves:
        leaf.requires_grad_()
    return [tensor.detach().clone() for tensor in (*way(case), *case.writes)]


def called(case: Case, call: Callable | None = None) -> list[Tensor]:
    """Return the result of the op and its gradients."""
    out = (call or case.call)()
    if not case.leaves:
        return [] if out is None else [out]
    return [out, *torch.autograd.grad(out, case.leaves, torch.ones_like(out))]


def defined(case: Case) -> list[Tensor]:
    """Take the definition's place for the kernel's."""
    fastjepa_kernels.use("torch")
    try:
        return called(case)
    finally:
        fastjepa_kernels.use("auto")


def compiled(case: Case) -> list[Tensor]:
    """Compile the call as one graph; without a card it is traced and not lowered."""
    torch._dynamo.reset()
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return called(case, torch.compile(case.call, fullgraph=True, backend=backend))


def replayed(case: Case) -> list[Tensor]:
    """Replay a CUDA graph once, captured after a call to warm up; changes of the inputs are undone before."""
    inputs = [tensor.detach() for tensor in (*case.reads, *case.writes)]
    before = [tensor.clone() for tensor in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        called(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = called(case)
    for tensor, value in zip(inputs, before, strict=True):
        tensor.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    return out
