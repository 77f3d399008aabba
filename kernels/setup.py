"""The `fastjepa-kernels` distribution: the ops alone, without the trainer."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGE = ROOT / "fastjepa_kernels"
VERSION = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE).group(1)

setup(
    name="fastjepa-kernels",
    version=VERSION,
    description="Token ops for masked ViT training (I-JEPA, MAE, iBOT): definitions in PyTorch, kernels in Triton",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["triton", "pytorch", "vision transformer", "i-jepa", "mae", "ibot", "ema"],
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=["fastjepa_kernels"],  # torch-ext/ is the same package, in the Hub's layout
    python_requires=">=3.11",
    install_requires=["torch>=2.11", 'triton>=3.6; platform_system == "Linux"'],
)
