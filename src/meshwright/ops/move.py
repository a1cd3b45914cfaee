"""Movement by name: rename, reorder, broadcast (split and merge are in ``reshape.py``).

None of these changes a value. On one device they are transposes or nothing; in a region a new name can mean another
split, and then, and only then, data moves (``relayout.py`` has the table).
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from ..collectives import vary
from ..dims import Dim, Dims, as_dims, as_names, check_unique, index_of, show
from ..errors import fail
from ..tensor import Tensor, make, operator, same_cell
from .lowering import check_operand, copied, local_sizes, run, wanted
from .relayout import move


@operator("rename")
def rename(x: Any, **new_by_old: str) -> Any:
    """The same values under other names.

    Where the layout splits old and new alike nothing moves. Otherwise the data moves to the new name's split:
    all-gather, slice, all-to-all, or, for a contraction whose sum is still to be taken, reduce-scatter.

    Raises:
        ValueError: an old name is missing, or a new one stands twice.
    """
    check_operand(x, "rename", scalars=False)
    for old in new_by_old:
        index_of(x.dims, old, "rename")
    after = tuple(Dim(str(new_by_old.get(d.name, d.name)), d.size) for d in x.dims)
    check_unique(after, "rename")
    return moved(x, after, "rename")


def moved(x: Tensor, after: Dims, asked: str) -> Any:
    """``x`` under the dims ``after``, dim for dim of the same sizes, split as their names say."""
    scope = x.scope
    if scope is None:
        return make(x.raw, after, asked=asked, role=x.role)
    if scope.split(x.dims, asked) == scope.split(after, asked):
        return same_cell(x, after)
    return move(x, after, asked)


@operator("reorder")
def reorder(x: Any, *names: Any) -> Any:
    """The dims in another order: ``x.reorder("embed", "batch")``, ``x.reorder("embed", ...)``; nothing moves.

    Raises:
        ValueError: a name is unknown or missing (``...`` stands for the rest, in their order).
    """
    check_operand(x, "reorder", scalars=False)
    if len(names) == 1 and isinstance(names[0], str | tuple | list):
        names = as_names(names[0], "reorder") if isinstance(names[0], str) else tuple(names[0])
    listed = [n.name if isinstance(n, Dim) else n for n in names]
    named = [n for n in listed if n is not ...]
    for n in named:
        index_of(x.dims, n, "reorder")
    if ... in listed:
        at = listed.index(...)
        listed[at : at + 1] = [n for n in x.names if n not in named]
    if len(listed) != x.ndim or set(listed) != set(x.names):
        asked = ", ".join("..." if n is ... else str(n) for n in listed)
        raise fail(f"reorder: ({asked}) is not an order of ({show(x.dims)}); use ... for the rest.")
    order = [x.names.index(n) for n in listed]
    after = tuple(x.dims[i] for i in order)
    if after == x.dims:
        return x
    rest = tuple(x.rest[i] for i in order) if x.rest is not None else None
    home = tuple(x.home[i] for i in order) if x.home is not None else None
    t = make(
        jnp.transpose(x.held, order), after, asked="reorder", role=x.role, rest=rest, partial=x.pending,
        copies=x.copies, home=home,
    )  # fmt: skip
    if isinstance(t, Tensor):
        t.share_sum(x, lambda array: jnp.transpose(array, order))
    return t


@operator("broadcast")
def broadcast(x: Any, *dims: Dim | Iterable[Dim]) -> Any:
    """``x`` repeated along new dims (or a tuple of them), which come first; each device makes its slice.

    Raises:
        ValueError: ``x`` has one of the names already.
    """
    check_operand(x, "broadcast")
    listed: Any = dims[0] if len(dims) == 1 else dims
    new = as_dims(listed, "broadcast")
    if not isinstance(x, Tensor):
        x = vary(jnp.asarray(x), wanted("broadcast", new))
        return make(jnp.broadcast_to(x, local_sizes(new, "broadcast")), new, asked="broadcast") if new else x
    for d in new:
        if d.name in x.names:
            raise fail(f"broadcast: the tensor ({show(x.dims)}) has a dim {d.name!r} already.")
    after = new + x.dims
    shape = local_sizes(after, "broadcast")
    want = wanted("broadcast", after)
    copies = copied([x], want)
    repeated = run(lambda array: jnp.broadcast_to(array, shape), [x], want.union(copies))
    return make(repeated, after, asked="broadcast", copies=copies)
