"""short_attention: the predictor's attention at ViT-H/14: heads of 24, context and block rows of one sequence (60 to 160)."""

from attention import RIVALS, packed
from protocol import Inputs, Setting, beside_ours

from fastjepa_kernels.short_attention import short_attention, short_attention_ref

PROVIDERS = beside_ours(short_attention, short_attention_ref, RIVALS)


def make_inputs(setting: Setting) -> Inputs:
    return packed(setting, *setting.pick(cuda=(512, 60, 160, 16, 24), cpu=(64, 60, 160, 6, 32), toy=(2, 5, 9, 2, 16)))


def test_short_attention(direction: str, bench):
    bench(make_inputs, direction)
