"""The rules of the house, checked: budgets, names, imports. An exception is one line in a table
here, with its reason."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import foveal

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "foveal"
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FILE_CAP, KERNEL_FILE_CAP = 400, 500
FUNCTION_CAP, KERNEL_FUNCTION_CAP = 50, 120
PARAMETER_CAP = 8

LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
MANY_PARAMETERS: dict[str, str] = {
    "kernels/cpu/operators.py:attention_operator": "an operator's schema is flat",
    "attention/api.py:attend_varlen": "the arguments of attend, and the bounds of packed sequences",
    "attention/paged.py:attend_paged": "the arguments of attend, bounds and positions",
}

BANNED_WORDS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}

BARE_ROOMS = ("core", "hardware", "kernels", "kv", "attention")
BARE_IMPORTS = {"foveal", "torch", "numpy", "psutil", "triton"}
"""What the lower rooms may import, so that they run from the source tree on a machine that has
only PyTorch and its neighbours."""

ENVIRONMENT = {"FOVEAL_LOG", "FOVEAL_CACHE", "FOVEAL_API_KEY"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def is_kernel(path: Path) -> bool:
    return "kernels" in path.relative_to(SOURCE).parts


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name_of(path)}:{node.name}", node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body; a docstring is free."""
    first = node.body[0]
    is_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = first.end_lineno if is_doc and len(node.body) > 1 else first.lineno - 1
    return (node.end_lineno or 0) - (start or 0)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_fits_its_budget(path: Path) -> None:
    cap = KERNEL_FILE_CAP if is_kernel(path) else FILE_CAP
    lines = len(path.read_text().splitlines())
    assert lines <= cap or name_of(path) in LONG_FILES


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_test_file_fits_its_budget(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_CAP


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_fit_their_budget(path: Path) -> None:
    cap = KERNEL_FUNCTION_CAP if is_kernel(path) else FUNCTION_CAP
    for name, node in functions(path):
        assert body_lines(node) <= cap or name in LONG_FUNCTIONS, name
        taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([a for a in taken if a.arg not in ("self", "cls")])
        command = path.parent.name == "cli"  # a command's parameters are its options
        assert count <= PARAMETER_CAP or command or name in MANY_PARAMETERS, name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_say_something(path: Path) -> None:
    words = set(path.stem.split("_")) | {path.parent.name}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            words |= {w.lower() for w in _camel_words(node.name)}
    assert not words & BANNED_WORDS


def _camel_words(name: str) -> list[str]:
    return "".join(f" {c}" if c.isupper() else c for c in name).split()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_says_what_it_is(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc and len(doc) > 20


def imported(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.relative_to(SOURCE).parts[0] in BARE_ROOMS], ids=name_of
)
def test_lower_rooms_need_little(path: Path) -> None:
    for module, line in imported(path):
        top = module.split(".")[0]
        assert top in BARE_IMPORTS or top in sys.stdlib_module_names, f"line {line}: {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_second_configuration_in_the_environment(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = node.value
            if word.isupper() and word.startswith("FOVEAL_"):
                assert word in ENVIRONMENT


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (silent and broad), f"line {node.lineno}"


def test_public_names_are_there_and_documented() -> None:
    assert sorted(foveal.__all__) == sorted(foveal._ROOMS)
    for name in foveal.__all__:
        assert getattr(foveal, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'attent'"):
        foveal.attent  # noqa: B018


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == foveal.__version__ == metadata.version("foveal")


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by file name alone."""
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert len(names) == len(set(names))
