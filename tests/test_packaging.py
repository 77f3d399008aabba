"""The release: both distributions build, install outside the repository and train there; its files agree on versions."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import fastjepa_kernels
from fastjepa import __version__
from tests.support.images import write_idx_pairs
from tests.support.places import CONFIGS, ROOT, files

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("packaging")]  # one build serves all

SMALL = ["data.batch_size=4", "runtime.dtype=fp32", "runtime.device=cpu", "--max-steps", "1"]


def run(*command: object, cwd: Path, **variables: str) -> str:
    words = [str(word) for word in command]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(cwd)} | variables
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Make what `make dist` writes, made from a copy of what is under version control: a build leaves files behind."""
    root = tmp_path_factory.mktemp("source")
    for path in files():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, root / path)
    (root / "fastjepa/configs").symlink_to("../configs")
    recipe = re.search(r"^dist:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for line in recipe.splitlines():
        run(*line.replace("$(BIN)/python", sys.executable).split(), cwd=root)
    return root / "dist"


@pytest.fixture(scope="module")
def python(dist, tmp_path_factory) -> Path:
    """A fresh environment with the wheels, and beside them, so that nothing is downloaded, this one's libraries."""
    place = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    fresh = place / "bin/python"
    install = (sys.executable, "-m", "pip", "--python", fresh, "install", "--quiet", "--no-deps", "--no-index")
    run(*install, *dist.glob("*.whl"), cwd=place)
    (library,) = place.glob("lib/python*/site-packages")  # a .pth in another .pth's directory is not read: no editable install
    (library / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return fresh


def test_both_distributions_give_a_wheel_and_a_source_distribution(dist):
    version = __version__
    found = {path.name for path in dist.iterdir()}
    names = ("fastjepa", "fastjepa_kernels")
    assert found == {f"{name}-{version}{end}" for name in names for end in (".tar.gz", "-py3-none-any.whl")}
    for name in names:
        with tarfile.open(dist / f"{name}-{version}.tar.gz") as source:
            assert {f"{name}-{version}/LICENSE", f"{name}-{version}/README.md"} <= set(source.getnames())
            assert all(member.isfile() or member.isdir() for member in source), "a link would lead out of the archive"
        with zipfile.ZipFile(dist / f"{name}-{version}-py3-none-any.whl") as wheel:
            assert any(member.endswith("licenses/LICENSE") for member in wheel.namelist())
            assert {member.partition("/")[0].partition("-")[0] for member in wheel.namelist()} == {name}


def test_it_trains_outside_the_repository(python, tmp_path):
    write_idx_pairs(tmp_path / "data/fashion-mnist")
    where = "import fastjepa, fastjepa_kernels; print(fastjepa.__file__, fastjepa_kernels.__file__)"
    assert run(python, "-c", where, cwd=tmp_path).count(str(python.parent.parent)) == 2
    command = [python.parent / "fastjepa", "train", "--config", "demo", "--output", "run", *SMALL]
    run(*command, cwd=tmp_path, FASTJEPA_DATA=str(tmp_path / "data"))
    assert (tmp_path / "run/checkpoints/jepa-00000001/encoder.safetensors").is_file()


def test_every_config_comes_along(python, tmp_path):
    names = [path.stem for path in CONFIGS]
    code = f"from fastjepa.config.load import load_config; print([load_config(name).mask.patch_size for name in {names}])"
    assert len(run(python, "-c", code, cwd=tmp_path).split(",")) == len(names)


def test_the_link_to_the_configs_is_what_is_packaged():
    assert (ROOT / "fastjepa/configs").resolve() == ROOT / "configs"
    assert 'package_data={"fastjepa": ["configs/*.yaml", "report/page/*"]}' in (ROOT / "setup.py").read_text()


def test_the_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ == fastjepa_kernels.__version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == "Apache-2.0" and "2301.08243" in citation["references"][0]["url"]
    assert (ROOT / "kernels/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_trainer_takes_the_kernels_of_its_own_minor_version():
    major, minor, _ = __version__.split(".")
    assert f'"fastjepa-kernels>={major}.{minor},<{major}.{int(minor) + 1}"' in (ROOT / "setup.py").read_text()


def test_ruff_is_the_same_everywhere():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (pinned,) = re.findall(r'"ruff==([\d.]+)"', (ROOT / "setup.py").read_text())
    assert hooks["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_workflow_runs_what_a_change_must_pass():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert job["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
