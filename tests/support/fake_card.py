"""A CUDA card that is not there: its tensors have a shape, a dtype, strides and a device, but no values.

Within `with FakeCard() as card:` torch.cuda answers as an H100 would, and tensors of the host stay real. Operations between
devices raise, as they would on a card. What makes the host wait for the device (an .item(), a .cpu(), a copy from pageable
memory, an index of booleans) is noted in `card.waits` with the line that asked, and goes on with zeros; within a capture it
raises. What C++ checks inside of an operator, determinism, and everything asynchronous cannot be seen here.

It must be imported before torch, so every test with it is a process of its own (tests/support/card_cases.py).
"""

import contextlib
import ctypes
import itertools
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.support.places import ROOT

TORCHES = (
    "2.11.0",
    "2.14.1",
)  # whose internals are replaced here; with another version, run tests/gpu_path and mend what fails
CARDS = 2
OURS = tuple(str(ROOT / folder) for folder in ("fastjepa", "kernels", "benchmarks", "tests/gpu_path", "tests/ops"))
# The answers that autograd wants of c10 and the driver before it runs a backward over CUDA tensors: `cards` without a context.
# With none, torch's fake mode puts a guard that does nothing in the place of CUDA's; there are some from then on.
DRIVER = """
signed char cards = 0;
signed char _ZN3c104cuda12device_countEv(void) { return cards; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
"""


def _load_driver() -> ctypes.CDLL:
    """Compile those answers and load them under the driver's name, before torch looks for them."""
    if "torch" in sys.modules:
        raise RuntimeError("tests.support.fake_card must be imported before torch, in a process of its own")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "driver.c", Path(folder) / "driver.so"
        source.write_text(DRIVER)
        subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


ANSWERS = _load_driver()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

if torch.__version__.partition("+")[0] not in TORCHES:
    raise RuntimeError(f"tests/support/fake_card.py is written for torch {TORCHES}, not {torch.__version__}; see its TORCHES")

aten = torch.ops.aten
INDEXES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
NO_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_byte)(lambda device: False)
HOST_DATA_PTR, MOVE_MODULE, INIT_PROCESS_GROUP = Tensor.data_ptr, torch.nn.Module.to, torch.distributed.init_process_group
_device_constructors()  # kept from now on: names replaced below would not be known to take a default device
_pinned: dict[int, Tensor] = {}  # by the address of their storage; kept, so that no other tensor gets the address


def is_pinned(tensor: Tensor) -> bool:
    """Return whether a tensor of the host lies in memory that was pinned here."""
    return tensor.untyped_storage().data_ptr() in _pinned


def pin(tensor: Tensor) -> Tensor:
    """Note a tensor of the host as pinned."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{tensor.device}': only dense CPU tensors can be pinned")
    _pinned[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


class Wait(NamedTuple):
    """A moment in which the host waits for the card."""

    what: str
    where: str  # the last file and line of ours
    callers: frozenset[str]  # names of the functions of ours that were running

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


class FakeCard(FakeTensorMode):
    """The mode: operations with a tensor of the card, or that make one, are computed without values."""

    avoid_device_init = True

    def __init__(self, current: torch.device | None = None):
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[Wait] = []
        self.current = current.index or 0 if current else 0
        self.capturing, self._depth = False, 0
        self._places, self._storages = itertools.count(1 << 40, 1 << 34), {}

    # Operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        here = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if not here and (to is None or to.type != "cuda"):
            return func(*args, **kwargs)  # the host's own
        if func in READS:
            self.wait(str(func))
            return READS[func](args)
        if func in (aten.copy_.default, aten._to_copy.default) and (copy := self._copied(func, args, kwargs)) is not None:
            return copy
        if func in INDEXES:
            args = (args[0], [place for one in args[1] for place in self._places_of(one)], *args[2:])
        lifted = tree_map_only(Tensor, lambda x: x if isinstance(x, FakeTensor) else self.from_tensor(x), (args, kwargs))
        return super().__torch_dispatch__(func, types, *lifted)

    def _copied(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """Return what a copy from the card to the host gives, None for any other; note the copies that the host waits for."""
        if func is aten.copy_.default:
            into, source, *asynchronous = args
            to, asynchronous = into.device.type, any(asynchronous) or kwargs.get("non_blocking")
        else:
            into, source = None, args[0]
            to, asynchronous = torch.device(kwargs.get("device") or source.device).type, kwargs.get("non_blocking")
        if to == "cuda" and not isinstance(source, FakeTensor):
            if source.ndim and not (asynchronous and is_pinned(source)):  # a number goes along with the kernel
                self.wait(f"a copy of {tuple(source.shape)} from pageable memory of the host")
            return None
        if to != "cpu" or source.device.type != "cuda":
            return None
        if into is None or not (asynchronous and is_pinned(into)):
            self.wait(f"a copy of {tuple(source.shape)} to the host")
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype) if into is None else into.zero_()

    def _places_of(self, index: Tensor | None) -> list[Tensor | None]:
        """Return the indices of whole numbers that an index stands for; the host has to count one of booleans."""
        if index is None or index.dtype != torch.bool:
            return [index]
        self.wait("an index of booleans")
        return [index.new_zeros(index.numel(), dtype=torch.int64)] * index.ndim

    def wait(self, what: str) -> None:
        """Note that the host waits, and where; RuntimeError within a capture."""
        frames = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)  # the innermost comes first
        stack = [frame for frame in frames if frame.filename.startswith(OURS)]
        where = f"{stack[0].filename}:{stack[0].lineno}" if stack else "a thread of autograd"
        self.waits.append(Wait(what, where, frozenset(frame.name for frame in stack)))
        if self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {self.waits[-1]}")

    def address(self, tensor: Tensor) -> int:
        """Return an address that no other storage of the card has."""
        if not isinstance(tensor, FakeTensor):
            return HOST_DATA_PTR(tensor)
        storage = tensor.untyped_storage()
        place, _ = self._storages.setdefault(storage._cdata, (next(self._places), storage))
        return place + tensor.storage_offset() * tensor.element_size() if tensor.numel() else 0

    # torch.cuda

    def __enter__(self):
        self._depth += 1  # the mode enters itself again
        if self._depth == 1:
            self._patches = contextlib.ExitStack()
            for place, name, answer in self._answers():
                self._patches.enter_context(mock.patch.object(place, name, answer))
        entered = super().__enter__()
        if self._depth == 1:
            _let_backward_run()
        return entered

    def __exit__(self, *error):
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._patches.close()

    def _answers(self) -> Iterator[tuple[Any, str, Any]]:
        """Yield (where, name, replacement) of all that asks for the card or cannot take its tensors."""
        cuda = {
            "is_available": lambda: True, "is_initialized": lambda: True,
            "device_count": lambda: CARDS, "current_device": lambda: self.current, "set_device": self._make_current,
            "device": self._on, "get_device_name": lambda d=None: Properties.name,
            "get_device_properties": lambda d=None: Properties, "get_device_capability": lambda d=None: (9, 0),
            "is_bf16_supported": lambda *a, **k: True,
            "stream": contextlib.nullcontext, "Event": lambda *a, **k: Event(self),
            "synchronize": lambda d=None: self.wait("torch.cuda.synchronize"),
            "CUDAGraph": Graph, "graph": self._capture, "is_current_stream_capturing": lambda: self.capturing,
            "memory_allocated": lambda d=None: 0, "max_memory_allocated": lambda d=None: 0,
            "get_rng_state": lambda d=None: torch.zeros(16, dtype=torch.uint8),
        }  # fmt: skip
        for name in ("Stream", "current_stream", "default_stream"):
            cuda[name] = lambda *a, **k: Stream(self)
        for name in ("_lazy_init", "_sleep", "reset_peak_memory_stats", "empty_cache", "manual_seed", "manual_seed_all",
                     "set_rng_state"):  # fmt: skip
            cuda[name] = lambda *a, **k: None  # one for each: Dynamo wants every function of torch to be another
        yield from ((torch.cuda, name, answer) for name, answer in cuda.items())
        yield Tensor, "data_ptr", lambda tensor: self.address(tensor)
        yield Tensor, "pin_memory", lambda tensor, *a: pin(tensor.clone() if tensor.device.type == "cpu" else tensor)
        yield Tensor, "record_stream", lambda tensor, stream: None
        yield Tensor, "is_pinned", lambda tensor, *a: is_pinned(tensor)
        yield from ((torch, name, _pinning(getattr(torch, name))) for name in ("empty", "zeros"))
        yield torch._subclasses.fake_tensor, "init_gpu_context", lambda *a: None  # of 2.11: makes a tensor on the card
        yield torch, "Generator", HostGenerator
        yield torch._C, "_select_conv_backend", lambda *a, **k: torch._C._ConvBackend.Cudnn
        yield torch._C, "_conv_determine_backend_memory_format", lambda *a: torch.contiguous_format
        yield torch.distributed, "init_process_group", _init_without_nccl
        yield torch.distributed, "all_gather_object", lambda into, thing, *a, **k: into.__setitem__(0, thing)
        yield torch.nn.Module, "to", _move_module
        yield torch.nn.init, "trunc_normal_", lambda tensor, *a, **k: tensor  # seconds, for values that nobody reads

    def _make_current(self, device: torch.device | int) -> None:
        self.current = device if isinstance(device, int) else torch.device(device).index or 0

    @contextlib.contextmanager
    def _on(self, device: torch.device | int) -> Iterator[None]:
        before = self.current
        self._make_current(device)
        yield
        self.current = before

    @contextlib.contextmanager
    def _capture(self, graph: "Graph", **options: Any) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


READS = {  # what returns a value to the host, or a shape that depends on one: what it gives without values
    aten._local_scalar_dense.default: lambda args: torch.zeros((), dtype=args[0].dtype).item(),
    aten.equal.default: lambda args: True,
    aten.is_nonzero.default: lambda args: False,
    aten.nonzero.default: lambda args: args[0].new_zeros(args[0].numel(), args[0].ndim, dtype=torch.int64),
    aten.masked_select.default: lambda args: args[0].flatten(),
    aten._unique2.default: lambda args: (args[0].flatten(), args[0].long(), args[0].flatten().long()),
}


def _let_backward_run() -> None:
    """Tell c10 that no card has a context: autograd then asks none for its streams. Attention is the one in plain torch."""
    ctypes.c_byte.in_dll(ANSWERS, "cards").value = 64  # autograd asks for a context by any index that could be
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10_cuda.so"))
    library._ZN3c104cuda9_internal20setHasPrimaryContextEPFbaE(NO_CONTEXT)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter of the host cannot become a fake one
    for backend in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{backend}_sdp")(False)


def _init_without_nccl(backend: str, device_id: torch.device | None = None, **options: Any) -> None:
    """Make a process group of one rank; in NCCL's place, which reduces tensors of cards alone, one that changes nothing."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers "fake"

    INIT_PROCESS_GROUP("cuda:fake" if backend == "nccl" else backend.replace("nccl", "fake"), **options)


def _move_module(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Move a module unless it is there: torch would swap each parameter, which one that an optimizer holds refuses."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    held = [*module.parameters(), *module.buffers()]
    there = all(one.device == device and (dtype is None or one.dtype == dtype) for one in held)
    return module if there else MOVE_MODULE(module, *args, **kwargs)


def _pinning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return pin(make(*args, **kwargs)) if pin_memory else make(*args, **kwargs)

    return made


class Properties:
    """The card's properties."""

    name, major, minor, total_memory, multi_processor_count = "NVIDIA H100 80GB HBM3", 9, 0, 80 << 30, 132
    warp_size, regs_per_multiprocessor, max_threads_per_multi_processor = 32, 65536, 2048
    shared_memory_per_block_optin, L2_cache_size, gcnArchName, uuid = 232448, 50 << 20, "", "GPU-fake"


class HostGenerator(torch.Generator):
    """A generator of the host, whatever device it is asked for: a card without values draws none."""

    def __new__(cls, device: torch.device | str = "cpu"):
        return super().__new__(cls, "cpu")


class Graph:
    """A captured graph, which counts its replays."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


class Stream:
    """A stream on which everything happens at once."""

    cuda_stream = 0

    def __init__(self, card: FakeCard):
        self.card = card

    def wait_stream(self, other: "Stream") -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self.card)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.card.wait("Stream.synchronize")


class Event:
    """An event that has happened once it is recorded."""

    def __init__(self, card: FakeCard):
        self.card, self.recorded = card, False

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return self.recorded

    def elapsed_time(self, end: "Event") -> float:
        assert self.recorded and end.recorded, "an event that was never recorded"
        return 1.0

    def synchronize(self) -> None:
        assert self.recorded, "an event that was never recorded"
        self.card.wait("Event.synchronize")


@contextlib.contextmanager
def counted_graphs() -> Iterator[list[str]]:
    """Compile with a backend that runs a graph as it was traced; give the signature of each graph that is made."""
    made: list[str] = []
    compile_with = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        made.append(", ".join(node.name for node in graph.graph.nodes if node.op == "placeholder"))
        return graph.forward

    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", lambda *a, **options: compile_with(*a, **options | {"backend": backend})):
        yield made
