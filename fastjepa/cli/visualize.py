"""The command `fastjepa visualize`: pictures of a checkpoint's masks, features and predictions, and their numbers."""

import argparse
import json
import os
import sys
from pathlib import Path

from fastjepa.cli.options import add_command, bands_option, positive_int, some_of

PICTURE_KINDS = ("masks", "pca", "neighbours", "samples")
VISUALIZE_EXAMPLES = """examples:
  fastjepa visualize runs/demo --data fashion-mnist
  fastjepa visualize runs/cifar10 --data cifar10 --images 6 --what pca,neighbours --output pictures
  fastjepa visualize runs/demo --data fashion-mnist --what samples --decoder runs/demo/decoder
  fastjepa visualize runs/sentinel2 --data /data/sentinel2 --bands 3,2,1
  fastjepa visualize IN1K-vit.h.14-300e.pth.tar --data /data/imagenet --n-train 500 --n-test 32

masks: contexts and target blocks. pca: the first three principal components of patch features as colours, beside those of an
untrained encoder. neighbours: the blocks of other images nearest to what the predictor says of a hidden block, and how
often the true one is nearer than random ones. samples: what the decoder that `fastjepa decoder` has trained draws from a
prediction, and how near it comes to the hidden block."""


def register(commands) -> None:
    """Add `visualize` to the list of commands."""
    sub = add_command(
        commands, "visualize", run_visualize, "pictures of masks, features and predictions of a checkpoint", VISUALIZE_EXAMPLES
    )
    weights = "run directory (its latest checkpoint), a checkpoint, or weights of the official code, timm or transformers"
    sub.add_argument("checkpoint", type=Path, help=weights)
    sub.add_argument("--data", required=True, help="data set's name, or a directory with train/ and test/ or val/")
    sub.add_argument("--images", type=positive_int, default=8, metavar="N", help="held-out images to show (default 8)")
    sub.add_argument("--seed", type=int, default=0, help="of images, masks and every other draw (default 0)")
    sub.add_argument("--output", type=Path, metavar="DIR", help="default: pictures/ in the run directory, or here")
    what = f"of {', '.join(PICTURE_KINDS)}, by commas (default: those for which the networks are there)"
    sub.add_argument("--what", type=some_of(*PICTURE_KINDS), metavar="LIST", help=what)
    bands_option(sub)
    sub.add_argument("--k", type=positive_int, default=6, help="nearest blocks to show (default 6)")
    sub.add_argument("--n-train", type=positive_int, default=2000, help="neighbours: training images searched (default 2000)")
    sub.add_argument(
        "--n-test", type=positive_int, default=256, help="neighbours, samples: held-out images counted (default 256)"
    )
    sub.add_argument(
        "--decoder", type=Path, metavar="DIR", help="samples: of `fastjepa decoder` (default: decoder/ in the run)"
    )
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sub.add_argument("--json", action="store_true", help="print names of files and numbers as JSON")


def run_visualize(args: argparse.Namespace) -> None:
    """Draw the pictures, write them and their numbers, and print the names of the files and the numbers."""
    from fastjepa.evals.inputs import open_subject
    from fastjepa.files import require_writable, write_atomic
    from fastjepa.visualize.bands import ShownBands
    from fastjepa.visualize.decoder import decoder_folder
    from fastjepa.visualize.images import save_picture
    from fastjepa.visualize.sheets import drawn_masks_sheet, open_drawn_split, pca_sheet, shown_images

    subject = open_subject(args.checkpoint, args.device, cache=False)
    output = args.output or (subject.home or Path()) / "pictures"
    require_writable(output, folder=True)
    args.decoder = args.decoder or decoder_folder(subject)
    args.bands = ShownBands.of(subject.pixels, args.bands)
    if args.bands.stretched:
        print(f"images are shown by {args.bands}; --bands chooses", file=sys.stderr)
    what = args.what or pictures_possible(args.checkpoint, args.decoder)
    held_out = open_drawn_split(args.data, "test", max(args.images, args.n_test), args.seed)
    shown, result = shown_images(subject, held_out, args.images), {"files": []}

    def keep(name: str, picture) -> None:
        save_picture(picture, output / name)
        result["files"].append(str(output / name))

    if "masks" in what:
        keep("masks.png", drawn_masks_sheet(subject, shown, args.seed, args.bands))
    if "pca" in what:
        keep("pca.png", pca_sheet(subject, shown, args.bands))
    for name, draw in (("neighbours", neighbours_picture), ("samples", samples_picture)):
        if name in what:
            result[name], numbers = draw(subject, held_out, args, keep), output / f"{name}.json"
            write_atomic(numbers, json.dumps(result[name], indent=1) + "\n")
            result["files"].append(str(numbers))
    print(json.dumps(result) if args.json else "\n".join([*result["files"], *numbers_in_words(result)]))


def pictures_possible(checkpoint: Path, decoder: Path) -> list[str]:
    """Return the pictures that the weights, and a decoder where there is one, can give; say which are left out, and why."""
    from fastjepa.weights.read import starting_networks

    if starting_networks(checkpoint).get("predictor"):
        return [name for name in PICTURE_KINDS if name != "samples" or decoder.is_dir()]
    print(f"{checkpoint}: holds no predictor, so neighbours are left out", file=sys.stderr)
    return ["masks", "pca"]


def neighbours_picture(subject, held_out, args: argparse.Namespace, keep) -> dict:
    """Search and rank blocks, keep the picture, and return the numbers with their origin."""
    from fastjepa.evals.inputs import provenance
    from fastjepa.evals.scoring import TRAIN_DRAW
    from fastjepa.visualize.neighbours import predict_blocks, search_blocks, summarise_ranks
    from fastjepa.visualize.sheets import neighbours_sheet, open_drawn_split

    bank = open_drawn_split(args.data, "train", args.n_train, args.seed, TRAIN_DRAW)
    queries = predict_blocks(subject, held_out, args.seed)
    found = search_blocks(subject, queries, held_out, bank, args.k, args.seed)
    keep("neighbours.png", neighbours_sheet(subject, queries, found, bank, args.images, args.bands))
    origin = provenance(subject, "target", (bank, held_out), args.seed)
    return origin | {"queries": len(held_out.rows), "searched": len(bank.rows)} | summarise_ranks(found)


def samples_picture(subject, held_out, args: argparse.Namespace, keep) -> dict:
    """Draw and measure samples, keep the picture, and return the numbers with their origin."""
    from fastjepa.evals.inputs import provenance
    from fastjepa.visualize.decoder import block_predictor, load_decoder
    from fastjepa.visualize.samples import draw_samples, sample_distances, summarise_samples
    from fastjepa.visualize.sheets import samples_sheet

    predictor = block_predictor(subject)
    network, step = load_decoder(args.decoder, predictor)
    drawn = draw_samples(predictor, network, held_out, args.seed)
    keep("samples.png", samples_sheet(subject, drawn, args.images))
    origin = provenance(subject, "target", (held_out, held_out), args.seed) | {"decoder": os.path.relpath(args.decoder)}
    origin["decoder_step"] = step
    return origin | {"images": len(held_out.rows)} | summarise_samples(sample_distances(subject, drawn), args.seed)


def numbers_in_words(result: dict) -> list[str]:
    """Return the lines that say the numbers of neighbours and of samples, where there are any."""
    return [*(rank_lines(result["neighbours"]) if "neighbours" in result else []),
            *(distance_lines(result["samples"]) if "samples" in result else [])]  # fmt: skip


def rank_lines(found: dict) -> list[str]:
    """Return a line for each way of drawing candidates: the true block's mean rank and recall among them."""
    lines = [f"true block among {found['candidates']} random ones, {found['queries']} images (95 % intervals):"]
    for name in ("anywhere", "same_place"):
        low, high = found[name]["ci95"]
        shares = [f"{key} {share_in_words(value)}" for key, value in found[name].items() if key.startswith("recall")]
        rank = f"mean rank {found[name]['mean_rank']:.1f} ({low:.1f} to {high:.1f}; chance {found[name]['chance']:g})"
        lines.append(", ".join([f"  {name.replace('_', ' '):10} {rank}", *shares]))
    return lines


def distance_lines(found: dict) -> list[str]:
    """Return a line for each condition that the decoder was given: how far its samples are from the hidden block."""
    lines = [f"samples to the hidden block, {found['samples']} of each of {found['images']} images (95 % intervals):"]
    for name in ("predictor", "shuffled", "untrained"):
        parts = [f"{measure} {mean_in_words(found[measure][name])}" for measure in ("pixels", "features")]
        if name in found["pixels"]["farther"]:
            farther = [f"{measure} {mean_in_words(found[measure]['farther'][name])}" for measure in ("pixels", "features")]
            parts.append(f"farther by {', '.join(farther)}")
        lines.append(f"  {name:10} {', '.join(parts)}")
    return lines


def mean_in_words(found: dict) -> str:
    """Return a mean with its 95 % interval."""
    low, high = found["ci95"]
    return f"{found['mean']:.4f} ({low:.4f} to {high:.4f})"


def share_in_words(found: dict) -> str:
    """Return a share in %, with its 95 % interval and what chance gives."""
    percent = [f"{100 * value:.1f}" for value in (found["share"], *found["ci95"])]
    return f"{percent[0]} % ({percent[1]} to {percent[2]}; chance {100 * found['chance']:g})"
