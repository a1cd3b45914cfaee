"""Joining and repeating along dims: concat, stack, unstack, repeat, tile.

Where the dim is split, a device's share of a concatenation is a window of each operand (``window.py``), laid side by
side: permutes, and no gather. A new dim that is split costs nothing, since every device has all of its entries and
keeps its own. ``unstack`` of a split dim is asked for all of it on every device: one all-gather.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from .. import collectives
from ..dims import Dim, Dims, as_dims, check_unique, find, index_of, names_of, without
from ..errors import fail, fail_type
from ..scope import vmapped_axes
from ..tensor import ACTIVATION, PARAMETER, Tensor, make, operator
from .along import along, global_places, on_words, read, resized, shared_out, whole
from .lowering import align, check_operand, copied, is_scalar, operand_list, run, wanted
from .slicing import index
from .window import window


def concat(tensors: Iterable[Tensor], name: str) -> Any:
    """Tensors one after the other along a dim that all of them have; its sizes add up.

    Args:
        tensors: one or more of one dtype, with the same dims (in any order) but for the size of ``name``.

    Returns:
        A tensor with the dims of the first, in its order.

    Raises:
        ValueError: the names differ, or another dim has two sizes.
        TypeError: the dtypes differ, or something is not a tensor.
    """
    joined = tuple(tensors)
    _check_like(joined, "concat", f"mw.concat([x, y], {name!r})")
    first = joined[0].dims
    at = index_of(first, name, "concat")
    sizes = [find(x.dims, name, "concat").size for x in joined]
    _check_dims([without(x.dims, (name,)) for x in joined], joined, "concat")
    if len(joined) == 1:
        return joined[0]
    after = resized(first, at, sum(sizes))
    want = wanted("concat", after)
    scope, axes, num = shared_out(after[at])
    length = after[at].size // num

    def local(*arrays: Any) -> Any:
        aligned = [align(a, x.dims, resized(first, at, n)) for a, x, n in zip(arrays, joined, sizes, strict=True)]
        return on_words(side_by_side)(*aligned) if num > 1 else lax.concatenate(aligned, at)

    def side_by_side(*arrays: Any) -> Any:
        out, before = None, 0
        for array, size in zip(arrays, sizes, strict=True):
            own = window(array, scope, axes, at, [k * length - before for k in range(num)], length)
            out = own if out is None else jnp.where(global_places(own, axes, at) >= before, own, out)
            before += size
        return out

    return _joined(local, joined, want, after, at, "concat")


def stack(tensors: Iterable[Any], dim: Dim | str) -> Any:
    """Tensors with the same dims side by side along a new dim, which comes first; scalars too.

    Args:
        tensors: one or more of one dtype, with the same dims in any order; or scalars.
        dim: the new dim, or its name. Where the layout splits it each device keeps its entries.

    Raises:
        ValueError: the dims differ, or the tensors have the new one; or its size is not their number.
        TypeError: the dtypes differ, or something is neither tensor nor scalar.
    """
    joined = tuple(tensors)
    if joined and all(is_scalar(x) for x in joined):
        joined = tuple(jnp.asarray(x) for x in joined)
    _check_like(joined, "stack", "mw.stack([x, y], 'layers')")
    (new,) = as_dims(Dim(dim, len(joined)) if isinstance(dim, str) else dim, "stack")
    if new.size != len(joined):
        raise fail(f"stack: the dim {new!r} for {len(joined)} tensors; give it that size, or only its name.")
    named = [x for x in joined if isinstance(x, Tensor)]
    first: Dims = named[0].dims if named else ()
    _check_dims([x.dims for x in named], named, "stack")
    after = (new, *first)
    check_unique(after, "stack")
    want = wanted("stack", after)
    _, axes, num = shared_out(new)

    def local(*arrays: Any) -> Any:
        stacked = jnp.stack([align(a, x.dims, first) for a, x in zip(arrays, named, strict=True)] if named else arrays)
        return on_words(lambda s: collectives.own_slice(s, axes, 0, num))(stacked) if num > 1 else stacked

    return _joined(local, named, want, after, 0, "stack") if named else make(local(*joined), after, asked="stack")


def _joined(
    local: Callable[..., Any], tensors: Sequence[Tensor], want: frozenset[str], after: Dims, at: int, asked: str
) -> Any:
    """Tensors joined along position ``at`` of ``after``. Parameters that rest alike are joined as they rest, and what
    comes out is one more: gathered at each of its uses, its gradient scattered, as those of its parts."""
    first = tensors[0]
    role = first.role if all(x.role == first.role for x in tensors) else ACTIVATION
    held = dict(zip(first.names, first.rest, strict=True)) if first.rest is not None else {}
    alike = all(x.names == first.names and x.rest == first.rest and not (x.pending or x.copies) for x in tensors)
    if held and role == PARAMETER and alike and not held.get(after[at].name) and not vmapped_axes():
        axes = {a for some in held.values() for a in some}
        array = local(*(collectives.vary(x.raw, want.union(axes)) for x in tensors))
        return make(array, after, asked=asked, role=role, rest=tuple(held.get(d.name, ()) for d in after))
    copies = copied(tensors, want)
    return make(run(local, tensors, want.union(copies)), after, asked=asked, role=role, copies=copies)


@operator("unstack")
def unstack(x: Any, name: str) -> tuple[Any, ...]:
    """A tuple of tensors without the dim ``name``, one for each of its positions (scalars, if it was the only one)."""
    check_operand(x, "unstack", scalars=False)
    at = index_of(x.dims, name, "unstack")
    old = x.dims[at]
    _, axes, num = shared_out(old)
    if num == 1:
        return tuple(index(x, {name: i}) for i in range(old.size))

    def local(array: Any) -> tuple[Any, ...]:
        every = collectives.gather_equal(array, axes, at)
        return tuple(lax.index_in_dim(every, i, at, keepdims=False) for i in range(old.size))

    after = without(x.dims, (name,))
    parts = run(on_words(local), [x], wanted("unstack", x.dims))
    return tuple(make(part, after, asked="unstack", role=x.role) for part in parts)


def repeat(x: Any, name: str, count: int) -> Any:
    """Each element of a dim ``count`` times in a row, as ``numpy.repeat``; ``tile`` repeats the whole."""
    check_operand(x, "repeat", scalars=False)
    at = index_of(x.dims, name, "repeat")
    count = _count(count, name, "repeat")
    after = resized(x.dims, at, x.dims[at].size * count)

    def local(array: Any) -> Any:
        return jnp.repeat(array, count, at)

    return along(x, (name,), local, after, "repeat") if count != 1 else x


def tile(x: Any, name: str, count: int) -> Any:
    """A dim ``count`` times one after the other, as ``numpy.tile``; ``repeat`` repeats each element."""
    check_operand(x, "tile", scalars=False)
    count = _count(count, name, "tile")
    return read(x, name, 0, find(x.dims, name, "tile").size * count, "tile", wrap=True)


def _count(count: Any, name: str, asked: str) -> int:
    count = whole(count, f"the count for {name!r}", asked)
    if count < 0:
        raise fail(f"{asked}: the count for {name!r} is {count}; it must not be negative.")
    return count


def _check_like(joined: Sequence[Any], asked: str, example: str) -> None:
    """Raise unless there is something to join, all of one kind and dtype."""
    if not joined:
        raise fail_type(f"{asked}: no tensors. Write {example}.")
    for x in joined:
        if isinstance(x, Tensor) or any(isinstance(y, Tensor) for y in joined) or not is_scalar(x):
            check_operand(x, asked, scalars=False)
    dtypes = list(dict.fromkeys(str(x.dtype) for x in joined))
    if len(dtypes) > 1:
        raise fail_type(
            f"{asked}: the operands are of {', '.join(dtypes)}: {operand_list(joined)}. They must be of one dtype: "
            f"convert them, x.astype({dtypes[0]!r})."
        )


def _check_dims(all_dims: Sequence[Dims], joined: Sequence[Tensor], asked: str) -> None:
    """Raise unless these dims are the same in any order."""
    for these in all_dims:
        if set(these) != set(all_dims[0]):
            ours, theirs = names_of(all_dims[0]), names_of(these)
            odd = [n for n in (*ours, *theirs) if (n in ours) != (n in theirs)]
            why = f"the dim {odd[0]!r} stands in one operand only" if odd else _two_sizes(all_dims[0], these)
            raise fail(
                f"{asked}: {why}.\n  operands: {operand_list(joined)}\n"
                f"  Operands have the same dims, in any order. Rename, or repeat along a missing one: x.broadcast(dim)."
            )


def _two_sizes(ours: Dims, theirs: Dims) -> str:
    d = next(d for d in ours if d not in theirs)
    return f"the dim {d.name!r} has size {d.size} in one operand and {find(theirs, d.name, '').size} in another"
