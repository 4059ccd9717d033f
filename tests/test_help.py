"""Every command says what it is for, how it is called, what each option means, and at once."""

import argparse
import importlib
import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tf_lesion.cli import main as tf_lesion_command
from tf_lesion.cli.replaced import REPLACED

ROOT = Path(__file__).parent.parent
LAST_WORD = '__name__ == "__main__"'
HEAVY = {
    *("tensorflow", "keras", "tensorflow_probability", "scipy", "nilearn", "SimpleITK"),
    *("matplotlib", "pandas", "sklearn", "skimage"),
}
SECONDS = 1.0  # of a --help; in a test with other work beside it, three times that


def _commands():
    """Modules that run as commands, tests and setup.py left out."""
    scripts = sorted(ROOT.glob("*.py"))
    folders = ("tf_lesion", "preprocessing", "eval")
    files = scripts + [path for name in folders for path in sorted((ROOT / name).rglob("*.py"))]
    runs = [path for path in files if LAST_WORD in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in runs]
    return [*(f"tf_lesion.cli.{name}" for name in tf_lesion_command.COMMANDS), *names]


OTHERS = {"tf_lesion.cli.main", *REPLACED}  # a list of commands, tested in test_packaging.py
COMMANDS = sorted(set(_commands()) - OTHERS)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no line breaks inside a help text


def _help(name, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).main(["--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def _examples(text):
    """Lines that call a command as its usage says."""
    called = re.search(r"usage: ([^\[]+?) +\[", text)[1].split()
    called = ["python", *called] if called[0].endswith(".py") else called
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s+" + " ".join(called) + " ", line)]


def test_all_commands_are_found():
    wanted = {"train_gmvae", "restore_brats", "preprocessing.brats", "tf_lesion.cli.detect"}
    assert wanted <= set(COMMANDS)


@pytest.mark.parametrize("name", REPLACED)
def test_a_command_of_earlier_versions_says_what_does_its_job(name, capsys):
    with pytest.raises(SystemExit) as left:
        runpy.run_module(name, run_name="__main__")
    assert left.value.code == 2
    assert f"{REPLACED[name]} does its job" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_purpose_an_example_and_defaults(name, capsys):
    text = _help(name, capsys)
    purpose = text.split("\n\n")[1].splitlines()[0]
    assert re.match(r"[A-Z].{20,}[.;:]", purpose)
    assert "None" not in text
    assert text.lower().count("(default: false)") == 0
    examples = _examples(text)
    assert examples
    options = set(re.findall(r"--[a-z0-9-]+", text[: text.index("\n\n")]))
    for line in examples:
        assert set(re.findall(r"--[a-z0-9-]+", line)) <= options, line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name, monkeypatch):
    parsers = []

    def caught(parser, *args, **kwargs):
        parsers.append(parser)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    (parser,) = parsers
    unexplained = [action.dest for action in parser._actions if len(action.help or "") < 5]
    assert unexplained == []


HELP_OF_ALL = """
import contextlib, importlib, io, json, sys
heavy, found = set(json.loads(sys.argv[1])), {}
for name in json.loads(sys.argv[2]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(name).main(["--help"])
    found[name] = sorted(heavy & set(sys.modules))
    heavy -= set(sys.modules)
print(json.dumps({name: modules for name, modules in found.items() if modules}))
"""


def test_no_help_needs_a_heavy_module():
    run = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, json.dumps(sorted(HEAVY)), json.dumps(COMMANDS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert json.loads(run.stdout) == {}, run.stderr


def _modules_and_seconds(*command):
    started = time.perf_counter()
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout, time.perf_counter() - started


def test_help_and_import_are_quick():
    _, seconds = _modules_and_seconds("restore_brats.py", "--help")
    assert seconds < 3 * SECONDS
    loaded, seconds = _modules_and_seconds("-c", "import sys, tf_lesion; print(*sys.modules)")
    assert not {*HEAVY, "numpy", "h5py", "nibabel"} & set(loaded.split())
    assert seconds < SECONDS
