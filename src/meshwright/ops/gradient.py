"""Custom gradients of functions of named tensors.

JAX calls the rules of ``jax.custom_vjp`` and ``jax.custom_jvp`` when it differentiates, which for a region is after the
region has been traced: the names would have lost their layout. The two wrappers here are JAX's own with one thing
added: the scope of the call travels with it as a static argument, and the rules run in it. What a backward rule gives
for an argument is brought to the form in which the argument came: a parameter's gradient to the parameter's rest.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .. import collectives
from ..dims import Dims
from ..errors import fail_type
from ..scope import current, current_manual, entered
from ..tensor import is_tensor
from .packing import Held, held_as


class custom_vjp:
    """``jax.custom_vjp`` for functions of tensors, inside regions and outside.

    @mw.custom_vjp
    def f(x): ...
    f.defvjp(forward, backward)      # forward(x) -> (y, kept); backward(kept, dy) -> (dx,)
    """

    def __init__(self, function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._static = frozenset(nondiff_argnums)
        self._inner = jax.custom_vjp(_in_scope(function), tuple(i + 1 for i in nondiff_argnums))

    def defvjp(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """State the forward pass (result and what to keep) and the backward pass: one gradient for each argument, a
        tensor of its dims, of whatever role, or None for zeros.

        Raises:
            ValueError: when differentiated, a gradient has not the dims of its argument.
            TypeError: when differentiated, there are not as many gradients as arguments, or one has another tree.
        """

        def scoped_forward(scope: Any, *args: Any) -> Any:
            result, kept = _in_scope(forward)(scope, *args)
            forms = tuple(_form(x, i) for i, x in enumerate(args) if i not in self._static)
            return result, (scope, forms, kept)

        def scoped_backward(*given: Any) -> Any:
            *static, (scope, forms, kept), gradient = given

            def gradients(gradient: Any) -> list[Any]:
                return _as_they_came(backward(*static, kept, gradient), forms)

            with entered(scope):
                _check_backward(gradients, gradient, forms)
                return scope, *gradients(gradient)

        self._inner.defvjp(scoped_forward, scoped_backward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(current(), *_by_position(self._function, args, kwargs))


class custom_jvp:
    """``jax.custom_jvp`` for functions of tensors, inside regions and outside.

    @mw.custom_jvp
    def f(x): ...
    @f.defjvp
    def _(primals, tangents): ...    # -> (y, dy)
    """

    def __init__(self, function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._inner = jax.custom_jvp(_in_scope(function), tuple(i + 1 for i in nondiff_argnums))

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """State the rule: (primals, tangents) to (result, its tangent)."""

        def scoped(*given: Any) -> Any:
            *static, (scope, *primals), (_, *tangents) = given
            with entered(scope):
                _check_rule(lambda: rule(*static, tuple(primals), tuple(tangents))[1], [])
                return rule(*static, tuple(primals), tuple(tangents))

        self._inner.defjvp(scoped)
        return rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(current(), *_by_position(self._function, args, kwargs))


def _by_position(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments in order, defaults among them, as the rules are given them."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except ValueError:  # a function of another language: nothing is known of its arguments
        return tuple(args)
    except TypeError as error:
        raise fail_type(f"{getattr(function, '__name__', 'a custom gradient')}: {error}.") from None
    if bound.kwargs:
        names = ", ".join(bound.kwargs)
        raise fail_type(f"a custom gradient's function takes {names} by keyword alone: its rules cannot be given that.")
    bound.apply_defaults()
    return bound.args


def _check_backward(gradients: Callable[[Any], list[Any]], given: Any, forms: Sequence["_Form"]) -> None:
    """Raise where a backward rule takes one microbatch's gradient for that of the batch. Where no argument has the dim
    that microbatches divide, the gradient that the rule is given is such an addend itself."""
    leaves, tree = jax.tree.flatten(given)
    addends = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if any(_divided(h.dims) for form in forms for h in form.held):
        addends = []

    def of_addends(*arrays: Any) -> list[Any]:
        every = list(leaves)
        for i, x in zip(addends, arrays, strict=True):
            every[i] = x
        return gradients(jax.tree.unflatten(tree, every))

    _check_rule(of_addends, [leaves[i] for i in addends])


def _check_rule(rule: Callable[..., Any], given: Sequence[Any]) -> None:
    parts: list[bool] = []

    def arrays(*given: Any) -> list[Any]:
        found = [x for x in jax.tree.leaves(rule(*given), is_leaf=is_tensor) if jnp.issubdtype(x.dtype, jnp.inexact)]
        parts[:] = [is_tensor(x) and _divided(x.dims) for x in found]
        return [x.array if is_tensor(x) else x for x in found]

    collectives.check_rule(arrays, given, parts)


def _divided(these: Dims | None) -> bool:
    """Whether microbatches divide one of these dims."""
    scope = current_manual()
    return scope is not None and any(collectives.TIME in scope.axes_of(d.name) for d in these or ())


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Form:
    """How an argument came: its tree, and how each tensor or array of it is held."""

    tree: Any
    held: tuple[Held, ...]
    where: tuple[str, ...]


def _form(x: Any, place: int) -> _Form:
    paths, tree = jax.tree_util.tree_flatten_with_path(x, is_leaf=is_tensor)
    where = (f"custom_vjp: the gradient of argument {place}{jax.tree_util.keystr(path)}" for path, _ in paths)
    return _Form(tree, tuple(held_as(leaf) for _, leaf in paths), tuple(where))


def _as_they_came(gradients: Any, forms: Sequence[_Form]) -> list[Any]:
    """The gradients of a backward rule, each in the form of its argument."""
    if not isinstance(gradients, tuple | list) or len(gradients) != len(forms):
        found = f"{len(gradients)}" if isinstance(gradients, tuple | list) else f"a {type(gradients).__name__}"
        raise fail_type(
            f"custom_vjp: the backward rule gave {found}; it must give a tuple with a gradient for each of the "
            f"{len(forms)} arguments, None for zeros."
        )
    return [_as_it_came(g, form, i) for i, (g, form) in enumerate(zip(gradients, forms, strict=True))]


def _as_it_came(gradient: Any, form: _Form, place: int) -> Any:
    if gradient is None:
        return None
    leaves, tree = jax.tree.flatten(gradient, is_leaf=lambda x: x is None or is_tensor(x))
    if tree != form.tree:
        raise fail_type(
            f"custom_vjp: the gradient of argument {place} is a tree of {tree.num_leaves} values, the argument one of "
            f"{form.tree.num_leaves}, or of another kind; give the argument's own tree, None where it is zero."
        )
    leaves = [_leaf_as_it_came(*each) for each in zip(leaves, form.held, form.where, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def _leaf_as_it_came(x: Any, held: Held, where: str) -> Any:
    if x is None or (held.dims is None and not is_tensor(x)) or (is_tensor(x) and x.dtype == jax.dtypes.float0):
        return x
    return held.pack(held.unpack(x, where), where)


def _in_scope(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(scope: Any, *args: Any) -> Any:
        with entered(scope):
            return function(*args)

    return run
