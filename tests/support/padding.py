"""Configurations of runs with a padding budget."""

from tests.support.networks import small


def configured(**runtime):
    mask = {"patch_size": 4, "min_keep": 4, "truncate_group": 8}
    return small(data={"crop_size": 64, "batch_size": 8}, mask=mask, runtime={"cuda_graph": True, **runtime})
