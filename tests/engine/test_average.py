"""The sharded average: laid out as it is gathered where ranks cut all parameters as one, copied where they cut each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

from fastjepa.config.load import config_from_dict
from fastjepa.engine.average import ShardedAverage, _Part
from fastjepa.model.jepa import build_pair
from fastjepa.ranks import collectives
from fastjepa.ranks.shard import Piece
from tests.support.runs import TINY

YES, NO = torch.tensor(True), torch.tensor(False)


def cut_as_one(parameters: dict[str, Tensor], world: int) -> list[dict[str, Piece]]:
    """Stages 1 and 2: the parameters side by side, in equal parts."""
    room = -(-sum(p.numel() for p in parameters.values()) // world)
    return cut(parameters, world, lambda begun, _: [(rank * room - begun, (rank + 1) * room - begun) for rank in range(world)])


def cut_each(parameters: dict[str, Tensor], world: int) -> list[dict[str, Piece]]:
    """Stage 3: every parameter in equal parts."""
    return cut(parameters, world, lambda _, p: [(rank * -(-p.numel() // world), (rank + 1) * -(-p.numel() // world))
                                                for rank in range(world)])  # fmt: skip


def cut(parameters: dict[str, Tensor], world: int, limits) -> list[dict[str, Piece]]:
    """Each rank's pieces of it; `limits` gives where each rank's part of a parameter starts and ends."""
    found, begun = [{} for _ in range(world)], 0
    for name, p in parameters.items():
        for pieces, (low, high) in zip(found, limits(begun, p), strict=True):
            low, high = max(low, 0), min(high, p.numel())
            if low < high:
                pieces[name] = Piece(p.detach().reshape(-1)[low:high].clone(), low, tuple(p.shape))
        begun += p.numel()
    return found


@given(shapes=some.lists(some.tuples(some.integers(1, 5), some.integers(1, 5)), min_size=1, max_size=5),
       world=some.integers(1, 4), way=some.sampled_from([cut_as_one, cut_each]),
       dtype=some.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
def test_every_rank_gets_the_whole_average(shapes, world, way, dtype):
    start = {f"w{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    online = {name: torch.randn_like(value) for name, value in start.items()}
    cuts = way(online, world)
    extents = [[(name, piece.start, piece.tensor.numel()) for name, piece in mine.items()] for mine in cuts]
    parts, networks = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "gather_objects", lambda _: extents)
        for rank in range(world):  # as if this were that rank's process
            patch.setattr(collectives, "this_rank", lambda rank=rank: rank)
            networks.append({name: nn.Parameter(value.clone(), requires_grad=False) for name, value in start.items()})
            parts.append(_Part(networks[rank], cuts[rank], dtype))
            parts[rank].update(0.75, YES)
        patch.setattr(collectives, "all_gather", lambda _, into=None: into.copy_(sent) if into is not None else sent)
        sent = torch.cat([part.sent for part in parts])
        for part in parts:
            part.gather()
    for name, value in start.items():
        expected = value.lerp(online[name], 0.25)
        for network in networks:
            assert network[name].dtype == dtype and network[name].shape == value.shape
            torch.testing.assert_close(
                network[name].float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
            )
    if way is cut_as_one:
        assert all(p.untyped_storage().data_ptr() == part.whole.untyped_storage().data_ptr()
                   for part, network in zip(parts, networks, strict=True) for p in network.values())  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_starts_as_the_target_encoder_is_and_not_as_the_encoder(dtype):
    """Weights given by --init need not be alike."""
    jepa, target_encoder = build_pair(config_from_dict(TINY))
    for p in target_encoder.parameters():
        p.copy_(torch.randn_like(p))
    start = {name: p.clone() for name, p in target_encoder.named_parameters()}
    online = {name: Piece(p.detach().view(-1), 0, tuple(p.shape)) for name, p in jepa.encoder.named_parameters()}
    average = ShardedAverage(target_encoder, online, dtype)
    average.update(0.5, NO)
    for name, piece in average.pieces().items():
        assert torch.equal(piece.tensor, start[name].view(-1)), name
    average.update(0.5, YES)
    for name, p in target_encoder.named_parameters():
        expected = (start[name] + dict(jepa.encoder.named_parameters())[name]) / 2
        torch.testing.assert_close(average.pieces()[name].tensor, expected.view(-1))
        assert p.dtype == (dtype if p.ndim > 1 else torch.float32) and torch.equal(
            p, average.pieces()[name].tensor.view_as(p).to(p.dtype)
        )
