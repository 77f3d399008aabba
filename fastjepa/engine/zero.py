"""The ZeRO engine: DeepSpeed shards optimizer states, gradients and weights over the ranks."""

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastjepa.engine.adamw import apply_schedule, build_adamw
from fastjepa.engine.average import ShardedAverage
from fastjepa.engine.schedule import StepSettings
from fastjepa.engine.shards import Shards
from fastjepa.errors import ConfigError
from fastjepa.masks.packed import Blocks, Packed
from fastjepa.model.jepa import Jepa
from fastjepa.model.vit import Encoder
from fastjepa.ranks.shard import Piece
from fastjepa.ranks.world import World, group_backends


class ZeroEngine:
    """Forward, backward and step over DeepSpeed's ZeRO: optimizer state and fp32 masters (1), gradients (2), weights (3)
    sharded.

    The methods are those of PlainEngine.

    Parameters and reductions stay in fp32, computation is autocast, and DeepSpeed's own check of the gradients' norm, which
    all ranks share, decides whether a step is taken: it waits for the device once a step.
    """

    def __init__(self, jepa: Jepa, settings: dict[str, Any], world: World, pred_lr_scale: float = 1.0):
        self.jepa, self.device = jepa, world.device
        self.micro_batches, self.seen = settings["gradient_accumulation_steps"], 0
        self.low = settings["torch_autocast"]["enabled"]
        self.stage = settings["zero_optimization"]["stage"]
        self.names = {p: name for name, p in jepa.named_parameters()}
        self.shapes = {name: tuple(p.shape) for p, name in self.names.items()}
        self.optimizer = build_adamw(jepa.encoder, jepa.predictor, pred_lr_scale)
        self.network = _initialize(jepa, self.optimizer, settings, world)
        self.zero = self.network.optimizer
        self.groups = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for group in range(len(self.groups)):  # made now, so that a checkpoint finds them before the first step
            with self._loaded(group) as flat:
                self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), "exp_avg": torch.zeros_like(flat),
                                              "exp_avg_sq": torch.zeros_like(flat)}  # fmt: skip

    def shards(self, average: ShardedAverage, networks: Mapping[str, nn.Module]) -> Shards:
        """Return this rank's part of the state, as checkpoints see it."""
        return Shards(self, average, networks)

    def follow(self, target_encoder: Encoder) -> ShardedAverage:
        """Return the average that follows the encoder's fp32 masters, sharded as they are; it starts as `target_encoder`."""
        masters = {name: piece for name, piece in self.masters().items() if name.startswith("encoder.")}
        online = {name.removeprefix("encoder."): piece for name, piece in masters.items()}
        return ShardedAverage(target_encoder, online, torch.bfloat16 if self.low else torch.float32)

    def __call__(self, images: Tensor, context: Packed, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return predictions (Q, D), context features (T, D) and those pooled, as Jepa.forward."""
        return self.network(images, context, blocks)

    @torch.no_grad()
    def pooled(self, images: Tensor, context: Packed, blocks: Blocks) -> Tensor:
        """Return the pooled features alone, as a regularizer reads them; sharded weights are gathered for the whole pair or
        not at all.
        """
        if self.stage == 3:
            return self.network(images, context, blocks)[2]
        return self.jepa.pooled(self.jepa.encoder(images, context), context)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients to those of the step."""
        self.network.backward(loss, scale_wrt_gas=False)
        self.seen += 1
        if self.seen < self.micro_batches:
            self.network.step()  # counts the micro-batch; the last one is counted by `step`

    def step(self, now: StepSettings) -> Tensor:
        """Step the optimizer unless a gradient is not finite, and return whether it was stepped, as PlainEngine.step."""
        apply_schedule(self.optimizer, now)
        self.network.step()
        self.seen = 0
        return torch.tensor(not self.zero.overflow, device=self.device)

    def masters(self) -> dict[str, Piece]:
        """Return this rank's piece of each parameter's fp32 master, by "encoder." or "predictor." and the official name."""
        # Weights are fp32 themselves: where masters are on NVMe, they are the same numbers.
        flats = [self.zero.fp16_partitioned_groups_flat[group] if self._swapped(group) else flat
                 for group, flat in enumerate(self.groups)]  # fmt: skip
        return {name: self._piece(flats[group], name, *place) for group, name, place in self._places()}

    def moments(self) -> dict[str, Piece]:
        """Return this rank's piece of each "parameter.moment"; a step count is everywhere, its group's. Those on NVMe are
        copies.
        """
        states, found = [self._state(group) for group in range(len(self.groups))], {}
        for group, name, place in self._places():
            found |= {f"{name}.{key}": self._piece(states[group][key], name, *place) for key in ("exp_avg", "exp_avg_sq")}
        return found | {f"{name}.step": Piece.all_of(states[group]["step"]) for group, name in self._owners()}

    def refresh(self, moments: Mapping[str, Piece]) -> None:
        """Bring the network's weights up to masters, and what is on NVMe to masters and moments, written from outside."""
        if self.stage < 3:
            return self.zero.update_lp_params()
        self.zero._partition_all_parameters()
        for group in range(len(self.groups)):
            if self._swapped(group):
                self._write(group, moments)
            else:
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _swapped(self, group: int) -> bool:
        """Return whether DeepSpeed keeps the group's masters and moments on NVMe between steps; small groups stay in memory."""
        return self.stage == 3 and self.zero._swappable_optimizer_subgroup(group)

    @contextlib.contextmanager
    def _loaded(self, group: int) -> Iterator[Tensor]:
        """Bring the group's masters and moments into memory for a change that is written back."""
        if self._swapped(group):
            self.zero._optimizer_states_and_gradient_swap_in(group)
        yield self.groups[group]
        if self._swapped(group):
            self.zero._optimizer_states_and_gradient_swap_out(group)

    def _state(self, group: int) -> dict[str, Tensor]:
        """Return AdamW's state of the group, to read; to write as well unless it is on NVMe."""
        state = self.optimizer.state[self.groups[group]]
        if not self._swapped(group):
            return state
        self.zero._optimizer_states_and_gradient_swap_in(group)
        copies = {key: tensor.clone() for key, tensor in state.items() if key != "step"}  # which is always in memory
        self.zero._release_swap_buffers(group)
        return state | copies

    @torch.no_grad()
    def _write(self, group: int, moments: Mapping[str, Piece]) -> None:
        with self._loaded(group) as flat:
            flat.copy_(self.zero.fp16_partitioned_groups_flat[group])
            for _, name, (offset, _, count) in (place for place in self._places() if place[0] == group):
                for key in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[flat][key].narrow(0, offset, count).copy_(moments[f"{name}.{key}"].tensor)

    def _piece(self, flat: Tensor, name: str, offset: int, start: int, count: int) -> Piece:
        return Piece(flat.detach().narrow(0, offset, count), start, self.shapes[name])

    def _owners(self) -> Iterator[tuple[int, str]]:
        """Yield (group, parameter) of every parameter, also of those this rank has no part of."""
        members = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
        for group, parameters in enumerate(members):
            yield from ((group, self.names[p]) for p in parameters)

    def _places(self) -> Iterator[tuple[int, str, tuple[int, int, int]]]:
        """Yield (group, parameter, (offset in the group, start in the parameter, count)) of this rank's pieces.

        Example at stage 3 on two ranks: of a parameter of 5 elements each rank holds 3, the last one padded; rank 1's piece
        starts at 3 in the parameter and counts 2.
        """
        by_name = {name: p for p, name in self.names.items()}
        for group, name in self._owners():
            p = by_name[name]
            if self.stage == 3:
                _, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
                start = dist.get_rank() * p.ds_tensor.ds_numel
                count = min(p.ds_tensor.ds_numel, p.ds_numel - start)  # the last rank's part is padded
            elif p._hp_mapping is None:
                continue
            else:
                offset, start = p._hp_mapping.hp_fragment_address.start, p._hp_mapping.lp_fragment_address.start
                count = p._hp_mapping.hp_fragment_address.numel
            if count > 0:
                yield group, name, (offset, start, count)


def _initialize(jepa: Jepa, optimizer: torch.optim.Optimizer, settings: dict[str, Any], world: World) -> nn.Module:
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("runtime.zero: sharding needs DeepSpeed; pip install 'fastjepa[deepspeed]' or set it to 0") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*is deprecated", FutureWarning)  # what DeepSpeed still calls
    if (settings["zero_optimization"].get("offload_optimizer") or {}).get("device") == "nvme":
        _, usable, why = next(op for op in deepspeed_ops(world.device.type) if op[0] == "async_io")
        if not usable:
            raise ConfigError(f"offload_optimizer to nvme: DeepSpeed cannot build async_io ({why}); apt-get install libaio-dev")
    if world.device.type == "cpu":  # its shared-memory reduction is compiled anew by every process: a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        _join_alone(world.device)
    network, *_ = deepspeed.initialize(model=jepa, optimizer=optimizer, config=settings, dist_init_required=False)
    return network


def _join_alone(device: torch.device) -> None:
    """Make the process group of one rank: DeepSpeed wants one, and a launcher's word."""
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **group_backends(device))


def deepspeed_ops(device: str) -> list[tuple[str, bool, str]]:
    """Return (name, whether it can be built here, DeepSpeed's words) of its compiled parts that a setting of ours could
    reach.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    found = []
    for name in ("fused_adam", "cpu_adam", "async_io"):
        builder, said = ALL_OPS[name], io.StringIO()
        with contextlib.redirect_stdout(said):  # the reasons are printed
            usable = (builder() if isinstance(builder, type) else builder).is_compatible(verbose=True)
        lines = [re.sub(r"\x1b\[\d+m|\[WARNING\]", "", line).strip() for line in said.getvalue().splitlines()]
        found.append((name, usable, lines[0] if lines else ""))
    return found
