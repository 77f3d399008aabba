"""Modules and an optimizer for other trainers, with the parameters and state dicts of the classes that they replace."""

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adamw_ema_step import adamw_ema_step_, adamw_ema_table
from .ema_update import Table, ema_table, ema_update_
from .patchify_tokens import patchify_tokens


class MaskedPatchEmbed(nn.Module):
    """The patch embedding of a ViT, computed for the visible patches alone.

    Parameters are `proj.weight` (D, C, p, p) and `proj.bias` (D,), as in timm's PatchEmbed and the official `patch_embed`.

    Args:
        patch_size, in_chans, embed_dim, bias: as in timm.
        mean, std: of each channel, counting from 0 to 1: uint8 and uint16 images are normalised with them, floats taken as
            they are. Not in the state dict; fp32 whatever the module is cast to, and there after `to_empty`.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        self._channels = {name: list(values) for name, values in (("mean", mean), ("std", std)) if values is not None}
        for name in ("mean", "std"):
            values = self._channels.get(name)
            if values is not None and len(values) != in_chans:
                raise ValueError(f"MaskedPatchEmbed: {name} has {len(values)} values for {in_chans} channels; give one each")
            on = self.proj.weight.device
            channels = None if values is None else torch.tensor(values, dtype=torch.float32, device=on)  # (C,)
            self.register_buffer(name, channels, persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "MaskedPatchEmbed":
        """Move as every module does, mean and std with their values and in fp32: `to_empty` would leave them without values.

        From the meta device they get the values that the module was made with.
        """
        before = {name: getattr(self, name) for name in self._channels}
        super()._apply(fn, recurse)
        for name, values in self._channels.items():
            device, kept = getattr(self, name).device, before[name].float()
            setattr(self, name, torch.tensor(values, device=device) if kept.is_meta else kept.to(device))
        return self

    def forward(self, images: Tensor, idx: Tensor | None = None) -> Tensor:
        """Embed the patches of (B, C, H, W) images that idx names into (T, D) tokens, in the weight's dtype or autocast's.

        idx is (T,) int32, patch n of image b being b * N + n; None stands for all B * N patches, in order.
        """
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.proj.weight.dtype
        # Whole numbers are normalised here; floats have been, by whoever made them.
        mean, std = (None, None) if images.is_floating_point() else (self.mean, self.std)
        rows = patchify_tokens(images, idx, mean, std, self.patch_size, dtype)  # (T, C * p * p)
        return F.linear(rows, self.proj.weight.flatten(1), self.proj.bias)


class ModelEma(nn.Module):
    """An average of a model's weights, with the interface and the state dict of timm's ModelEmaV3.

    All fp32 and bf16 tensors move in one launch, so that there is no `foreach` to choose; bf16 averages round to nearest
    (timm's may round stochastically): for a bf16 model ask for dtype=torch.float32.

    Args:
        model: copied; its floating-point parameters and buffers are averaged, its other buffers copied.
        decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power: the decay at each step, see get_decay.
        device, dtype: of the average, where they differ from the model's.
        exclude_buffers: copy floating-point buffers instead of averaging them.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        exclude_buffers: bool = False,
    ):
        super().__init__()
        self.module = deepcopy(model).eval()
        self.decay, self.min_decay = decay, min_decay
        self.update_after_step, self.use_warmup = update_after_step, use_warmup
        self.warmup_gamma, self.warmup_power = warmup_gamma, warmup_power
        self.device, self.exclude_buffers = device, exclude_buffers
        self.module.to(device=device, dtype=dtype)
        self._table: Table | None = None

    def get_decay(self, step: int | None = None) -> float:
        """Return the momentum at a step: 0 until update_after_step is past, then `decay`.

        With warmup it is 1 - (1 + t / gamma)^-power, between min_decay and decay, t counting from update_after_step:
        gamma 1 and power 2/3 give 0.37, 0.52, 0.60 at t = 1, 2, 3.
        """
        if step is None:
            return self.decay
        since = step - self.update_after_step - 1
        if since <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        return max(min(1 - (1 + since / self.warmup_gamma) ** -self.warmup_power, self.decay), self.min_decay)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        self.apply_update_(model, self.get_decay(step))

    @torch.no_grad()
    def apply_update_(self, model: nn.Module, decay: float | Tensor, finite: Tensor | None = None) -> None:
        """Move towards the model by 1 - decay; where `finite`, a 0-dim bool tensor on the device, is False do nothing."""
        targets, sources = [], []
        for averaged, average, value in self._pairs(model):
            value = value.to(average.device)
            # Three ways: copied as it is; averaged with all others in one launch; averaged alone where no kernel takes it.
            if not averaged:
                average.copy_(value if finite is None else torch.where(finite, value.to(average.dtype), average))
            elif all(x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous() for x in (average, value)):
                targets.append(average)
                sources.append(value)
            else:
                weight = 1.0 - decay if finite is None else (1.0 - decay) * finite.float()
                weight = weight.to(average.dtype) if isinstance(weight, Tensor) else weight
                average.lerp_(value.to(average.dtype), weight)
        if self._table is None and targets and targets[0].is_cuda:
            self._table = ema_table(targets, sources)
        ema_update_(targets, sources, decay, finite, table=self._table)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Start again from the model's weights."""
        for _, average, value in self._pairs(model):
            average.copy_(value)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def _pairs(self, model: nn.Module) -> list[tuple[bool, Tensor, Tensor]]:
        """List (True where it is averaged, average, the model's tensor), in the order of the state dict, tied weights once."""
        copied = {name for name, _ in self.module.named_buffers(remove_duplicate=False)} if self.exclude_buffers else set()
        seen: set[int] = set()
        pairs = []
        own, other = self.module.state_dict(), model.state_dict()
        for (name, average), value in zip(own.items(), other.values(), strict=True):
            if average.data_ptr() not in seen or not average.numel():
                pairs.append((average.is_floating_point() and name not in copied, average, value))
            seen.add(average.data_ptr())
        return pairs


class FusedAdamWEMA(torch.optim.Optimizer):
    """AdamW as torch has it, and the moving average of the new parameters, in one pass; state dicts load into and from AdamW.

    Args:
        params: parameters or groups, fp32, contiguous, on one device.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW, of each group.
        targets: (parameter, its average) pairs: zip(encoder.parameters(), target_encoder.parameters()); fp32 or bf16.
        copies: (parameter, bf16 copy of its average) pairs, for every target or none.

    pickle and deepcopy carry parameters and targets along: copy models and optimizer in one call.
    With CUDA graphs: take one step first, keep gradients in place (set_to_none=False), pass momentum as a tensor, and call
    write_hyper() before a replay where lr or weight decay moved.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        targets: Iterable[tuple[Tensor, Tensor]] = (),
        copies: Iterable[tuple[Tensor, Tensor]] = (),
    ):
        self._targets, self._copies = dict(targets), dict(copies)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if self._copies and self._copies.keys() != self._targets.keys():
            raise ValueError(
                f"FusedAdamWEMA: there are {len(self._copies)} copies for {len(self._targets)} targets; give each target one"
            )
        if lost := len(self._targets.keys() - set(self._params)):
            raise ValueError(f"FusedAdamWEMA: {lost} targets belong to no parameter of the optimizer; give it theirs")

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for group in self.param_groups:
            betas, chosen = group["betas"], [name for name in ("amsgrad", "maximize") if group.get(name)]
            if chosen:
                raise ValueError(f"FusedAdamWEMA: a group asks for {chosen[0]}, which it has not; use torch.optim.AdamW")
            sizes = (group["lr"], group["eps"], group["weight_decay"])
            if not all(0 <= size < math.inf for size in sizes) or not all(0 <= beta < 1 for beta in betas):
                raise ValueError(
                    f"FusedAdamWEMA: lr {group['lr']}, eps {group['eps']} and weight_decay {group['weight_decay']} must be"
                    f" finite and at least 0, betas {betas} in [0, 1)"
                )
        self._gather()

    def _gather(self) -> None:
        """Put the parameters into the op's order, those with a target first, and their counts into one tensor; keep the state.

        Groups [a, b] and [c], targets for b and c: parameters [b, c, a], groups [0, 1, 0]. state[p]["step"] of each is a view
        of one element of (3,) counts, so that a state dict holds them as AdamW's does.
        """
        numbered = [(p, number) for number, group in enumerate(self.param_groups) for p in group["params"]]
        numbered.sort(key=lambda pair: pair[0] not in self._targets)
        self._params, self._numbers = [p for p, _ in numbered], [number for _, number in numbered]
        self._steps = torch.zeros(len(numbered), device=self._params[0].device)
        self._hyper = torch.zeros(len(self.param_groups), 5, dtype=torch.float64, device=self._params[0].device)
        self._written: list[tuple] = []
        self._table: Table | None = None
        for p, step in zip(self._params, self._steps.unbind(), strict=True):
            if p in self.state:
                made = self.state[p]["step"]  # a tensor, or in old files a number
                self.state[p]["step"] = step.copy_(made) if isinstance(made, Tensor) else step.fill_(made)
                self._moments(p)

    def _moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[p]
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state.get(name)
            state[name] = torch.zeros_like(p, memory_format=torch.contiguous_format) if moment is None else moment.contiguous()
        return state["exp_avg"], state["exp_avg_sq"]

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "FusedAdamWEMA: a shallow copy would share moments, not their counts; deepcopy model and optimizer at once"
        )

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_targets": self._targets, "_copies": self._copies}

    def __setstate__(self, state: dict) -> None:
        """Take what pickle and deepcopy carry; the tables of addresses are made again for the tensors of the copy."""
        super().__setstate__(state)
        self._gather()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if any("max_exp_avg_sq" in state for state in self.state.values()):
            raise ValueError("FusedAdamWEMA: the state is of AdamW with amsgrad, which it has not; use torch.optim.AdamW")
        self._gather()

    def write_hyper(self) -> None:
        """Send lr, betas, eps and weight decay of the groups to the device, where they changed; without waiting for it."""
        rows = [(float(g["lr"]), *g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups]
        if rows != self._written:
            values = torch.tensor(rows, dtype=torch.float64, device="cpu")
            self._hyper.copy_(values.pin_memory() if self._hyper.is_cuda else values, non_blocking=True)
            self._written = rows

    @torch.no_grad()
    def step(
        self, closure: Callable | None = None, *, momentum: float | Tensor | None = None, finite: Tensor | None = None
    ) -> Tensor | None:
        """One step, and the averages' with `momentum`; where `finite` (0-dim bool, on the device) is False, nothing."""
        if self._targets and momentum is None:
            raise TypeError("FusedAdamWEMA: step needs momentum=..., how much of each target is kept")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [None if p.grad is None else p.grad.contiguous() for p in self._params]
        # State begins with a parameter's first gradient, as in AdamW.
        for p, grad, step in zip(self._params, grads, self._steps.unbind(), strict=True):
            if grad is not None and p not in self.state:
                self.state[p]["step"], self._table = step, None
        moments = [self._moments(p) if p in self.state else (p, p) for p in self._params]  # unread without a gradient
        exp_avgs, exp_avg_sqs = ([pair[i] for pair in moments] for i in (0, 1))
        targets = [self._targets[p] for p in self._params if p in self._targets]
        copies = [self._copies[p] for p in self._params if p in self._copies]
        self.write_hyper()
        if self._table is None and self._steps.is_cuda:
            self._table = adamw_ema_table(self._params, grads, exp_avgs, exp_avg_sqs, self._numbers, targets, copies)
        adamw_ema_step_(
            self._params, grads, exp_avgs, exp_avg_sqs, self._steps, self._hyper, self._numbers,
            targets, 1.0 if momentum is None else momentum, copies, finite, self._table,
        )  # fmt: skip
        return loss
