"""The annotations of the package, executed while its tests run.

``execute_annotations`` makes the import system hand every function and method of the package to beartype, which checks
arguments and results against their annotations at each call. An argument that an annotation refuses is one of two
things:

- The function takes it all the same: the annotation is wrong, or the caller is. The test fails.
- A test calls the package wrongly, to read the error. The function must then refuse by itself, since its users have no
  beartype switched on. So a call that an annotation refuses is made anyway, and the function's own error comes out.

This is beartype by itself rather than under jaxtyping's import hook. That one binds the arguments anew and opens a
scope of sizes at each call, which doubles the time that tracing takes; this adds a tenth to it. The sizes that names
in annotations stand for are checked in tests of their own, with jaxtyping.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any, Never, Self, get_args

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintParamViolation

_CONF = BeartypeConf(is_random=False, is_pep484_tower=True)
_DECORATOR = "__checked__"


def execute_annotations(package: str) -> None:
    """From now on check what is imported of ``package``, of which nothing may have been imported yet."""
    early = [name for name in sys.modules if name.split(".")[0] == package]
    assert not early, f"imported before its annotations could be executed: {early}"
    sys.meta_path.insert(0, _Finder(package))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its annotations executed: a decorator."""
    _forget_what_a_lone_function_cannot_check(function)
    guarded = beartype(conf=_CONF)(function)
    if guarded is function:
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        try:
            return guarded(*args, **kwargs)
        except BeartypeCallHintParamViolation as violation:
            if not _is_of_this_call(violation):
                raise
            refused = violation
        function(*args, **kwargs)
        raise refused

    # A file name in brackets is nobody's code: errors that name the user's line look past it.
    call.__code__ = call.__code__.replace(co_filename="<checked>")
    return functools.wraps(function)(call)


def _forget_what_a_lone_function_cannot_check(function: Callable[..., Any]) -> None:
    """``Self`` needs the class, and an argument that is ``Never`` speaks to the static checker only."""
    function.__annotations__ = {
        name: hint
        for name, hint in function.__annotations__.items()
        if hint is not Self and Self not in get_args(hint) and (hint is not Never or name == "return")
    }


def _is_of_this_call(violation: BaseException) -> bool:
    """Whether the guard raised it at once, rather than some call further in."""
    guard = violation.__traceback__ and violation.__traceback__.tb_next
    return guard is not None and guard.tb_next is None


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != self.package:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """The module's code with a decorator on each function. Not kept on disk, where a plain import would find it."""
        tree = ast.parse(self.get_data(self.path), self.path)
        _decorate(tree.body)
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _DECORATOR, checked)
        super().exec_module(module)


def _decorate(body: Sequence[ast.stmt]) -> None:
    """Functions and methods, not functions inside functions, which would be decorated anew at each call.

    The decorator goes undermost: what others make of a function (``jax.custom_vjp``, ``property``) need not be one.
    """
    for node in body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list.append(ast.copy_location(ast.Name(_DECORATOR, ast.Load()), node))
        elif isinstance(node, ast.ClassDef):
            _decorate(node.body)
