"""A peer for benchmarks/peer_process.py: one linear layer, whose FLOPs are known, and the faults that a peer may have."""

import os

from peer_process import Request
from peer_steps.loop import PeerStep, adamw
from torch import Tensor, nn


class ToyStep(PeerStep):
    def __init__(self, request: Request):
        super().__init__(request)
        print("a library that prints", flush=True)
        fault = request.config.get("fault")
        if fault == "raises":
            raise RuntimeError("no such width\nand a second line")
        if fault == "dies":
            os.write(2, b"killed by a library\n")
            os._exit(3)
        self.layer = nn.Linear(request.shape["width"], 1, bias=False).to(self.device)
        self.optimizer, self.followed = adamw([self.layer], request), 0

    def loss(self, number: int) -> Tensor:
        images = self.batch(number)[0]
        return self.layer(images.flatten(1)[:, : self.layer.in_features]).mean() + 10 * (number % 2)

    def follow(self) -> None:
        self.followed += 1


build = ToyStep
