"""Record what the trainer computes, so that a rebuilt trainer can be compared with it: `tests/test_golden.py` does so.

    python tests/reference/record_golden.py record         writes golden.json, help.json and the two kept runs beside this file
    python tests/reference/record_golden.py observe FILE   writes the same observations of the present code to FILE

Everything goes through the `fastjepa` command and the files that it writes; `inner` names the few functions beside it.
The observations are made by two launches: one process, and two ranks of torchrun. Both are held to one thread and to AVX2
instructions, so that one x86-64 machine gives the bits of another as far as its libraries allow. All paths are relative to
a temporary folder, so nothing that is written names a place of the machine.

Record again only where a change of results is meant, and say in the commit which values changed and why. The kept runs
hold what an earlier commit wrote (it is in their names), and `record` never replaces one that is there.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PINNED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE",
          "ONEDNN_MAX_CPU_ISA": "AVX2", "COLUMNS": "100", "NO_COLOR": "1"}  # fmt: skip
KEPT = {"run_0a7d515": HERE / "run_0a7d515", "run_0a7d515_zero1": HERE / "run_0a7d515_zero1"}
NETWORKS = ("encoder", "predictor", "target_encoder")
CLASSES, TRAIN, TEST = 4, 160, 40

SHARED = ["data.source=images", "data.batch_size=16", "optimization.epochs=2", "logging.every=1", "logging.monitor_every=0",
          "logging.probe_every=0", "runtime.dtype=fp32", "runtime.device=cpu"]  # fmt: skip
PLAIN = ["loss.regularizer=none"]
CUT = [*PLAIN, "mask.sampling=official", "mask.truncate=batch_min"]
ALONE = {
    "vicreg": [],
    "plain": PLAIN,
    "micro_batch": ["runtime.micro_batch=8"],
    "official_cut": [*CUT, "mask.truncate_group=8", "optimization.final_weight_decay=0.4"],
    "official_cut_micro_batch": [*CUT, "mask.truncate_group=8", "runtime.micro_batch=4"],
    "joint": [*PLAIN, "meta.predictor=joint"],
    "target_input": [*PLAIN, "loss.target=input"],
    "target_pixels": [*PLAIN, "loss.target=pixels"],
    "normalize_batch": [*PLAIN, "loss.normalize=batch"],
    "sigreg_l2": ["loss.regularizer=sigreg", "loss.kind=l2", "optimization.pred_lr_scale=0.5"],
    "share_batch_random": [*PLAIN, "mask.share=batch", "mask.strategy=random", "mask.sampling=official",
                           "mask.pred_mask_scale=[0.15, 0.2]"],
}  # fmt: skip
RANKS = {  # DeepSpeed last: it keeps the process group that it has met first
    "two_ranks_ddp": ["runtime.zero=0"],
    "two_ranks_ddp_official_cut": [*CUT, "runtime.zero=0", "mask.truncate_group=16", "runtime.micro_batch=4"],
    "two_ranks_zero1": ["runtime.zero=1"],
}
TINY = ["meta.embed_dim=16", "meta.depth=1", "meta.num_heads=2", "meta.pred_depth=1", "meta.pred_emb_dim=8"]

DEMO_MASK, SMALL_GRID = ["mask.min_keep=0", "mask.pred_mask_scale=[0.15, 0.3]"], ["data.crop_size=28", "mask.patch_size=7"]
MASKS = {
    "official": [],
    "official_uncut": ["mask.truncate=none"],
    "uniform": ["mask.sampling=uniform", "mask.truncate=none"],
    "uniform_cut": ["mask.sampling=uniform", "mask.truncate_group=8"],
    "fraction": ["mask.truncate=fraction"],
    "two_contexts": ["mask.num_enc_masks=2", "mask.num_pred_masks=3", "mask.allow_overlap=true"],
    "share_batch": ["mask.share=batch"],
    "block": ["mask.strategy=block", "mask.truncate=none"],
    "rasterized": ["mask.strategy=rasterized", "mask.truncate=none"],
    "random": ["mask.strategy=random", "mask.truncate=none"],
    "demo": [*SMALL_GRID, *DEMO_MASK, "mask.sampling=uniform", "mask.truncate=none"],
    "crowded": ["mask.min_keep=40", "mask.enc_mask_scale=[0.4, 0.5]", "mask.truncate=none"],
    "demo_official": [*SMALL_GRID, *DEMO_MASK, "mask.truncate_group=16"],
}
DRAWS = [(0, 0, 0, 16, 16), (7, 1234, 5, 21, 64)]  # seed, step, first slot, last slot, slots of the global batch


def inner():
    """Return every function below the command line that is recorded, by name: the one place to mend when they move."""
    from fastjepa.config.load import load_config
    from fastjepa.data.crops import BLOCKS_PER_SAMPLE, CROP_TRIES, crop_box
    from fastjepa.data.sources import open_source
    from fastjepa.loader.loader import batch_recipe
    from fastjepa.loader.micro_batches import MicroBatches
    from fastjepa.masks.draw import draw_masks
    from fastjepa.masks.layouts import Masking
    from fastjepa.rng import BOX_STREAM, generator

    def uniforms(seed: int, epoch: int, sample: int) -> list[float]:
        return generator(seed, BOX_STREAM, epoch, sample * BLOCKS_PER_SAMPLE).random(4 * BLOCKS_PER_SAMPLE).tolist()

    def images(overrides: list[str], rank: int, world: int, item: int):
        config = load_config("multiblock", [*SHARED, *overrides])
        return MicroBatches(batch_recipe(config), open_source(config.data.address), rank, world)[item].images

    def draw(mask, grid: tuple[int, int], seed: int, step: int, *slots: int):
        start, stop, total = slots
        return draw_masks(Masking(mask, grid, seed), step, range(start, stop), total)

    return {
        "load": load_config,
        "draw": draw,
        "crop_box": crop_box,
        "uniforms": uniforms,
        "flip_at": 4 * CROP_TRIES,
        "images": images,
    }


def write_images(folder: Path) -> None:
    """Write idx files of noisy pictures, 28 pixels a side, four classes; a hash of the place makes every byte."""
    import numpy as np

    folder.mkdir()
    rows, columns = np.mgrid[:28, :28]
    for prefix, count, first in (("train", TRAIN, 0), ("t10k", TEST, TRAIN)):
        labels = (np.arange(first, first + count) * 7 % CLASSES).astype(np.uint8)
        stripes = 3 * (rows * (labels % 2)[:, None, None] + columns * (labels // 2)[:, None, None])  # (n, 28, 28)
        noise = np.stack([bytes_of(f"image {number}", 28 * 28) for number in range(first, first + count)]).reshape(-1, 28, 28)
        pixels = (stripes + 0.65 * noise).clip(0, 255).astype(np.uint8)
        for name, values in (("images", pixels), ("labels", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (folder / f"{prefix}-{name}-idx{values.ndim}-ubyte").write_bytes(header + values.tobytes())


def bytes_of(text: str, count: int):
    """Return `count` bytes that a text stands for, as a NumPy array."""
    import numpy as np

    return np.frombuffer(hashlib.shake_256(text.encode()).digest(count), np.uint8)


def command(*words: str) -> str:
    """Run `fastjepa WORDS` in this process and return what it prints; a failure ends the recording."""
    from fastjepa.cli.main import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = main(list(words))
        except SystemExit as end:  # --help
            code = end.code
    if code:
        raise SystemExit(f"fastjepa {' '.join(words)} ended with {code}")
    return printed.getvalue()


def train(output: str, overrides: list[str], *options: str) -> None:
    """Train the network of configs/multiblock.yaml; a rank is told its number, as launchers of old append it."""
    local = ["--local_rank", os.environ["LOCAL_RANK"]] if "LOCAL_RANK" in os.environ else []
    config = ["--config", str(ROOT / "configs" / "multiblock.yaml")]
    command("train", *config, "--output", output, *options, *local, *SHARED, *overrides)


def series(output: str, *names: str) -> dict[str, list[float]]:
    """Return {name: values by step} of a run's metrics.jsonl; names that it does not log are left out."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in names if name in lines[0]}


def latest(output: str) -> Path:
    return max((Path(output) / "checkpoints").iterdir())


def read_tensors(checkpoint: Path, group: str) -> dict:
    """Return {name: tensor} of "encoder", say, whole or in pieces "name@start", whose shapes the metadata holds."""
    import torch
    from safetensors import safe_open

    whole, parts, shapes = {}, {}, {}
    for file in sorted(checkpoint.glob(f"{group}[.-]*safetensors")):
        with safe_open(file, "pt") as stored:
            shapes |= json.loads((stored.metadata() or {}).get("shapes", "{}"))
            for key in stored.keys():  # noqa: SIM118 (a handle, not a dict)
                name, _, start = key.partition("@")
                tensor = stored.get_tensor(key)
                if start:
                    parts.setdefault(name, {})[int(start)] = tensor
                else:
                    whole[name] = tensor
    return whole | {name: torch.cat([part[start] for start in sorted(part)]).view(shapes[name]) for name, part in parts.items()}


def weights(output: str) -> dict:
    """Return the SHA-256 of the three networks' tensors in name order, and norm, mean size and greatest size of each."""
    digest, numbers = hashlib.sha256(), {}
    for network in NETWORKS:
        tensors = read_tensors(latest(output), network)
        for name in sorted(tensors):
            digest.update(f"{network}.{name}".encode() + tensors[name].contiguous().numpy().tobytes())
        sizes = [tensor.double().abs() for tensor in tensors.values()]
        total, count = sum(float(size.sum()) for size in sizes), sum(size.numel() for size in sizes)
        norm = math.sqrt(sum(float(size.square().sum()) for size in sizes))
        numbers[network] = [norm, total / count, max(float(size.max()) for size in sizes)]
    return {"sha256": digest.hexdigest(), "statistics": numbers}


def checkpoint_form(output: str) -> dict:
    """Return the names in a checkpoint: files, tensors with dtype and shape, metadata, and the keys of its JSON files."""
    from safetensors import safe_open

    found, tensors = latest(output), {}
    for file in sorted(found.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            slices = {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118
            tensors[file.name] = {key: f"{part.get_dtype()} {part.get_shape()}" for key, part in sorted(slices.items())}
            tensors[file.name]["metadata"] = " ".join(sorted(stored.metadata() or ()))
    state, manifest = (json.loads((found / name).read_text()) for name in ("state.json", "manifest.json"))
    return {
        "name": found.name,
        "files": sorted(file.name for file in found.iterdir()),
        "tensors": tensors,
        "state": sorted(state),
        "record": sorted(state["record"]),
        "versions": sorted(state["record"]["versions"]),
        "manifest": {"": sorted(manifest)} | {name: sorted(entry) for name, entry in sorted(manifest["files"].items())},
    }


def run_variants(variants: dict[str, list[str]], shared: list[str]) -> dict:
    """Train every variant for 20 steps and return its losses and final weights."""
    for name, overrides in variants.items():
        train(name, [*overrides, *shared])
    if os.environ.get("RANK", "0") != "0":
        return {}
    return {name: series(name, "loss", "regularizer") | weights(name) for name in variants}


def mask_draws() -> dict:
    """Return a hash of each draw of each kind of mask, and the patches of its first slot."""
    import numpy as np

    found, used = {}, inner()
    for name, overrides in MASKS.items():
        config = used["load"]("vit_base16", overrides)
        for where in DRAWS:
            context, target = used["draw"](config.mask, config.grid, *where)
            bits = b"".join(str(mask.shape).encode() + np.packbits(mask).tobytes() for mask in (context, target))
            patches = {"context": context[0], "target": target[0]}
            found[f"{name} {where}"] = {"sha256": hashlib.sha256(bits).hexdigest()} | {
                kind: [np.flatnonzero(mask).tolist() for mask in masks] for kind, masks in patches.items()
            }
    return found


def crops() -> dict:
    """Return crop boxes with flips of given (seed, epoch, sample, height, width), and hashes of micro-batches' pixels."""
    used, boxes = inner(), {}
    for seed, epoch, sample, height, width in ((0, 0, 0, 28, 28), (0, 1, 0, 28, 28), (3, 2, 77, 375, 500), (0, 9, 5, 20, 900)):
        uniforms = used["uniforms"](seed, epoch, sample)
        for scale in ((0.3, 1.0), (0.5, 1.0)):
            box = used["crop_box"](height, width, scale, uniforms)
            key = f"seed {seed} epoch {epoch} sample {sample} of {height}x{width} scale {scale}"
            boxes[key] = [*box, uniforms[used["flip_at"]] < 0.5]
    pixels = {}
    for rank, world, item in ((0, 1, 0), (0, 1, 25), (1, 2, 7)):
        images = used["images"](["runtime.micro_batch=8"], rank, world, item)
        pixels[f"rank {rank} of {world} item {item}"] = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return {"boxes": boxes, "pixels": pixels}


def helps(path: tuple[str, ...] = ()) -> dict[str, str]:
    """Return {command: its --help} of a command and of all below it."""
    text = command(*path, "--help")
    found = {" ".join(("fastjepa", *path)): text}
    if text.partition("\n\n")[0].rstrip().endswith(" ..."):
        for name in re.findall(r"^    ([a-z]\w*)(?:  |$)", text, re.MULTILINE):
            found |= helps((*path, name))
    return found


def kept_run(name: str) -> dict:
    """Return what a kept run gives: features of its encoders, k-NN with and without its cache, and the losses of 4 steps more.

    Its cached features are exchanged for their labels, one-hot, before the second k-NN: an accuracy of 1 says that they
    were read.
    """
    import torch

    from fastjepa import load_encoder

    shutil.copytree(KEPT[name], name)
    images = torch.linspace(-9, 9, 2 * 28 * 28).sin().view(2, 1, 28, 28)
    found = {}
    for which in ("target", "context"):
        with torch.inference_mode():
            features = load_encoder(name, which).forward_features(images)
        found[which] = [*features.shape, float(features.std()), *features[1, 2, :6].tolist()]
    if any(Path(name).glob("features/*")):
        found |= cached_features(name)
    command("train", "--config", f"{name}/config.yaml", "--output", name, "--resume", "must", "--max-steps", "10",
            "data.batch_size=16", "runtime.zero=0")  # fmt: skip
    return found | {"resumed": {key: values[-5:] for key, values in series(name, "step", "loss", "regularizer").items()}}


def cached_features(name: str) -> dict:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    knn = ["eval", "knn", "--checkpoint", name, "--data", "images", "--k", "5", "--json"]
    computed = json.loads(command(*knn, "--no-cache"))["accuracy"]
    for file in Path(name).glob("features/*.safetensors"):
        with safe_open(file, "pt") as stored:
            metadata, x, y = stored.metadata(), stored.get_tensor("x"), stored.get_tensor("y")
        save_file({"x": torch.eye(x.shape[1])[y], "y": y}, file, metadata)
    before = state_of(name)
    marked = json.loads(command(*knn))["accuracy"]
    return {"computed": computed, "marked": marked, "files_written": sorted(state_of(name).items() - before.items())}


def state_of(folder: str) -> dict[str, int]:
    """Return {file: time of its last change} of the files of features in a folder, at any depth."""
    return {str(file): file.stat().st_mtime_ns for file in Path(folder).rglob("*.safetensors")}


def processor() -> str:
    """Return maker and family of the CPU: those alike give the same bits under PINNED."""
    info = Path("/proc/cpuinfo")
    lines = dict(re.findall(r"^(.+?)\s*: (.*)$", info.read_text(), re.MULTILINE)) if info.is_file() else {}
    named = " ".join(lines[name] for name in ("vendor_id", "cpu family") if name in lines)
    return named or f"{platform.machine()} {platform.processor()}"


def alone(out: Path) -> None:
    """Observe what one process shows."""
    import torch

    runs = run_variants(ALONE, [])
    found = {
        "made_by": {"torch": torch.__version__.partition("+")[0], "processor": processor()},
        "runs": runs,
        "schedule": series("official_cut", "lr", "weight_decay", "ema_momentum", "context_tokens", "target_tokens"),
        "checkpoint": checkpoint_form("vicreg"),
        "masks": mask_draws(),
        "crops": crops(),
        "kept": {name: kept_run(name) for name in KEPT},
        "help": helps(),
    }
    out.write_text(json.dumps(found))


def ranks(out: Path) -> None:
    """Observe what two ranks show."""
    runs = run_variants(RANKS, ["data.batch_size=8"])
    if runs:
        out.write_text(json.dumps({"runs": runs, "sharded_checkpoint": checkpoint_form("two_ranks_zero1")}))


def keep(name: str) -> None:
    """Write a kept run: 6 steps of a tiny network, and, of one process, the cache of its features."""
    sharded = name.endswith("zero1")
    train(name, [*TINY, f"runtime.zero={int(sharded)}", f"data.batch_size={8 if sharded else 16}"], "--max-steps", "6")
    if not sharded:
        command("eval", "knn", "--checkpoint", name, "--data", "images", "--k", "5", "--json")
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(Path(name) / "tensorboard", ignore_errors=True)
        shutil.copytree(name, KEPT[name])


def launch(folder: str, processes: int, *words: str) -> None:
    """Run this file with `words` in a folder, in one process or in ranks of torchrun, under PINNED."""
    starter = [sys.executable]
    if processes > 1:
        starter += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | PINNED
    done = subprocess.run([*starter, __file__, *words], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}")


def observe() -> dict:
    """Return all observations of the present code."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images")
        for part, processes in (("alone", 1), ("ranks", 2)):
            launch(folder, processes, part, f"{part}.json")
            seen = json.loads((Path(folder) / f"{part}.json").read_text())
            found |= seen | {"runs": found.get("runs", {}) | seen["runs"]}
    return found


def record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images")
        for name, place in KEPT.items():
            if not place.exists():
                launch(folder, 2 if name.endswith("zero1") else 1, "keep", name)
    found = observe()
    for name, values in (("help", found.pop("help")), ("golden", found)):
        text = json.dumps(values, indent=1)
        short = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
        (HERE / f"{name}.json").write_text(short + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record"]:
            record()
        case ["observe", file]:
            Path(file).write_text(json.dumps(observe()))
        case [("alone" | "ranks") as part, file]:
            {"alone": alone, "ranks": ranks}[part](Path(file))
        case ["keep", name]:
            keep(name)
        case _:
            sys.exit(__doc__)
