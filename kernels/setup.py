"""The `fastjepa-kernels` distribution: the ops alone, without the trainer."""

import re
from pathlib import Path

from setuptools import setup

PACKAGE = Path(__file__).parent / "fastjepa_kernels"
VERSION = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE).group(1)

setup(
    name="fastjepa-kernels",
    version=VERSION,
    description="Token ops for I-JEPA: definitions in PyTorch, kernels in Triton",
    license="Apache-2.0",
    packages=["fastjepa_kernels"],
    python_requires=">=3.11",
    install_requires=["torch>=2.11", 'triton>=3.6; platform_system == "Linux"'],
)
