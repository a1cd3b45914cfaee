"""How the code reads, as far as a machine can tell: the order of the modules, sizes, what may be called where."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "meshwright"

MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 100
LINES_OF_NEARLY_EVERY_FUNCTION = 40
"""Of 95 in 100."""

COLLECTIVES = {
    "all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all", "axis_index", "axis_size", "pbroadcast",
    "pcast", "pmax", "pmean", "pmin", "ppermute", "psend", "pshuffle", "psum", "psum_scatter", "pswapaxes", "pvary",
    "ragged_all_to_all", "unreduced_psum", "unreduced_psum_scatter",
}  # fmt: skip


def parsed(folder: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(), str(path)) for path in sorted(folder.rglob("*.py"))}


TREES = parsed(SOURCE)


def found(check: Callable[[ast.AST], str | None], trees: dict[Path, ast.Module] = TREES) -> list[str]:
    """``file:line: what`` for each node of the source in which ``check`` finds something."""
    return [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {what}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if (what := check(node))
    ]


def none_of(offences: list[str]) -> None:
    assert not offences, "\n" + "\n".join(offences)


def test_imports_point_down_and_go_in_no_circle() -> None:
    """The order stands in pyproject.toml, under tool.importlinter."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "examples"])
def test_files_are_small(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    none_of([f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE])


def test_functions_are_short() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    longest = sorted(lengths, key=lambda name: -lengths[name])
    listed = "\n" + "\n".join(f"{lengths[name]:4} {name}" for name in longest[: len(longest) // 10])
    assert lengths[longest[0]] <= MOST_LINES_OF_A_FUNCTION, listed
    assert lengths[longest[len(longest) // 20]] <= LINES_OF_NEARLY_EVERY_FUNCTION, listed


def test_every_module_says_what_it_is() -> None:
    none_of([str(path.relative_to(ROOT)) for path, tree in TREES.items() if not ast.get_docstring(tree)])


def test_only_public_jax() -> None:
    def private(node: ast.AST) -> str | None:
        match node:
            case ast.Import(names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                modules = [f"{module}.{alias.name}" for alias in names]
            case ast.Attribute():
                modules = [ast.unparse(node)]
            case _:
                return None
        return next((m for m in modules if f"{m}.".startswith(("jax._src.", "jax.interpreters.", "jaxlib."))), None)

    none_of(found(private))


def test_one_file_calls_the_collectives() -> None:
    def collective(node: ast.AST) -> str | None:
        match node:
            case ast.Attribute(value, name) if name in COLLECTIVES and ast.unparse(value) in ("lax", "jax.lax"):
                return f"{ast.unparse(value)}.{name}"
            case ast.ImportFrom(module="jax.lax", names=names):
                return next((f"jax.lax.{n.name}" for n in names if n.name in COLLECTIVES | {"*"}), None)
        return None

    none_of(found(collective, {path: tree for path, tree in TREES.items() if path.name != "collectives.py"}))
    assert found(collective), "the check finds nothing in collectives.py either: it has gone blind"


def test_init_files_only_list_names() -> None:
    """``from .dims import Dim as Dim``: what is not listed is private."""

    def lists_a_name(node: ast.stmt) -> bool:
        match node:
            case ast.ImportFrom(names=names):
                return all(alias.asname == alias.name for alias in names)
            case ast.Expr(ast.Constant(str())):
                return node.lineno == 1
        return False

    lists = {path: tree for path, tree in TREES.items() if path.name == "__init__.py"}
    others = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in lists.items()
        for node in tree.body
        if not lists_a_name(node)
    ]
    none_of(others)


def test_nothing_is_probed_hidden_or_global() -> None:
    def habit(node: ast.AST) -> str | None:
        match node:
            case ast.Global():
                return "global: pass the state, or hold it in an object"
            case ast.ExceptHandler(type=None):
                return "a bare except hides every mistake"
            case ast.Call(ast.Name("hasattr")):
                return "hasattr: ask for the type, not for what it happens to have"
        return None

    none_of(found(habit))


def test_importing_leaves_the_environment_alone() -> None:
    changes = ("os.environ.setdefault", "os.environ.update", "os.environ.pop", "os.putenv", "jax.config.update")

    def written(node: ast.AST) -> str | None:
        match node:
            case ast.Call(function) if ast.unparse(function) in changes:
                return ast.unparse(node)
            case ast.Subscript(value, ctx=ast.Store() | ast.Del()) if ast.unparse(value) == "os.environ":
                return ast.unparse(node)
        return None

    none_of(found(written, {path: ast.Module(list(outside_functions(tree)), []) for path, tree in TREES.items()}))


def outside_functions(tree: ast.Module) -> Iterator[ast.stmt]:
    """What runs when a module is imported."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from outside_functions(ast.Module(node.body, []))
        elif not isinstance(node, ast.FunctionDef):
            yield node


def test_public_functions_have_docstrings() -> None:
    none_of([name for name, thing in public_things() if not described(thing)])


def public_things() -> Iterator[tuple[str, object]]:
    """What the packages list: functions, classes and their methods, the functions of modules."""
    for path, tree in TREES.items():
        if path.name != "__init__.py":
            continue
        package = importlib.import_module(".".join(path.parent.relative_to(SOURCE.parent).parts))
        names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
        for name in names:
            yield from with_parts(f"{package.__name__}.{name}", getattr(package, name))


def with_parts(name: str, thing: object) -> Iterator[tuple[str, object]]:
    yield name, thing
    if inspect.isclass(thing):
        parts = {n: x for n, x in vars(thing).items() if inspect.isroutine(x) or isinstance(x, property | classmethod)}
    elif inspect.ismodule(thing):
        parts = {n: x for n, x in vars(thing).items() if inspect.isroutine(x) and x.__module__ == thing.__name__}
    else:
        parts = {}
    yield from ((f"{name}.{n}", x) for n, x in parts.items() if not n.startswith("_"))


def described(thing: object) -> bool:
    """A dataclass without a docstring is given its signature for one."""
    text = inspect.getdoc(thing) or ""
    return bool(text) and not (inspect.isclass(thing) and text.startswith(f"{thing.__name__}("))
