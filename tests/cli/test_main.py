"""Commands as they are typed: what they print, their exit codes, and one sentence for a mistake."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from fastjepa.cli.main import main
from fastjepa.errors import ConfigError
from tests.support.runs import TINY


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes that differ in brightness, in train/ and test/."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for label in (0, 1):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(128 * label, 128 * label + 100, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def config(images, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"source": str(images)}}))
    return file


def test_masks_json_has_the_promised_keys(config, capsys):
    assert main(["masks", "--config", str(config), "--groups", "20", "--json", "data.batch_size=128"]) == 0
    statistics = json.loads(capsys.readouterr().out)
    assert statistics.keys() == {"tokens", "context_before", "context_after", "target_block", "target_union",
                                 "row_share", "col_share", "ms_per_2048"}  # fmt: skip
    assert statistics["tokens"] == 64
    assert statistics["context_after"] < statistics["context_before"]


def test_masks_writes_a_picture_of_the_configs_images(config, tmp_path, capsys):
    picture = tmp_path / "masks.png"
    assert main(["masks", "--config", str(config), "--groups", "2", "--picture", str(picture)]) == 0
    assert "context_before" in capsys.readouterr().out
    with Image.open(picture) as sheet:
        assert sheet.width > 6 * 32 and sheet.height > 8 * 32


def test_train_then_eval(config, images, tmp_path, capsys):
    assert main(["train", "--config", str(config), "--output", str(tmp_path), "--max-steps", "2"]) == 0
    capsys.readouterr()
    for kind in ("knn", "linear"):
        command = ["eval", kind, "--checkpoint", str(tmp_path), "--data", str(images), "--encoder", "random", "--json"]
        assert main(command) == 0
        result = json.loads(capsys.readouterr().out)
        assert {"accuracy", "ci95", "encoder", "data", "n_train", "n_test"} <= result.keys()
        assert (result["encoder"], result["n_train"], result["n_test"]) == ("random", 60, 20)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["train", "--config", "no/such.yaml"], "no/such.yaml: cannot read the config"),
        (["train", "--config", "CONFIG", "mask.patchsize=4"], "did you mean 'patch_size'"),
        (["train", "--config", "CONFIG", "data.source=/no/such/folder"], "/no/such/folder"),
        (["train", "--config", "CONFIG", "data.batch_size=4096"], "fewer than one global batch"),
        (["eval", "knn", "--checkpoint", "/no/run", "--data", "IMAGES"], "/no/run"),
        (["data", "get", "fashion-mnis"], "fashion-mnist"),
        (["masks", "--config", "CONFIG", "mask.min_keep=60"], "min_keep"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(command, sentence, config, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {"CONFIG": str(config), "IMAGES": str(images)}
    assert main([named.get(word, word) for word in command]) == 2
    message = capsys.readouterr().err.strip()
    assert sentence in message
    assert "Traceback" not in message


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ConfigError):
        main(["train", "--config", str(tmp_path / "none.yaml"), "--debug"])


@pytest.mark.parametrize("command", ["train", "verify", "masks", "eval", "data"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"fastjepa {command}" in capsys.readouterr().out.partition("example")[2]


def test_ctrl_c_is_one_word_and_code_130(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastjepa.data.prepare.catalog.get_dataset", interrupted)
    assert main(["data", "get", "cifar10"]) == 130
    assert capsys.readouterr().err == "fastjepa data: interrupted\n"
