"""Here: whether a tensor is used where it was made.

A tensor of a region is one device's slice, which means nothing outside; a whole tensor means nothing inside. Every
operation asks here first, so that what would come out wrong is an error that says what to write instead.
"""

import numpy as np

from .dims import show
from .errors import fail
from .scope import Scope, current_manual
from .tensor import Tensor


def check_here(x: Tensor, asked: str) -> None:
    """Raise a ``ValueError`` when ``x`` comes from another region than the one it is used in, or lost its names."""
    here = current_manual()
    if x.scope is here or x.scope == here:
        check_names(x, asked)
        return
    what = f"{asked}: the tensor ({show(x.dims)})"
    if here is None:
        raise fail(
            f"{what} is one device's slice from inside a region (layout: {_text(x.scope)}), used outside it.\n"
            "  Return it from the function given to mw.spmd: what comes out is the whole tensor. The rules of a custom "
            "gradient run outside the region under JAX's own decorators: use mw.custom_vjp or mw.custom_jvp."
        )
    if x.scope is None:
        raise fail(
            f"{what} is a whole tensor from outside, used inside a region (layout: {here.text}).\n"
            "  Pass it to the function given to mw.spmd as an argument: inside, each device then sees its slice."
        )
    raise fail(
        f"{what} belongs to a region with the layout {x.scope.where}, used in one with the layout {here.where}.\n"
        "  Return it from the first region and pass it to the second as an argument."
    )


def check_names(x: Tensor, asked: str) -> None:
    """Raise a ``ValueError`` when the array has not one axis for each dim: JAX mapped over a tensor as a pytree."""
    if np.ndim(x.raw) != len(x.dims):
        raise fail(
            f"{asked}: the tensor ({show(x.dims)}) holds an array of shape {np.shape(x.raw)}: jax.vmap or jax.lax.scan "
            "took or added an axis that has no name.\n"
            "  Use mw.vmap(f, dim) or mw.scan(f, init, xs, over=dim), which map over a named dim."
        )


def _text(scope: Scope | None) -> str:
    return scope.text if scope is not None else ""
