"""Experiments that use the trainer and are used by none of it: `fastjepa sweep`."""
