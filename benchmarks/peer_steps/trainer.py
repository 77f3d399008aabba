"""The trainer's own step and, where the request has a clone, the official code's, as benchmarks/step.py times them."""

from ijepa import draw_work
from peer_process import Request
from step import OfficialStep, OurStep, build_contender
from work import prepare_device

from fastjepa.config.load import config_from_dict


def build(request: Request) -> OurStep | OfficialStep:
    config = config_from_dict(request.config, "request")
    device = prepare_device(config, config.mask.truncate_group)
    works = [draw_work(config, device, number) for number in request.numbers]
    return build_contender("theirs" if request.clone else "ours", config, device, works, request.clone)
