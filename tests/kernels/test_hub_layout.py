"""kernels/ has the layout of a Hugging Face kernel without compiled code: built as theirs are, it loads through `kernels`."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from jinja2 import Environment, StrictUndefined
from kernels._rust import Build, Digest, DigestAlgorithm

import fastjepa_kernels
from tests.support.places import ROOT

KERNEL = ROOT / "kernels"
GENERAL = tomllib.loads((KERNEL / "build.toml").read_text())["general"]
PACKAGE = GENERAL["name"].replace("-", "_")

OPTIONAL = {"flash_attn", "xformers"}  # what varlen_attention may call, imported where it is asked for

# Run in a process of its own, as this one has the operators of the installed package; and with the repository's root first
# on the path, where a folder `kernels` lies that must not hide the library.
LOAD = """
import importlib, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import kernels, torch

ops = kernels.get_local_kernel(Path(sys.argv[1]), backend="cpu")
x = torch.arange(24.0).view(2, 4, 3).requires_grad_()
idx = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
rows = ops.gather_tokens(x, idx)
rows.sum().backward()
layers = importlib.import_module(ops.__name__ + ".layers")
assert not any(name.partition(".")[0] in ("fastjepa", "fastjepa_kernels") for name in sys.modules)
print(json.dumps({
    "library": kernels.get_local_kernel.__module__,
    "layers": layers.ModelEma.__module__,
    "file": ops.__file__,
    "rows": rows.tolist(),
    "gradient": x.grad[:, :, 0].tolist(),
    "missing": [name for name in ops.__all__ if not hasattr(ops, name)],
    "public": ops.__all__,
}))
"""


def build(folder: Path) -> Path:
    """Build what kernel-builder makes of a kernel without compiled code: for each backend the package and its metadata."""
    Build.open(KERNEL)  # the schema of this edition
    for backend in GENERAL["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(KERNEL / "torch-ext" / PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
        digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
        metadata = {
            "name": GENERAL["name"],
            "id": f"_{PACKAGE}_{backend}_test",
            "version": GENERAL["version"],
            "license": GENERAL["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digest.files},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata))
    return folder


def test_it_loads_through_the_kernels_library(tmp_path: Path):
    folder = build(tmp_path)
    command = [sys.executable, "-c", LOAD, str(folder), str(ROOT)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["library"] == "kernels.load"
    assert found["layers"] == f"_{PACKAGE}_cpu_test.layers"
    assert Path(found["file"]) == folder / "build" / "torch-cpu" / "__init__.py"
    assert found["rows"] == [[[9, 10, 11], [3, 4, 5]], [[12, 13, 14], [18, 19, 20]]]
    assert found["gradient"] == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert found["missing"] == []
    assert found["public"] == fastjepa_kernels.__all__


def test_the_layout_is_a_link_to_the_package():
    link = KERNEL / "torch-ext" / PACKAGE
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert link.resolve() == KERNEL / "fastjepa_kernels"
    assert GENERAL["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()


def absolute_imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Top-level names of what is not imported relatively."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((KERNEL / PACKAGE).glob("*.py")), ids=lambda path: path.stem)
def test_imports_are_relative_or_of_torch_and_triton(path: Path):
    """A kernel is loaded under another name, and beside other revisions of itself."""
    allowed, tree = {"torch", "triton", *sys.stdlib_module_names}, ast.parse(path.read_text())
    everywhere = absolute_imports(ast.walk(tree))
    assert everywhere - allowed <= (OPTIONAL if path.stem == "varlen_attention" else set())
    assert not absolute_imports(tree.body) & OPTIONAL


def test_public_names_are_in_all():
    """Every name that __init__ imports, and every definition of an op."""
    init = KERNEL / PACKAGE / "__init__.py"
    imported = {
        alias.name for node in ast.parse(init.read_text()).body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(fastjepa_kernels.__all__) == imported
    assert sorted(fastjepa_kernels.__all__) == fastjepa_kernels.__all__
    definitions = [node for path in init.parent.glob("*.py") for node in ast.parse(path.read_text()).body]
    references = {node.name for node in definitions if isinstance(node, ast.FunctionDef) and node.name.endswith("_ref")}
    assert references <= imported


def test_modules_are_in_layers():
    found = {
        (path.stem, node.name)
        for path in (KERNEL / PACKAGE).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any("Module" in ast.unparse(base) for base in node.bases)
    }
    assert found == {("layers", "MaskedPatchEmbed"), ("layers", "ModelEma")}


def test_the_card_can_be_filled_in():
    """As kernel-builder does, and its example runs on what is installed."""
    template = Environment(undefined=StrictUndefined, trim_blocks=True).from_string((KERNEL / "CARD.md").read_text())
    card = template.render(
        repo_id="someone/fastjepa-kernels", version=GENERAL["version"], license=GENERAL["license"].lower(),
        functions=["gather_tokens"], layers=["ModelEma"], has_benchmark=False, upstream=None, source=None,
    )  # fmt: skip
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\ntags:\n") and "{" not in card.replace("`", "")
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'get_kernel("someone/fastjepa-kernels", version=0)' in example
    code = re.sub(r"^from kernels .*\n", "", example, flags=re.MULTILINE)
    names: dict = {"get_kernel": lambda repo_id, version: fastjepa_kernels}
    exec(code, names)
    assert names["rows"].shape == (2, 49, 768)
