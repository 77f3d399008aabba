"""The diffusion decoder: what it is told, what it learns, that it goes on after a kill, and how its samples are measured."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.data.pixels import Pixels, normalise_pixels
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Subject, open_subject
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import Jepa, build_pair
from fastjepa.visualize import neighbours, samples
from fastjepa.visualize.decoder import (
    DECODER_FILE,
    BlockDecoder,
    DecoderSettings,
    block_conditions,
    block_predictor,
    decoder_lr,
    decoder_step,
    drawn_size,
    initial_state,
    load_decoder,
    mean_and_deviation,
    read_decoder,
    reduced_images,
    save_decoder,
)
from fastjepa.visualize.neighbours import draw_query_masks
from fastjepa.visualize.samples import (
    CONDITION_NAMES,
    SAMPLE_SEEDS,
    DrawnSamples,
    bootstrap_interval,
    draw_samples,
    other_images,
    pixels_of_block,
    rescaled_conditions,
    sample_decoder,
    sample_distances,
    summarise_samples,
)
from tests.support.decoders import CONFIG, split, stirred

pytestmark = pytest.mark.xdist_group("decoder")  # one decoder serves all

TINY = ["--steps", "12", "--batch", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, and two runs that have trained one step on them from different weights: run/ and other/."""
    root, draw = tmp_path_factory.mktemp("decoder"), np.random.default_rng(0)
    for name, count in (("train", 20), ("test", 6)):
        (root / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = Image.fromarray(draw.integers(0, 256, (6, 6, 3), np.uint8)).resize((64, 64))
            pixels.save(root / "images" / name / f"{i:02}.png")
    config = CONFIG | {"data": CONFIG["data"] | {"source": str(root / "images")}}
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    for name, seed in (("run", 0), ("other", 1)):
        words = ["--config", root / "tiny.yaml", "--output", root / name, "--max-steps", "1", f"runtime.seed={seed}"]
        assert main(["train", *map(str, words)]) == 0
    assert main(train(place=root)) == 0
    return root


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not look at how good samples are."""
    monkeypatch.setattr(samples, "VISITED_TIMES", 2)


@pytest.fixture
def subject(place: Path) -> Subject:
    return open_subject(place / "run", "cpu", cache=False)


def train(place: Path, *words: object, source: object = "run", output: object = "run/decoder") -> list[str]:
    paths = [place / source, "--data", place / "images", "--output", place / output]
    return ["decoder", *map(str, paths), *TINY, *map(str, words)]


def show(place: Path, *words: object, source: object = "run", output: object = "out") -> list[str]:
    paths = [place / source, "--data", place / "images", "--output", place / output]
    return ["visualize", *map(str, paths), "--images", "3", "--n-test", "4", "--k", "2", *map(str, words)]


def untrained(dim: int = 5, channels: int = 1, size: tuple[int, int] = (8, 8)) -> BlockDecoder:
    torch.manual_seed(0)
    return BlockDecoder(dim, channels, size)


def test_the_condition_reaches_every_pixel_and_gets_a_gradient():
    decoder, condition = untrained(), torch.zeros(2, 5, requires_grad=True)
    x, times = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1), torch.tensor([500, 500])
    same = decoder(x, times, condition)
    torch.testing.assert_close(same[0], same[1])
    different = decoder(x, times, condition + torch.tensor([[0.0], [1.0]]))
    assert (different[0] != different[1]).all()
    different.square().sum().backward()
    assert (condition.grad != 0).all()


def test_conditions_are_standardised():
    """Numbers that are large, or far from zero, weigh no more than others."""
    condition = torch.randn(200, 3) * torch.tensor([1.0, 1000.0, 1e-3]) + torch.tensor([0.0, 50.0, -7.0])
    decoder, plain, x, times = untrained(3), untrained(3), torch.randn(1, 1, 8, 8), torch.tensor([500])
    decoder.mean, decoder.std = mean, std = mean_and_deviation(condition)
    torch.testing.assert_close(decoder(x, times, condition[:1]), plain(x, times, (condition[:1] - mean) / std))
    for never_varies in (torch.zeros(4, 3), torch.ones(1, 3)):
        assert mean_and_deviation(never_varies)[1].min() > 0  # or what is divided by it would not be finite


def test_a_condition_is_the_mean_of_what_the_predictor_says_of_one_block(
    place: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
):
    """Given its own image's context alone, whatever else is in the batch."""
    load, load_predictor = Subject.encoder, neighbours.load_predictor
    monkeypatch.setattr(Subject, "encoder", lambda *args: stirred(load(*args)))
    for module in ("decoder", "neighbours"):
        monkeypatch.setattr(f"fastjepa.visualize.{module}.load_predictor", lambda subject: stirred(load_predictor(subject)))
    predict, settings = block_predictor(subject), DecoderSettings(steps=3, batch=4, seed=5)
    found = list(block_conditions(predict, split(place, "train"), settings, 1, "conditions"))
    assert len(found) == 2
    networks = Jepa(subject.encoder("context"), neighbours.load_predictor(subject)).eval()
    for number, (images, condition) in enumerate(found, 1):
        contexts, targets = draw_query_masks(subject, 4, seed=5, step=number)
        assert not (contexts[:, 0] & targets.any(axis=1)).any()  # none of the image's targets is seen
        for i in range(4):
            context, _, blocks = pack(contexts[i : i + 1], targets[i : i + 1, :1])
            with torch.no_grad():
                rows, *_ = networks(normalise_pixels(images[i : i + 1], subject.config.mean_std), context, blocks)
            torch.testing.assert_close(condition[i], rows.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own(place: Path, subject: Subject):
    predict, settings = block_predictor(subject), DecoderSettings(steps=10, batch=4)
    seen = [
        image.sum().item()
        for images, _ in block_conditions(predict, split(place, "train"), settings, 0, "")
        for image in images
    ]
    assert sorted(seen[:20]) == sorted(seen[20:]) and len(set(seen)) == 20 and seen[:20] != seen[20:]


def test_it_learns_what_the_condition_says_and_draws_it():
    """Two conditions, a black picture and a white one."""
    settings = DecoderSettings(steps=60, batch=16, lr=3e-3)
    state = initial_state(dataclasses.asdict(settings) | {"dim": 1, "channels": 1, "size": [8, 8]}, torch.device("cpu"))
    says = torch.tensor([-1.0, 1.0]).repeat(8)[:, None]
    images = (says > 0).to(torch.uint8).mul(255)[..., None, None].expand(-1, 1, 8, 8)
    losses = [float(decoder_step(state, settings, images, says)) for _ in range(settings.steps)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    state.average.copy_to(state.decoder.parameters())
    black, white = sample_decoder(state.decoder.eval(), says[:2], seed=0).mean(dim=(1, 2, 3, 4)).tolist()
    assert black < 0.2 and white > 0.8


def test_samples_are_functions_of_the_seed_and_the_images_place_alone():
    decoder, condition = untrained().eval(), torch.zeros(3, 5)
    drawn = sample_decoder(decoder, condition, seed=1)
    assert drawn.shape == (3, SAMPLE_SEEDS, 1, 8, 8) and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(drawn, sample_decoder(decoder, condition, seed=1))
    torch.testing.assert_close(drawn[:2], sample_decoder(decoder, condition[:2], seed=1))
    flat = torch.cat([drawn, sample_decoder(decoder, condition, seed=2)]).flatten(0, 1).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)  # no two have the same noise


@pytest.mark.parametrize(
    "size, expected", [((28, 28), (28, 28)), ((224, 224), (32, 32)), ((224, 160), (32, 24)), ((14, 14), (16, 16))]
)
def test_images_are_drawn_small(size: tuple[int, int], expected: tuple[int, int]):
    assert drawn_size(size) == expected


def test_the_learning_rate_rises_and_falls_with_the_step():
    rates = [decoder_lr(DecoderSettings(steps=100, lr=1.0), step) for step in range(100)]
    assert max(rates) == 1.0 and rates.index(1.0) == 4 and rates[0] == 0.2 and rates[-1] < 1e-3
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)


def test_a_state_has_one_file(tmp_path: Path):
    """Byte for byte: safetensors shuffles the entries of a header's metadata."""
    state = initial_state(
        dataclasses.asdict(DecoderSettings()) | {"dim": 1, "channels": 1, "size": [8, 8]}, torch.device("cpu")
    )
    files = [tmp_path / str(i) for i in range(12)]
    for file in files:
        save_decoder(file, state)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_after_a_kill(place: Path, tmp_path: Path):
    """Killed in mid-training, once something is written; the same command ends with the very file of one that ran through."""
    often = (
        "from fastjepa.cli.main import main; from fastjepa.visualize import decoder; decoder.SAVE_EVERY = 2; main(sys.argv[1:])"
    )
    words, file = train(place, output=tmp_path / "killed"), tmp_path / "killed" / DECODER_FILE
    running = subprocess.Popen(
        [sys.executable, "-c", f"import sys; {often}", *words],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    while not file.is_file() and running.poll() is None:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert 0 < read_decoder(file)[1] < 12
    assert main(words) == 0
    assert file.read_bytes() == (place / "run/decoder" / DECODER_FILE).read_bytes()
    assert [path.name for path in file.parent.iterdir() if not path.name.startswith(".")] == [DECODER_FILE]


def test_one_that_has_ended_is_left_alone(place: Path, tmp_path: Path):
    file = place / "run/decoder" / DECODER_FILE
    before = file.read_bytes()
    assert main(train(place)) == 0
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "words, source, message",
    [
        (["--steps", "9"], "run", "a decoder of other steps: 12, not 9; give another --output"),
        (["--seed", "3"], "run", "a decoder of other seed: 0, not 3"),
        ([], "other", "a decoder of other networks; give another --output"),
    ],
)
def test_a_decoder_made_otherwise_is_neither_gone_on_with_nor_touched(
    place: Path, words: list[str], source: str, message: str, capsys: pytest.CaptureFixture
):
    file = place / "run/decoder" / DECODER_FILE
    before = file.read_bytes()
    assert main(train(place, *words, source=source)) == 2
    assert message in capsys.readouterr().err
    assert file.read_bytes() == before


def planted(subject: Subject, place: Path, drawn) -> DrawnSamples:
    """The held-out images with samples that `drawn(truth, inside)` makes, (n, SEEDS, C, H, W), whatever was given."""
    shown = EvalImages(split(place, "test").source, subject.size, Pixels(3))
    images = torch.cat(list(shown.batches(6)))
    _, target = draw_query_masks(subject, 6, 0)
    truth = reduced_images(images, (32, 32))
    inside = pixels_of_block(target[:, 0], subject.config.grid, truth.shape[2:])
    made = {name: drawn(name, truth, inside[:, None])[:, None].expand(-1, SAMPLE_SEEDS, -1, -1, -1) for name in CONDITION_NAMES}
    return DrawnSamples(images, target[:, 0], target[:, 0], truth, made)


def test_a_perfect_decoder_has_no_distance_and_others_some(place: Path, subject: Subject):
    """Told of another image, a perfect decoder draws that one."""
    other = torch.from_numpy(other_images(6, 0))
    draw = {"predictor": lambda x: x, "shuffled": lambda x: x[other], "untrained": lambda x: x * 0 + 0.5}
    found = sample_distances(subject, planted(subject, place, lambda name, truth, inside: draw[name](truth)))
    for measure in ("pixels", "features"):
        assert found[measure]["predictor"].tolist() == [0.0] * 6
        assert found[measure]["shuffled"].min() > 0 and found[measure]["untrained"].min() > 0
    told = summarise_samples(found, 0)
    assert told["pixels"]["farther"]["shuffled"]["ci95"][0] > 0


def test_only_the_block_counts_in_pixels(place: Path, subject: Subject):
    """Off by 0.5 inside is a square error of 0.25; what lies outside is nobody's business."""
    shift = {"predictor": (0, 1), "shuffled": (0.5, 0), "untrained": (0.5, 9)}  # inside, outside

    def draw(name: str, truth: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        return torch.where(inside, truth + shift[name][0], truth + shift[name][1])

    given = planted(subject, place, draw)
    drawn = {name: images.clamp(0, 20) for name, images in given.drawn.items()}
    found = sample_distances(subject, dataclasses.replace(given, drawn=drawn))["pixels"]
    assert found["predictor"].tolist() == [0.0] * 6
    assert found["shuffled"] == pytest.approx([0.25] * 6) and found["untrained"] == pytest.approx([0.25] * 6)


def test_features_are_of_the_whole_drawn_image_and_compared_on_the_block_alone(place: Path, subject: Subject):
    """Compare with the definition, sample by sample: the target encoder sees the drawing, enlarged to the run's 64 pixels."""
    noise = torch.rand(6, SAMPLE_SEEDS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = planted(subject, place, lambda name, truth, inside: truth)
    found = sample_distances(subject, dataclasses.replace(given, drawn={"predictor": noise}))["features"]["predictor"]

    def seen(image: torch.Tensor) -> torch.Tensor:
        enlarged = torch.nn.functional.interpolate(image[None], (64, 64), mode="bilinear").mul(255).round().to(torch.uint8)
        features = subject.encoder("target").features(normalise_pixels(enlarged, subject.config.mean_std))[0]
        return torch.nn.functional.layer_norm(features, features.shape[-1:])

    for i, block in enumerate(torch.from_numpy(given.block)):
        apart = [(seen(noise[i, k]) - seen(given.truth[i]))[block].square().mean().item() for k in range(SAMPLE_SEEDS)]
        assert found[i] == pytest.approx(np.mean(apart), rel=1e-4)


def test_what_the_decoder_is_given(place: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch):
    """The same masks and contexts each time: the own image, another image, and another predictor."""
    monkeypatch.setattr(samples, "sample_decoder", lambda decoder, condition, seed, about: condition)
    predict, test = block_predictor(subject), split(place, "test")
    decoder, _ = load_decoder(place / "run/decoder", predict)
    found = draw_samples(predict, decoder, test, seed=4)
    context, block = (masks[:, 0] for masks in draw_query_masks(subject, 6, 4))
    assert np.array_equal(found.context, context) and np.array_equal(found.block, block)
    own, others = predict(found.images, context, block), found.images[torch.from_numpy(other_images(6, 4))]
    assert torch.equal(found.drawn["predictor"], own)
    assert torch.equal(found.drawn["shuffled"], predict(others, context, block))
    start = build_pair(subject.config)[0].predictor.eval().requires_grad_(False)
    plain = dataclasses.replace(predict, predictor=start)(found.images, context, block)
    torch.testing.assert_close(found.drawn["untrained"], rescaled_conditions(plain, decoder))
    assert not torch.allclose(found.drawn["untrained"], rescaled_conditions(own, decoder), atol=1e-3)


def test_averaged_weights_draw(place: Path, subject: Subject):
    tensors = read_decoder(place / "run/decoder" / DECODER_FILE)[2]
    decoder, step = load_decoder(place / "run/decoder", block_predictor(subject))
    assert step == 12
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, tensors[f"average.{name}"])
    assert not all(torch.equal(parameter, tensors[f"weights.{name}"]) for name, parameter in decoder.named_parameters())


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**20))
def test_a_pixel_is_in_the_patch_that_holds_its_middle(rows: int, cols: int, patch: int, seed: int):
    block = np.random.default_rng(seed).random((2, rows * cols)) < 0.5
    size = torch.Size((rows * patch, cols * patch))
    expected = block.reshape(2, rows, cols).repeat(patch, axis=1).repeat(patch, axis=2)
    assert np.array_equal(pixels_of_block(block, (rows, cols), size).numpy(), expected)


def test_patches_need_not_be_whole_pixels():
    inside = pixels_of_block(np.array([[True, False, False]]), (1, 3), torch.Size((1, 4)))
    assert inside[0, 0].tolist() == [
        True,
        False,
        False,
        False,
    ]  # it ends at 1.33, beyond the second pixel's corner, not its middle


@given(st.integers(2, 40), st.integers(0, 2**20))
def test_the_other_image_is_never_the_own_and_each_is_taken_once(count: int, seed: int):
    other = other_images(count, seed)
    assert sorted(other) == list(range(count)) and (other != np.arange(count)).all()


def test_an_untrained_predictors_conditions_are_of_the_scale_that_the_decoder_knows():
    decoder, condition = untrained(), torch.randn(50, 5) * 1e-3 + 4
    decoder.mean, decoder.std = torch.arange(5.0), torch.arange(1.0, 6.0)
    found = rescaled_conditions(condition, decoder)
    torch.testing.assert_close(found.mean(dim=0), decoder.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.std(dim=0, correction=0), decoder.std, rtol=1e-3, atol=1e-3)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(0)
    intervals = [bootstrap_interval(draw.normal(3.0, 1.0, 60), seed)["ci95"] for seed in range(200)]
    assert 0.9 <= np.mean([low <= 3.0 <= high for low, high in intervals]) <= 0.99


def test_baselines_are_compared_image_by_image():
    """Distances that vary much between images, and a baseline that is farther by the same each time."""
    own = np.random.default_rng(0).random(30) * 10
    told = summarise_samples(
        {name: {"predictor": own, "shuffled": own + 1, "untrained": own} for name in ("pixels", "features")}, 0
    )
    assert told["pixels"]["farther"]["shuffled"] == {"mean": pytest.approx(1), "ci95": pytest.approx([1, 1])}
    assert told["features"]["farther"]["untrained"]["mean"] == 0
    low, high = told["pixels"]["predictor"]["ci95"]
    assert low < own.mean() < high and high - low > 1


@pytest.mark.usefixtures("hasty")
def test_the_command_draws_and_counts(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(show(place, "--what", "samples", output=tmp_path)) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "samples.png") in printed and "samples to the hidden block, 6 of each of 4 images" in printed
    width, height = Image.open(tmp_path / "samples.png").size
    assert width >= 12 * 96 and height >= 3 * 96  # block, context, six samples, mean, deviation, two baselines
    found = json.loads((tmp_path / "samples.json").read_text())
    assert (found["images"], found["samples"], found["step"], found["decoder_step"]) == (4, 6, 1, 12)
    assert all(
        found[measure][name]["ci95"][0] <= found[measure][name]["mean"]
        for measure in ("pixels", "features")
        for name in CONDITION_NAMES
    )


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_samples_are_shown_where_there_is_a_decoder_and_are_the_same_again(place: Path, tmp_path: Path):
    drawn = []
    for name in ("first", "again"):
        assert main(show(place, output=tmp_path / name)) == 0
        drawn.append([(tmp_path / name / file).read_bytes() for file in ("samples.png", "samples.json")])
    assert drawn[0] == drawn[1]
    assert main(show(place, source="other", output=tmp_path / "none")) == 0
    assert not (tmp_path / "none/samples.png").exists() and (tmp_path / "none/neighbours.png").exists()


def test_what_cannot_be_shown_is_a_sentence(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / DECODER_FILE).write_bytes(b"not tensors")
    cases = [(place / "nowhere", "run", "nowhere: holds no decoder; `fastjepa decoder` trains one"),
             (tmp_path, "run", "is not a decoder, or is damaged"),
             (place / "run/decoder", "other", "its decoder is of other networks than")]  # fmt: skip
    for folder, source, message in cases:
        assert main(show(place, "--what", "samples", "--decoder", folder, source=source)) == 2
        assert message in capsys.readouterr().err


def test_weights_without_a_predictor_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["convert", str(place / "run"), str(tmp_path / "timm"), "--to", "timm"]) == 0
    assert main(train(place, source=tmp_path / "timm", output=tmp_path / "out")) == 2
    assert "holds no predictor, which predictions need" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_absent_diffusers_is_a_sentence(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(train(place, output=tmp_path / "out")) == 2
    assert main(show(place, "--what", "samples")) == 2
    assert capsys.readouterr().err.count("pip install 'fastjepa[viz]'") == 2
    assert not (tmp_path / "out").exists()
