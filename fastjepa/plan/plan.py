"""The needs of a config on N GPUs: memory by part and ZeRO stage, hours, and traffic. All estimates.

Memory is counted by `plan.memory`, traffic by `plan.traffic`; hours are FLOPs over a stated share of a card's peak.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config
from fastjepa.engine.schedule import warmup_notes
from fastjepa.errors import ConfigError
from fastjepa.loss.normalizations import NORMALIZATIONS
from fastjepa.loss.targets import choose_targets
from fastjepa.masks.layouts import Masking
from fastjepa.model.jepa import NetworkShape
from fastjepa.plan.datasheets import DATASHEETS
from fastjepa.plan.flops import flops_per_image, muon_flops
from fastjepa.plan.memory import ZERO_STAGES, ActivationBytes, activation_bytes, network_sizes, row_counts, tensor_bytes
from fastjepa.plan.sharding import recommend_stage, usable_bytes
from fastjepa.plan.traffic import TRAFFIC_GPUS, traffic_rows
from fastjepa.plan.workload import Workload
from fastjepa.weights.pretrained import PretrainedEncoder
from fastjepa.weights.teacher import read_teacher, teacher_shape

IMAGENET_IMAGES = 1_281_167  # images of ImageNet-1k's training set


@dataclass(frozen=True)
class Cards:
    """The GPUs of a plan, one a rank."""

    count: int = 1
    memory: float = 80.0  # GB (1e9 bytes) of each
    name: str = "h100"  # a key of DATASHEETS
    utilisation: float = 0.4  # FLOP/s as a share of the card's dense peak in runtime.dtype

    def rate(self, dtype: str) -> float:
        """Return the FLOP/s of one card."""
        return DATASHEETS[self.name].peak(dtype) * self.utilisation


def workload_of(config: Config) -> Workload:
    """Return the work that a config asks of each rank."""
    runtime = config.runtime
    return Workload(
        shape=NetworkShape.of(config),
        masking=Masking.of(config),
        targets=choose_targets(config.loss.target, config.loss.target_layers),
        normalization=NORMALIZATIONS[config.loss.normalize],
        batch_size=config.data.batch_size,
        micro_batch=config.micro_batch,
        dtype=runtime.dtype,
        checkpointed=runtime.checkpoint_activations,
        compiled=runtime.compile,
        muon=config.optimization.optimizer == "muon",
        padded=runtime.cuda_graph,
        token_budget=runtime.token_budget,
    )


def plan_run(
    config: Config, cards: Cards, stages: Sequence[int] = ZERO_STAGES, images: int = IMAGENET_IMAGES
) -> dict[str, object]:
    """Return the memory a GPU needs in bytes, by part and stage; what fits; hours; the stage to use, with the reason; notes.

    Args:
        stages: the ZeRO stages to lay side by side.
        images: images of an epoch.
    """
    config = config_on_card(config)
    work = workload_of(config)
    usable, dtype = usable_bytes(cards.memory * 1e9), work.dtype
    activations = _Activations(work, cards.count)
    needs = {stage: _stage_needs(activations, stage, usable) for stage in stages}
    stage, why = recommend_stage(needs, cards.count, work)
    per_image = flops_per_image(work, work.batch_size * cards.count)
    hours = per_image * images * config.optimization.epochs / (cards.count * cards.rate(dtype)) / 3600
    return {
        "model": config.meta.model_name, "gpus": cards.count, "dtype": dtype, "micro_batch": work.micro_batch,
        "gpu_memory": cards.memory * 1e9, "usable": usable, "stages": needs,
        "flops_per_image": per_image, "card": cards.name, "peak_flops": DATASHEETS[cards.name].peak(dtype),
        "utilisation": cards.utilisation, "images_per_epoch": images, "epochs": config.optimization.epochs,
        "hours": hours, "gpu_hours": hours * cards.count, "recommended_stage": stage, "why": why,
        "notes": warmup_notes(config.optimization) + muon_notes(config, per_image, cards.count),
    }  # fmt: skip


def muon_notes(config: Config, per_image: float, gpus: int) -> list[str]:
    """Return a sentence on what Muon's products cost beside the images of a step, where the config asks for Muon."""
    if config.optimization.optimizer == "adamw":
        return []
    flops, images = muon_flops(NetworkShape.of(config)), config.data.batch_size * gpus
    return [f"Muon takes {flops / 1e12:.3g} TFLOP a step, shared by the GPUs, {flops / (per_image * images):.2g} times what "
            f"the {images} images take; the hours above do not count it."]  # fmt: skip


def plan_traffic(config: Config, cards: Cards, gpus: Sequence[int] = TRAFFIC_GPUS) -> list[dict[str, float]]:
    """Return `traffic_rows` of a config for each number of `gpus`; of `cards`, name and utilisation count."""
    work = workload_of(config_on_card(config))
    seconds = flops_per_image(work) / cards.rate(work.dtype)
    return traffic_rows(network_sizes(work.shape, work.muon), work.dtype, seconds, gpus)


def config_on_card(config: Config) -> Config:
    """Return the config as the cards run it: `runtime.dtype: auto` is bf16 there, and the teacher's shape is known."""
    config = with_teacher_shape(config)
    dtype = "fp32" if config.runtime.dtype == "fp32" else "bf16"
    return replace(config, runtime=replace(config.runtime, dtype=dtype))


def settle_teacher(config: Config) -> tuple[Config, PretrainedEncoder | None]:
    """Return the config with the shape of its teacher, and the teacher as it is read; None where the config names none.

    Raises:
        ConfigError: a teacher that cannot be read, has another shape than the config says, or does not fit its other keys.
    """
    name, said = config.meta.teacher, config.meta.teacher_shape
    if name is None:
        return config, None
    teacher = read_teacher(name, config.grid, config.data.channels)
    shape = teacher_shape(teacher)
    if said not in (None, shape):
        raise ConfigError(f"meta.teacher_shape: {list(said)} is not that of {name}, {list(shape)}; leave it out")
    sections = config.to_dict()
    sections["meta"]["teacher_shape"] = shape
    return config_from_dict(sections, f"meta.teacher {name}"), teacher


def with_teacher_shape(config: Config) -> Config:
    """Return the config with the shape of its teacher, if it has one; its file is read where the config does not say it."""
    return config if config.meta.teacher_shape else settle_teacher(config)[0]


class _Activations:
    """Activation bytes of micro-batches; masks are drawn once for each size."""

    def __init__(self, work: Workload, gpus: int):
        self.work, self.gpus, self.known = work, gpus, {}

    def __call__(self, micro_batch: int) -> ActivationBytes:
        if micro_batch not in self.known:
            self.known[micro_batch] = activation_bytes(self.work, row_counts(self.work, micro_batch, self.gpus))
        return self.known[micro_batch]


def _stage_needs(activations: _Activations, stage: int, usable: float) -> dict:
    work = activations.work
    fixed = tensor_bytes(network_sizes(work.shape, work.muon), work.dtype, activations.gpus, stage)
    needs, state = dict(fixed), sum(fixed.values())
    for end, checkpointed in (("", False), ("_checkpointed", True)):

        def fits(micro_batch: int, checkpointed: bool = checkpointed) -> bool:
            return state + activations(micro_batch).held(checkpointed) <= usable

        held = activations(work.micro_batch).held(checkpointed)
        needs |= {
            "activations" + end: held,
            "total" + end: state + held,
            "fits" + end: fits(work.micro_batch),
            "largest_micro_batch" + end: largest_micro_batch(work.batch_size, fits),
        }
    return needs


def largest_micro_batch(batch: int, fits: Callable[[int], bool]) -> int:
    """Return the largest divisor of `batch` for which `fits`; 0 where none does."""
    return next((m for m in range(batch, 0, -1) if batch % m == 0 and fits(m)), 0)
