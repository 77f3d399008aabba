"""The `fastjepa` distribution; the kernels are a distribution of their own, in kernels/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastjepa" / "__init__.py").read_text(), re.MULTILINE).group(1)

EXTRAS = {
    "dali": ["nvidia-dali-cuda130>=2.0"],  # decoding ahead, on CPU threads or a GPU
    "deepspeed": ["deepspeed>=0.18"],  # sharding (runtime.zero 1 to 3)
    "flash": ["flash-attn>=2.8"],  # built from source: needs nvcc
    "xformers": ["xformers>=0.0.35"],
    "eval": [],  # the probes need nothing beyond the core
    "pyarrow": ["pyarrow>=17"],  # Parquet files
    "lightly": ["lightly>=1.6"],  # loss.regularizer: vicreg, as the small presets use it
    "tensorboard": ["tensorboard"],
    "bench": ["pytest-benchmark", "timm>=1.0.20", "lightly>=1.6"],
}
EXTRAS["dev"] = [
    "pytest>=8.3",
    "pytest-timeout",
    "pytest-benchmark",  # gpu-check runs the benches dry
    "hypothesis",
    "ruff==0.17.6",  # pinned: another version formats otherwise
    *EXTRAS["dali"],  # decodes on CPUs as well
    *EXTRAS["deepspeed"],
    *EXTRAS["lightly"],
    *EXTRAS["pyarrow"],
    *EXTRAS["tensorboard"],
    "webdataset>=1.0",  # its reader must understand the shards that are written
    "timm>=1.0.20",  # the ViT that the packed encoder must equal
    "kernels>=0.17",  # Hugging Face's: loads kernels/ in its layout
]

setup(
    name="fastjepa",
    version=VERSION,
    description="A fast I-JEPA trainer, equal to the official recipe",
    license="Apache-2.0",
    packages=find_packages(include=["fastjepa", "fastjepa.*"]),
    python_requires=">=3.11",
    install_requires=[
        "fastjepa-kernels",  # kernels/ of this repository: pip install -e ./kernels -e .
        "torch>=2.11",
        "torchvision",
        "numpy",
        "pillow",
        "pyyaml",
        "safetensors",
        "rich",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fastjepa=fastjepa.cli:main"]},
)
