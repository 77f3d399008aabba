"""The plan's bytes of activations against what autograd saves in a forward."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import Config, LossConfig
from fastjepa.engine.precision import COMPUTE_DTYPES, autocast_of
from fastjepa.masks.layouts import Masking
from fastjepa.masks.packer import Packer
from fastjepa.model.jepa import NetworkShape, build_pair
from fastjepa.model.vit import use_attention
from fastjepa.plan.memory import RowCounts, activation_bytes, blocks_bytes, buffer_bytes, network_sizes
from fastjepa.plan.plan import workload_of
from tests.support.plans import small


def vit(name: str, **runtime: object) -> Config:
    """At 224 and patch 16; its two images have contexts, and its sequences lengths, alike: nothing is padded."""
    runtime = {"dtype": "fp32", "device": "cpu", "attention": "sdpa"} | runtime
    return config_from_dict({"data": {"batch_size": 2}, "meta": {"model_name": name}, "runtime": runtime})


def saved(c: Config) -> tuple[int, RowCounts]:
    """Bytes of distinct storages that autograd saves in a forward, without parameters and buffers."""
    jepa, _ = build_pair(c)
    use_attention(jepa, c.runtime.attention)
    packed = Packer(Masking.of(c)).packed(0, range(c.micro_batch), c.micro_batch)
    own = {t.untyped_storage().data_ptr() for t in (*jepa.parameters(), *jepa.buffers())}
    kept = {}  # the tensors too: an address that is freed would be used again

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.zeros(c.micro_batch, 3, *c.image_size, dtype=torch.uint8)
    with (
        autocast_of(COMPUTE_DTYPES[c.runtime.dtype], torch.device("cpu")),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        jepa(images, packed[0], packed[2])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), RowCounts.of(*packed)


def shallow(c: Config, count: RowCounts) -> int:
    """Checkpointing keeps in a forward all but the block that the backward makes anew."""
    blocks = blocks_bytes(workload_of(c), count)
    return activation_bytes(workload_of(c), count).checkpointed - max(inside - kept for kept, inside in blocks)


@pytest.mark.parametrize(("loss", "meta"), [
    ({"normalize": "dyntanh"}, {}), ({"visible_weight": 0.5}, {}), ({"visible_weight": 0.5}, {"pred_depth": 1}),
    ({}, {"predictor_context": 0.5, "predictor_repeats": 2}),
    ({"visible_weight": 0.5}, {"predictor_context": 0.5, "pred_depth": 1}),
    *(pytest.param({}, {"positions": "rope", "pred_depth": depth}, marks=pytest.mark.slow) for depth in (1, 3)),
    *(pytest.param({}, {"qk_norm": True, "pred_depth": depth}, marks=pytest.mark.slow) for depth in (1, 2, 3)),
])  # fmt: skip
def test_what_a_variant_of_the_objective_saves_is_counted(loss: dict, meta: dict):
    c = dataclasses.replace(small("fp32"), loss=LossConfig(**loss))
    c = dataclasses.replace(c, meta=dataclasses.replace(c.meta, **meta))
    bytes_saved, count = saved(c)
    assert bytes_saved == pytest.approx(activation_bytes(workload_of(c), count).saved, rel=0.01)


@pytest.mark.parametrize("widths", [(64,), (512, 384, 64)])
def test_what_a_projector_saves_is_counted_to_the_byte(widths: tuple[int, ...]):
    bytes_saved, planned = [], []
    for more in ({}, {"projector": widths}):
        c = dataclasses.replace(small(), loss=LossConfig(regularizer="vicreg", **more))
        found, count = saved(c)
        bytes_saved.append(found)
        planned.append(activation_bytes(workload_of(c), count).saved)
    assert planned[1] - planned[0] == bytes_saved[1] - bytes_saved[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small", "vit_base"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_are_what_autograd_saves(name: str, dtype: str):
    """With sdpa on equal lengths, which saves what flash attention does; bf16 also saves the weights' copies."""
    c = vit(name, dtype=dtype)
    bytes_saved, count = saved(c)
    planned = (
        activation_bytes(workload_of(c), count).saved
        + buffer_bytes(network_sizes(NetworkShape.of(c)), dtype, 0)["autocast_copies"]
    )
    assert planned == pytest.approx(bytes_saved, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small", "vit_base"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpointed_activations_are_what_autograd_saves(name: str, dtype: str):
    """In bf16 the predictor's two outer layers, outside of every block, still save their weights' copies."""
    c = vit(name, dtype=dtype, checkpoint_activations=True)
    bytes_saved, count = saved(c)
    outer = 2 * 2 * c.encoder_shape[0] * c.meta.pred_emb_dim if dtype == "bf16" else 0
    assert shallow(c, count) + outer == pytest.approx(bytes_saved, rel=0.001)


@pytest.mark.parametrize("pred_depth", [1, 2, 3])
def test_a_predictor_of_any_depth_is_counted(pred_depth: int):
    c = config_from_dict({"data": {"batch_size": 2, "crop_size": 64}, "mask": {"patch_size": 8, "min_keep": 4},
                          "meta": {"embed_dim": 48, "depth": 1, "num_heads": 4, "pred_depth": pred_depth, "pred_emb_dim": 32},
                          "runtime": {"dtype": "fp32", "device": "cpu", "attention": "sdpa"}})  # fmt: skip
    bytes_saved, count = saved(c)
    assert activation_bytes(workload_of(c), count).saved == pytest.approx(bytes_saved, rel=0.001)
