"""One way down: no import cycle, options and packages in one place, types on everything public."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("tf_lesion", "eval", "preprocessing")
OPTIONS = ROOT / "tf_lesion" / "cli" / "options.py"
SCRIPTS = sorted(ROOT.glob("*.py"))
# The package itself only hands on names; its version may be read from anywhere below.
FACADE = {"tf_lesion": {"__version__"}}


def _name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def _for_types_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _walk(node):
    """Every node, also inside of functions, but for what is imported for type checkers alone."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not _for_types_only(child):
            yield from _walk(child)


def _imported(tree):
    """Modules of ours that a file imports; from a package the names of its `__init__`."""
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in FILES:
                    yield whole
                elif node.module in FILES and alias.name not in FACADE.get(node.module, ()):
                    yield node.module


IMPORTS = {name: set(_imported(tree)) - {name} for name, tree in TREES.items()}


def _cycle(imports):
    """A cycle as a list of names, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        found = next((found for other in sorted(imports[name]) if (found := visit(other))), None)
        path.pop()
        done.add(name)
        return found

    return next((found for name in sorted(imports) if (found := visit(name))), None)


def test_a_cycle_would_be_found_also_inside_of_a_function():
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _cycle({"a": {"b"}, "b": set()}) is None
    tree = ast.parse("def f():\n    from tf_lesion.files import InputError")
    assert set(_imported(tree)) == {"tf_lesion.files"}


def test_no_import_cycle():
    assert _cycle(IMPORTS) is None


def test_the_library_imports_neither_commands_nor_cohorts():
    up = {
        (name, other)
        for name, imported in IMPORTS.items()
        for other in imported
        if name.startswith("tf_lesion") and not other.startswith("tf_lesion")
    }
    assert up == set()


def test_no_option_is_declared_outside_of_the_table():
    declared = []
    for path in [*FILES.values(), *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if path == OPTIONS or not isinstance(node, ast.Attribute | ast.Call):
                continue
            function = node.func if isinstance(node, ast.Call) else node
            if not (isinstance(function, ast.Attribute) and function.attr == "add_argument"):
                continue
            positional = (
                isinstance(node, ast.Call)
                and isinstance(node.args[0], ast.Constant)
                and not node.args[0].value.startswith("-")
            )
            if isinstance(node, ast.Call) and not positional:
                declared.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert declared == []


def test_every_option_of_the_table_is_declared_once_and_used():
    (table,) = (
        node.value
        for node in ast.parse(OPTIONS.read_text()).body
        if isinstance(node, ast.AnnAssign) and node.target.id == "OPTIONS"
    )
    names = [key.value for key in table.keys]
    assert sorted(set(names)) == sorted(names)
    sources = [path.read_text() for path in [*FILES.values(), *SCRIPTS] if path != OPTIONS]
    assert [name for name in names if not any(f'"{name}"' in text for text in sources)] == []


def _calls(tree, *names):
    """Calls of functions and methods of these names."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [node for node in calls if ast.unparse(node.func).rpartition(".")[2] in names]


@pytest.mark.parametrize("name", FILES)
def test_every_figure_is_made_and_saved_without_the_users_settings(name):
    assert "pyplot" not in FILES[name].read_text()
    shielded = [
        range(node.lineno, node.end_lineno + 1)
        for node in ast.walk(TREES[name])
        if "plainly()" in map(ast.unparse, getattr(node, "decorator_list", ()))
        or "plainly()" in (ast.unparse(item) for item in getattr(node, "items", ()))
    ]
    drawn = [call.lineno for call in _calls(TREES[name], "Figure", "savefig")]
    assert [line for line in drawn if not any(line in lines for lines in shielded)] == []


def _is_of_bytes(call):
    """Whether a call of `open` is not of text: its mode has a b, or it is no file's method."""
    mode = call.args[1:] if isinstance(call.func, ast.Name) else call.args
    return any(not isinstance(each, ast.Constant) or "b" in str(each.value) for each in mode)


@pytest.mark.parametrize("name", FILES)
def test_every_text_is_read_and_written_in_an_encoding_that_is_named(name):
    opened = [call for call in _calls(TREES[name], "open") if not _is_of_bytes(call)]
    whole = _calls(TREES[name], "read_text", "write_text", "fdopen")
    calls = opened + [call for call in whole if isinstance(call.func, ast.Attribute)]
    bare = [call for call in calls if "encoding" not in {given.arg for given in call.keywords}]
    assert [call.lineno for call in bare] == []
    # pandas writes UTF-8, but fails with names that are none.
    assert [call.lineno for call in _calls(TREES[name], "to_csv") if call.args] == []


def _public(body, prefix=""):
    """(name, function) of what a module or a class of it offers."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.FunctionDef) and (
            not node.name.startswith("_") or node.name == "__init__"
        ):
            yield f"{prefix}{node.name}", node


def _untyped(function):
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    bare = [
        each.arg
        for each in arguments
        if each and each.annotation is None and each.arg not in ("self", "cls")
    ]
    returns = function.returns is None and function.name != "__init__"
    return bare + ["return"] * returns


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("tf_lesion")])
def test_everything_public_has_a_whole_signature_of_types(name):
    untyped = {public: _untyped(node) for public, node in _public(TREES[name].body)}
    assert {public: what for public, what in untyped.items() if what} == {}
