"""README and docs/: short, without a broken link, and every command in them is one that exists."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_README = 150  # lines: one screen or two
LARGEST_PICTURE = 300_000  # bytes
OURS = re.compile(
    r"(tf-lesion [a-z]+|python -m (?:eval|preprocessing)\.\w+|python \w+\.py)(?: (.*))?$"
)
SCRIPTS = {"python train_gmvae.py": "train_gmvae", "python restore_brats.py": "restore_brats"}


class ParsedError(Exception):
    """The command line was understood; its work is not done."""


def _code(text):
    """Lines of code: of fences without Python, and indented by four after an empty line."""
    text = re.sub(r"```(?:python|text)\n.*?```", "", text, flags=re.DOTALL)
    fenced = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*)$", plain, re.MULTILINE)
    return [*"".join(fenced).replace("\\\n", " ").splitlines(), *indented]


def _commands():
    """(page, command, its arguments) of every line that calls something of ours."""
    for page in PAGES:
        for line in _code(page.read_text()):
            called = re.sub(r"^(?:srun |[A-Z_]+='.*?' +)", "", line.strip())
            found = OURS.match(called)
            if found:
                yield page.relative_to(ROOT).as_posix(), found[1], found[2] or ""


COMMANDS = list(_commands())


def module_of(command):
    """The module that a command runs."""
    if command in SCRIPTS:
        return SCRIPTS[command]
    name = command.split()[-1]
    return f"tf_lesion.cli.{name}" if command.startswith("tf-lesion") else name


def test_commands_of_all_kinds_are_found():
    assert {command for _, command, _ in COMMANDS} >= {
        "tf-lesion detect",
        "tf-lesion calibrate",
        "python train_gmvae.py",
        "python -m preprocessing.camcan",
        "python -m eval.tables",
    }


@pytest.mark.parametrize(("page", "command", "arguments"), COMMANDS)
def test_a_command_in_the_docs_is_understood(page, command, arguments, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, argv=None, namespace=None):
        parse(parser, argv, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    known = module_of(command)
    if known.startswith(("eval.", "preprocessing.")):
        folder = ROOT / known.replace(".", "/")
        known = f"{known}.__main__" if folder.is_dir() else known
    argv = shlex.split(arguments.replace("$SLURM_ARRAY_TASK_ID", "1"), comments=True)
    with pytest.raises(ParsedError):
        importlib.import_module(known).main(argv)


def test_an_option_that_does_not_exist_would_be_seen(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("tf_lesion.cli.detect").main(["scan.nii", "maps", "--no-such"])
    assert "--no-such" in capsys.readouterr().err


def test_every_make_target_in_the_docs_exists():
    text = "\n".join(page.read_text() for page in PAGES)
    named = re.findall(r"(?:^ {4}|^|`)make (?:PYTHON=\S+ )?([a-z][a-z-]*)", text, re.MULTILINE)
    targets = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "docs", "test"} <= set(named) <= set(" ".join(targets).split())


def test_every_link_leads_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, _ = target.partition("#")
            if path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_file_named_in_the_docs_exists():
    """Of this repository: what begins with one of its folders."""
    pattern = re.compile(r"`((?:tf_lesion|eval|preprocessing|tests|docs)/[\w/.-]*)`")
    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in pattern.findall(text) if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page != README}
    assert set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == pages


def test_the_readme_is_short_and_its_picture_small():
    assert len(README.read_text().splitlines()) <= LONGEST_README
    assert (ROOT / "docs" / "images" / "restored.png").stat().st_size <= LARGEST_PICTURE
