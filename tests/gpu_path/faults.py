"""Faults that a fake card must see, and their harmless neighbours: `python -m tests.gpu_path.faults`."""

from collections.abc import Callable

from tests.support.fake_card import FakeCard  # before torch

import torch  # isort: skip
from torch import Tensor

from tests.support.card_cases import tell_faults


def on_card(*shape: int, dtype: torch.dtype = torch.float32, index: int = 0) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=f"cuda:{index}")


WAITS = {
    "item": lambda: on_card().item(),
    "bool": lambda: bool(on_card(dtype=torch.bool)),
    "tolist": lambda: on_card(1).tolist(),
    "cpu": lambda: on_card(3).cpu(),
    "copy down": lambda: torch.empty(3).copy_(on_card(3), non_blocking=True),  # the host's side is not pinned
    "copy down, waiting": lambda: torch.empty(3, pin_memory=True).copy_(on_card(3)),
    "pageable up": lambda: torch.ones(3).to("cuda", non_blocking=True),
    "pinned up, waiting": lambda: torch.ones(3).pin_memory().to("cuda"),
    "booleans": lambda: on_card(3, 3)[on_card(3, 3, dtype=torch.bool)],
    "write booleans": lambda: on_card(3, 3).__setitem__(on_card(3, 3, dtype=torch.bool), 0.0),
    "nonzero": lambda: on_card(3).nonzero(),
    "unique": lambda: on_card(3).unique(),
    "masked_select": lambda: on_card(3).masked_select(on_card(3, dtype=torch.bool)),
    "equal": lambda: torch.equal(on_card(3), on_card(3)),
    "synchronize": lambda: torch.cuda.synchronize(),
    "event": lambda: recorded().synchronize(),
    "backward": lambda: backward_that_reads(),
}
ASYNCHRONOUS = {
    "pinned up": lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "pinned down": lambda: torch.empty(3, pin_memory=True).copy_(on_card(3), non_blocking=True),
    "a number": lambda: on_card(3) * torch.tensor(2.0),
    "whole numbers": lambda: on_card(3)[on_card(2, dtype=torch.int64)],
    "fill": lambda: on_card(3).fill_(2.0),
    "host": lambda: torch.ones(3).nonzero().tolist(),
    "backward": lambda: on_card(3).requires_grad_().square().sum().backward(),
}
ERRORS = {
    "two cards": (lambda: on_card(3) + on_card(3, index=1), "cuda:1"),
    "card and host": (lambda: on_card(3) + torch.ones(3), "cpu"),
    "pin a card": (lambda: on_card(3).pin_memory(), "cannot pin"),
    "capture": (lambda: captured(lambda: on_card().item()), "when stream is capturing"),
    "no record": (lambda: torch.cuda.Event().synchronize(), "never recorded"),
}


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def backward_that_reads() -> None:
    x = on_card(3).requires_grad_()
    y = x.square()
    y.register_hook(lambda grad: grad * float(grad.sum()))
    y.sum().backward()


def captured(body: Callable[[], object]) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        body()


def take_case(case: str) -> None:
    kind, name = case.split(": ")
    with FakeCard() as card:
        if kind == "error":
            call, word = ERRORS[name]
            try:
                call()
            except (RuntimeError, AssertionError) as error:
                assert word in str(error), str(error)
                return
            raise AssertionError("no error")
        (WAITS if kind == "waits" else ASYNCHRONOUS)[name]()
        assert len(card.waits) == (kind == "waits"), [str(wait) for wait in card.waits]


if __name__ == "__main__":
    kinds = {"waits": WAITS, "asynchronous": ASYNCHRONOUS, "error": ERRORS}
    tell_faults([f"{kind}: {name}" for kind, cases in kinds.items() for name in cases], take_case)
