"""The conversions of kernels/README.md: its code blocks, before and after, train alike for twenty steps."""

import ast
import re
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.support.places import KERNELS

README = KERNELS / "README.md"
STEPS = 20
BLOCK = re.compile(r"^<!-- (\w+): (\w+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {(conversion, part): code for conversion, part, code in BLOCK.findall(README.read_text())}
PARTS = {"mae": ("model", "{}", "loop"), "ibot": ("model", "{}", "loop"), "ema": ("{}", "loop")}


def tiny_vit() -> VisionTransformer:
    return VisionTransformer(img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 24, 24)


def distillation(model: nn.Module, target: nn.Module, batch: Tensor) -> Tensor:
    """A loss that the average takes part in."""
    with torch.no_grad():
        wanted = target(batch)
    return nn.functional.mse_loss(model(batch + 0.3 * torch.randn_like(batch)), wanted + batch[:, :4].tanh())


def mae_names() -> dict[str, Any]:
    return {"vit": tiny_vit(), "decoder": (16, 1, 2), "batches": [images(3) for _ in range(STEPS)]}


def ibot_names() -> dict[str, Any]:
    return {"vit": tiny_vit(), "head": (32, 16, 40), "batches": [(images(2), images(2)) for _ in range(STEPS)]}


def ema_names() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 4))
    return {"model": model, "loss_of": distillation, "batches": [torch.randn(8, 12) for _ in range(STEPS)]}


NAMES = {"mae": mae_names, "ibot": ibot_names, "ema": ema_names}


def run(conversion: str, which: str) -> dict[str, Any]:
    """Return what the blocks leave behind, run one after the other from the same seed."""
    torch.manual_seed(0)
    names = NAMES[conversion]()
    for part in PARTS[conversion]:
        key = (conversion, part.format(which))
        torch.manual_seed(1)  # a converted block may draw other initial weights, which it then replaces
        exec(compile(BLOCKS[key], f"{README.name}: {': '.join(key)}", "exec"), names)
    return names


@pytest.mark.parametrize("conversion", PARTS)
def test_twenty_steps_have_the_same_losses(conversion: str):
    before, after = run(conversion, "before")["losses"], run(conversion, "after")["losses"]
    assert len(before) == STEPS
    assert before == run(conversion, "before")["losses"]  # the seed decides everything
    assert max(before) > 1.02 * min(before)
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("conversion, network", [("mae", "mae"), ("ibot", "student"), ("ibot", "teacher"), ("ema", "target")])
def test_checkpoints_go_both_ways(conversion: str, network: str):
    before, after = (run(conversion, which)[network] for which in ("before", "after"))
    assert list(before.state_dict()) == list(after.state_dict())
    before.load_state_dict(deepcopy(after.state_dict()))
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    after.load_state_dict(before.state_dict())


def imports(code: str) -> set[str]:
    nodes = ast.walk(ast.parse(code))
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes
               if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    return {module.partition(".")[0] for module in modules}


def test_the_ops_alone_are_enough():
    """A converted trainer needs what it needed, and this distribution."""
    assert {key[0] for key in BLOCKS} == {*PARTS, "use"}
    for conversion, parts in PARTS.items():
        before, after = (
            {name for part in parts for name in imports(BLOCKS[conversion, part.format(which)])}
            for which in ("before", "after")
        )
        assert after - before == {"fastjepa_kernels"}
        assert before - sys.stdlib_module_names <= {"torch", "timm", "lightly"}


def test_every_block_is_run():
    fences = README.read_text().count("```python")
    assert fences == len(BLOCKS) == 1 + sum(len(parts) + 1 for parts in PARTS.values())


def test_the_example_of_use_runs(capsys: pytest.CaptureFixture):
    names: dict[str, Any] = {}
    exec(BLOCKS["use", "example"], names)
    try:
        printed = capsys.readouterr().out
        assert "target_loss torch asked for" in printed
        assert len(printed.splitlines()) == len(names["fastjepa_kernels"].dispatch.OPS)
    finally:
        names["fastjepa_kernels"].use("auto")


def test_the_table_names_every_op():
    """A row for each public function that has a definition beside it, in a file that exists."""
    import fastjepa_kernels

    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| `(\w+\.py)` \|[^|]+\|$", README.read_text(), re.MULTILINE))
    public = {name.removesuffix("_ref") for name in fastjepa_kernels.__all__ if name.endswith("_ref")}
    assert {name.rstrip("_") for name in rows} == public
    assert all((README.parent / "fastjepa_kernels" / file).is_file() for file in rows.values())
