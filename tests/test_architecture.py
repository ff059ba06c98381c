"""Imports between the packages run one way, and light modules stay light."""

import ast
from pathlib import Path

import pytest

import dqrm

SOURCE = Path(dqrm.__file__).parent
BASE = {"errors", "options", "config", "files", "identity", "checksums", "recipe", "__init__"}
TRAINED = {"artifact", "export", "training", "models", "quant", "data"} | BASE
# What each part may import of the others.
ALLOWED = {
    "kernels": set(),
    "quant": {"kernels"},
    "data": {"kernels", "errors", "options", "files", "identity", "checksums", "__init__"},
    "models": {"kernels", "quant", "config", "options", "errors"},
    "distributed": {"quant", "kernels", "options", "errors"},
    "artifact": {"models", "quant", "data", "errors", "identity"},
    "training": {"artifact", "models", "quant", "kernels", "data", "distributed"} | BASE,
    "export": TRAINED,
    "serving": TRAINED,
    "server": {"serving", "artifact", "export", "models", "data"} | BASE,
    "torchrec": {"distributed", "training", "models", "quant", "data"} | BASE,
    "bench": {"torchrec", "distributed", "kernels", "console"} | TRAINED,
    "daily": {"distributed", "serving", "console"} | TRAINED,
    "studies": {"distributed", "serving", "console"} | TRAINED,
    "report": {"training", "data", "console"} | BASE,
}


def imports(file: Path) -> set[str]:
    """The first-level parts of dqrm that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "dqrm" else [f"dqrm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] == "dqrm":
                part = [*name.split("."), "__init__"][1]
                found.add("__init__" if part.startswith("__") else part)
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    files = list((SOURCE / part).rglob("*.py"))
    assert files
    for file in files:
        assert imports(file) <= ALLOWED[part] | {part}, file.name


def test_the_public_names_exist():
    for name in dqrm.__all__:
        assert getattr(dqrm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dqrm.nothing
    assert set(dqrm.__all__) <= set(dir(dqrm))


def test_type_checkers_see_the_public_names():
    """The imports that only type checkers read are those of the table."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == dqrm._HOMES
    assert [name for name in dqrm.__all__ if name != "__version__"] == sorted(seen)


# Longer than the house rule, with the reason. Nothing at present.
LONG_FUNCTIONS: dict[str, str] = {}
LONG_FILES: dict[str, str] = {}


def test_files_and_functions_stay_short():
    files, functions = set(), set()
    for file in SOURCE.rglob("*.py"):
        text, name = file.read_text(), file.relative_to(SOURCE).as_posix()
        if len(text.splitlines()) > 400:
            files.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60:
                functions.add(f"{name}:{node.name}")
    assert functions == set(LONG_FUNCTIONS)
    assert files == set(LONG_FILES)
