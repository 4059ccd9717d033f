"""Packaging: `pip install .` installs the library `tf_lesion`; the scripts run from a checkout."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "tf_lesion" / "__init__.py").read_text())[1]

LIBRARY = [
    "tensorflow>=2.18",
    "tensorflow-probability[tf]>=0.25",
    "numpy",
    "h5py",
    "tensorboard",
    "tqdm",
]
SCRIPTS = [
    "nibabel",
    "scikit-image",
    "SimpleITK",
    "nilearn",
    "jinja2",
    "scikit-learn",
    "scipy",
    "matplotlib",
    "pyyaml",
]
TEST = ["pytest", "ruff"]

setup(
    name="tf_lesion",
    version=VERSION,
    description="Find lesions in brain MRI without ever having seen one (You et al., MIDL 2019)",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["tf_lesion", "tf_lesion.baselines"],
    package_data={"tf_lesion": ["pretrained/*.md", "pretrained/*/*", "pretrained/*/checkpoints/*"]},
    python_requires=">=3.11",
    install_requires=LIBRARY,
    extras_require={"scripts": SCRIPTS, "test": TEST},
)
