"""Weights in and out: bit for bit through every format, features as the other library's, and training that goes on."""

import argparse
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from transformers import IJepaConfig, IJepaForImageClassification, IJepaModel

from fastjepa.checkpoint.directory import find_checkpoint
from fastjepa.checkpoint.restore import load_networks
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.cli.main import main
from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import MODELS
from fastjepa.errors import CheckpointError, UserError
from fastjepa.model.jepa import build_pair
from fastjepa.weights.convert import Conversion, convert_weights, write_encoder
from fastjepa.weights.hub_folders import timm_arguments
from fastjepa.weights.pretrained import EncoderForm
from fastjepa.weights.read import NETWORK_OF, load_encoder, read_weights, starting_networks
from tests.support.weights import IJEPA, SHAPE, convert, make_state, official_file, same_networks

FOLDERS = ("fastjepa", "timm", "transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_checkpoint(path / "checkpoints", make_state(config_from_dict(SHAPE)))
    return path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("which", ["target", "context"])
@pytest.mark.parametrize("to", [*FOLDERS, "meta"])
def test_a_round_trip_is_bitwise_and_records_which_encoder_it_is(run, tmp_path, capsys, to, which):
    middle = tmp_path / ("middle.pth.tar" if to == "meta" else "middle")
    convert(run, middle, "--to", to, "--which", which)
    assert f"the {which} encoder" in capsys.readouterr().out
    convert(middle, tmp_path / "back", "--to", "fastjepa")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert same_networks(back, load_networks(run)[NETWORK_OF[which]])
    said = json.loads((tmp_path / "back" / "config.json").read_text())["form"]
    assert said == read_weights(run, which).form.to_dict()
    if to != "meta":
        assert f'"which": "{which}"' in (middle / "config.json").read_text()
        assert f"**the {which} encoder**" in (middle / "README.md").read_text()


def test_what_is_written_has_the_mode_of_the_umask(run, tmp_path, capsys):
    before = os.umask(0o027)
    try:
        for to in ("fastjepa", "timm", "transformers", "meta"):
            assert main(["convert", str(run), str(tmp_path / to), "--to", to]) == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == dict.fromkeys((p.name for p in files), "0o640")
    assert sum(path.name == "model.safetensors" for path in files) == 3


def test_every_pair_of_formats_is_bitwise(run, tmp_path):
    """run -> timm -> transformers -> meta -> fastjepa -> transformers -> timm"""
    path = run
    for step, to in enumerate(("timm", "transformers", "meta", "fastjepa", "transformers", "timm")):
        made = tmp_path / f"{step}.pth.tar"
        convert_weights(path, made, Conversion(to))
        path = made
    assert same_networks(read_weights(path).tensors, read_weights(run).tensors)
    assert read_weights(path).form == read_weights(run).form


def test_the_choice_is_target_unless_one_is_named(run):
    assert load_encoder(run).which == "target"
    assert load_encoder(run, "context").which == "context"
    stored = load_networks(run)
    assert torch.equal(load_encoder(run).norm.weight, stored["target_encoder"]["norm.weight"])


def test_an_encoder_that_is_not_there_is_not_given(run, tmp_path):
    convert(run, tmp_path / "context", "--to", "transformers", "--which", "context")
    with pytest.raises(UserError, match="holds the context encoder, not the target"):
        load_encoder(tmp_path / "context", "target")
    convert(run, tmp_path / "one.pth.tar", "--to", "meta", "--which", "context")
    with pytest.raises(UserError, match="holds encoder, and not the target_encoder"):
        load_encoder(tmp_path / "one.pth.tar", "target")


PREFIXES = ["module.", "", "_orig_mod.", "module.module.", "module._orig_mod.", "_orig_mod.module.", "module.module.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_official_files_are_read_with_and_without_module(tmp_path, prefix):
    path, state = official_file(tmp_path / "jepa-ep300.pth.tar", prefix)
    for which, network in NETWORK_OF.items():
        loaded = read_weights(path, which)
        assert same_networks(loaded.tensors, state.networks[network].state_dict())
        assert (loaded.form.num_heads, loaded.form.image_size, loaded.form.which) == (3, (32, 32), which)
        assert "epoch 300" in loaded.form.origin


def test_official_files_of_another_shape_need_their_yaml(tmp_path, capsys):
    meta = {"embed_dim": 48, "depth": 2, "num_heads": 6}
    path, state = official_file(tmp_path / "odd.pth.tar", meta=meta)
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "fastjepa"]) == 2
    assert "the heads of width 48, depth 2; name" in capsys.readouterr().err
    shape = {"data": {"crop_size": 32}, "mask": {"patch_size": 8}, "meta": {"model_name": "vit_tiny"} | meta}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(shape))
    convert(path, tmp_path / "out", "--to", "fastjepa", "--config", tmp_path / "odd.yaml")
    assert load_encoder(tmp_path / "out").blocks[0].attn.num_heads == 6


def test_official_files_run_no_code(tmp_path):
    torch.save({"encoder": {}, "code": pickle.PickleBuffer}, tmp_path / "evil.pth.tar")
    with pytest.raises(CheckpointError, match="not a checkpoint of tensors and numbers alone"):
        read_weights(tmp_path / "evil.pth.tar")


@pytest.mark.parametrize("prefix", PREFIXES[2:])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_names_of_wrappers_are_stripped_from_an_encoder_alone(tmp_path, prefix, ending):
    network = official_file(tmp_path / "whole.pth.tar")[1].networks["target_encoder"].state_dict()
    named = {prefix + name.replace("blocks.1.", "blocks.1._orig_mod."): tensor.contiguous() for name, tensor in network.items()}
    (torch.save if ending == ".pth" else save_file)(named, tmp_path / f"one{ending}")
    assert same_networks(read_weights(tmp_path / f"one{ending}").tensors, network)
    assert same_networks(starting_networks(tmp_path / f"one{ending}")["encoder"], network)
    twice = named | {"norm.weight": network["norm.weight"].clone()}
    (torch.save if ending == ".pth" else save_file)(twice, tmp_path / f"two{ending}")
    with pytest.raises(UserError, match=f"two{ending}: some weights are in it twice"):
        read_weights(tmp_path / f"two{ending}")


def test_files_in_torchs_old_format_are_read(tmp_path):
    networks = {name: network.state_dict() for name, network in official_file(tmp_path / "a.pth.tar")[1].networks.items()}
    for name, contents in (("whole.pth.tar", networks | {"epoch": 3}), ("one.pt", networks["target_encoder"])):
        torch.save(contents, tmp_path / name, _use_new_zipfile_serialization=False)
        assert same_networks(read_weights(tmp_path / name).tensors, networks["target_encoder"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (np.float64(0.1), "scalar"),
        (np.int32(1), "scalar"),
        (np.zeros(3), "_reconstruct"),
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (Path("a"), "pathlib.PosixPath"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_tensor_in_a_file_is_named(tmp_path, thing, name, zipped):
    torch.save({"encoder": {}, "other": thing}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=f"a.pth: not a checkpoint of tensors and numbers alone .there is a .*{name}"
    ) as said:
        read_weights(tmp_path / "a.pth")
    assert "\n" not in str(said.value) and "\x1b" not in str(said.value)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda raw: b"", "an empty file"),
        (lambda raw: b"<html>not found", "begins with b'<html>no'"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1", "begins with b'version '"),
        (lambda raw: raw[:5000], "cut off or damaged"),
        (lambda raw: raw[:-100], "cut off or damaged"),
        (lambda raw: b"\x80\x02" + raw[:50], "damaged, or no file of torch's old format"),
    ],
)
def test_a_damaged_file_is_told_by_what_is_wrong_with_it(tmp_path, spoil, says):
    path = official_file(tmp_path / "a.pth.tar")[0]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"a.pth.tar: .*{says}.*again"):
        read_weights(path)


def test_official_to_official_keeps_everything(tmp_path):
    """A file without "module." gets it, the rest stays."""
    path, state = official_file(tmp_path / "plain.pth.tar", "", {"depth": 1})
    convert(path, tmp_path / "out.pth.tar", "--to", "meta")
    out = torch.load(tmp_path / "out.pth.tar", weights_only=True)
    assert (out["epoch"], out["loss"], out["lr"]) == (300, 0.1, 1.0)
    assert all(name.startswith("module.") for network in state.networks for name in out[network])
    assert same_networks(out["predictor"], {f"module.{k}": v for k, v in state.networks["predictor"].state_dict().items()})


@pytest.mark.parametrize("image_size", [32, [32, 48]])
def test_a_transformers_model_gives_the_same_features(tmp_path, image_size):
    """Randomly initialised; its eps of 1e-12, on tokens of variance 1e-3, is 1e-3 away from ours of 1e-6."""
    torch.manual_seed(0)
    theirs = IJepaModel(IJepaConfig(**IJEPA, image_size=image_size)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_encoder(tmp_path / "hf")
    assert ours.which == "context" and ours.norm.eps == ours.blocks[1].norm2.eps == 1e-12
    x = torch.randn(2, 3, *ours.image_size)
    expected = theirs(x).last_hidden_state
    assert (ours.forward_features(x) - expected).abs().max() < 1e-5
    convert(tmp_path / "hf", tmp_path / "ours", "--to", "fastjepa")
    convert(tmp_path / "ours", tmp_path / "back", "--to", "transformers")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back")]
    assert same_networks(*weights)
    back = IJepaModel.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(back(x).last_hidden_state, expected)


def test_a_transformers_classifier_leaves_its_head_behind(tmp_path, capsys):
    torch.manual_seed(0)
    theirs = IJepaForImageClassification(IJepaConfig(**IJEPA, image_size=32, num_labels=5)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", "--to", "fastjepa")
    assert "left out: classifier.bias, classifier.weight" in capsys.readouterr().err
    x = torch.randn(2, 3, 32, 32)
    found = load_encoder(tmp_path / "out").forward_features(x)
    assert (found - theirs.ijepa(x).last_hidden_state).abs().max() < 1e-5


def test_a_sharded_transformers_folder_is_read(tmp_path):
    theirs = IJepaModel(IJepaConfig(**IJEPA, image_size=32))
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert same_networks(read_weights(tmp_path / "many").tensors, read_weights(tmp_path / "one").tensors)


TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "class_token": False,
        "global_pool": "avg", "fc_norm": False}  # fmt: skip


def timm_folder(path: Path, **arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch16_224", num_classes=3, **(TIMM | arguments)).eval()
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    save_for_hf(network, path, safe_serialization=True)
    return network


def test_a_timm_vit_gives_the_same_features(tmp_path, capsys):
    theirs = timm_folder(tmp_path / "timm", mlp_ratio=3)
    convert(tmp_path / "timm", tmp_path / "ours", "--to", "fastjepa", "--which", "context")
    assert "left out: head.bias, head.weight" in capsys.readouterr().err
    ours = load_encoder(tmp_path / "ours")
    assert ours.mean_std == ((0.5,) * 3, (0.5,) * 3)  # as its config says
    x = torch.randn(2, 3, 32, 32)
    assert (ours.forward_features(x) - theirs.forward_features(x)).abs().max() < 1e-5
    convert(tmp_path / "ours", tmp_path / "back", "--to", "timm")
    stored = theirs.state_dict()
    del stored["head.weight"], stored["head.bias"]
    assert same_networks(load_file(tmp_path / "back" / "model.safetensors"), stored)


def test_an_encoder_nobody_labelled_stays_unstated_until_the_user_says(tmp_path):
    timm_folder(tmp_path / "timm")
    assert load_encoder(tmp_path / "timm").which == "unstated"
    assert load_encoder(tmp_path / "timm", "target").which == "target"
    with pytest.raises(UserError, match="no word on which it is"):
        convert_weights(tmp_path / "timm", tmp_path / "x.pth.tar", Conversion("meta"))


@pytest.mark.parametrize("name", MODELS)
def test_timms_arithmetic_reaches_the_width_of_the_mlp(name):
    form = EncoderForm.of_config(config_from_dict(SHAPE | {"meta": {"model_name": name}}), "target", "a test")
    architecture, arguments = timm_arguments(form)
    assert int(form.embed_dim * arguments["mlp_ratio"]) == form.mlp_hidden
    assert timm.is_model(architecture) and name in architecture


def test_timm_takes_what_is_written_for_it(tmp_path):
    """Load by checkpoint_path and as a local folder."""
    config = config_from_dict(SHAPE)
    _, encoder = build_pair(config)
    form = EncoderForm.of_config(config, "target", "a test")
    write_encoder(tmp_path / "out", "timm", form, encoder.state_dict())
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    common = said["model_args"] | {"num_classes": 0}
    file = tmp_path / "out" / "model.safetensors"
    taken = timm.create_model(said["architecture"], pretrained=False, checkpoint_path=file, **common).eval()
    x = torch.randn(2, 3, 32, 48)
    assert (taken.forward_features(x) - encoder.features(x)).abs().max() < 1e-5
    folder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(folder.forward_features(x), taken.forward_features(x))
    assert tuple(folder.pretrained_cfg["mean"]) == (0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"class_token": True}, "cls_token"),
        ({"fc_norm": None}, "fc_norm"),
        ({"init_values": 0.1}, "ls1"),
        ({"qk_norm": True}, "k_norm"),
    ],
)
def test_a_vit_that_is_no_ijepa_encoder_is_refused(tmp_path, arguments, name):
    timm_folder(tmp_path / "timm", **arguments)
    with pytest.raises(UserError, match=f"{name}.* has no place in an I-JEPA encoder"):
        read_weights(tmp_path / "timm")


def test_an_eps_that_a_format_cannot_say_is_refused_and_leaves_nothing(tmp_path, capsys):
    IJepaModel(IJepaConfig(**IJEPA, image_size=32)).save_pretrained(tmp_path / "hf")
    for to in ("timm", "meta"):
        assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", to]) == 2
        assert "1e-12" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_name_that_is_taken_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["convert", str(run), str(tmp_path / "out"), "--to", "fastjepa"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_what_cannot_be_read_is_named(run, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    convert(run, tmp_path / "whole", "--to", "fastjepa")
    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "empty")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "part")
    save_file({name: t for name, t in tensors.items() if name != "norm.bias"}, tmp_path / "part" / "model.safetensors")
    sentences = {
        "bert": "a bert model", "broken": "not JSON", "notes.txt": "not a file of weights", "cut.safetensors": "not a readable",
        "part": "norm.bias is not there", "empty": "not a readable", "nothing": "holds no complete checkpoint",
    }  # fmt: skip
    for name, sentence in sentences.items():
        with pytest.raises((UserError, CheckpointError), match=sentence) as caught:
            read_weights(tmp_path / name)
        assert name in str(caught.value)


def test_half_precision_stays_as_it_is_and_computes_in_fp32(run, tmp_path, images):
    convert(run, tmp_path / "out", "--to", "fastjepa")
    file = tmp_path / "out" / "model.safetensors"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halved, file)
    convert(tmp_path / "out", tmp_path / "hf", "--to", "transformers")
    assert same_networks(read_weights(tmp_path / "hf").tensors, halved)
    assert load_encoder(tmp_path / "hf").forward_features(images).dtype == torch.float32


def test_an_encoder_lies_in_a_lone_file_too(run, tmp_path):
    """One of a checkpoint's needs its config; one of ours says its form itself."""
    found = find_checkpoint(run)
    with pytest.raises(UserError, match="name the run directory"):
        read_weights(found / "target_encoder.safetensors")
    lone = read_weights(found / "target_encoder.safetensors", shape=EncoderForm.of_config(config_from_dict(SHAPE)))
    assert lone.form.which == "target"
    convert(run, tmp_path / "out", "--to", "fastjepa", "--which", "context")
    assert read_weights(tmp_path / "out" / "model.safetensors").form == read_weights(run, "context").form


def test_training_starts_from_anything(run, tmp_path):
    path, state = official_file(tmp_path / "jepa.pth.tar", meta={"depth": 1})
    given = starting_networks(path)
    assert given.keys() == state.networks.keys()
    assert all(same_networks(given[name], network.state_dict()) for name, network in state.networks.items())
    convert(run, tmp_path / "hf", "--to", "transformers")
    assert starting_networks(tmp_path / "hf").keys() == {"encoder"}
    assert starting_networks(run).keys() == {"encoder", "predictor", "target_encoder"}


def test_ijepa_weights_that_timm_publishes_are_context_encoders(tmp_path):
    timm_folder(tmp_path / "timm")
    file = tmp_path / "timm" / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"pretrained_cfg": said["pretrained_cfg"] | {"tag": "in1k_ijepa"}}))
    assert load_encoder(tmp_path / "timm").which == "context"


def test_a_plain_state_dict_of_a_known_size_is_read(tmp_path):
    """The heads are those of that size: a ViT-T has three."""
    shape = {"img_size": 32, "patch_size": 8, "class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    theirs = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = load_encoder(tmp_path / "vit.pth", "context", grid=(4, 4))  # positions that were learned do not say it
    x = torch.randn(1, 3, 32, 32)
    assert (ours.forward_features(x) - theirs.forward_features(x)).abs().max() < 1e-5
    assert (ours.which, load_encoder(tmp_path / "vit.pth", grid=(4, 4)).which) == ("context", "unstated")


def test_a_transformers_model_of_another_kind_is_refused(tmp_path):
    IJepaModel(IJepaConfig(**IJEPA, image_size=32, qkv_bias=False)).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="qkv_bias is False"):
        read_weights(tmp_path / "hf")


@pytest.mark.parametrize(("missing", "to", "extra"), [("timm", "fastjepa", "timm"), ("onnxscript", "onnx", "onnx")])
def test_a_missing_library_is_one_sentence(tmp_path, monkeypatch, capsys, missing, to, extra):
    timm_folder(tmp_path / "timm")
    source = tmp_path / "timm"
    if to == "onnx":
        convert_weights(source, tmp_path / "ours", Conversion("fastjepa"))
        source = tmp_path / "ours"
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", to]) == 2
    assert f"pip install 'fastjepa[{extra}]'" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "fastjepa convert runs/demo" in capsys.readouterr().out
