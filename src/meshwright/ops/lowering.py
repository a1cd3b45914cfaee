"""What every operation shares: its operands' checks, their positional arrays, and the use of parameters.

An operation reads ``arrays = local(asked, tensors, want)``: each device's slices under the compute layout, with types
that vary over ``want``, the axes over which the result will be split. Where an operand is a parameter at rest, the
operation runs through ``run``, which gathers it inside a rematerialised call: the gathered form is never kept for the
backward pass, it is gathered again there, as FSDP does.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.extend import source_info_util

from .. import collectives
from ..dims import Dim, Dims, Names, as_names, index_of, names_of, show
from ..errors import fail_type
from ..here import check_here
from ..scope import Axes, Scope, Split, current_manual, mapped_axes
from ..tensor import PARAMETER, Tensor


def is_scalar(x: Any) -> bool:
    """Whether ``x`` is a plain scalar, which needs no names."""
    return isinstance(x, bool | int | float | complex | np.generic) or (
        isinstance(x, jax.Array | np.ndarray) and x.ndim == 0
    )


def check_operand(x: Any, asked: str, scalars: bool = True) -> None:
    """Raise unless ``x`` is a tensor at home here, or, where allowed, a scalar."""
    if isinstance(x, Tensor):
        check_here(x, asked)
    elif not (scalars and is_scalar(x)):
        kind = f"an array of shape {tuple(x.shape)}" if isinstance(x, jax.Array | np.ndarray) else type(x).__name__
        also = " or a scalar" if scalars else ""
        raise fail_type(
            f"{asked}: expected a tensor{also}, found {kind}. Name its dims: mw.Tensor(array, 'batch embed')."
        )


def split_of(these: Dims, asked: str) -> Split:
    """The axes of each dim under the compute layout; empty tuples outside a region."""
    scope = current_manual()
    return scope.split(these, asked) if scope is not None else ((),) * len(these)


def axes_of(d: Dim) -> tuple[Scope, Axes] | None:
    """The scope and the axes that split ``d``; None when each device holds the whole of it."""
    scope = current_manual()
    if scope is None or not scope.axes_of(d.name):
        return None
    return scope, scope.axes_of(d.name)


def wanted(asked: str, *all_dims: Dims) -> frozenset[str]:
    """The axes that split any of these dims: a result made of them varies over all of these."""
    scope = current_manual()
    if scope is None:
        return frozenset()
    split = (a for these in all_dims for axes in scope.split(these, asked) for a in axes)
    return mapped_axes().union(split) - {collectives.TIME}


def local_sizes(these: Dims, asked: str) -> tuple[int, ...]:
    """The shape of a device's slice of a tensor with these dims."""
    scope = current_manual()
    if scope is None:
        return tuple(d.size for d in these)
    return scope.local_sizes(these, scope.split(these, asked))


_done_again = jax.make_user_context(False)


def done_again() -> bool:
    """Whether what is being traced runs again in the backward pass, and keeps no form of a parameter for it."""
    return _done_again.value  # type: ignore[no-any-return]


def doing_again() -> AbstractContextManager[None]:
    """A context in which ``done_again()`` is true."""
    return _done_again(True)  # type: ignore[no-any-return]


def run(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    want: frozenset[str],
    *,
    again: bool = False,
    linear: bool = False,
    runs: Sequence[tuple[int, ...]] | None = None,
) -> Any:
    """``function`` of the tensors' local arrays.

    Where a parameter has to be gathered for this use (or made to vary, unless it came into the region as it is), that
    is done again in the backward pass: what is kept for it is the parameter as it rests, and the other operands.
    ``again`` asks for it where nothing is gathered too: for a function that rearranges a parameter before a product,
    the rearranged one is then not kept beside it.
    ``linear``: the gradient needs no value of a parameter, so nothing of one is kept and nothing done again.
    Inside a rematerialised function all of this is done again as it is.
    ``runs`` asks for the other operands with runs of dims merged (``Tensor.merged``).
    """
    merges = runs or (None,) * len(tensors)
    held = at_rest(tensors, want)
    if linear or done_again() or not (again or any(held)):
        return function(*(_local(x, want, merge) for x, merge in zip(tensors, merges, strict=True)))

    line = source_info_util.current().traceback  # JAX forgets it: a rematerialised function is traced by itself.

    def prepare_and_run(*arrays: Any) -> Any:
        with source_info_util.user_context(line, name_stack=source_info_util.current_name_stack()):
            ready = (x.for_use(a, want) if rests else a for a, x, rests in zip(arrays, tensors, held, strict=True))
            return function(*ready)

    arrays = [
        x.at_use(want) if rests else x.local(want) if x.role == PARAMETER else _local(x, want, merge)
        for x, rests, merge in zip(tensors, held, merges, strict=True)
    ]
    return jax.checkpoint(prepare_and_run)(*arrays)


def at_rest(tensors: Sequence[Tensor], want: frozenset[str]) -> list[bool]:
    """For each operand, whether it is a parameter that is kept for the backward pass as it rests, and made ready for
    its use there again."""
    return [not done_again() and _as_it_rests(x, want) for x in tensors]


def _local(x: Tensor, want: frozenset[str], runs: tuple[int, ...] | None) -> Any:
    return x.local(want) if runs is None else x.merged(want, runs)


def _as_it_rests(x: Tensor, want: frozenset[str]) -> bool:
    """Whether the parameter is passed on as it rests. A vector is not: keeping it costs less than gathering it."""
    if x.role != PARAMETER or x.scope is None or x.copies or x.ndim == 1:
        return False
    return x.rest is not None or not (x.came or want <= collectives.varies_over(x.raw))


def copied(tensors: Sequence[Tensor], want: frozenset[str]) -> Axes:
    """The axes along which a result may stay copies: its operands are, and nothing splits it over them."""
    return tuple(dict.fromkeys(a for x in tensors for a in x.copies if a not in want))


def align(array: Any, have: Dims, out: Dims) -> Any:
    """Transpose and expand a positional array of dims ``have`` to the order of ``out``, of which it may lack some."""
    if have == out:
        return array
    order = [i for d in out for i, h in enumerate(have) if h.name == d.name]
    if order != sorted(order):
        array = jax.lax.transpose(array, order)
    held = names_of(have)
    missing = [i for i, d in enumerate(out) if d.name not in held]
    return jax.lax.expand_dims(array, missing) if missing else array


def over_names(x: Tensor, over: Names | None, asked: str) -> tuple[str, ...]:
    """The names to work over: all dims for None. Unknown or repeated names are errors."""
    names = x.names if over is None else as_names(over, asked)
    for name in names:
        index_of(x.dims, name, asked)
    return tuple(dict.fromkeys(names))


def positions(x: Tensor, names: Sequence[str], asked: str) -> tuple[int, ...]:
    return tuple(index_of(x.dims, name, asked) for name in names)


def operand_list(operands: Sequence[Any]) -> str:
    """The operands as an error lists them."""
    return "; ".join(f"({show(x.dims)})" if isinstance(x, Tensor) else "a scalar" for x in operands)
