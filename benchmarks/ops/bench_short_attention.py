"""short_attention: the predictor's attention at ViT-H/14: heads of 24, context and block rows of one sequence (60 to 160)."""

import pytest
from attention import RIVALS, packed
from protocol import DIRECTIONS, Load, Setting, compiled

from fastjepa_kernels.short_attention import short_attention, short_attention_ref

PROVIDERS = {
    "eager": short_attention_ref,
    "compiled": compiled(short_attention_ref),
    **RIVALS,
    "ours": short_attention,
}


def load(setting: Setting) -> Load:
    return packed(setting, *setting.pick(cuda=(512, 60, 160, 16, 24), cpu=(64, 60, 160, 6, 32), toy=(2, 5, 9, 2, 16)))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_short_attention(provider: str, direction: str, bench):
    bench(PROVIDERS[provider], load, direction)
