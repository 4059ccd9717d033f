"""Every command says what it is for, how it is called, and what each option means."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAST_WORD = '__name__ == "__main__"'


def _commands():
    """Modules that run as commands, tests and setup.py left out."""
    folders = (".", "tf_lesion", "preprocessing", "eval")
    files = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    runs = [path for path in files if LAST_WORD in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in runs]


COMMANDS = _commands()


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no line breaks inside a help text


def _help(name, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).main(["--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def _examples(name, text):
    called = f"python -m {name} " if "." in name else f"python {name}.py "
    lines = text.replace("\\\n", " ").splitlines()
    return [
        line.strip() for line in lines if line.startswith("  ") and line.strip().startswith(called)
    ]


def test_all_commands_are_found():
    assert {"train_gmvae", "restore_brats", "eval.report", "preprocessing.brats"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_purpose_an_example_and_defaults(name, capsys):
    text = _help(name, capsys)
    purpose = text.split("\n\n")[1].splitlines()[0]
    assert re.match(r"[A-Z].{20,}[.;:]", purpose)
    assert _examples(name, text)
    assert "None" not in text
    assert text.lower().count("(default: false)") == 0


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


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_use_options_that_exist(name, capsys):
    text = _help(name, capsys)
    options = set(re.findall(r"--[a-z0-9-]+", text[: text.index("\n\n")]))
    for line in _examples(name, text):
        used = set(re.findall(r"--[a-z0-9-]+", line))
        assert used <= options or "--restored" in used, line  # compare_tf1 has a second parser
