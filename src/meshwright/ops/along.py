"""Movement along dims: pad, shift, roll, flip (``slicing.py`` has slice and index, ``join.py`` joins and repeats).

The result of each is the tensor read at other positions of a dim: from a start, step by step, for so many elements. On
one device that is a slice, a padding, a reversal. Where the dim is split, the devices' shares of the result are windows
of the tensor, and neighbours exchange what is not at home (``window.py``): never the whole tensor. The dim keeps its
name, and so its axes, which must divide its new size.

====================  ======================================================
operation, dim split  between devices
====================  ======================================================
pad, shift, roll      permutes of what a device lacks
flip                  one permute of the slice
pad, mode "edge"      as pad, and a sum of one position for each end
====================  ======================================================

These are linear and act on one dim, so what a tensor promises can wait: a slice of a sum that is still to be taken is
the sum of slices, which is less to send, and a layer's slice of a stack of parameters stays at rest (``along``).
"""

import operator as python
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..dims import Dim, Dims, Names, as_names, find, index_of, num_elements
from ..errors import fail, fail_type, nearest
from ..scope import Axes, Scope
from ..tensor import PARAMETER, Tensor, make
from .lowering import axes_of, check_operand, copied, is_scalar, run, wanted
from .window import window

MODES = ("constant", "edge", "reflect", "wrap")


def along(
    x: Tensor, names: Sequence[str], function: Callable[[Any], Any], after: Dims, asked: str, partial: Axes = ()
) -> Any:
    """A linear ``function`` of a device's slice that acts along the dims ``names`` only; ``after`` are the result's.

    It works on what a device holds, before promised sums and gathers, where that moves no more than afterwards:
    always where the result is smaller, and for parameters, which are gathered at each use, where it is not larger.
    ``partial``: axes over which the function leaves addends.
    """
    function = on_words(function)
    change = num_elements(after) - num_elements(x.dims)
    each_use = (x.role == PARAMETER or bool(x.copies)) and not x.pending
    less = change < 0 or (change == 0 and each_use)
    at_rest = x.rest is not None and any(x.rest[index_of(x.dims, name, asked)] for name in names)
    promises = x.rest is not None or x.pending or x.copies
    if x.scope is None or not promises or at_rest or not less or (x.copies and not after):
        want = wanted(asked, x.dims)
        copies = copied([x], want)
        result = run(function, [x], want.union(copies))
        return make(result, after, asked=asked, role=x.role, partial=partial, copies=copies)
    held = dict(zip(x.names, x.rest, strict=True)) if x.rest is not None else {}
    rest = tuple(held.get(d.name, ()) for d in after)
    return make(
        function(x.held), after, asked=asked, role=x.role, rest=rest, partial=x.pending + partial, copies=x.copies
    )


def on_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of arrays; of random keys, it moves their words, in a last position that it does not know of."""

    def moved(*arrays: Any) -> Any:
        if not jnp.issubdtype(arrays[0].dtype, jax.dtypes.prng_key):
            return function(*arrays)
        implementation = jax.random.key_impl(arrays[0])
        words = function(*(jax.random.key_data(a) for a in arrays))
        return jax.tree.map(lambda w: jax.random.wrap_key_data(w, impl=implementation), words)

    return moved


def read(
    x: Tensor, name: str, first: int, size: int, asked: str, *, step: int = 1, fill: Any = 0, wrap: bool = False
) -> Any:
    """The tensor of which position i along ``name`` is position first + i * step of ``x``, for ``size`` positions."""
    at = index_of(x.dims, name, asked)
    old = x.dims[at]
    if (first, size, step) == (0, old.size, 1):
        return x
    after = resized(x.dims, at, size)
    wanted(asked, after)
    scope, axes, num = shared_out(old)
    length = size // num
    starts = [first + k * length * step for k in range(num)]

    def local(array: Any) -> Any:
        return window(array, scope, axes, at, starts, length, step=step, fill=fill, wrap=wrap)

    return along(x, (name,), local, after, asked)


def resized(these: Dims, at: int, size: int) -> Dims:
    return (*these[:at], Dim(these[at].name, size), *these[at + 1 :])


def shared_out(d: Dim) -> tuple[Scope | None, Axes, int]:
    """The scope, the axes that split ``d``, and the number of devices along them: None, (), 1 where it is whole."""
    split = axes_of(d)
    return (None, (), 1) if split is None else (*split, split[0].size(split[1]))


def whole(value: Any, what: str, asked: str, instead: str = "") -> int:
    """A static integer, or a ``TypeError`` that says ``instead``."""
    kind = type(value).__name__
    if not isinstance(value, bool | np.bool_ | jax.Array):
        try:
            return python.index(value)
        except TypeError:
            pass
    elif isinstance(value, jax.Array):
        kind = f"JAX array ({value.dtype}{list(value.shape)})"
    raise fail_type(
        f"{asked}: {what} is a {kind}; it must be an int that is known when the program is traced.{instead}"
    )


def check_fill(value: Any, x: Tensor, asked: str) -> None:
    """Raise unless ``value`` is a scalar that the dtype of ``x`` can hold."""
    if not is_scalar(value):
        raise fail_type(f"{asked}: the value to fill with is a {type(value).__name__}; it must be a scalar.")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise fail_type(f"{asked}: a tensor of random keys cannot be filled with {value!r}; concat it with other keys.")
    given = jnp.asarray(value).dtype
    if _kind(given) > _kind(x.dtype) and not (isinstance(value, int) and value in (0, 1)):
        raise fail_type(
            f"{asked}: a tensor of {x.dtype} cannot be filled with a value of {given}; convert one of the two."
        )


def _kind(dtype: Any) -> int:
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next(i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind))


def pad(x: Any, value: Any = 0, *, mode: str = "constant", **widths: int | tuple[int, int]) -> Any:
    """``x`` made longer: ``mw.pad(x, length=(1, 0))`` puts one element before, none after.

    Args:
        value: what to put there, a scalar (mode "constant").
        mode: "constant"; or as in NumPy "edge" (the first and last element repeated), "reflect" (mirrored about them)
            or "wrap" (the other end).
        widths: for each dim by name, how many elements before and after it; one int for both.

    Raises:
        ValueError: a width is negative (slice instead), a name or mode is unknown, or "reflect" goes beyond the dim.
        TypeError: a width is not an int, or the dtype cannot hold the value.
    """
    check_operand(x, "pad", scalars=False)
    if mode not in MODES:
        raise fail(f"pad: there is no mode {mode!r}.{nearest(str(mode), MODES)}")
    if mode == "constant":
        check_fill(value, x, "pad")
    for name, width in widths.items():
        before, after = _widths(x, name, width)
        old = x.size(name)
        if mode in ("constant", "wrap") or not before + after:
            x = read(x, name, -before, before + old + after, "pad", fill=value, wrap=mode == "wrap")
        else:
            x = _padded_by_own(x, name, before, after, mode)
    return x


def _widths(x: Tensor, name: str, width: Any) -> tuple[int, int]:
    d = find(x.dims, name, "pad")
    pair = tuple(width) if isinstance(width, tuple | list) else (width, width)
    if len(pair) != 2:
        raise fail(f"pad: the width of {name!r} is {width!r}; give (before, after), or one int for both.")
    before, after = (whole(w, f"the width of {name!r}", "pad") for w in pair)
    if before < 0 or after < 0:
        raise fail(
            f"pad: the width {pair} of {name!r} is negative (size {d.size}). To make a dim shorter, slice it: "
            f"x.slice({name!r}, {max(-before, 0)}, {max(d.size + min(before, 0) + min(after, 0), 0)})."
        )
    return before, after


def _padded_by_own(x: Tensor, name: str, before: int, after: int, mode: str) -> Any:
    """``x`` padded with its own elements: at its ends (edge), or mirrored about them (reflect)."""
    at = index_of(x.dims, name, "pad")
    old = x.dims[at].size
    if old == 0 or (mode == "reflect" and max(before, after) >= old):
        raise fail(
            f"pad: mode {mode!r} cannot put {(before, after)} elements around {name!r} of size {old}"
            + (": a reflection has one less than the dim." if old else ".")
        )
    later = resized(x.dims, at, before + old + after)
    wanted("pad", later)
    scope, axes, num = shared_out(x.dims[at])
    length = later[at].size // num
    begins = [k * length for k in range(num)]

    def local(array: Any) -> Any:
        if num == 1:
            return jnp.pad(array, [(before, after) if i == at else (0, 0) for i in range(array.ndim)], mode=mode)
        body = window(array, scope, axes, at, [b - before for b in begins], length)
        if mode == "edge":
            front, back = _element(array, axes, at, 0, 0), _element(array, axes, at, num - 1, -1)
        else:
            front = window(array, scope, axes, at, [before - b for b in begins], length, step=-1)
            back = window(array, scope, axes, at, [before + 2 * (old - 1) - b for b in begins], length, step=-1)
        place = global_places(body, axes, at)
        return jnp.where(place < before, front, jnp.where(place >= before + old, back, body))

    return along(x, (name,), local, later, "pad")


def _element(array: Any, axes: Axes, at: int, owner: int, position: int) -> Any:
    """One position of the owner's slice, kept as a dim of size 1, on every device."""
    element = lax.index_in_dim(array, position, at)
    element = element.astype(jnp.uint8) if array.dtype == bool else element
    owned = jnp.where(collectives.index(axes) == owner, element, jnp.zeros_like(element))
    return collectives.all_sum(owned, axes).astype(array.dtype)


def global_places(array: Any, axes: Axes, at: int) -> Any:
    """The global position of each element of a device's slice along position ``at``: int32, for comparisons."""
    place = lax.broadcasted_iota(jnp.int32, [n if i == at else 1 for i, n in enumerate(array.shape)], at)
    return place + collectives.index(axes) * array.shape[at] if axes else place


def shift(x: Any, name: str, by: int, *, wrap: bool = False, fill: Any = 0) -> Any:
    """The elements of a dim moved ``by`` positions towards its end (towards its start when negative).

    What is moved out is lost and ``fill`` stands where nothing came in; with ``wrap`` it comes in at the other end.
    Position i of the result is position i - by of ``x``.

    Raises:
        ValueError: there is no such dim.
        TypeError: ``by`` is not a static int, or the dtype cannot hold ``fill``.
    """
    check_operand(x, "shift", scalars=False)
    size = find(x.dims, name, "shift").size
    by = whole(by, f"the shift of {name!r}", "shift")
    if wrap:
        by = by % size if size else 0
    else:
        check_fill(fill, x, "shift")
    return read(x, name, -by, size, "shift", fill=fill, wrap=wrap)


def roll(x: Any, **by: int) -> Any:
    """The elements of dims moved round: ``mw.roll(x, length=1)``, as ``numpy.roll`` does."""
    check_operand(x, "roll", scalars=False)
    for name, places in by.items():
        x = shift(x, name, places, wrap=True)
    return x


def flip(x: Any, names: Names) -> Any:
    """The dims ``names`` reversed."""
    check_operand(x, "flip", scalars=False)
    for name in as_names(names, "flip"):
        size = find(x.dims, name, "flip").size
        x = read(x, name, size - 1, size, "flip", step=-1) if size > 1 else x
    return x
