"""The model card of an encoder, README.md beside its weights."""

from fastjepa.weights.pretrained import UNSTATED_WHICH, EncoderForm


def model_card(form: EncoderForm, library: str, use: str) -> str:
    """Return the text of a model card; no licence is claimed for weights that came from elsewhere."""
    unsaid = "an encoder (target or context: its source did not say)"
    kind_of = unsaid if form.which == UNSTATED_WHICH else f"the {form.which} encoder"
    height, width = form.image_size
    bands = f", bands {', '.join(map(str, form.bands))} of a file counted from 0" if form.bands else ""
    counted = "on [0, 1]" if form.dtype == "uint8" else f"of {form.dtype} values, {form.unit:g} counted as 1"
    shape = f"width {form.embed_dim}, depth {form.depth}, {form.num_heads} heads, MLP {form.mlp_hidden}"
    return f"""---
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- i-jepa
- self-supervised
- vision-transformer
---

# An I-JEPA encoder

This is **{kind_of}** of an [I-JEPA](https://arxiv.org/abs/2301.08243) pair. The paper evaluates target encoders.

| | |
|---|---|
| from | {form.origin} |
| shape | {shape}, layer norm eps {form.layer_norm_eps:g} |
| images | {form.channels} channels{bands}, {height}x{width} pixels, patches of {form.patch_size}x{form.patch_size} |
| normalisation | mean {list(form.mean)}, deviation {list(form.std)}, {counted} |

```python
{use}
```

The licence is that of the weights' source; Meta's published I-JEPA weights are CC BY-NC 4.0.
"""
