"""Training steps beside those of other I-JEPA code: `python benchmarks/peers.py --device cpu --models vit_tiny,vit_small`.

Forward, backward, optimizer and average of each peer's own parts, used as its documentation shows, on the same images, sizes,
dtype and threads; on the same masks where the peer takes masks. Every peer is a process of its own, and all take turns in
every round. One that is not installed here gets an environment for the run: a temporary one that pip fills, on top of the
packages that are here, so that all have the same torch. `ratio` is our images/s over the peer's, ours being the row named
`beside`, whose objective is nearest; `ratio_at_equal_flops` compares FLOP/s, as objectives differ in cost.
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import official
import timing
import torch
from ijepa import draw_work, typical_batches
from options import config_of, make_parser, run_script
from peer_process import PeerError, PeerProcess, Request
from step import insist_on_equal_losses
from timing import Ceiling, Spread
from work import mlp_shapes, prepare_device

from fastjepa.cli.options import some_of
from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import MODELS, Config
from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.ranks.world import join_world

DISTINCT = 2  # batches that the rounds take turns with
EXAMPLES = """examples:
  python benchmarks/peers.py --device cpu --models vit_tiny,vit_small --reference ../ijepa --json
  python benchmarks/peers.py --device cuda --models vit_base --batch 64 --peers lightly"""


class Peer(NamedTuple):
    """A trainer to time."""

    objective: str
    module: str = "peer_steps.trainer"  # its step
    package: str = ""  # as pip names it, with the version that was read
    beside: str = ""  # the row of ours whose objective is nearest
    keys: dict[str, dict[str, str]] = {}  # of our config


PAPER = "the paper's, contexts cut to the shortest of 128"
OURS = {
    "fastjepa": Peer(PAPER),
    "fastjepa whole": Peer("contexts stay whole", keys={"mask": {"truncate": "none"}}),
    "fastjepa joint": Peer("the predictor sees a context once, with all its blocks", keys={"meta": {"predictor": "joint"}}),
}
PEERS = {
    "official": Peer(PAPER, beside="fastjepa"),
    "lightly": Peer("learned positions; a class token, which masks count as the first patch",
                    "peer_steps.lightly_ijepa", "lightly[timm]", "fastjepa"),
    "stable-pretraining": Peer(
        "blocks without overlap, shared by the batch; 85 to 100 % of the rest is context; the predictor sees it once",
        "peer_steps.stable_pretraining_ijepa", "stable-pretraining==0.1.8", "fastjepa joint"),
}  # fmt: skip


def distribution(peer: Peer) -> str:
    return peer.package.partition("[")[0].partition("==")[0]


def environment(peer: Peer, folder: Path) -> str:
    """Return a Python that has the peer's package: this one, or that of an environment that is made in `folder`.

    The environment sees the packages of this one behind its own, and pip takes them for installed. PeerError where pip fails.
    """
    if not peer.package or find_spec(distribution(peer).replace("-", "_")):
        return sys.executable
    python, base = folder / "bin" / "python", {"base": str(folder), "platbase": str(folder)}
    if not folder.exists():
        print(f"{peer.package}: pip installs it into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        Path(sysconfig.get_path("purelib", vars=base), "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run([python, "-m", "pip", "install", "-q", peer.package], capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"pip cannot install {peer.package}: {done.stderr.strip().splitlines()[-1]}")
    return str(python)


def request_for(name: str, peer: Peer, config: Config, clone: str | None) -> Request:
    """Return what a peer builds its step from: the trainer's batches of typical cost, as arrays and by their numbers."""
    numbers, (width, depth, heads, mlp_ratio), meta = typical_batches(config, DISTINCT), config.encoder_shape, config.meta
    works = [draw_work(config, torch.device("cpu"), number) for number in numbers]
    batches = [(w.images.numpy(), w.indices(w.context_mask)[0].numpy(), torch.stack(w.indices(w.target_mask)).numpy())
               for w in works]  # fmt: skip
    shape = {"size": config.image_size[0], "patch": config.mask.patch_size, "width": width, "depth": depth, "heads": heads,
             "mlp_ratio": mlp_ratio, "predictor_width": meta.pred_emb_dim, "predictor_depth": meta.pred_depth}  # fmt: skip
    pace = config.optimization
    rates = {"lr": pace.lr, "weight_decay": pace.weight_decay, "ema_momentum": pace.momentum_knots[0][1]}
    keys = {section: values | peer.keys.get(section, {}) for section, values in config.to_dict().items()}
    place = join_world(config.runtime.device).device.type, config.runtime.dtype, torch.get_num_threads()
    return Request(name, peer.module, distribution(peer), *place, shape, rates, batches, numbers,
                   config_from_dict(keys, name).to_dict(), clone if name == "official" else None)  # fmt: skip


class Timed(NamedTuple):
    """A peer's rounds on one model, and what its process said of itself."""

    seconds: list[float]  # a step
    spent: list[int]  # FLOPs of the same steps
    facts: dict
    phases: list[dict[str, float]]  # ms by part, of some further steps

    @classmethod
    def of(cls, run: PeerProcess, seconds: list[float]) -> "Timed":
        spent = [run.facts["flops"][number % DISTINCT] for number in range(len(seconds))]
        return cls(seconds, spent, run.facts, [phases_of(run.phases(number)) for number in range(DISTINCT)])

    def row(self, images: int, rates: list[float]) -> dict:
        """Return the numbers of a row; `rates` are those of matrix products in the same rounds, in FLOP/s."""
        shares = [f / s / rate for f, s, rate in zip(self.spent, self.seconds, rates, strict=True)]
        return {
            "n": len(self.seconds), "images_per_s": Spread.of([images / s for s in self.seconds])._asdict(),
            "ms": {part: Spread.of([taken[part] for taken in self.phases]).median for part in self.phases[0]},
            "gflop_per_image": float(np.mean(self.spent)) / images / 1e9, "gemm_gflops": Spread.of(rates).median / 1e9,
            "share_of_gemm": Spread.of(shares)._asdict(),
            **{key: value for key, value in self.facts.items() if key != "flops"},
        }  # fmt: skip

    def ratios(self, ours: "Timed") -> dict:
        """Return how far ours is ahead: in images/s, in FLOP/s, and in peak memory, where less is better."""
        per_flop = [[s / f for s, f in zip(one.seconds, one.spent, strict=True)] for one in (ours, self)]
        return {"ratio": timing.paired_ratio(ours.seconds, self.seconds)._asdict(),
                "ratio_at_equal_flops": timing.paired_ratio(*per_flop)._asdict(),
                "memory_ratio": self.facts["peak_bytes"] / ours.facts["peak_bytes"]}  # fmt: skip


def phases_of(taken: dict[str, float]) -> dict[str, float]:
    """Sum the milliseconds of a step's parts, which each peer splits in its own way, into four phases.

    Gradient norms, and what is left over, count with the optimizer.
    """
    found = dict.fromkeys(("forward", "backward", "optimizer", "EMA"), 0.0)
    for part, ms in taken.items():
        found[next((name for name in found if part.endswith(name)), "forward" if part == "loss" else "optimizer")] += ms
    return found


def take_turns(known: dict[str, Peer], runs: dict[str, PeerProcess], config: Config, rounds: int) -> list[dict]:
    """Time rounds of a step of every peer, and of the matrix products that are the ceiling of all; return their rows."""
    device, dtype = join_world(config.runtime.device).device, COMPUTE_DTYPES[config.runtime.dtype]
    ceiling = Ceiling([*mlp_shapes(config), timing.square_product(device)], dtype, device)
    seconds = timing.interleave({"ceiling": ceiling, **runs}, rounds, device)
    timed, rates = {name: Timed.of(run, seconds[name]) for name, run in runs.items()}, list(ceiling.rates.values())
    about = {"dtype": config.runtime.dtype, "size": config.image_size[0], "batch": config.data.batch_size}
    rows = []
    for name, one in timed.items():
        row = {"model": config.meta.model_name, "peer": name, "objective": known[name].objective, **about}
        row |= one.row(config.data.batch_size, rates)
        if beside := known[name].beside:
            row |= {"beside": beside} | one.ratios(timed[beside])
        rows.append(row)
    return rows


def measure_model(
    known: dict[str, Peer], config: Config, clone: str | None, rounds: int, scratch: Path
) -> tuple[list[dict], list[dict]]:
    """Return the rows of a model, and the peers that cannot be built for it with the reasons; ours must run."""
    gaps, runs = [], {}
    with ExitStack() as running:
        for name, peer in known.items():
            try:
                if name == "official" and not clone:
                    raise PeerError(
                        "git clone https://github.com/facebookresearch/ijepa, and name its directory by --reference"
                    )
                python = environment(peer, scratch / name)
                runs[name] = running.enter_context(PeerProcess(python, request_for(name, peer, config, clone)))
            except PeerError as error:
                if name in OURS:
                    raise PeerError(f"{name}: {error}") from error
                gaps.append({"what": f"{name} {config.meta.model_name}", "reason": str(error)})
        return take_turns(known, runs, config, rounds), gaps


def measure_asked(options: argparse.Namespace) -> dict:
    known, rows, gaps = OURS | {name: PEERS[name] for name in options.peers}, [], []
    configs = [config_of(options, meta__model_name=model) for model in options.models]
    for config in configs:
        device = prepare_device(config, config.mask.truncate_group)
        if options.reference and "official" in known:
            official.refuse_config(options.reference, config)
            insist_on_equal_losses(config, device, options.reference)
    with tempfile.TemporaryDirectory(prefix="fastjepa-peers-") as scratch:
        for config in configs:
            found, absent = measure_model(known, config, options.reference, options.rounds, Path(scratch))
            rows, gaps = rows + found, gaps + absent
    return {"rows": rows, "not_measured": gaps}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    about = "Time whole training steps beside those of other I-JEPA code, all in turns."
    parser = make_parser(about, EXAMPLES, device="auto", dtype="auto", batch=8, size=224, threads=None, rounds=8)
    names = ",".join(PEERS)
    parser.add_argument("--models", type=some_of(*MODELS), default="vit_tiny,vit_small", metavar="NAME,...")
    parser.add_argument("--peers", type=some_of(*PEERS), default=names, metavar="NAME,...", help=f"default {names}")
    parser.add_argument("--reference", metavar="DIR", help="clone of the official I-JEPA code")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_script("peers.py", parse_options(argv), measure_asked)


if __name__ == "__main__":
    sys.exit(main())
