"""varlen_attention: the context encoder's attention at ViT-H/14: heads of 80, contexts of 70 to 150 patches."""

from attention import RIVALS, packed
from protocol import Inputs, Setting, compiled

from fastjepa_kernels.varlen_attention import varlen_attention, varlen_attention_ref

PROVIDERS = {
    "eager": varlen_attention_ref,
    "compiled": compiled(varlen_attention_ref)._replace(whole=False),  # it reads the lengths
    **RIVALS,
    "ours": varlen_attention,
}


def make_inputs(setting: Setting) -> Inputs:
    return packed(setting, *setting.pick(cuda=(128, 70, 150, 16, 80), cpu=(32, 70, 150, 12, 64), toy=(2, 5, 9, 2, 16)))


def test_varlen_attention(direction: str, bench):
    bench(make_inputs, direction)
