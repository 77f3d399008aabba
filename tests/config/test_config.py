"""The configuration: what loads, what is refused, and what the refusal says."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.config.load import config_from_dict, load_config
from fastjepa.config.schema import MODELS, Config, LossConfig
from fastjepa.errors import ConfigError

# The keys and values of the official ViT-H/14 run, 300 epochs of ImageNet-1k, in the official sections.
OFFICIAL = {
    "data": {
        "batch_size": 128, "color_jitter_strength": 0.0, "crop_scale": [0.3, 1.0], "crop_size": 224,
        "num_workers": 10, "image_folder": "imagenet_full_size/061417/",
        "root_path": "$replace_this_with_absolute_path_to_your_datasets_directory",
        "pin_mem": True, "use_color_distortion": False, "use_gaussian_blur": False, "use_horizontal_flip": False,
    },
    "logging": {"folder": "$replace_this_with_path_for_experiment_logs/vith14.224-bs.2048-ep.300/", "write_tag": "jepa"},
    "mask": {
        "allow_overlap": False, "aspect_ratio": [0.75, 1.5], "enc_mask_scale": [0.85, 1.0], "min_keep": 10,
        "num_enc_masks": 1, "num_pred_masks": 4, "patch_size": 14, "pred_mask_scale": [0.15, 0.2],
    },
    "meta": {
        "copy_data": False, "load_checkpoint": False, "model_name": "vit_huge", "pred_depth": 12, "pred_emb_dim": 384,
        "read_checkpoint": None, "use_bfloat16": True,
    },
    "optimization": {
        "ema": [0.996, 1.0], "epochs": 300, "final_lr": 1.0e-06, "final_weight_decay": 0.4, "ipe_scale": 1.0,
        "lr": 0.001, "start_lr": 0.0002, "warmup": 40, "weight_decay": 0.04,
    },
}  # fmt: skip
H14 = {"data": {"crop_size": 224}, "mask": {"patch_size": 14}, "meta": {"model_name": "vit_huge", "pred_depth": 12}}
H16_448 = {"data": {"crop_size": 448, "batch_size": 16}, "mask": {"patch_size": 16}}
G16 = {
    "data": {"crop_size": 224, "batch_size": 16},
    "mask": {"patch_size": 16},
    "meta": {"model_name": "vit_giant", "pred_depth": 16},
    "optimization": {"epochs": 44, "warmup": 3},
}
SECTIONS = {field.name: field.default for field in dataclasses.fields(Config)}
KEYS = [(section, field.name) for section, default in SECTIONS.items() for field in dataclasses.fields(default)]


def merged(changes: dict) -> dict:
    return {name: section | changes.get(name, {}) for name, section in OFFICIAL.items()}


def written(folder: Path, raw: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return path


def refusal(folder: Path, raw: object, *overrides: str) -> str:
    """The one-line message with which a file holding `raw` is refused; it always names the file."""
    path = written(folder, raw)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


MOMENTA = ("two numbers in [0, 1], or one or more knots [share of the run, momentum], both in [0, 1], whose shares rise from "
           "each to the next")  # fmt: skip

# What loads


@pytest.mark.parametrize(
    "changes, grid, shape",
    [
        (H14, (16, 16), (1280, 32, 16, 4.0)),
        (H16_448, (28, 28), (1280, 32, 16, 4.0)),
        (G16, (14, 14), (1408, 40, 16, 48 / 11)),
    ],
)
def test_official_files_load_unmodified(tmp_path, changes, grid, shape):
    raw = merged(changes)
    loaded = load_config(written(tmp_path, raw))
    assert (loaded.grid, loaded.encoder_shape) == (grid, shape)
    assert loaded.runtime.dtype == "bf16"
    for section, values in raw.items():
        for name, value in values.items():
            assert loaded.to_dict()[section][name] == value, f"{section}.{name}"


def test_official_objective_is_the_default(tmp_path):
    """Nothing that the official files do not say changes their objective."""
    loaded = load_config(written(tmp_path, OFFICIAL))
    assert (loaded.mask.strategy, loaded.mask.sampling, loaded.mask.truncate) == ("multiblock", "official", "batch_min")
    assert loaded.loss == LossConfig(kind="smooth_l1", target="output", normalize="layer", regularizer="none")
    assert (loaded.mask.share, loaded.optimization.pred_lr_scale) == ("image", 1.0)
    assert loaded.mask.truncate_group == loaded.data.batch_size == 128


def test_an_empty_file_and_an_empty_section_are_the_defaults(tmp_path):
    assert load_config(written(tmp_path, "")) == Config()
    assert load_config(written(tmp_path, "data:\nmask: {}\n")) == Config()


@pytest.mark.parametrize("spelling", ["1e-3", "1E-3", "0.001", "1.0e-3"])
def test_every_spelling_of_a_float_is_a_float(tmp_path, spelling):
    """YAML 1.1 reads 1e-3 as text."""
    assert load_config(written(tmp_path, f"optimization: {{lr: {spelling}}}")).optimization.lr == 0.001
    assert load_config(written(tmp_path, ""), [f"optimization.lr={spelling}"]).optimization.lr == 0.001


def test_a_whole_number_is_a_float_where_one_is_asked_for():
    loaded = config_from_dict({"optimization": {"warmup": 40, "ema": [1, 1]}})
    assert isinstance(loaded.optimization.warmup, float)
    assert loaded.optimization.ema == (1.0, 1.0)


def test_momenta_are_two_or_at_knots(tmp_path):
    """Both forms are read from files and overrides, and written so that they are read back."""
    for text, knots in (
        ("[0.9, 1]", ((0.0, 0.9), (1.0, 1.0))),
        ("[[0,0.95],[1,1.0]]", ((0.0, 0.95), (1.0, 1.0))),
        ("[[0, 0.95], [1e-1, 0.999], [1, 0.9995]]", ((0.0, 0.95), (0.1, 0.999), (1.0, 0.9995))),
        ("[[0.3, 0.5]]", ((0.3, 0.5),)),
    ):
        loaded = load_config(written(tmp_path, OFFICIAL), [f"optimization.ema={text}"])
        assert loaded.optimization.momentum_knots == knots
        assert load_config(written(tmp_path, f"optimization: {{ema: {text}}}")).optimization.ema == loaded.optimization.ema
        assert load_config(written(tmp_path, loaded.to_dict())) == loaded
        assert json.loads(json.dumps(loaded.to_dict())) == loaded.to_dict(), "lists at every depth"
    message = refusal(tmp_path, {"optimization": {"ema": [[0, 0.9, 1], [1, 1, 1]]}})
    assert "must be [a finite number, a finite number] or a list of [a finite number, a finite number]" in message
    assert "must be [a finite number, a finite number] or a list" in refusal(tmp_path, "", "optimization.ema=[0.9,[1,1]]")


def test_sequences_become_tuples():
    """A Config can be hashed and shared: nothing in it changes."""
    loaded = config_from_dict({"data": {"crop_scale": [0.5, 1], "channels": 1, "mean": [0.3], "std": [0.2]}})
    assert (loaded.data.crop_scale, loaded.mean_std) == ((0.5, 1.0), ((0.3,), (0.2,)))
    assert hash(loaded) == hash(config_from_dict(loaded.to_dict()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.data.channels = 3


def test_a_non_square_image_has_rows_and_columns():
    loaded = config_from_dict({"data": {"crop_size": [128, 192]}, "mask": {"patch_size": 16}})
    assert (loaded.image_size, loaded.grid) == ((128, 192), (8, 12))


def test_mean_and_std_default_to_imagenet_by_channels():
    assert Config().mean_std == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert config_from_dict({"data": {"channels": 1}}).mean_std == ((0.449,), (0.226,))


def test_meta_overrides_the_shape_of_a_named_model():
    loaded = config_from_dict({"meta": {"model_name": "vit_tiny", "embed_dim": 128, "depth": 4, "num_heads": 4}})
    assert loaded.encoder_shape == (128, 4, 4, 4.0)


def test_the_micro_batch_defaults_to_the_batch():
    assert config_from_dict({"data": {"batch_size": 48}}).micro_batch == 48
    assert config_from_dict({"data": {"batch_size": 48}, "runtime": {"micro_batch": 12}}).micro_batch == 12


@pytest.mark.parametrize("official, dtype", [(True, "bf16"), (False, "fp32")])
def test_use_bfloat16_says_runtime_dtype(official, dtype):
    assert config_from_dict({"meta": {"use_bfloat16": official}}).runtime.dtype == dtype
    assert config_from_dict({"meta": {"use_bfloat16": official}, "runtime": {"dtype": dtype}}).runtime.dtype == dtype


@pytest.mark.parametrize("name", MODELS)
def test_every_model_name_loads(name):
    dim, depth, heads, _ = config_from_dict({"meta": {"model_name": name}}).encoder_shape
    assert (dim, depth, heads) == MODELS[name][:3]


# Overrides


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path):
    path = written(tmp_path, OFFICIAL)
    loaded = load_config(path, ["data.batch_size=64", "data.batch_size=32", "mask.truncate=none", "data.crop_scale=[0.5, 1.0]"])
    assert (loaded.data.batch_size, loaded.mask.truncate, loaded.data.crop_scale) == (32, "none", (0.5, 1.0))
    assert loaded.optimization == load_config(path).optimization


def test_an_override_opens_a_section_and_unsets_a_key(tmp_path):
    assert load_config(written(tmp_path, "data:\n"), ["data.source=cifar10"]).data.source == "cifar10"
    assert load_config(written(tmp_path, "runtime: {micro_batch: 8}"), ["runtime.micro_batch=null"]).micro_batch == 64


def test_an_override_keeps_equals_signs_in_its_value(tmp_path):
    assert load_config(written(tmp_path, ""), ["data.source=a=b"]).data.source == "a=b"


@pytest.mark.parametrize(
    "key", ["data.source", "data.root_path", "data.image_folder", "logging.folder", "meta.read_checkpoint"]
)
@pytest.mark.parametrize(
    "text",
    ["/data/set #2", "2024", "2024-01-31", "1e5", "0x1f", "1_000", "no", "on", "yes", "true", "null", "~", "~/set", "[v2]",
     "{v2}", "a: b", "- a", "a:", "'quoted'", "*star", "&and", "!tag", "%", "@at", "`", " spaces ", "C:\\set", "#", "[open",
     "größe", "a\tb"],
)  # fmt: skip
def test_an_override_of_text_is_taken_as_it_stands(tmp_path, key, text):
    section, name = key.split(".")
    loaded = load_config(written(tmp_path, ""), [f"{key}={text}"])
    assert loaded.to_dict()[section][name] == text
    assert load_config(written(tmp_path, loaded.to_dict())) == loaded, "it is written so that it is read back"


def test_an_override_of_text_by_nothing_unsets_it(tmp_path):
    assert load_config(written(tmp_path, "data: {source: a}"), ["data.source="]).data.source is None
    assert "logging.write_tag: None must be text" in refusal(tmp_path, "", "logging.write_tag=")


@pytest.mark.parametrize("text", ["2024", "no", "on", "[v2]", "a: b", "2024-01-31", "1.5"])
def test_text_that_the_file_holds_without_quotes_is_refused_with_the_remedy(tmp_path, text):
    raw = f"data:\n  source: {text}\n" if ": " not in text else f"data:\n  source:\n    {text}\n"
    assert "must be text or null; YAML reads text as something else where it is not in quotes" in refusal(tmp_path, raw)
    assert load_config(written(tmp_path, f"data: {{source: '{text}'}}")).data.source == text


@pytest.mark.parametrize("text", ["batch_size=3", "data.batch_size", "data.=3", ".batch_size=3", "=3", ""])
def test_a_malformed_override_says_how_to_write_one(tmp_path, text):
    with pytest.raises(ConfigError, match="section.key=value"):
        load_config(written(tmp_path, ""), [text])


def test_an_override_whose_value_is_no_yaml_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="data.crop_scale"):
        load_config(written(tmp_path, ""), ["data.crop_scale=[0.5"])


def test_an_override_into_a_section_that_holds_no_keys_is_refused(tmp_path):
    assert "'data' must hold keys" in refusal(tmp_path, "data: 5", "data.batch_size=3")


def test_an_override_is_as_strict_as_the_file(tmp_path):
    assert "data.batch_sise: unknown key; did you mean 'batch_size'?" in refusal(tmp_path, "", "data.batch_sise=3")
    assert "unknown section 'dtaa'; did you mean 'data'?" in refusal(tmp_path, "", "dtaa.batch_size=3")


# What is refused


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, why in ((tmp_path / "absent.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=why) as error:
            load_config(path)
        assert f"{path}: " in str(error.value) and "--config FILE" in str(error.value)


def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path):
    assert "not a YAML file" in refusal(tmp_path, "data: [1")
    assert "mapping of sections (data, mask, meta" in refusal(tmp_path, "- data")
    assert "'data' must hold keys, not [1]" in refusal(tmp_path, "data: [1]")
    (tmp_path / "run.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="run.bin: not a YAML file"):
        load_config(tmp_path / "run.bin")


@pytest.mark.parametrize("section, near", [("optimisation", "optimization"), ("masks", "mask"), ("log", "logging")])
def test_an_unknown_section_names_the_nearest(tmp_path, section, near):
    assert f"unknown section {section!r}; did you mean {near!r}?" in refusal(tmp_path, {section: {}})


def test_an_unknown_section_near_nothing_lists_them_all(tmp_path):
    assert f"unknown section 'xyz'; valid: {', '.join(SECTIONS)}" in refusal(tmp_path, {"xyz": {}})


@pytest.mark.parametrize("section, name", KEYS)
def test_an_unknown_key_names_the_nearest(tmp_path, section, name):
    message = refusal(tmp_path, {section: {name + "_": 1}})
    assert f"{section}.{name}_: unknown key; did you mean {name!r}?" in message


def test_keys_belong_to_one_section(tmp_path):
    assert "data.lr: unknown key" in refusal(tmp_path, {"data": {"lr": 0.1}})


@pytest.mark.parametrize(
    "section, name, value, wanted",
    [
        ("data", "batch_size", 6.0, "a whole number"),
        ("data", "batch_size", "64", "a whole number"),
        ("data", "batch_size", True, "a whole number"),
        ("data", "batch_size", None, "a whole number"),
        ("data", "source", 3, "text or null"),
        ("data", "use_horizontal_flip", 1, "true or false"),
        ("data", "pin_mem", "yes please", "true or false"),
        ("data", "crop_size", [224], "a whole number or [a whole number, a whole number]"),
        ("data", "crop_scale", 0.5, "[a finite number, a finite number]"),
        ("data", "crop_scale", [0.3, 0.6, 1.0], "[a finite number, a finite number]"),
        ("data", "loader", "dalli", "auto or dali or torch; did you mean 'dali'?"),
        ("data", "decode_threads", 1.5, "a whole number or null"),
        ("data", "mean", 0.5, "a list of a finite number or null"),
        ("optimization", "lr", "fast", "a finite number"),
        ("optimization", "lr", True, "a finite number"),
        ("optimization", "lr", [0.1], "a finite number"),
        ("optimization", "lr", float("nan"), "a finite number"),
        pytest.param("optimization", "lr", 10**400, "a finite number", id="optimization-lr-10**400"),
        ("optimization", "lr", "1e999", "a finite number"),
        ("meta", "embed_dim", "wide", "a whole number or null"),
        ("mask", "truncate", "batchmin", "batch_min or none or fraction; did you mean 'batch_min'?"),
        ("mask", "truncate", None, "batch_min or none or fraction"),
        ("mask", "sampling", "offical", "official or uniform; did you mean 'official'?"),
        ("loss", "kind", "l1", "smooth_l1 or l2"),
        ("loss", "regularizer", "vicregs", "did you mean 'vicreg'?"),
        ("runtime", "dtype", "bfloat16", "auto or fp32 or bf16"),
        ("runtime", "zero", False, "0"),
    ],
)
def test_a_wrong_type_is_refused_in_words(tmp_path, section, name, value, wanted):
    message = refusal(tmp_path, {section: {name: value}})
    assert f"{section}.{name}: {value!r} must be " in message
    assert wanted in message


@pytest.mark.parametrize(
    "section, name, value, wanted",
    [
        ("data", "batch_size", 0, "greater than 0"),
        ("data", "num_workers", -1, "0 or greater"),
        ("data", "prefetch", 0, "greater than 0"),
        ("data", "decode_threads", 0, "greater than 0"),
        ("data", "hw_decoder_load", 1.01, "in [0, 1]"),
        ("data", "channels", 0, "greater than 0"),
        ("data", "crop_scale", [0.0, 1.0], "two rising numbers in (0, 1]"),
        ("data", "crop_scale", [1.0, 0.3], "two rising numbers in (0, 1]"),
        ("data", "crop_scale", [0.3, 1.1], "two rising numbers in (0, 1]"),
        ("mask", "pred_mask_scale", [0.2, 0.15], "two rising numbers in (0, 1]"),
        ("mask", "aspect_ratio", [0, 1], "two rising numbers greater than 0"),
        ("mask", "aspect_ratio", [1.5, 0.75], "two rising numbers greater than 0"),
        ("mask", "truncate_group", 0, "greater than 0"),
        ("mask", "context_fraction", 0, "in (0, 1]"),
        ("mask", "context_fraction", 1.01, "in (0, 1]"),
        ("meta", "depth", 0, "greater than 0"),
        ("optimization", "lr", -1e-3, "0 or greater"),
        ("optimization", "ipe_scale", 0, "greater than 0"),
        ("optimization", "ema", [0.996, 1.1], MOMENTA),
        ("optimization", "ema", [], MOMENTA),
        ("optimization", "ema", [[0, 0.9], [0.5, 1.1]], MOMENTA),
        ("optimization", "ema", [[0, 0.9], [0.5, 0.99], [0.5, 1.0]], MOMENTA),
        ("optimization", "ema", [[0.5, 0.9], [0.2, 0.99]], MOMENTA),
        ("optimization", "ema", [[-0.1, 0.9]], MOMENTA),
        ("optimization", "ema", [[0, 0.9], [1.5, 0.99]], MOMENTA),
        ("logging", "every", 0, "greater than 0"),
        ("loss", "regularizer_weight", -0.1, "0 or greater"),
        ("runtime", "seed", -1, "in [0, 2**64)"),
        ("runtime", "micro_batch", 0, "greater than 0"),
        ("runtime", "max_skipped", 0, "greater than 0"),
    ],
)
def test_a_value_out_of_range_is_refused_in_words(tmp_path, section, name, value, wanted):
    message = refusal(tmp_path, {section: {name: value}})
    assert f"{section}.{name}: " in message
    assert message.endswith(f"must be {wanted}")


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.crop_scale", [1.0, 1.0]),
        ("data.hw_decoder_load", 0),
        ("data.hw_decoder_load", 1),
        ("data.mean", [0, 1, 0.5]),
        ("data.std", [1, 1, 0.005]),
        ("mask.context_fraction", 1.0),
        ("optimization.warmup", 0),
        ("optimization.ema", [0, 1]),
    ],
)
def test_the_ends_of_a_range_belong_to_it(key, value):
    section, name = key.split(".")
    assert config_from_dict({section: {name: value}}).to_dict()[section][name] == value


def test_a_retired_key_is_no_error_and_is_named_where_it_asked_for_something(tmp_path, caplog):
    old = {"data": {"device_memory_padding": 16 << 20, "host_memory_padding": 1 << 20, "batch_size": 8}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    config = load_config(tmp_path / "old.yaml", ["data.preallocate_width_hint=640"])
    assert config == config_from_dict({"data": {"batch_size": 8}}) and "host_memory_padding" not in config.to_dict()["data"]
    named = [record.getMessage().partition("data.")[2].split(":")[0] for record in caplog.records]
    assert named == ["host_memory_padding", "preallocate_width_hint"]


def test_an_unknown_model_names_the_nearest(tmp_path):
    assert "did you mean 'vit_huge'?" in refusal(tmp_path, {"meta": {"model_name": "vit_hugh"}})


def test_an_official_key_that_cannot_act_raises(tmp_path):
    message = refusal(tmp_path, {"meta": {"copy_data": True}})
    assert "meta.copy_data: True is not supported: " in message
    assert "set it to " in message


@pytest.mark.parametrize(
    "raw, named",
    [
        ({"meta": {"use_bfloat16": True}, "runtime": {"dtype": "fp32"}}, ["meta.use_bfloat16", "runtime.dtype"]),
        ({"meta": {"use_bfloat16": False}, "runtime": {"dtype": "bf16"}}, ["meta.use_bfloat16", "runtime.dtype"]),
        ({"data": {"crop_size": 224}, "mask": {"patch_size": 15}}, ["data.crop_size", "mask.patch_size"]),
        ({"data": {"crop_size": [224, 225]}}, ["data.crop_size: 224x225", "mask.patch_size: 16"]),
        ({"data": {"crop_size": [225, 224]}}, ["data.crop_size: 225x224", "mask.patch_size: 16"]),
        ({"data": {"crop_size": 0}}, ["data.crop_size", "positive"]),
        ({"data": {"crop_size": -224}}, ["data.crop_size", "positive"]),
        ({"meta": {"num_heads": 7}}, ["meta.embed_dim: 768", "meta.num_heads: 7"]),
        ({"meta": {"pred_num_heads": 5}}, ["meta.pred_emb_dim: 384", "meta.pred_num_heads: 5"]),
        ({"meta": {"pred_emb_dim": 100}}, ["meta.pred_emb_dim: 100", "meta.pred_num_heads: 12"]),
        ({"meta": {"embed_dim": 42, "num_heads": 2}}, ["meta.embed_dim: 42", "multiple of 4"]),
        ({"data": {"batch_size": 64}, "runtime": {"micro_batch": 48}}, ["runtime.micro_batch: 48", "data.batch_size: 64"]),
        ({"data": {"batch_size": 64}, "runtime": {"micro_batch": 128}}, ["runtime.micro_batch: 128", "data.batch_size: 64"]),
        ({"data": {"mean": [0.5]}}, ["data.mean", "3 numbers"]),
        ({"data": {"std": [0.5] * 3, "channels": 1}}, ["data.std", "1 numbers"]),
        ({"data": {"std": [0.5, 0.0, 0.5]}}, ["data.std", "greater than 0"]),
        ({"data": {"std": [0.2, 1e-9, 0.2]}}, ["data.std: 1e-09", "greater than 0.0004"]),
        ({"data": {"std": [1e-4], "channels": 1}}, ["data.std: 0.0001", "greater than 0.0004"]),
        ({"data": {"std": [0.2, -0.2, 0.2]}}, ["data.std: -0.2", "greater than 0.0004"]),
        ({"data": {"mean": [-0.485, 0.456, 0.406]}}, ["data.mean: -0.485", "0 or greater"]),
        ({"data": {"mean": [123.675, 116.28, 103.53]}}, ["data.mean: 123.675", "divide", "by 255: [0.485, 0.456, 0.406]"]),
        ({"data": {"std": [58.395, 57.12, 57.375]}}, ["data.std: 58.395", "divide", "by 255: [0.229, 0.224, 0.225]"]),
        ({"data": {"mean": [0.5, 0.5, 127.5]}}, ["data.mean: 127.5", "by 255"]),
        ({"data": {"mean": [33.3], "channels": 1}}, ["data.mean: 33.3", "by 255: [0.131]"]),
        ({"data": {"std": [3], "channels": 1}}, ["data.std: 3", "by 255: [0.012]"]),
        ({"optimization": {"optimizer": "muon"}, "runtime": {"zero": 1}}, ["optimization.optimizer: muon", "runtime.zero"]),
        ({"optimization": {"optimizer": "muon", "lr": 0}}, ["optimization.lr: 0", "optimization.muon_lr"]),
        ({"data": {"source": "cifar10", "root_path": "a"}}, ["data.source", "data.root_path"]),
        ({"data": {"source": "cifar10", "image_folder": "a"}}, ["data.source", "image_folder"]),
    ],
)
def test_keys_that_contradict_each_other_are_both_named(tmp_path, raw, named):
    message = refusal(tmp_path, raw)
    assert all(name in message for name in named), message


# Whole configs


def test_to_dict_is_plain_and_reads_back(tmp_path):
    """The resolved config beside a checkpoint starts the same run."""
    loaded = load_config(written(tmp_path, merged(G16)), ["data.crop_size=[224, 448]", "runtime.micro_batch=4"])
    assert config_from_dict(loaded.to_dict()) == loaded
    assert load_config(written(tmp_path, loaded.to_dict())) == loaded
    assert json.loads(json.dumps(loaded.to_dict())) == loaded.to_dict()


def test_every_key_has_a_default_and_a_description():
    for default in SECTIONS.values():
        for field in dataclasses.fields(default):
            assert field.default is not dataclasses.MISSING and field.metadata["doc"], field.name


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=3), plain, max_size=2)


@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_loads_or_is_refused_by_name(key, value):
    """Whatever a key is given, the answer is a Config that reads back or a ConfigError: no other exception."""
    section, name = key
    try:
        loaded = config_from_dict({section: {name: value}}, "run.yaml")
    except ConfigError as error:
        assert str(error).startswith("run.yaml: ")
        assert name in str(error)
    else:
        assert config_from_dict(loaded.to_dict()) == loaded


@pytest.mark.parametrize("name", ["demo", "cifar10"])
def test_a_small_preset_asks_for_no_deepspeed_on_several_ranks(name):
    """`make demo` runs a process a core where DeepSpeed is not installed."""
    assert load_config(name).runtime.zero == 0
