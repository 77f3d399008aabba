"""Positions in weights: told from learned ones in any precision, of the grid they belong to, and those of other sizes."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from transformers import IJepaConfig, IJepaModel

from fastjepa import load_encoder
from fastjepa.checkpoint.directory import find_checkpoint
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.cli.main import main
from fastjepa.cli.options import POSITION_WAYS
from fastjepa.config.load import config_from_dict
from fastjepa.errors import CheckpointError, UserError
from fastjepa.model.jepa import build_pair
from fastjepa.model.positions import DEFAULT_POSITIONS, POSITIONS, scaled_coordinates, sincos_positions
from fastjepa.weights.convert import Conversion, convert_weights
from fastjepa.weights.positions import grid_of_positions, possible_grids
from fastjepa.weights.read import read_weights
from tests.support.weights import IJEPA, SHAPE, convert, make_state, official_file

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_checkpoint(path / "checkpoints", make_state(config_from_dict(SHAPE)))
    return path


def rewrite(file: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Replace each tensor of a safetensors file by change(name, tensor)."""
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)


def is_position(name: str) -> bool:
    return "pos" in name


def drifted(positions: torch.Tensor) -> torch.Tensor:
    """Move one value, as training would."""
    moved = positions.clone()
    moved[0, -1, 5] += 0.03
    return moved


PRECISIONS = {
    **{str(dtype).removeprefix("torch."): lambda name, x, dtype=dtype: x.to(dtype) for dtype in DTYPES},
    "positions in bf16 alone": lambda name, x: x.bfloat16() if is_position(name) else x,
    "all but positions in bf16": lambda name, x: x if is_position(name) else x.bfloat16(),
    "positions in fp16, the rest in bf16": lambda name, x: x.half() if is_position(name) else x.bfloat16(),
    "fp32 that was bf16": lambda name, x: x.bfloat16().float(),
    "fp32 that was fp16": lambda name, x: x.half().float(),
    "bf16 that was fp16": lambda name, x: x.half().bfloat16(),
    "fp16 that was bf16": lambda name, x: x.bfloat16().half(),
}


@pytest.mark.parametrize("to", ["timm", "transformers", "fastjepa"])
def test_fixed_positions_are_known_in_any_precision(run, tmp_path, to):
    """Every other size stays open, and its positions are whole ones; one value that moved makes them learned ones."""
    for number, (words, change) in enumerate(PRECISIONS.items()):
        folder = tmp_path / str(number)
        convert(run, folder, "--to", to)
        rewrite(folder / "model.safetensors", change)
        encoder = load_encoder(folder, positions="computed")
        assert encoder.fixed_positions, words
        assert torch.equal(encoder.positions((8, 5)), sincos_positions(32, (8, 5))[0]), words
        assert encoder.forward_features(torch.zeros(1, 3, 64, 40)).isfinite().all()

        rewrite(folder / "model.safetensors", lambda name, x: drifted(x) if is_position(name) else x)
        assert not load_encoder(folder).fixed_positions, words


@pytest.mark.parametrize("dtype", DTYPES)
def test_official_files_and_checkpoints_are_known_in_any_precision(run, tmp_path, dtype):
    path, _ = official_file(tmp_path / "jepa.pth.tar")
    stored = torch.load(path)
    for network in ("encoder", "target_encoder"):
        stored[network] = {name: tensor.to(dtype) for name, tensor in stored[network].items()}
    torch.save(stored, path)
    assert load_encoder(path).fixed_positions
    lone = tmp_path / "target_encoder.safetensors"
    save_file({name: x.to(dtype) for name, x in load_file(find_checkpoint(run) / lone.name).items()}, lone)
    shape = read_weights(run).form
    assert grid_of_positions(read_weights(lone, shape=shape).tensors["pos_embed"]) == (4, 6)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_model_that_transformers_saved_in_half_precision_takes_other_sizes(tmp_path, dtype):
    theirs = IJepaModel(IJepaConfig(**IJEPA, image_size=32))
    theirs.embeddings.position_embeddings.data = sincos_positions(32, (4, 4))
    theirs.to(dtype).save_pretrained(tmp_path / "hf")
    assert load_encoder(tmp_path / "hf").fixed_positions
    theirs.embeddings.position_embeddings.data = 0.02 * torch.randn(1, 16, 32).to(dtype)
    theirs.save_pretrained(tmp_path / "learned")
    assert not load_encoder(tmp_path / "learned").fixed_positions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 192, 1280])
def test_one_grid_fits_and_no_other(dtype, dim):
    for grid in ((16, 16), (8, 32), (32, 8), (4, 64), (1, 256)):
        assert grid_of_positions(sincos_positions(dim, grid).to(dtype)) == grid
    moved = sincos_positions(dim, (16, 16))
    moved[0, 200, dim // 2] += 0.02
    assert grid_of_positions(moved.to(dtype)) is None


def test_the_possible_grids_begin_with_the_most_nearly_square():
    assert possible_grids(8) == [(2, 4), (4, 2), (1, 8), (8, 1)]
    assert possible_grids(256)[0] == (16, 16) and len(possible_grids(256)) == 9


GRIDS = ((16, 16), (8, 32), (32, 8), (4, 64))  # of 256 patches, of 2x2 pixels
LEARNED = torch.randn(1, 256, 192, generator=torch.Generator().manual_seed(0))


def tiny_config(grid: tuple[int, int]) -> dict:
    return {"data": {"crop_size": [2 * n for n in grid]}, "mask": {"patch_size": 2}, "meta": {"model_name": "vit_tiny"}}


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return build_pair(config_from_dict(tiny_config((16, 16))))[1].state_dict()


@pytest.fixture
def official(tmp_path, tiny) -> Callable[[torch.Tensor], Path]:
    def write(positions: torch.Tensor) -> Path:
        torch.save({"target_encoder": tiny | {"pos_embed": positions}, "epoch": 3}, tmp_path / "jepa.pth.tar")
        return tmp_path / "jepa.pth.tar"

    return write


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_say_how_the_patches_of_a_file_lie(tmp_path, official, tiny, grid):
    """The same in an official file, in one file of our own checkpoints, in a plain state dict, and in half precision."""
    positions, image_size = sincos_positions(192, grid), tuple(2 * n for n in grid)
    save_file(tiny | {"pos_embed": positions}, tmp_path / "target_encoder.safetensors")
    torch.save(tiny | {"pos_embed": positions.bfloat16()}, tmp_path / "vit.pth")
    for file in (official(positions), tmp_path / "target_encoder.safetensors", tmp_path / "vit.pth"):
        assert read_weights(file).form.image_size == image_size
    encoder = load_encoder(official(positions.half()), grid=grid)  # a word that agrees
    assert encoder.fixed_positions and encoder.forward_features(torch.zeros(1, 3, *image_size)).shape == (1, 256, 192)


def test_a_config_or_a_grid_that_positions_contradict_is_refused(tmp_path, official, capsys):
    path = official(sincos_positions(192, (8, 32)))
    (tmp_path / "square.yaml").write_text(yaml.safe_dump(tiny_config((16, 16))))
    command = ["convert", str(path), str(tmp_path / "out"), "--to", "fastjepa"]
    for option in (["--grid", "16x16"], ["--config", str(tmp_path / "square.yaml")]):
        assert main([*command, *option]) == 2
        assert "pos_embed holds the positions of 8x32 patches, and there are 16x16" in capsys.readouterr().err
    assert main([*command, "--grid", "8x32", "--config", str(tmp_path / "square.yaml")]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main([*command, "--grid", "8x32"]) == 0
    assert load_encoder(tmp_path / "out").image_size == (16, 64)
    with pytest.raises(UserError, match="has a grid of 8x32 patches, not 4x64"):
        load_encoder(tmp_path / "out", grid=(4, 64))


def test_a_folder_whose_config_positions_contradict_is_refused(tmp_path):
    theirs = IJepaModel(IJepaConfig(**IJEPA, image_size=32))
    theirs.embeddings.position_embeddings.data = sincos_positions(32, (2, 8))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="pos_embed holds the positions of 2x8 patches, and there are 4x4"):
        load_encoder(tmp_path)


def test_learned_positions_need_a_word_on_how_patches_lie(tmp_path, official, capsys):
    path = official(LEARNED)
    named = "256 patches may lie as 16x16, 8x32, 32x8, 4x64, 64x4, 2x128, 128x2, 1x256, 256x1; load_encoder"
    with pytest.raises(UserError, match=rf"positions were learned, and its {named}.*--grid ROWSxCOLUMNS or --config YAML"):
        load_encoder(path)
    assert load_encoder(path, grid=(8, 32)).image_size == (16, 64)
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump(tiny_config((8, 32))))
    for name, option in (("grid", ["--grid", "8x32"]), ("config", ["--config", tmp_path / "wide.yaml"])):
        convert(path, tmp_path / name, "--to", "fastjepa", *option)
        assert load_encoder(tmp_path / name).image_size == (16, 64)
    with pytest.raises(SystemExit):
        main(["convert", str(path), str(tmp_path / "out"), "--to", "fastjepa", "--grid", "8 by 32"])
    assert "8 by 32 is no grid such as 8x32" in capsys.readouterr().err


@pytest.mark.parametrize("positions", [sincos_positions(192, (16, 16)), LEARNED])
def test_a_row_for_a_class_token_is_named(tmp_path, official, tiny, positions):
    with_row = torch.cat([torch.zeros(1, 1, 192), positions], dim=1)
    torch.save(tiny | {"pos_embed": with_row, "cls_token": torch.zeros(1, 1, 192)}, tmp_path / "vit.pth")
    files = [tmp_path / "vit.pth", *([official(with_row)] if positions is not LEARNED else [])]
    for file in files:
        with pytest.raises(UserError, match="pos_embed has a row for a class token"):
            load_encoder(file)


def test_a_training_that_goes_on_has_the_grid_of_its_file(tmp_path):
    path, _ = official_file(tmp_path / "jepa.pth.tar", meta={"depth": 1})
    config = {"meta": {"model_name": "vit_tiny", "depth": 1, "pred_depth": 1, "pred_emb_dim": 12}, "mask": {"patch_size": 8}}
    wide = tmp_path / "wide.yaml"
    wide.write_text(json.dumps(config | {"data": {"crop_size": [16, 64]}}))  # JSON is YAML
    with pytest.raises(CheckpointError, match=r"encoder.pos_embed is of 4x4 patches in the file and 2x8 by the config"):
        convert_weights(path, tmp_path / "run", Conversion("run", config=wide, steps_per_epoch=5))


TIMM = {"img_size": [32, 48], "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "class_token": False,
        "global_pool": "avg", "fc_norm": False, "num_classes": 0}  # fmt: skip
SIZES = ([64, 96], [48, 72], [16, 24], [64, 40], [48, 32])


@pytest.mark.parametrize("learned", [True, False])
def test_interpolated_positions_are_those_of_timm(tmp_path, learned):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch16_224", **TIMM, dynamic_img_size=True).eval()
    theirs.pos_embed.data = torch.randn(1, 24, 32) if learned else sincos_positions(32, (4, 6))
    save_for_hf(theirs, tmp_path / "timm", model_args=TIMM, safe_serialization=True)
    ours = load_encoder(tmp_path / "timm", positions="interpolated")
    for size in SIZES:
        images = torch.randn(1, 3, *size)
        assert (ours.forward_features(images) - theirs.forward_features(images)).abs().max() < 1e-5


@pytest.mark.parametrize("learned", [True, False])
def test_interpolated_positions_of_a_transformers_folder_are_those_of_transformers(tmp_path, learned):
    torch.manual_seed(0)
    theirs = IJepaModel(IJepaConfig(**IJEPA, image_size=32)).eval()
    theirs.embeddings.position_embeddings.data = torch.randn(1, 16, 32) if learned else sincos_positions(32, (4, 4))
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_encoder(tmp_path / "hf", positions="interpolated")
    for size in SIZES:
        images = torch.randn(1, 3, *size)
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        assert (ours.forward_features(images) - expected).abs().max() < 1e-5


def test_a_run_that_was_converted_interpolates_as_the_library_it_was_converted_to(run, tmp_path):
    convert(run, tmp_path / "timm", "--to", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, dynamic_img_size=True).eval()
    images = torch.randn(1, 3, 64, 96)
    expected = theirs.forward_features(images)
    for path in (run, tmp_path / "timm"):
        assert (load_encoder(path, positions="interpolated").forward_features(images) - expected).abs().max() < 1e-5


def test_scaled_coordinates_span_the_image_as_the_trained_ones_do():
    assert scaled_coordinates(4, 2).tolist() == [-0.25, 0.25, 0.75, 1.25]
    assert scaled_coordinates(1, 4).tolist() == [1.5]
    assert scaled_coordinates(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(sincos_positions(32, (3, 5), trained=(3, 5)), sincos_positions(32, (3, 5)))
    halves = sincos_positions(8, (2, 4), trained=(2, 2)).view(2, 4, 8)
    assert torch.allclose(halves[1, 2, :4], torch.tensor([0.75, 0.0075, 0.75, 0.0075]).sin() * torch.tensor([1, 1, 0, 0])
                          + torch.tensor([0.75, 0.0075, 0.75, 0.0075]).cos() * torch.tensor([0, 0, 1, 1]))  # fmt: skip
    assert torch.equal(halves[:, :, 4:], sincos_positions(8, (2, 4)).view(2, 4, 8)[:, :, 4:])  # rows are as they were


def test_the_trained_size_is_the_same_whatever_is_asked_for(run):
    images = torch.randn(1, 3, 32, 48)
    features = [load_encoder(run, positions=way).forward_features(images) for way in (None, *POSITIONS)]
    assert all(torch.equal(other, features[0]) for other in features[1:])


def test_another_size_is_told_unless_its_positions_were_chosen(run):
    images = torch.zeros(1, 3, 64, 96)
    with pytest.warns(UserWarning, match=f"positions of 8x12 patches are {DEFAULT_POSITIONS}, trained on 4x6; load_encoder"):
        found = load_encoder(run).forward_features(images)
    with warnings.catch_warnings(action="error"):
        load_encoder(run).forward_features(images[:, :, :32, :48])
        features = {way: load_encoder(run, positions=way).forward_features(images) for way in POSITIONS}
    assert torch.equal(found, features[DEFAULT_POSITIONS])
    assert all((features[a] - features[b]).norm() > 1e-3 * found.norm() for a, b in (POSITIONS[:2], POSITIONS[1:]))


def test_learned_positions_take_other_sizes_interpolated_alone(tmp_path):
    IJepaModel(IJepaConfig(**IJEPA, image_size=32)).save_pretrained(tmp_path)
    images = torch.zeros(1, 3, 64, 48)
    for way in (None, "computed", "scaled"):
        with pytest.raises(
            UserError, match='learned for 32x32 pixels; resize the images to that, or load with positions="inter'
        ):
            load_encoder(tmp_path, positions=way).forward_features(images)
    assert load_encoder(tmp_path, positions="interpolated").forward_features(images).shape == (1, 48, 32)


def test_what_is_no_kind_of_positions_is_refused(run, tmp_path, capsys):
    with pytest.raises(UserError, match="positions 'bicubic': choose one of computed, interpolated, scaled"):
        load_encoder(run, positions="bicubic")
    for words, reason in (("--to timm --dynamic", "--dynamic is for"), ("--to pt2 --positions scaled", "add --dynamic")):
        assert main(["convert", str(run), str(tmp_path / "out"), *words.split()]) == 2
        assert reason in capsys.readouterr().err
    assert (set(POSITION_WAYS), POSITION_WAYS[0]) == (set(POSITIONS), DEFAULT_POSITIONS)


def test_an_evaluation_at_another_size_says_its_positions_and_keeps_them_apart(tmp_path, run, capsys, monkeypatch):
    random = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label in (0, 1):
            (tmp_path / "data" / split / str(label)).mkdir(parents=True)
            for i in range(8):
                pixels = torch.randint(120 * label, 120 * label + 100, (32, 48, 3), generator=random, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / "data" / split / str(label) / f"{i}.png")
    monkeypatch.setenv("FASTJEPA_DATA", str(tmp_path / "kept"))
    convert(run, tmp_path / "encoder", "--to", "fastjepa")
    command = ["eval", "knn", "--checkpoint", str(tmp_path / "encoder"), "--data", str(tmp_path / "data"), "--device", "cpu"]
    assert main([*command, "--positions", "scaled"]) == 2
    assert "--positions is for another size than the run's own 32x48" in capsys.readouterr().err
    for number, way in enumerate(POSITIONS, start=1):
        assert main([*command, "--image-size", "64", "--positions", way, "--json"]) == 0
        said = capsys.readouterr()
        assert f"8x8 patches, trained on 4x6: their positions are {way}" in said.err
        assert json.loads(said.out)["positions"] == way
        assert len(list((tmp_path / "kept" / "features").glob("*"))) == 2 * number  # features of train and test, made anew
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positions"] == "trained"
