"""Training steps beside those of other I-JEPA code: `python benchmarks/peers.py --device cpu --models vit_tiny,vit_small`.

Forward, backward, optimizer and average of each peer's own parts, used as its documentation shows, on the same images, sizes,
dtype and threads; on the same masks where the peer takes masks. Every peer is a process of its own, and all take turns in
every round. One that is not installed here gets an environment for the run: a temporary one that pip fills, on top of the
packages that are here, so that all have the same torch. `ratio` is our images/s over the peer's, of the row named `beside`,
whose objective is nearest; `ratio at equal FLOPs` compares FLOP/s, as objectives differ in cost.
"""

import argparse
import importlib.metadata
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
from peer_process import ROOT, PeerError, PeerProcess, Request
from step import insist_on_equal_losses
from timing import Ceiling, Spread
from work import mlp_shapes, prepare_device

from fastjepa.cli.options import some_of
from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import MODELS, Config
from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.ranks.world import join_world

DISTINCT = 2  # batches that the rounds take turns with
STEPS = ROOT / "benchmarks" / "peer_steps"
EXAMPLES = """examples:
  python benchmarks/peers.py --device cpu --models vit_tiny,vit_small --reference ../ijepa --json
  python benchmarks/peers.py --device cuda --models vit_base --batch 64 --peers lightly"""


class Peer(NamedTuple):
    """A trainer to time: its step, and what its row is compared with."""

    file: Path
    objective: str  # as far as it is not the paper's
    package: str = ""  # as pip names it, and its version where one is meant
    beside: str = ""  # the row of ours whose objective is nearest
    keys: dict[str, dict[str, str]] = {}  # of our config


PAPER = "the paper's, contexts cut to the shortest of 128"
OURS = {
    "fastjepa": Peer(STEPS / "trainer.py", PAPER),
    "fastjepa whole": Peer(STEPS / "trainer.py", "contexts stay whole", keys={"mask": {"truncate": "none"}}),
    "fastjepa joint": Peer(STEPS / "trainer.py", "the predictor sees a context once, with all its blocks",
                           keys={"meta": {"predictor": "joint"}}),
}  # fmt: skip
PEERS = {
    "official": Peer(STEPS / "trainer.py", PAPER, beside="fastjepa"),
    "lightly": Peer(STEPS / "lightly_ijepa.py", "learned positions; a class token, which masks count as the first patch",
                    "lightly[timm]", "fastjepa"),
    "stable-pretraining": Peer(
        STEPS / "stable_pretraining_ijepa.py",
        "blocks without overlap, shared by the batch; 85 to 100 % of the rest is context; the predictor sees it once",
        "stable-pretraining==0.1.8", "fastjepa joint"),
}  # fmt: skip


def distribution(peer: Peer) -> str:
    """Return the name of the distribution that a peer's package is: of `lightly[timm]` it is lightly."""
    return peer.package.partition("[")[0].partition("==")[0]


def environment(peer: Peer, folder: Path) -> str:
    """Return a Python that has the peer's package: this one, or that of an environment made in `folder`.

    The environment sees the packages of this one behind its own, and pip takes them for installed. PeerError where pip fails.
    """
    if not peer.package or find_spec(distribution(peer).replace("-", "_")):
        return sys.executable
    venv.create(folder, with_pip=True)
    python, paths = folder / "bin" / "python", {"base": str(folder), "platbase": str(folder)}
    Path(sysconfig.get_path("purelib", vars=paths), "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    print(f"{peer.package}: installing it into a temporary environment", file=sys.stderr)
    done = subprocess.run([python, "-m", "pip", "install", "-q", peer.package], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise PeerError(f"pip cannot install {peer.package}: {' '.join(lines)[:200]}")
    return str(python)


def version_of(peer: Peer, python: str) -> str | None:
    """Return the version of a peer's package in its environment; None for ours and the official code."""
    if not peer.package:
        return None
    if python == sys.executable:
        return importlib.metadata.version(distribution(peer))
    code = f"import importlib.metadata as m; print(m.version({distribution(peer)!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def request_for(peer: Peer, config: Config, clone: str | None) -> Request:
    """Return what a peer builds its step from: the trainer's batches of typical cost, as arrays, or their numbers."""
    numbers, cpu = typical_batches(config, DISTINCT), torch.device("cpu")
    (width, depth, heads, mlp_ratio), meta = config.encoder_shape, config.meta
    works = [draw_work(config, cpu, number) for number in numbers]
    batches = [(w.images.numpy(), w.indices(w.context_mask)[0].numpy(), torch.stack(w.indices(w.target_mask)).numpy())
               for w in works]  # fmt: skip
    shape = {"size": config.image_size[0], "patch": config.mask.patch_size, "width": width, "depth": depth, "heads": heads,
             "mlp_ratio": mlp_ratio, "predictor_width": meta.pred_emb_dim, "predictor_depth": meta.pred_depth}  # fmt: skip
    rates = config.optimization
    optimizer = {"lr": rates.lr, "weight_decay": rates.weight_decay, "ema_momentum": rates.momentum_knots[0][1]}
    varied = config_from_dict(
        {section: keys | peer.keys.get(section, {}) for section, keys in config.to_dict().items()}, "peer"
    )
    place = join_world(config.runtime.device).device.type, config.runtime.dtype, torch.get_num_threads()
    return Request(*place, shape, batches, optimizer, meta.model_name, numbers, varied.to_dict(), clone)


def usable_pythons(known: dict[str, Peer], clone: str | None, scratch: Path) -> tuple[dict[str, str], list[dict]]:
    """Return the Python of every peer that can be tried, and the others with the reasons."""
    pythons, gaps = {}, []
    for name, peer in known.items():
        try:
            if name == "official" and not clone:
                raise PeerError("no clone is named: git clone https://github.com/facebookresearch/ijepa, and give --reference")
            pythons[name] = environment(peer, scratch / name)
        except PeerError as error:
            gaps.append({"what": name, "reason": str(error)})
    return pythons, gaps


class Timed(NamedTuple):
    """A peer's rounds on one model, and what its process said of itself."""

    seconds: list[float]  # a step
    spent: list[int]  # FLOPs of the same steps
    facts: dict
    phases: list[dict[str, float]]  # ms by part, of some further steps

    def row(self, images: int, rates: list[float]) -> dict:
        """Return the numbers of a row; `rates` are those of matrix products in the same rounds, in FLOP/s."""
        speed = Spread.of([images / s for s in self.seconds])
        shares = Spread.of([f / s / rate for f, s, rate in zip(self.spent, self.seconds, rates, strict=True)])
        parts = [phases_of(taken) for taken in self.phases]
        return {
            "n": len(self.seconds), "images_per_s": speed._asdict(),
            "ms": {part: Spread.of([found[part] for found in parts]).median for part in parts[0]},
            "gflop_per_image": float(np.mean(self.facts["flops"])) / images / 1e9,
            "gemm_gflops": Spread.of(rates).median / 1e9, "share_of_gemm": shares._asdict(),
            "peak_bytes": self.facts["peak_bytes"], "process_bytes": self.facts["process_bytes"],
            "torch": self.facts["torch"],
        }  # fmt: skip

    def ratios(self, ours: "Timed") -> dict:
        """Return how far ours is ahead: in images/s, in FLOP/s, and in memory, where less is better."""
        per_flop = [[s / f for s, f in zip(one.seconds, one.spent, strict=True)] for one in (ours, self)]
        return {
            "ratio": timing.paired_ratio(ours.seconds, self.seconds)._asdict(),
            "ratio_at_equal_flops": timing.paired_ratio(*per_flop)._asdict(),
            "memory_ratio": self.facts["peak_bytes"] / ours.facts["peak_bytes"],
        }


def phases_of(taken: dict[str, float]) -> dict[str, float]:
    """Sum the milliseconds of a step's parts, which each peer splits in its own way, into four phases."""
    found = dict.fromkeys(("forward", "backward", "optimizer", "EMA"), 0.0)
    for part, ms in taken.items():
        phase = next((phase for phase in found if part.endswith(phase)), "forward" if part == "loss" else "optimizer")
        found[phase] += ms  # gradient norms and what is left over count with the optimizer
    return found


def take_turns(known: dict[str, Peer], runs: dict[str, PeerProcess], config: Config, rounds: int) -> list[dict]:
    """Time rounds of a step of every peer, and of the matrix products that are the ceiling of all; return their rows."""
    device, dtype = join_world(config.runtime.device).device, COMPUTE_DTYPES[config.runtime.dtype]
    ceiling = Ceiling([*mlp_shapes(config), timing.square_product(device)], dtype, device)
    seconds = timing.interleave({"ceiling": ceiling, **runs}, rounds, device)
    rates = [ceiling.rates[number] for number in range(rounds)]
    timed = {}
    for name, run in runs.items():
        spent = [run.facts["flops"][number % DISTINCT] for number in range(rounds)]
        timed[name] = Timed(seconds[name], spent, run.facts, [run.phases(number) for number in range(DISTINCT)])
    about = {"dtype": config.runtime.dtype, "size": config.image_size[0], "batch": config.data.batch_size}
    return [
        {"model": config.meta.model_name, "peer": name, "objective": known[name].objective, **about,
         **one.row(config.data.batch_size, rates),
         **({"beside": known[name].beside, **one.ratios(timed[known[name].beside])} if known[name].beside else {})}
        for name, one in timed.items()
    ]  # fmt: skip


def measure_model(
    known: dict[str, Peer], pythons: dict[str, str], config: Config, clone: str | None, rounds: int
) -> tuple[list[dict], list[dict]]:
    """Return the rows of a model, and the peers that cannot be built for it with the reasons; ours must run."""
    gaps = []
    with ExitStack() as running:
        runs = {}
        for name, python in pythons.items():
            request = request_for(known[name], config, clone if name == "official" else None)
            try:
                runs[name] = running.enter_context(PeerProcess(python, known[name].file, request))
            except PeerError as error:
                if name in OURS:
                    raise
                gaps.append({"what": f"{name} {config.meta.model_name}", "reason": str(error)})
        return take_turns(known, runs, config, rounds), gaps


def measure_asked(options: argparse.Namespace) -> dict:
    known, clone = OURS | {name: PEERS[name] for name in options.peers}, options.reference
    configs = [config_of(options, meta__model_name=model) for model in options.models]
    for config in configs:
        device = prepare_device(config, config.mask.truncate_group)
        if clone and "official" in known:
            official.refuse_config(clone, config)
            insist_on_equal_losses(config, device, clone)
    with tempfile.TemporaryDirectory(prefix="fastjepa-peers-") as scratch:
        pythons, gaps = usable_pythons(known, clone, Path(scratch))
        versions = {name: version_of(known[name], python) for name, python in pythons.items()}
        rows = []
        for config in configs:
            found, absent = measure_model(known, pythons, config, clone, options.rounds)
            rows, gaps = rows + [row | {"version": versions[row["peer"]]} for row in found], gaps + absent
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
