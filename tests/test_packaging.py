"""What pip installs: the library, its command, its priors, and nothing that cannot be used."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tf_lesion
from tf_lesion.cli import main as command

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("tf_lesion", "eval", "preprocessing", "tests")
CARD = "MODEL_CARD.md"  # for people


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made from a copy: a build leaves its folders in the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    build = [*("-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-q")]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(
        [sys.executable, *build, "--wheel-dir", folder / "out", folder], check=True, env=environment
    )
    (path,) = (folder / "out").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_library_and_nothing_else(unpacked):
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"tf_lesion"}
    ours = {path.relative_to(ROOT) for path in (ROOT / "tf_lesion").rglob("*.py")}
    packed = {path.relative_to(unpacked) for path in unpacked.rglob("*.py")}
    assert packed == ours


def test_every_file_in_the_wheel_is_read_by_its_code(unpacked):
    library = unpacked / "tf_lesion"
    sources = {*library.rglob("*.py"), *library.rglob("*.html")}
    text = "\n".join(path.read_text() for path in sources)
    data = [path for path in library.rglob("*") if path.is_file() and path.suffix != ".py"]
    unread = {
        str(path.relative_to(library))
        for path in data
        if path.name not in text and path.parent.name != "checkpoints"
    }
    assert unread == {f"pretrained/{CARD}", "py.typed"}
    for prior in ("gmvae", "vae"):
        assert list((library / "pretrained" / prior / "checkpoints").glob("*.index"))


def test_the_command_runs_from_the_wheel_alone(unpacked):
    (metadata,) = unpacked.glob("*.dist-info")
    entry = (metadata / "entry_points.txt").read_text()
    assert "tf-lesion = tf_lesion.cli.main:main" in entry
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); from tf_lesion.cli.main import main"
    run = subprocess.run(
        [sys.executable, "-I", "-c", f"{code}; sys.exit(main(['--version']))"],
        capture_output=True,
        text=True,
    )
    assert run.stdout == f"tf-lesion {tf_lesion.__version__}\n", run.stderr


def test_all_that_the_library_imports_is_a_dependency(unpacked):
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    required = [
        Requirement(line.removeprefix("Requires-Dist: "))
        for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    needed = (each for each in required if str(each.marker) in ("None", 'extra == "dicom"'))
    names = {each.name.lower().replace("-", "_") for each in needed}
    imports = re.compile(r"^\s*(?:import|from) (\w+)", re.MULTILINE)
    packaged = {"skimage": "scikit_image", "sitk": "simpleitk", "tensorflow_probability": ""}
    used = {
        name.lower()
        for path in (unpacked / "tf_lesion").rglob("*.py")
        for name in imports.findall(_code(path.read_text()))
    }
    foreign = {packaged.get(name, name) for name in used - set(sys.stdlib_module_names)}
    assert foreign - {"", "tf_lesion"} <= names
    pins = dict(
        line.lower().replace("-", "_").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for each in required:
        name = each.name.lower().replace("-", "_")
        if name in pins:
            assert each.specifier.contains(pins[name].replace("_", "-")), each
    assert names <= set(pins)


def _code(text):
    """Without docstrings."""
    return re.sub(r'"""(.|\n)*?"""', "", text)


def test_the_command_lists_its_commands_and_refuses_others(capsys):
    assert command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", shown, re.MULTILINE) for name in command.COMMANDS)
    assert command.main([]) == 2
    assert command.main(["restore"]) == 2
    assert "Expected one of detect, train, " in capsys.readouterr().err
