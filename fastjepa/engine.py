"""The engine runs the trained pair: forward, backward, step. Plain torch on one process or with DDP, or DeepSpeed's ZeRO."""

import contextlib
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from fastjepa import optim
from fastjepa.config import Config, ConfigError
from fastjepa.distributed import World
from fastjepa.model import Jepa
from fastjepa.packing import Blocks, Packed
from fastjepa.pieces import Piece
from fastjepa.schedule import Now

# Torch 2.14 renamed the option.
SYNC_BUFFERS = max({"forward_sync_buffers", "broadcast_buffers"} & signature(DistributedDataParallel).parameters.keys())
BUCKET = 50_000_000  # elements of a reduction or gather: 200 MB of fp32, where DeepSpeed's default takes 2 GB


class Engine:
    """Accumulates `micro_batches` gradients between steps; ranks exchange them during the last backward only.

    With `static_gradients` a gradient stays where it is in memory and is zeroed after a step, as a CUDA graph needs it.
    """

    def __init__(self, jepa: Jepa, world: int = 1, micro_batches: int = 1, static_gradients: bool = False,
                 pred_lr_scale: float = 1.0):  # fmt: skip
        self.jepa, self.micro_batches, self.static_gradients = jepa, micro_batches, static_gradients
        self.optimizer = optim.adamw(jepa.encoder, jepa.predictor, pred_lr_scale)
        self.parameters = list(jepa.parameters())
        fixed = {SYNC_BUFFERS: False}  # positions: no forward needs to exchange them
        self.network = jepa if world == 1 else DistributedDataParallel(jepa, gradient_as_bucket_view=True, **fixed)
        self._count(0)

    def __call__(self, images: Tensor, context: Packed, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """As Jepa.forward."""
        return self.network(images, context, blocks)

    @torch.no_grad()
    def features(self, images: Tensor, context: Packed, blocks: Blocks) -> Tensor:
        """(T, D) context features alone, without gradient."""
        return self.jepa.encoder(images, context)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self._count(self.seen + 1)

    def _count(self, seen: int) -> None:
        """The micro-batches seen; outside the forward, which is thereby the same function every time, to a compiler too."""
        self.seen = seen
        self.network.require_backward_grad_sync = seen + 1 == self.micro_batches

    def step(self, now: Now) -> Tensor:
        """Step the optimizer with this step's schedule values, unless a gradient is not finite.

        Returns a 0-dim bool tensor on the device: whether the step was taken. A step that was not taken changed no
        weight, no moment and no step count.
        """
        finite = torch.isfinite(get_total_norm([p.grad for p in self.parameters], foreach=True))
        optim.apply_schedule(self.optimizer, now)
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.static_gradients)
        self._count(0)
        return finite


class ShardedEngine:
    """The same methods over DeepSpeed's ZeRO: optimizer state and fp32 masters (1), gradients (2), weights (3) sharded.

    Parameters and reductions stay in fp32, computation is autocast, and DeepSpeed's own check of the gradients' norm, which
    all ranks share, decides whether a step is taken: it waits for the device once a step.
    """

    def __init__(self, jepa: Jepa, settings: dict[str, Any], world: World, pred_lr_scale: float = 1.0):
        self.jepa, self.device = jepa, world.device
        self.micro_batches, self.seen = settings["gradient_accumulation_steps"], 0
        self.stage = settings["zero_optimization"]["stage"]
        self.names = {p: name for name, p in jepa.named_parameters()}
        self.shapes = {name: tuple(p.shape) for p, name in self.names.items()}
        self.optimizer = optim.adamw(jepa.encoder, jepa.predictor, pred_lr_scale)
        self.network = _initialize(jepa, self.optimizer, settings, world)
        self.zero = self.network.optimizer
        self.groups = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for group in range(len(self.groups)):  # made now, so that a checkpoint finds them before the first step
            with self._loaded(group) as flat:
                self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), "exp_avg": torch.zeros_like(flat),
                                              "exp_avg_sq": torch.zeros_like(flat)}  # fmt: skip

    def __call__(self, images: Tensor, context: Packed, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """As Jepa.forward."""
        return self.network(images, context, blocks)

    @torch.no_grad()
    def features(self, images: Tensor, context: Packed, blocks: Blocks) -> Tensor:
        """As Engine.features; weights that are sharded are gathered for the whole pair or not at all."""
        return self.network(images, context, blocks)[1] if self.stage == 3 else self.jepa.encoder(images, context)

    def backward(self, loss: Tensor) -> None:
        self.network.backward(loss, scale_wrt_gas=False)
        self.seen += 1
        if self.seen < self.micro_batches:
            self.network.step()  # counts the micro-batch; the last one is Engine.step's

    def step(self, now: Now) -> Tensor:
        """As Engine.step."""
        optim.apply_schedule(self.optimizer, now)
        self.network.step()
        self.seen = 0
        return torch.tensor(not self.zero.overflow, device=self.device)

    def masters(self) -> dict[str, Piece]:
        """{parameter: this rank's piece of its fp32 master}, "encoder." and "predictor." before official names."""
        # Weights are fp32 themselves: where masters are on NVMe, they are the same numbers.
        flats = [self.zero.fp16_partitioned_groups_flat[group] if self._swapped(group) else flat
                 for group, flat in enumerate(self.groups)]  # fmt: skip
        return {name: self._piece(flats[group], name, *place) for group, name, place in self._places()}

    def moments(self) -> dict[str, Piece]:
        """{parameter.moment: this rank's piece of it}; each step count is everywhere, its group's. Copies of those on NVMe."""
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
        """Whether DeepSpeed keeps the group's masters and moments on NVMe between steps; small groups stay in memory."""
        return self.stage == 3 and self.zero._swappable_optimizer_subgroup(group)

    @contextlib.contextmanager
    def _loaded(self, group: int) -> Iterator[Tensor]:
        """The group's masters, and its moments, in memory for a change that is written back."""
        if self._swapped(group):
            self.zero._optimizer_states_and_gradient_swap_in(group)
        yield self.groups[group]
        if self._swapped(group):
            self.zero._optimizer_states_and_gradient_swap_out(group)

    def _state(self, group: int) -> dict[str, Tensor]:
        """AdamW's state of the group, to read; to write as well unless it is on NVMe."""
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
        """(group, parameter) of every parameter, also of those this rank has no part of."""
        members = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
        for group, parameters in enumerate(members):
            yield from ((group, self.names[p]) for p in parameters)

    def _places(self) -> Iterator[tuple[int, str, tuple[int, int, int]]]:
        """(group, parameter, (offset in the group, start in the parameter, count)) of this rank's pieces."""
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


def build(jepa: Jepa, config: Config, world: World, given: Path | None = None) -> Engine | ShardedEngine:
    """The engine that `runtime.zero` asks for; auto is 1 for several ranks and plain torch for one."""
    stage, scale = stage_of(config, world), config.optimization.pred_lr_scale
    if stage == 0:
        if given:
            raise ConfigError(f"--deepspeed_config {given}: runtime.zero 0 runs without DeepSpeed; set it to 1, 2 or 3")
        return Engine(jepa, world.size, config.data.batch_size // config.micro_batch, config.runtime.cuda_graph, scale)
    if stage == 3 and config.runtime.compile:
        raise ConfigError(
            "runtime.compile: not with runtime.zero 3, whose gathers a compiler cannot see; switch one of them off"
        )
    return ShardedEngine(jepa, deepspeed_settings(config, stage, given), world, scale)


def stage_of(config: Config, world: World) -> int:
    return int(world.size > 1) if config.runtime.zero == "auto" else config.runtime.zero


def deepspeed_settings(config: Config, stage: int, given: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration: what the config says, and the file `given` on top of what the config leaves open.

    Raises:
        ConfigError: a file that cannot be read, or that contradicts the config; the message names both keys.
    """
    ours = {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.data.batch_size // config.micro_batch,
        "zero_optimization": {"stage": stage},
        "torch_autocast": {"enabled": config.runtime.dtype == "bf16", "dtype": "bfloat16"},
    }
    ours["torch_autocast"]["lower_precision_safe_modules"] = []  # which would reduce gradients in bf16
    defaults = {
        "zero_optimization": {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    theirs = _read(given) if given else {}
    for section, owner in REFUSED.items():
        if section in theirs:
            raise ConfigError(f"{given}: {section!r} is decided by {owner}; remove it there")
    _check_nvme(given, theirs.get("zero_optimization", {}), stage)
    _contradictions(given, theirs, ours)
    return _merged(_merged(defaults, theirs), ours)


def _check_nvme(given: Path | None, zero: Mapping[str, Any], stage: int) -> None:
    """Of what DeepSpeed can keep on NVMe, masters and moments at stage 3: the average then reads the fp32 weights."""
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise ConfigError(f"{given}: offload_param to nvme hides the weights from the average; offload to cpu")
    optimizer = zero.get("offload_optimizer") or {}
    if optimizer.get("device") != "nvme":
        return
    if stage != 3:
        raise ConfigError(f"{given}: DeepSpeed takes offload_optimizer to nvme at stage 3 alone; set runtime.zero=3, or cpu")
    if not optimizer.get("nvme_path"):
        raise ConfigError(f"{given}: offload_optimizer to nvme needs nvme_path, a directory on the disk of this machine")


REFUSED = {"optimizer": "the optimization section", "scheduler": "the optimization section", "fp16": "runtime.dtype",
           "bf16": "runtime.dtype", "amp": "runtime.dtype", "gradient_clipping": "the recipe, which has none",
           "train_batch_size": "data.batch_size and the number of ranks"}  # fmt: skip
OWNERS = {"train_micro_batch_size_per_gpu": "runtime.micro_batch", "zero_optimization.stage": "runtime.zero",
          "gradient_accumulation_steps": "data.batch_size / runtime.micro_batch",
          "torch_autocast.enabled": "runtime.dtype", "torch_autocast.dtype": "runtime.dtype",
          "torch_autocast.lower_precision_safe_modules": "the recipe, which reduces in fp32,"}  # fmt: skip


def _contradictions(given: Path | None, theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in ours.items():
        if key in theirs and isinstance(value, Mapping):
            _contradictions(given, theirs[key], value, f"{key}.")
        elif prefix + key in OWNERS and theirs.get(key, value) not in (value, "auto"):
            owner = OWNERS[prefix + key]
            raise ConfigError(f"{given}: {prefix}{key} is {theirs[key]!r} and {owner} is {value!r}; make them agree")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], Mapping)}
    return {**base, **over, **both}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a readable DeepSpeed configuration ({error}); give a JSON file") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: a DeepSpeed configuration is a JSON object, not {type(found).__name__}")
    return found


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
    if not dist.is_initialized():  # DeepSpeed wants a group, and a launcher's word, even for one rank
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    network, *_ = deepspeed.initialize(model=jepa, optimizer=optimizer, config=settings, dist_init_required=False)
    return network


def deepspeed_ops(device: str) -> list[tuple[str, bool, str]]:
    """(name, whether it can be built here, what DeepSpeed says) of its compiled parts that a setting of ours could reach."""
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
