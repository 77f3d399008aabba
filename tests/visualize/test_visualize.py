"""`fastjepa visualize`: neighbours by brute force, ranks against planted copies, and the command as a user runs it."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.data.pixels import Pixels, normalise_pixels
from fastjepa.errors import UserError
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Split, Subject, open_subject
from fastjepa.loss.jepa_loss import jepa_loss
from fastjepa.loss.objective import choose_objective
from fastjepa.loss.regularizers import NoRegularizer
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import Jepa
from fastjepa.visualize import neighbours
from fastjepa.visualize.neighbours import (
    BankDistances,
    Neighbours,
    Queries,
    block_distances,
    nearest_blocks,
    normalised_rows,
    patch_rows,
    predict_blocks,
    rank_of_truth,
    search_blocks,
    summarise_ranks,
    target_rows,
    translated_rows,
)
from fastjepa.visualize.sheets import open_drawn_split
from tests.support.decoders import CONFIG, split, stirred

pytestmark = pytest.mark.xdist_group("visualize")  # one run serves all

GRID = (16, 16)
COUNTS = {"train": 20, "test": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ with train and test splits, without classes; run/, which has trained one step on them."""
    root, draw = tmp_path_factory.mktemp("visualize"), np.random.default_rng(0)
    for part, count in COUNTS.items():
        (root / "images" / part).mkdir(parents=True)
        for i in range(count):
            pixels = Image.fromarray(draw.integers(0, 256, (6, 6, 3), np.uint8)).resize((64, 64))
            pixels.save(root / "images" / part / f"{i:02}.png")
    data = CONFIG["data"] | {"source": str(root / "images")}
    (root / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"data": data}))
    words = ["train", "--config", str(root / "tiny.yaml"), "--output", str(root / "run"), "--max-steps", "1"]
    assert main(words) == 0
    return root


@pytest.fixture
def subject(place: Path) -> Subject:
    return open_subject(place / "run", "cpu", cache=False)


def command(place: Path, *words: object, source: object = "run", output: str = "out") -> list[str]:
    paths = [str(place / source), "--data", str(place / "images"), "--output", str(place / output)]
    return ["visualize", *paths, "--images", "3", "--k", "2", *map(str, words)]


blocks = st.tuples(st.integers(1, 5), st.integers(1, 6)).flatmap(
    lambda grid: st.tuples(
        st.just(grid), st.lists(st.booleans(), min_size=grid[0] * grid[1], max_size=grid[0] * grid[1]).filter(any)
    )
)


@given(blocks)
def test_translates_are_every_place_where_a_block_lies_whole(drawn: tuple[tuple[int, int], list[bool]]):
    """Whatever its shape: moved by every offset, kept where no patch leaves the grid."""
    grid, flags = drawn
    block = np.array(flags)
    patches = [divmod(int(i), grid[1]) for i in np.flatnonzero(block)]
    expected = [
        [(row + down) * grid[1] + column + right for row, column in patches]
        for down in range(-grid[0], grid[0]) for right in range(-grid[1], grid[1])
        if all(0 <= row + down < grid[0] and 0 <= column + right < grid[1] for row, column in patches)
    ]  # fmt: skip
    places, own = translated_rows(block, grid)
    assert places.tolist() == expected
    assert places[own].tolist() == np.flatnonzero(block).tolist()


def test_distances_are_the_loss_of_every_block_of_every_image():
    generator = torch.Generator().manual_seed(0)
    block = np.zeros((4, 5), bool)
    block[1:3, 2:4] = True
    places, _ = translated_rows(block.reshape(-1), (4, 5))
    predicted, features = torch.randn(4, 8, generator=generator), torch.randn(3, 20, 8, generator=generator)
    found = block_distances(predicted, places, features)
    assert found.shape == (3, 12)
    for image in range(3):
        for number, place in enumerate(places):
            expected = torch.nn.functional.mse_loss(predicted, features[image, torch.from_numpy(place)])
            torch.testing.assert_close(found[image, number], expected)


def test_the_true_distance_is_the_loss_of_that_block_alone(place: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch):
    """As the trainer computes it, image by image: the packed batch mixes nothing up."""
    load, load_predictor = Subject.encoder, neighbours.load_predictor
    monkeypatch.setattr(Subject, "encoder", lambda *args: stirred(load(*args)))
    monkeypatch.setattr(neighbours, "load_predictor", lambda subject: stirred(load_predictor(subject)))
    queries = predict_blocks(subject, split(place, "test"), seed=3)
    contexts, targets = draw_masks(Masking(subject.config.mask, GRID, 3), 0, range(6), 6)
    assert np.array_equal(queries.context, contexts[:, 0]) and np.array_equal(queries.block, targets[:, 0])
    networks = Jepa(subject.encoder("context"), neighbours.load_predictor(subject)).eval()
    for i, pixels in enumerate(queries.images):
        context, target, wanted = pack(contexts[i : i + 1, :1], targets[i : i + 1, :1])
        image = normalise_pixels(pixels[None], subject.config.mean_std)
        with torch.no_grad():
            predicted, *_ = networks(image, context, wanted)
            loss = jepa_loss(predicted, subject.encoder("target")(image, wanted=target), wanted, "l2")
        torch.testing.assert_close(queries.predicted[i], predicted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(queries.true[i], loss, rtol=1e-4, atol=1e-5)


def test_search_equals_brute_force(place: Path, subject: Subject):
    """Over all images and places: the best block of each image, and of these the nearest."""
    test, train = split(place, "test"), split(place, "train")
    queries = predict_blocks(subject, test, seed=3)
    found = search_blocks(subject, queries, test, train, k=5, seed=3)
    target = subject.encoder("target")
    images = torch.cat(list(EvalImages(train.source, subject.size, Pixels(3), train.rows).batches(20)))
    features = normalised_rows(patch_rows(subject, target, images))
    for i, predicted in enumerate(queries.predicted):
        places, _ = translated_rows(queries.block[i], GRID)
        best = [min((float((predicted - image[torch.from_numpy(place)]).square().mean()), n) for n, place in enumerate(places))
                for image in features]  # fmt: skip
        order = sorted(range(len(best)), key=lambda image: best[image])[:5]
        assert found.row[i].tolist() == order
        assert found.distance[i].tolist() == pytest.approx([best[image][0] for image in order], rel=1e-4)
        for j, image in enumerate(order):
            assert np.flatnonzero(found.block[i, j]).tolist() == sorted(places[best[image][1]].tolist())


@pytest.mark.parametrize("layers", ["last", (1,), (1, 2)], ids=str)
@pytest.mark.parametrize("normalize", ["layer", "none", "batch"])
def test_the_truth_is_what_the_loss_asks_for(place: Path, subject: Subject, normalize: str, layers):
    """Predictions that equal it have no loss; with `batch`, where all patches of these images are the targets of a step."""
    loss = dataclasses.replace(subject.config.loss, normalize=normalize, target_layers=layers,
                               layers="each" if layers == "last" else "mean")  # fmt: skip
    asked = dataclasses.replace(subject, config=dataclasses.replace(subject.config, loss=loss))
    encoder = stirred(asked.encoder("target")).eval()
    test = split(place, "test")
    images = torch.cat(list(EvalImages(test.source, subject.size, Pixels(3), test.rows).batches(20)))
    truth = target_rows(asked, encoder, images)
    objective = choose_objective(loss, NoRegularizer())
    everything = np.ones((len(images), 1, truth.shape[1]), bool)
    _, target, blocks = pack(everything, everything)
    batch = SimpleNamespace(images=normalise_pixels(images, subject.config.mean_std), target=target)
    with torch.no_grad():
        targets = objective.targets(encoder, batch)
        right, wrong = (jepa_loss(rows.reshape(-1, rows.shape[2]), targets, blocks, "l2", objective.normalization)
                        for rows in (truth, truth.roll(1, dims=0)))  # fmt: skip
    assert right.item() < 1e-6 < 1e-3 < wrong.item()


def perfect(subject: Subject, test: Split) -> Queries:
    """Queries whose predictions are the truth itself."""
    queries = predict_blocks(subject, test, seed=0)
    features = normalised_rows(patch_rows(subject, subject.encoder("target"), queries.images))
    truth = [rows[torch.from_numpy(block)] for rows, block in zip(features, queries.block, strict=True)]
    return dataclasses.replace(queries, predicted=truth, true=torch.zeros(len(truth)))


def test_a_planted_copy_is_found_first_at_its_place(place: Path, subject: Subject, tmp_path: Path):
    shutil.copytree(place / "images", tmp_path / "images")
    for i in range(COUNTS["test"]):
        shutil.copy(tmp_path / f"images/test/{i:02}.png", tmp_path / f"images/train/copy-{i:02}.png")
    test, train = split(tmp_path, "test"), split(tmp_path, "train")
    queries = perfect(subject, test)
    found = search_blocks(subject, queries, test, train, k=2, seed=0)
    name = lambda split, row: Path(split.source.name(int(split.rows[row]))).name  # noqa: E731
    assert [name(train, row) for row in found.row[:, 0]] == [f"copy-{name(test, i)}" for i in range(COUNTS["test"])]
    assert found.distance[:, 0].max() < 1e-4 < found.distance[:, 1].min()
    assert np.array_equal(found.block[:, 0], queries.block)


def test_an_image_is_no_neighbour_and_no_rival_of_its_own(place: Path, subject: Subject):
    """Searched among the very images that are asked about; exact predictions are then nearer than all others."""
    test = split(place, "test")
    found = search_blocks(subject, perfect(subject, test), test, test, k=5, seed=0)
    assert all(i not in row for i, row in enumerate(found.row.tolist()))
    assert found.candidates == 5 and all(ranks.tolist() == [1.0] * 6 for ranks in found.rank.values())
    with pytest.raises(UserError, match="6 neighbours of 5 other images cannot be had; lower --k"):
        search_blocks(subject, perfect(subject, test), test, test, k=6, seed=0)


def test_ranks_are_against_all_other_places_or_the_same_one(place: Path, subject: Subject):
    """Blocks at the true one's place are all nearer than it, blocks elsewhere all farther."""
    queries = perfect(subject, split(place, "test"))
    same, anywhere = [], []
    for i, block in enumerate(queries.block):
        places, own = translated_rows(block, GRID)
        apart = torch.rand(20, len(places), generator=torch.Generator().manual_seed(i)) + 1
        apart[:, own] = 0  # at this place all others are nearer than the true one
        one = dataclasses.replace(queries, true=torch.full((6,), 0.5), block=queries.block[i : i + 1])
        found = nearest_blocks(one, BankDistances([apart], np.zeros((1, 20), bool), (places,), (own,)), 3, 20, i)
        same.append(found.rank["same_place"].item())
        anywhere.append(found.rank["anywhere"].item())
    assert same == [21.0] * 6 and max(anywhere) < 5


@pytest.mark.parametrize("others, expected", [([2.0, 3.0], 1), ([0.5, 3.0], 2), ([1.0, 0.5, 9.0], 2.5), ([0.1, 0.2], 3)])
def test_a_rank_counts_what_is_nearer_and_half_of_the_ties(others: list[float], expected: float):
    assert rank_of_truth(torch.tensor(1.0), torch.tensor(others)) == expected


def test_a_prediction_that_knows_nothing_ranks_as_chance_says():
    ranks = torch.arange(1, 101).repeat(40).double()
    found = summarise_ranks(
        Neighbours(torch.empty(0), torch.empty(0), np.empty(0), {"anywhere": ranks, "same_place": ranks * 0 + 1}, 99)
    )
    blind, sure = found["anywhere"], found["same_place"]
    assert found["candidates"] == 99 and blind["chance"] == 50.5 and blind["ci95"][0] < 50.5 < blind["ci95"][1]
    for k in (1, 5):
        recall = blind[f"recall@{k}"]
        assert recall["chance"] == k / 100 and recall["ci95"][0] < k / 100 < recall["ci95"][1]
    assert sure["mean_rank"] == 1 and sure["ci95"] == [1, 1] and sure["recall@1"]["share"] == 1


def test_the_first_images_are_not_those_of_the_first_class(tmp_path: Path):
    """Folders are sorted by class."""
    for label in "abcdefgh":
        for part in ("train", "test"):
            (tmp_path / part / label).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (4, 4)).save(tmp_path / "test" / label / f"{i}.png")
    drawn = open_drawn_split(str(tmp_path), "test", 64, 0)
    assert len(set(drawn.rows)) == 64 and len({drawn.source.label(int(row)) for row in drawn.rows[:8]}) > 3


def test_the_command_draws_and_counts(place: Path, capsys: pytest.CaptureFixture):
    assert main(command(place)) == 0
    printed = capsys.readouterr().out
    sizes = {}
    for name in ("masks", "pca", "neighbours"):
        assert str(place / "out" / f"{name}.png") in printed
        sizes[name] = Image.open(place / "out" / f"{name}.png").size
    assert sizes["masks"][0] == 6 * 64 + 5 * 4  # image, context and four targets
    assert sizes["pca"][1] == 4 * 64 + 3 * 4  # image, target, context and random encoder
    assert sizes["neighbours"][0] >= 5 * 64 + 4 * 6  # image, context, true block and two neighbours
    found = json.loads((place / "out" / "neighbours.json").read_text())
    assert (found["queries"], found["searched"], found["candidates"], found["step"]) == (6, 20, 20, 1)
    low, high = found["same_place"]["ci95"]
    assert low <= found["same_place"]["mean_rank"] <= high and found["same_place"]["chance"] == 11
    assert f"mean rank {found['anywhere']['mean_rank']:.1f} (" in printed


def test_the_same_command_draws_the_same_and_another_seed_something_else(place: Path, capsys: pytest.CaptureFixture):
    def drawn(seed: int, output: str) -> tuple[dict, list[bytes]]:
        assert main(command(place, "--json", "--seed", seed, output=output)) == 0
        found = json.loads(capsys.readouterr().out)
        return found["neighbours"], [Path(file).read_bytes() for file in found["files"] if file.endswith(".png")]

    first, again, other = drawn(1, "first"), drawn(1, "again"), drawn(2, "other")
    assert first == again
    assert all(a != b for a, b in zip(first[1], other[1], strict=True))


def test_an_official_checkpoint_gives_the_same_pictures(place: Path, tmp_path: Path):
    """It says no masks: they are the defaults, which the run has as well."""
    assert main(["convert", str(place / "run"), str(tmp_path / "jepa.pth.tar"), "--to", "meta", "--steps-per-epoch", "1"]) == 0
    for source, output in ((place / "run", tmp_path / "ours"), (tmp_path / "jepa.pth.tar", tmp_path / "theirs")):
        assert main(command(place, source=source, output=output)) == 0
    for name in ("masks.png", "pca.png", "neighbours.png"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_without_a_predictor_the_rest_is_shown_and_it_is_said(
    place: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture
):
    assert main(["convert", str(place / "run"), str(tmp_path / to), "--to", to]) == 0
    assert main(command(place, source=tmp_path / to, output=tmp_path / "out")) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"masks.png", "pca.png"}
    assert "holds no predictor, so neighbours are left out" in capsys.readouterr().err
    assert main(command(place, "--what", "neighbours", source=tmp_path / to, output=tmp_path / "none")) == 2
    assert "holds no predictor, which predictions need; give a run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--images", "7"], "7 images were asked for and its test split has 6; say --images 6"),
        (["--k", "21"], "21 neighbours of 20 other images cannot be had; lower --k or use more images"),
        (["--data", "nowhere"], "'nowhere' is neither a directory nor a data set's name"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture):
    assert main(command(place, *words)) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_an_unknown_picture_is_refused_by_name(place: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(command(place, "--what", "pca,dreams"))
    assert "'dreams' is none of masks, pca, neighbours" in capsys.readouterr().err


@pytest.mark.parametrize("loss", [{"target": "pixels"}, {"target_layers": (1, 2)}, {"normalize": "running"}])
def test_a_predictor_of_something_else_than_a_row_a_patch_is_refused(place: Path, loss: dict):
    subject = open_subject(place / "run")
    config = dataclasses.replace(subject.config, loss=dataclasses.replace(subject.config.loss, **loss))
    with pytest.raises(UserError, match="its predictor learned something else than one row of target features a patch"):
        neighbours.load_predictor(dataclasses.replace(subject, config=config))


def test_so_is_one_that_has_learned_from_a_teacher(place: Path):
    subject = open_subject(place / "run")
    meta = dataclasses.replace(subject.config.meta, teacher="anywhere", teacher_shape=(32, 2, 2, 128, 8))
    with pytest.raises(UserError, match="its predictor learned something else than one row of target features a patch"):
        neighbours.load_predictor(dataclasses.replace(subject, config=dataclasses.replace(subject.config, meta=meta)))
