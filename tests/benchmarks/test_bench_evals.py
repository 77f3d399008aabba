"""benchmarks/evals.py: the same features for all, the same neighbours, and honest ratios."""

import json

import evals
import pytest

from fastjepa.evals import linear

TOY = ["--n-train=240", "--n-test=60", "--classes=6", "--width=16", "--rounds=2", "--threads=1", "--json"]


@pytest.mark.slow  # it imports scikit-learn and Lightning
def test_probes_take_turns_on_the_same_features(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "MIN_STEPS", 40)
    assert evals.main(TOY) == 0
    rows = json.loads(capsys.readouterr().out)
    accuracy = {(row["evaluation"], row["library"]): row["accuracy"] for row in rows}
    libraries = ["fastjepa", "lightly", "scikit-learn"]
    assert [row["library"] for row in rows] == [*libraries, "fastjepa", "fastjepa, one head", "scikit-learn"]
    assert len({accuracy["k-NN", library] for library in libraries}) == 1  # one definition, three programs
    assert 2 / 6 < min(accuracy.values()) <= max(accuracy.values()) < 1
    for row in rows:
        assert ("ratio" in row) == (row["library"] != "fastjepa") and row["n"] == 2 and row["ms"]["median"] > 0
