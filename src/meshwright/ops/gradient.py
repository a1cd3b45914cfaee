"""Custom gradients of functions of named tensors.

JAX calls the rules of ``jax.custom_vjp`` and ``jax.custom_jvp`` when it differentiates, which for a region is after the
region has been traced: the names would have lost their layout. The two wrappers here are JAX's own with one thing
added: the scope of the call travels with it as a static argument, and the rules run in it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..scope import current, entered


class custom_vjp:
    """``jax.custom_vjp`` for functions of tensors, inside regions and outside.

    @mw.custom_vjp
    def f(x): ...
    f.defvjp(forward, backward)      # forward(x) -> (y, kept); backward(kept, dy) -> (dx,)
    """

    def __init__(self, function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        functools.update_wrapper(self, function)
        self._inner = jax.custom_vjp(_in_scope(function), tuple(i + 1 for i in nondiff_argnums))

    def defvjp(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """State the forward pass (result and what to keep) and the backward pass (one gradient for each argument)."""

        def scoped_forward(scope: Any, *args: Any) -> Any:
            result, kept = _in_scope(forward)(scope, *args)
            return result, (scope, kept)

        def scoped_backward(*given: Any) -> Any:
            *static, (scope, kept), gradient = given
            return scope, *_in_scope(backward)(scope, *static, kept, gradient)

        self._inner.defvjp(scoped_forward, scoped_backward)

    def __call__(self, *args: Any) -> Any:
        return self._inner(current(), *args)


class custom_jvp:
    """``jax.custom_jvp`` for functions of tensors, inside regions and outside.

    @mw.custom_jvp
    def f(x): ...
    @f.defjvp
    def _(primals, tangents): ...    # -> (y, dy)
    """

    def __init__(self, function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        functools.update_wrapper(self, function)
        self._inner = jax.custom_jvp(_in_scope(function), tuple(i + 1 for i in nondiff_argnums))

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """State the rule: (primals, tangents) to (result, its tangent)."""

        def scoped(*given: Any) -> Any:
            *static, (scope, *primals), (_, *tangents) = given
            return _in_scope(rule)(scope, *static, tuple(primals), tuple(tangents))

        self._inner.defjvp(scoped)
        return rule

    def __call__(self, *args: Any) -> Any:
        return self._inner(current(), *args)


def _in_scope(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(scope: Any, *args: Any) -> Any:
        with entered(scope):
            return function(*args)

    return run
