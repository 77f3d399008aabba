"""The attentive probe: what it computes, what it may choose from, and where its patch features come from."""

import json
from pathlib import Path

import pytest
import torch

from fastjepa.cli.main import main
from fastjepa.errors import UserError
from fastjepa.evals import patch_features
from fastjepa.evals.attentive import AttentiveOptions, AttentiveProbe, attentive_accuracy
from fastjepa.evals.inputs import open_splits, open_subject
from fastjepa.evals.patch_features import PatchFeatures, held_in_memory, patch_features_of
from fastjepa.evals.supervised import TrainingPlace
from tests.support.evals import write_images, write_run


def patches(n: int, seed: int = 0, signal: float = 3.0, classes: int = 3) -> PatchFeatures:
    """(n, 6, 16) in bf16: one patch, at a random place, carries the class; pooling buries it among the other five."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(9))
    y, x = torch.arange(n) % classes, 0.5 * torch.randn(n, 6, 16, generator=generator)
    x[torch.arange(n), torch.randint(6, (n,), generator=generator)] += signal * centres[y]
    return held_in_memory(x.bfloat16(), y)


def with_labels(data: PatchFeatures, order: torch.Tensor) -> PatchFeatures:
    return PatchFeatures(data.y[order], data.read)


def short(train: PatchFeatures, test: PatchFeatures, states=lambda name: None, **options):
    """Four epochs of a probe of two heads on three classes."""
    asked = AttentiveOptions(**{"epochs": 4, "batch": 32} | options)
    return attentive_accuracy(train, test, 3, 2, asked, TrainingPlace(states=states))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def test_probe_attends_as_written_out():
    """softmax over patches of the query's products, per head, then MLP and linear layer, both halves with a residual."""
    torch.manual_seed(0)
    probe, x = AttentiveProbe(16, 2, 3).double(), torch.randn(5, 6, 16).double()
    weight, bias = probe.attention.in_proj_weight.split(16), probe.attention.in_proj_bias.split(16)
    seen, query = probe.norm1(x), probe.query[0]
    q = (query @ weight[0].T + bias[0]).view(2, 8)
    k, v = ((seen @ w.T + b).view(5, 6, 2, 8) for w, b in zip(weight[1:], bias[1:], strict=True))
    share = (torch.einsum("hd,bnhd->bhn", q, k) / 8**0.5).softmax(dim=2)
    mixed = torch.einsum("bhn,bnhd->bhd", share, v).reshape(5, 16)
    pooled = query + probe.attention.out_proj(mixed)
    pooled = pooled + probe.mlp(probe.norm2(pooled))
    assert torch.allclose(probe(x), probe.head(pooled), atol=1e-10)


def test_probe_finds_the_patch_that_pooling_buries():
    result = short(patches(600), patches(200, seed=1), epochs=10, lrs=(3e-3,))
    assert result.accuracy > 0.95 and result.chosen == {"lr": 3e-3} and result.validation_accuracy is None


def test_permuted_labels_leave_chance():
    """Chance is a third; the bound is four standard deviations at 400 test images."""
    shuffled = with_labels(patches(300), torch.randperm(300, generator=torch.Generator().manual_seed(1)))
    assert abs(short(shuffled, patches(400, seed=1)).accuracy - 1 / 3) < 0.1


def test_test_labels_do_not_touch_the_choice():
    train, test = patches(300), patches(200, seed=1)
    wrong = with_labels(test, torch.randperm(200, generator=torch.Generator().manual_seed(1)))
    right, other = (short(train, data, lrs=(1e-6, 3e-3)) for data in (test, wrong))
    assert right.chosen == other.chosen == {"lr": 3e-3} and right.validation_accuracy == other.validation_accuracy
    assert right.accuracy > other.accuracy + 0.2


def test_images_that_choose_are_not_fitted():
    train, seen = patches(120), {"fitted": set(), "held": set()}

    def read(rows, size, about):
        if about != "width" and len(rows) < 120:  # else the training on all that follows
            seen["held" if about == "validation" else "fitted"] |= set(rows.tolist())
        return train.read(rows, size, about)

    short(PatchFeatures(train.y, read), patches(30, seed=1), lrs=(1e-3, 1e-4))
    assert len(seen["held"]) == 18 and seen["fitted"] == set(range(120)) - seen["held"]


def test_a_learning_rate_that_diverges_is_named():
    with pytest.raises(UserError, match="--lr 1e[+]30: the loss of epoch 1 is"):
        short(patches(60), patches(30, seed=1), lrs=(1e30,))


def test_an_interrupted_probe_ends_as_an_undisturbed_one(tmp_path: Path):
    train, test = patches(200), patches(100, seed=1)
    whole = short(train, test)

    def stop(rows, size, about):
        if about == "epoch 3 of 4":
            raise KeyboardInterrupt
        return train.read(rows, size, about)

    states = lambda name: tmp_path / f"{name}.pt"  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        short(PatchFeatures(train.y, stop), test, states=states)
    seen = []
    watching = PatchFeatures(train.y, lambda rows, size, about: seen.append(about) or train.read(rows, size, about))
    assert short(watching, test, states=states) == whole
    assert seen == ["width", "epoch 3 of 4", "epoch 4 of 4"]
    states("final").write_bytes(b"PK")
    with pytest.raises(OSError, match="final.pt: cannot be read .* delete the file"):
        short(train, test, states=states)


def test_patch_features_are_the_same_from_the_disk_and_from_the_encoder(run: Path, images: Path):
    kept, streamed = (open_subject(run, "cpu", cache) for cache in (True, False))
    split = open_splits(str(images), 30, None, 0)[0]
    encoder, rows = kept.encoder("target", split), torch.tensor([29, 3, 14, 0])
    first, second, other = (patch_features_of(one, encoder, split) for one in (kept, kept, streamed))
    assert len(list((run / "features").iterdir())) == 1
    for found in (first, second, other):
        blocks = list(found.read(rows, 3, "test"))
        assert [block.shape for block in blocks] == [(3, 16, 32), (1, 16, 32)] and blocks[0].dtype == torch.bfloat16
        assert found.y.tolist() == [split.source.label(int(row)) for row in split.rows]
        assert torch.allclose(torch.cat(blocks).float(), torch.cat(list(other.read(rows, 3, ""))).float(), atol=0.02)


def test_patch_features_that_do_not_fit_on_the_disk_are_made_anew(
    run: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(patch_features, "MEMORY_SHARE", 0.0)
    one = open_subject(run, "cpu")
    split = open_splits(str(images), None, None, 0)[1]
    found = patch_features_of(one, one.encoder("target", split), split)
    assert next(iter(found.read(torch.arange(2), 2, ""))).shape == (2, 16, 32)
    assert not list((run / "features").iterdir())
    assert "each epoch makes them anew" in " ".join(capsys.readouterr().err.split())


def test_command_gives_a_row_and_leaves_features_alone(run: Path, images: Path, capsys: pytest.CaptureFixture):
    command = ["eval", "attentive", "--checkpoint", str(run), "--data", str(images), "--epochs", "6", "--batch-size", "8"]
    assert main([*command, "--encoder", "context", "--seed", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["checkpoint"] == str(run / "checkpoints" / "jepa-00000003") and row["step"] == 3
    assert (row["probe"], row["protocol"], row["encoder"], row["split"]) == ("attentive", "v-jepa", "context", "test")
    assert (row["seed"], row["n_train"], row["n_test"], row["epochs"]) == (2, 40, 20, 6)
    assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] and row["accuracy"] > 0.9
    assert not (run / "unfinished").exists() or not list((run / "unfinished").iterdir())
    assert sorted(file.suffix for file in (run / "features").iterdir()) == [".npy", ".npy"]
