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
    "eval": ["scikit-learn>=1.4", "timm>=1.0.20", "torchmetrics>=1.4"],  # lowshot, finetune, dense; k-NN and probes need none
    "pyarrow": ["pyarrow>=17"],  # Parquet files
    "tiff": ["tifffile>=2024.8", "imagecodecs>=2024.6"],  # TIFF and PNG files of any depth and any number of bands
    "remote": ["fsspec[http]>=2024.6", "s3fs>=2024.6", "braceexpand"],  # shards behind https:// and s3://
    "lightly": ["lightly>=1.6"],  # loss.regularizer: sigreg and visreg; loss.projector
    "studies": ["lightly>=1.6", "timm>=1.0.20", "matplotlib>=3.8", "scipy>=1.11"],  # sweep: MAE, plots, the fitted curve
    "viz": ["diffusers>=0.35"],  # decoder, and visualize --what samples
    "tensorboard": ["tensorboard"],
    "onnx": ["onnx>=1.18", "onnxscript>=0.5"],  # convert --to onnx
    "timm": ["timm>=1.0.20"],  # to read folders that timm wrote; what is written for it needs nothing
    "bench": ["pytest-benchmark", "timm>=1.0.20", "lightly>=1.6", "matplotlib>=3.8", "scipy>=1.11", "spdl>=0.8"],
    "docs": ["mkdocs-material>=9.6"],
}
EXTRAS["dev"] = [
    "pytest>=8.3,<9.2",  # pytest-xdist 3.8 does not see the groups of tests in 9.2
    "pytest-timeout",
    "pytest-xdist",  # make test runs two processes
    "pytest-benchmark",  # gpu-check runs the benches dry
    "hypothesis",
    "ruff==0.17.6",  # pinned: another version formats otherwise
    *EXTRAS["dali"],  # decodes on CPUs as well
    *EXTRAS["deepspeed"],
    *EXTRAS["docs"],  # a test builds them
    *EXTRAS["eval"],
    *EXTRAS["lightly"],
    *EXTRAS["onnx"],
    *EXTRAS["pyarrow"],
    *EXTRAS["studies"],
    *(needed for needed in EXTRAS["remote"] if not needed.startswith("s3fs")),  # no test has a bucket
    *EXTRAS["tensorboard"],
    *EXTRAS["tiff"],
    *EXTRAS["viz"],
    "spdl>=0.8",  # a loader of benchmarks/data.py
    "webdataset>=1.0",  # its reader must understand the shards that are written
    "timm>=1.0.20",  # the ViT that the packed encoder must equal
    "onnxruntime",  # runs what is exported
    "transformers>=5.0",  # IJepaModel and its files; brings huggingface_hub, which reads the folders
    "kernels>=0.17",  # Hugging Face's: loads kernels/ in its layout
    "playwright",  # drives the Chromium that `make browser` installs
    "axe-playwright-python",  # what a screen reader would stumble over
    "build",  # make dist
    "setuptools>=77",  # which it builds with
]

setup(
    name="fastjepa",
    version=VERSION,
    description="A fast I-JEPA trainer, equal to the official recipe",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["i-jepa", "self-supervised learning", "vision transformer", "pytorch", "deepspeed", "dali", "triton"],
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["fastjepa", "fastjepa.*"]),
    package_data={"fastjepa": ["configs/*.yaml", "report/page/*"]},  # fastjepa/configs is a link to configs/: --config demo
    python_requires=">=3.11",
    install_requires=[
        "fastjepa-kernels>=0.1,<0.2",  # kernels/ of this repository: pip install -e ./kernels -e .
        "torch>=2.11",
        "torchvision",
        "numpy",
        "pillow>=10.1",  # fonts of any size
        "simplejpeg>=1.8",
        "pyyaml",
        "safetensors",
        "rich",
        "jinja2",  # the report's page; torch brings it as well
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fastjepa=fastjepa.cli.main:main"]},
)
