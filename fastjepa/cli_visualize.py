"""`fastjepa visualize`: pictures of what a checkpoint's networks see and predict."""

import argparse
import json
import os
import sys
from pathlib import Path

from fastjepa import cli_decoder
from fastjepa.arguments import add, among, positive

WHAT = ("masks", "pca", "neighbours", "samples")
EXAMPLES = """examples:
  fastjepa visualize runs/demo --data fashion-mnist
  fastjepa visualize runs/cifar10 --data cifar10 --images 6 --what pca,neighbours --output pictures
  fastjepa visualize runs/demo --data fashion-mnist --what samples --decoder runs/demo/decoder
  fastjepa visualize IN1K-vit.h.14-300e.pth.tar --data /data/imagenet --n-train 500 --n-test 32

masks: contexts and target blocks. pca: the first three principal components of patch features as colours, beside those of an
untrained encoder. neighbours: the blocks of other images nearest to what the predictor says of a hidden block, and how
often the true one is nearer than random ones. samples: what the decoder that `fastjepa decoder` has trained draws from a
prediction, and how near it comes to the hidden block."""


def register(commands) -> None:
    sub = add(commands, "visualize", visualize, "pictures of masks, features and predictions of a checkpoint", EXAMPLES)
    weights = "run directory (its latest checkpoint), a checkpoint, or weights of the official code, timm or transformers"
    sub.add_argument("checkpoint", type=Path, help=weights)
    sub.add_argument("--data", required=True, help="data set's name, or a directory with train/ and test/ or val/")
    sub.add_argument("--images", type=positive, default=8, metavar="N", help="held-out images to show (default 8)")
    sub.add_argument("--seed", type=int, default=0, help="of images, masks and every other draw (default 0)")
    sub.add_argument("--output", type=Path, metavar="DIR", help="default: pictures/ in the run directory, or here")
    what = f"of {', '.join(WHAT)}, by commas (default: those for which the networks are there)"
    sub.add_argument("--what", type=among(*WHAT), metavar="LIST", help=what)
    sub.add_argument("--k", type=positive, default=6, help="nearest blocks to show (default 6)")
    sub.add_argument("--n-train", type=positive, default=2000, help="neighbours: training images searched (default 2000)")
    sub.add_argument("--n-test", type=positive, default=256, help="neighbours, samples: held-out images counted (default 256)")
    sub.add_argument(
        "--decoder", type=Path, metavar="DIR", help="samples: of `fastjepa decoder` (default: decoder/ in the run)"
    )
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sub.add_argument("--json", action="store_true", help="print names of files and numbers as JSON")


def visualize(args: argparse.Namespace) -> None:
    from fastjepa import gallery, pictures
    from fastjepa.evals.subject import open_subject

    subject = open_subject(args.checkpoint, args.device, cache=False)
    output = args.output or (subject.home or Path()) / "pictures"
    args.decoder = args.decoder or cli_decoder.home(subject)
    what = args.what or default(args.checkpoint, args.decoder)
    held_out = gallery.open_split(args.data, "test", max(args.images, args.n_test), args.seed)
    shown, result = gallery.images(subject, held_out, args.images), {"files": []}

    def keep(name: str, picture) -> None:
        pictures.save(picture, output / name)
        result["files"].append(str(output / name))

    if "masks" in what:
        keep("masks.png", gallery.masks_sheet(subject, shown, args.seed))
    if "pca" in what:
        keep("pca.png", gallery.pca_sheet(subject, shown))
    for name in [name for name in ("neighbours", "samples") if name in what]:
        found = neighbours(subject, held_out, args, keep) if name == "neighbours" else samples(subject, held_out, args, keep)
        result[name], numbers = found, output / f"{name}.json"
        numbers.write_text(json.dumps(found, indent=1) + "\n")
        result["files"].append(str(numbers))
    print(json.dumps(result) if args.json else "\n".join([*result["files"], *said(result)]))


def default(checkpoint: Path, decoder: Path) -> list[str]:
    """All that the weights, and a decoder where there is one, can show; what they hold no network for is left out, and said."""
    from fastjepa import interop

    if interop.networks(checkpoint).get("predictor"):
        return [name for name in WHAT if name != "samples" or decoder.is_dir()]
    print(f"{checkpoint}: holds no predictor, so neighbours are left out", file=sys.stderr)
    return ["masks", "pca"]


def neighbours(subject, held_out, args: argparse.Namespace, keep) -> dict:
    """Search and rank, keep the picture, and give the numbers with their origin."""
    from fastjepa import gallery
    from fastjepa.evals import neighbours
    from fastjepa.evals.result import TRAIN_IMAGES
    from fastjepa.evals.subject import provenance

    bank = gallery.open_split(args.data, "train", args.n_train, args.seed, TRAIN_IMAGES)
    queries = neighbours.predict(subject, held_out, args.seed)
    found = neighbours.search(subject, queries, held_out, bank, args.k, args.seed)
    keep("neighbours.png", gallery.neighbours_sheet(subject, queries, found, bank, args.images))
    origin = provenance(subject, "target", (bank, held_out), args.seed)
    return origin | {"queries": len(held_out.rows), "searched": len(bank.rows)} | neighbours.summary(found)


def samples(subject, held_out, args: argparse.Namespace, keep) -> dict:
    """Draw and measure, keep the picture, and give the numbers with their origin."""
    from fastjepa import gallery
    from fastjepa.evals.subject import provenance
    from fastjepa.studies import decoder, samples

    talk = decoder.speaker(subject)
    network, step = decoder.load(args.decoder, talk)
    drawn = samples.draw(talk, network, held_out, args.seed)
    keep("samples.png", gallery.samples_sheet(subject, drawn, args.images))
    origin = provenance(subject, "target", (held_out, held_out), args.seed) | {"decoder": os.path.relpath(args.decoder)}
    origin["decoder_step"] = step
    return origin | {"images": len(held_out.rows)} | samples.summary(samples.distances(subject, drawn), args.seed)


def said(result: dict) -> list[str]:
    """The numbers in words."""
    return [*(ranks(result["neighbours"]) if "neighbours" in result else []),
            *(apart(result["samples"]) if "samples" in result else [])]  # fmt: skip


def ranks(found: dict) -> list[str]:
    lines = [f"true block among {found['candidates']} random ones, {found['queries']} images (95 % intervals):"]
    for name in ("anywhere", "same_place"):
        low, high = found[name]["ci95"]
        shares = [f"{key} {share(value)}" for key, value in found[name].items() if key.startswith("recall")]
        rank = f"mean rank {found[name]['mean_rank']:.1f} ({low:.1f} to {high:.1f}; chance {found[name]['chance']:g})"
        lines.append(", ".join([f"  {name.replace('_', ' '):10} {rank}", *shares]))
    return lines


def apart(found: dict) -> list[str]:
    """A line for each thing that the decoder was given: how far its samples are from the hidden block."""
    lines = [f"samples to the hidden block, {found['samples']} of each of {found['images']} images (95 % intervals):"]
    for name in ("predictor", "shuffled", "untrained"):
        parts = [f"{measure} {spread(found[measure][name])}" for measure in ("pixels", "features")]
        if name in found["pixels"]["farther"]:
            farther = [f"{measure} {spread(found[measure]['farther'][name])}" for measure in ("pixels", "features")]
            parts.append(f"farther by {', '.join(farther)}")
        lines.append(f"  {name:10} {', '.join(parts)}")
    return lines


def spread(found: dict) -> str:
    low, high = found["ci95"]
    return f"{found['mean']:.4f} ({low:.4f} to {high:.4f})"


def share(found: dict) -> str:
    percent = [f"{100 * value:.1f}" for value in (found["share"], *found["ci95"])]
    return f"{percent[0]} % ({percent[1]} to {percent[2]}; chance {100 * found['chance']:g})"
