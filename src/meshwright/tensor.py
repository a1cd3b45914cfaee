"""Tensor: an array and its dims.

Outside a region a tensor holds the whole array. Inside, it holds one device's slice, and its dims keep the sizes of the
whole: the code reads the same. What a slice is, the names decide (the scope's compute rules), with three exceptions
that a tensor carries with it, all of them promises of communication not yet made:

``partial``   the devices along these axes hold addends: the sum is taken when somebody needs it, so that two
              contractions that are added cost one sum, and a rename onto a split dim costs a reduce-scatter.
``rest``      a dim is split over more axes than its name says: a parameter at rest, or an activation whose gather
              waits for its first use. How it is used decides the gradient: reduce-scatter or slice.
``copies``    the type says that devices differ along these axes although the values are equal: a parameter gathered
              once a step, whose gradients are summed once a step. ``home`` says how it lies at rest: JAX's
              transformations inside the region see that form, for a gradient is no copy.

What is derived from a slice once (its sum, its gathered form, its form that varies over more axes) is kept in the
tensor's cell and shared by its renames: three matmuls of one input share one all-reduce in the backward pass. It is
computed in the trace that made the tensor, wherever the first use stands.

    >>> import jax.numpy as jnp
    >>> x = Tensor(jnp.ones((2, 3)), "batch embed")
    >>> x.names, x.size("embed")
    (('batch', 'embed'), 3)
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import collectives
from .annotations import annotation
from .dims import Dim, Dims, Names, as_dims, as_names, find, index_of, names_of, show, sizes_of
from .errors import fail, fail_type, nearest
from .held import Cell, gathered, merge_runs, slice_own, told
from .scope import Axes, Scope, Split, current, current_manual, describe, mapped_axes
from .summing import PLAIN

ACTIVATION = "activation"
PARAMETER = "parameter"
Role = str
_NOTHING: frozenset[str] = frozenset()


class Tensor:
    """An array with named dims.

    Args:
        array: anything ``jax.numpy.asarray`` takes, of the shape of the dims. Inside a region too this is the whole
            array: each device keeps its slice of it.
        dims: the dims, or their names (``"batch embed"``), whose sizes are then the array's.

    Raises:
        ValueError: shape and dims differ, a name stands twice, or there are no dims (a tensor without dims is a plain
            JAX scalar).
    """

    __slots__ = ("__weakref__", "_cell", "copies", "dims", "home", "partial", "rest", "role", "scope")
    __array_priority__ = 1000

    _cell: Cell | Any
    dims: Dims
    role: Role
    scope: Scope | None
    rest: Split | None
    partial: Axes
    copies: Axes
    home: Split | None

    def __init__(self, array: Any, dims: Names | Dim | Iterable[Dim | str], role: Role = ACTIVATION) -> None:
        if role not in (ACTIVATION, PARAMETER):
            raise fail(f"Tensor: there is no role {role!r}.{nearest(str(role), (ACTIVATION, PARAMETER))}")
        array = array if isinstance(array, jax.Array) else _as_array(array)
        named = _dims_for(array, dims)
        scope = current_manual()
        _set(self, array, named, role, scope)
        if scope is not None:
            self._cell = Cell(slice_own(array, scope, scope.split(named, "Tensor")))

    def __class_getitem__(cls, item: Any) -> Any:
        """An annotation, ``mw.Tensor["batch length embed"]``: see ``annotations.py``."""
        return annotation(cls, item)

    # What it is

    @property
    def array(self) -> Any:
        """The positional array: whole outside a region; inside, this device's slice under the compute layout."""
        return self.local(_NOTHING)

    @property
    def raw(self) -> Any:
        """The array as it is held, before any promised sum or gather."""
        return self._cell.raw if self.scope is not None else self._cell

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the dims, in order."""
        return names_of(self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the dims: those of the whole tensor, also inside a region."""
        return sizes_of(self.dims)

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self.dims)

    @property
    def dtype(self) -> Any:
        """The dtype of the values, also of the slices."""
        return self.raw.dtype

    def dim(self, name: str) -> Dim:
        """The dim called ``name``."""
        return find(self.dims, name, "dim")

    def size(self, name: str) -> int:
        """The size of the dim called ``name``."""
        return find(self.dims, name, "size").size

    def position(self, name: str, asked: str) -> int:
        """The position of the dim called ``name`` in the array; ``asked`` is what an error says was asked."""
        return index_of(self.dims, name, asked)

    # How a device holds it

    @property
    def settled(self) -> bool:
        """Whether the slice held is the one that the names say: nothing is promised."""
        return self.rest is None and not self.partial and not self.copies

    def local(self, want: frozenset[str]) -> Any:
        """This device's slice under the compute layout, its type varying at least over the axes ``want``."""
        if self.scope is None:
            return self._cell
        if self.rest is not None and self.role == PARAMETER:
            return self.for_use(self.at_use(want), want)
        key, sums = (self.partial, self.rest, self.copies, want), self.scope.sums
        with told(self.dims):
            return self._cell.once(key, lambda: collectives.vary(self._kept(want), want, sums))

    def merged(self, want: frozenset[str], runs: tuple[int, ...]) -> Any:
        """``local``, runs of neighbouring dims merged into one: ``runs`` says how many dims each new one is made of."""
        array = self.local(want)
        if len(runs) == array.ndim:
            return array
        if self.scope is None or (self.rest is not None and self.role == PARAMETER):
            return merge_runs(array, runs)
        return self._cell.once(self._merged_key(want, runs), lambda: merge_runs(array, runs))

    def _merged_key(self, want: frozenset[str], runs: tuple[int, ...]) -> tuple[Any, ...]:
        return "merged", self.partial, self.rest, self.copies, want, runs

    @property
    def came(self) -> bool:
        """Whether this is an argument of the region as it came in."""
        return self.scope is not None and self._cell.came

    def at_use(self, want: frozenset[str]) -> Any:
        """The slice held by a parameter that each use makes whole for itself. What came into the region varies over the
        use's other axes once for all uses: their gradients are added up before they are summed over devices. (What is
        made of it, a cast one too, is summed by itself.)"""
        sums = self.scope.sums if self.scope else PLAIN
        beyond = want.difference(a for axes in self.rest or () for a in axes)
        if not self.came or not beyond:
            return self.raw
        with told(self.dims):
            return self._cell.once(("use", beyond), lambda: collectives.vary(self.raw, beyond, sums))

    def for_use(self, raw: Any, want: frozenset[str]) -> Any:
        """What ``local`` gives for a parameter at rest whose slice held is ``raw``."""
        unwanted, sums = tuple(a for a in self.copies if a not in want), self.scope.sums if self.scope else PLAIN
        with told(self.dims):
            # Varied before it is gathered: its gradient is scattered first, then what is left summed over other axes.
            array = gathered(collectives.vary(raw, want, sums), self.rest, want, self.scope)
            return collectives.vary(collectives.from_first(array, unwanted, sums) if unwanted else array, want, sums)

    def at_home(self) -> Any:
        """This device's slice, as it lies at rest, of a parameter that was gathered once a step."""
        assert self.scope is not None and self.home is not None
        scope, home = self.scope, self.home
        return self._cell.once(("home", home), lambda: slice_own(self.raw, scope, home))

    def share_sum(self, x: "Tensor", function: Callable[[Any], Any]) -> None:
        """Make the sum of this tensor, ``function`` of the addends of ``x``, from the sum of ``x`` when it is needed:
        what is linear in one pending tensor then costs no sum of its own."""
        if self.partial and self.partial == x.partial and not self.copies:
            self._cell.shared = lambda: function(x.summed())

    def made_by(self, scatter: Callable[[Axes, int], Any]) -> None:
        """State how the pending sum over axes is made where it is to be split along a position: an array, or None."""
        self._cell.scatter = scatter

    def scattered(self, axes: Axes, dim: int) -> Any:
        """The sum over ``axes`` split along position ``dim``, as the maker of its addends makes it, or None."""
        make = self._cell.scatter
        return None if make is None else self._cell.once(("scatter", axes, dim), lambda: make(axes, dim))

    def summed(self) -> Any:
        """What is held, its pending sum taken."""
        if not self.partial:
            return self.raw
        axes, sums = self.partial, self.scope.sums if self.scope else PLAIN
        take = self._cell.shared or (lambda: collectives.all_sum(self.raw, axes, sums))
        return self._cell.once(("sum", axes), take)

    @property
    def pending(self) -> Axes:
        """The axes along which the sum is still to be taken: ``partial``, until somebody has needed the sum."""
        return () if self.partial and ("sum", self.partial) in self._cell.derived else self.partial

    @property
    def held(self) -> Any:
        """The array held: the addends where the sum is pending, else the sum."""
        return self._cell.derived.get(("sum", self.partial), self.raw) if self.partial else self.raw

    def _kept(self, want: frozenset[str]) -> Any:
        """The slice with its promises kept: first the sum, on what is held, then the gather, then one value."""
        held, used = (summed := self.summed()), _NOTHING
        sums = self.scope.sums if self.scope else PLAIN
        if self.rest is not None:
            key = _, _, _, used = self._gather_key(want)
            held = self._cell.once(key, lambda: gathered(summed, self.rest, used, self.scope))
        unwanted = tuple(a for a in self.copies if a not in want)
        if unwanted:
            whole, key = held, ("first", self.partial, self.rest, used, unwanted)
            held = self._cell.once(key, lambda: collectives.from_first(whole, unwanted, sums))
        return held

    def _gather_key(self, want: frozenset[str]) -> tuple[str, Axes, Split | None, frozenset[str]]:
        return "gather", self.partial, self.rest, frozenset(a for axes in self.rest or () for a in axes) & want

    def awaits_gather(self, want: frozenset[str]) -> bool:
        """Whether the gather that a use over ``want`` needs is promised, not made yet, and at home in this trace."""
        return self.rest is not None and self._cell.here and self._gather_key(want) not in self._cell.derived

    def gather_made(self, want: frozenset[str], whole: Any, runs: tuple[int, ...], merged: Any) -> None:
        """Keep that promise with ``whole``, which somebody assembled on the way, and has with its dims merged too."""
        self._cell.derived.update({self._gather_key(want): whole, self._merged_key(want, runs): merged})

    # Operators and methods: each hands over to ops/

    def __add__(self, other: Any) -> Any:
        return OPS["add"](self, other)

    def __radd__(self, other: Any) -> Any:
        return OPS["add"](other, self)

    def __sub__(self, other: Any) -> Any:
        return OPS["subtract"](self, other)

    def __rsub__(self, other: Any) -> Any:
        return OPS["subtract"](other, self)

    def __mul__(self, other: Any) -> Any:
        return OPS["multiply"](self, other)

    def __rmul__(self, other: Any) -> Any:
        return OPS["multiply"](other, self)

    def __truediv__(self, other: Any) -> Any:
        return OPS["divide"](self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return OPS["divide"](other, self)

    def __floordiv__(self, other: Any) -> Any:
        return OPS["floor_divide"](self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return OPS["floor_divide"](other, self)

    def __mod__(self, other: Any) -> Any:
        return OPS["mod"](self, other)

    def __rmod__(self, other: Any) -> Any:
        return OPS["mod"](other, self)

    def __pow__(self, other: Any) -> Any:
        return OPS["pow"](self, other)

    def __rpow__(self, other: Any) -> Any:
        return OPS["pow"](other, self)

    def __and__(self, other: Any) -> Any:
        return OPS["bitwise_and"](self, other)

    def __rand__(self, other: Any) -> Any:
        return OPS["bitwise_and"](other, self)

    def __or__(self, other: Any) -> Any:
        return OPS["bitwise_or"](self, other)

    def __ror__(self, other: Any) -> Any:
        return OPS["bitwise_or"](other, self)

    def __xor__(self, other: Any) -> Any:
        return OPS["bitwise_xor"](self, other)

    def __rxor__(self, other: Any) -> Any:
        return OPS["bitwise_xor"](other, self)

    def __lshift__(self, other: Any) -> Any:
        return OPS["left_shift"](self, other)

    def __rlshift__(self, other: Any) -> Any:
        return OPS["left_shift"](other, self)

    def __rshift__(self, other: Any) -> Any:
        return OPS["right_shift"](self, other)

    def __rrshift__(self, other: Any) -> Any:
        return OPS["right_shift"](other, self)

    def __neg__(self) -> Any:
        return OPS["negative"](self)

    def __pos__(self) -> Any:
        return OPS["positive"](self)

    def __abs__(self) -> Any:
        return OPS["abs"](self)

    def __invert__(self) -> Any:
        return OPS["invert"](self)

    def __eq__(self, other: object) -> Any:
        return OPS["equal"](self, other)

    def __ne__(self, other: object) -> Any:
        return OPS["not_equal"](self, other)

    def __lt__(self, other: Any) -> Any:
        return OPS["less"](self, other)

    def __le__(self, other: Any) -> Any:
        return OPS["less_equal"](self, other)

    def __gt__(self, other: Any) -> Any:
        return OPS["greater"](self, other)

    def __ge__(self, other: Any) -> Any:
        return OPS["greater_equal"](self, other)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        return OPS["index"](self, index)

    def astype(self, dtype: Any) -> Any:
        """The same values in another dtype. A parameter stays at rest: the gather moves the new dtype."""
        return OPS["astype"](self, dtype)

    def sum(self, over: Names | None = None) -> Any:
        """The sum over dims: a name, several, or all when None."""
        return OPS["sum"](self, over)

    def mean(self, over: Names | None = None) -> Any:
        """The mean over dims: a name, several, or all when None."""
        return OPS["mean"](self, over)

    def prod(self, over: Names | None = None) -> Any:
        """The product over dims: a name, several, or all when None."""
        return OPS["prod"](self, over)

    def max(self, over: Names | None = None) -> Any:
        """The greatest over dims: a name, several, or all when None."""
        return OPS["max"](self, over)

    def min(self, over: Names | None = None) -> Any:
        """The least over dims: a name, several, or all when None."""
        return OPS["min"](self, over)

    def any(self, over: Names | None = None) -> Any:
        """Whether any value over dims is true."""
        return OPS["any"](self, over)

    def all(self, over: Names | None = None) -> Any:
        """Whether every value over dims is true."""
        return OPS["all"](self, over)

    def var(self, over: Names | None = None, *, ddof: int = 0) -> Any:
        """The variance over dims."""
        return OPS["var"](self, over, ddof=ddof)

    def std(self, over: Names | None = None, *, ddof: int = 0) -> Any:
        """The standard deviation over dims."""
        return OPS["std"](self, over, ddof=ddof)

    def rename(self, **new_by_old: str) -> Any:
        """The same values under other names: ``x.rename(length="kv_length")``. Data moves when the layout says so."""
        return OPS["rename"](self, **new_by_old)

    def split(self, name: str, **sizes: int) -> Any:
        """One dim into several: ``x.split("embed", heads=8, head_dim=64)``; one size may be -1."""
        return OPS["split"](self, name, **sizes)

    def merge(self, names: Names, into: str) -> Any:
        """Several dims into one: ``x.merge(("heads", "head_dim"), "embed")``."""
        return OPS["merge"](self, names, into)

    def reorder(self, *names: Any) -> Any:
        """The dims in another order; ``...`` stands for the rest."""
        return OPS["reorder"](self, *names)

    def broadcast(self, *dims: Dim | Iterable[Dim]) -> Any:
        """The tensor repeated along new dims (or a tuple of them), which come first."""
        return OPS["broadcast"](self, *dims)

    def slice(self, name: str, start: Any, size: int) -> Any:
        """``size`` elements of a dim from ``start``, which may be a traced integer."""
        return OPS["slice"](self, name, start, size)

    def unstack(self, name: str) -> Any:
        """A tuple of tensors, one for each position along a dim."""
        return OPS["unstack"](self, name)

    # What Python would do with an array, and a named tensor will not

    def __bool__(self) -> bool:
        raise fail_type(f"A tensor ({show(self.dims)}) has no truth value; reduce it: x.any() or x.all().")

    def __len__(self) -> int:
        raise fail_type(f"A tensor ({show(self.dims)}) has no length; write x.size(name) for the size of a dim.")

    def __iter__(self) -> Any:
        raise fail_type(f"A tensor ({show(self.dims)}) has no first dim to iterate over; write x.unstack(name).")

    def __matmul__(self, other: Any) -> Any:
        raise fail_type(f"A tensor ({show(self.dims)}) has no last dim for @ to sum; write mw.dot(x, y, over=name).")

    __rmatmul__ = __matmul__

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise fail_type(f"A tensor ({show(self.dims)}) is not an array by itself; write x.array for its positions.")

    def __repr__(self) -> str:
        raw = self.raw
        held = f"{getattr(raw, 'dtype', type(raw).__name__)}"
        if self.scope is not None:
            text = describe(self.dims, self.scope.split(self.dims, "repr"))
        else:
            text = show(self.dims)
        role = "" if self.role == ACTIVATION else f", {self.role}"
        head = f"Tensor({text}; {held}{role})"
        if isinstance(raw, Tracer) or not isinstance(raw, jax.Array | np.ndarray) or not _readable(raw):
            return head
        return f"{head}\n{np.array2string(np.asarray(raw), threshold=100, precision=5)}"


def is_tensor(x: Any) -> bool:
    """Whether ``x`` is a tensor: JAX's tree functions stop there, ``is_leaf=is_tensor``."""
    return isinstance(x, Tensor)


def _readable(array: Any) -> bool:
    return not jnp.issubdtype(array.dtype, jax.dtypes.extended) and getattr(array, "is_fully_addressable", True)


OPS: dict[str, Callable[..., Any]] = {}
"""What the operators hand over to; each file of ``ops/`` enters its own."""


def operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for an operation that is also an operator or a method of tensors."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        OPS[name] = function
        return function

    return enter


def _as_array(given: Any) -> Any:
    if isinstance(given, Tensor):
        raise fail_type(f"Tensor: ({show(given.dims)}) is a tensor already; rename its dims, or write x.array.")
    try:
        return jnp.asarray(given)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise fail_type(f"Tensor: expected an array, found {type(given).__name__}: {reason}") from None


def _dims_for(array: Any, these: Any) -> Dims:
    if not isinstance(these, str | Dim | Iterable):
        raise fail_type(f"Tensor: expected dims or their names, found {type(these).__name__}.")
    listed = as_names(these) if isinstance(these, str) else (these,) if isinstance(these, Dim) else tuple(these)
    if any(isinstance(d, str) for d in listed) and len(listed) != array.ndim:
        written = ", ".join(map(str, listed))
        raise fail(f"Tensor: the names are ({written}), the array has {array.ndim} dims: its shape is {array.shape}.")
    these = tuple(Dim(d, array.shape[i]) if isinstance(d, str) else d for i, d in enumerate(listed))
    named = as_dims(these)
    if not named:
        raise fail("Tensor: there are no dims; a tensor without dims is a plain JAX scalar, so use the array itself.")
    if tuple(array.shape) != sizes_of(named):
        raise fail(
            f"Tensor: the array has shape {tuple(array.shape)}, the dims ({show(named)}) have sizes {sizes_of(named)}."
            "\n  Inside a region too, a tensor is made from the whole array; mw.apply works on slices."
        )
    return named


def _set(
    t: Tensor, held: Any, these: Dims, role: Role, scope: Scope | None,
    rest: Split | None = None, partial: Axes = (), copies: Axes = (), home: Split | None = None,
) -> None:  # fmt: skip
    t._cell, t.dims, t.role, t.scope = held, these, role, scope
    t.rest, t.partial, t.copies, t.home = rest, partial, copies, home


def make(
    raw: Any, these: Dims, *, asked: str = "A tensor", role: Role = ACTIVATION, came: bool = False,
    rest: Split | None = None, partial: Axes = (), copies: Axes = (), home: Split | None = None,
) -> Any:  # fmt: skip
    """What an operation returns: a tensor around a device's slice (or a whole array), or a plain scalar.

    Without dims the promised sums are taken at once. ``rest`` says over which axes each dim is split beyond its
    compute rule, ``partial`` over which axes the sum is still to be taken, ``copies`` as in the module's text; ``came``
    marks an argument of the region.
    """
    scope = current()
    if scope is None or not scope.manual:
        if not these:
            return raw
        if scope is not None:
            raw = collectives.constrain(raw, scope.mesh, scope.split(these, asked))
        t = object.__new__(Tensor)
        _set(t, raw, these, role, None)
        return t
    if not these:
        total = collectives.all_sum(raw, partial, scope.sums) if partial else raw
        return collectives.from_first(total, copies, scope.sums) if copies else total
    scope.split(these, asked)
    t = object.__new__(Tensor)
    if rest is not None and not any(rest):
        rest = None
    _set(t, Cell(raw), these, role, scope, rest, partial, copies, home if copies else None)
    t._cell.came = came
    return t


def same_cell(x: Tensor, these: Dims) -> Any:
    """``x`` under other dims that are split just as its own: no data moves and what was derived is shared."""
    t = object.__new__(Tensor)
    _set(t, x._cell, these, x.role, x.scope, x.rest, x.partial, x.copies, x.home)
    return t


def _flatten(t: Tensor) -> tuple[tuple[Any], Any]:
    if t.scope is None:
        return (t._cell,), (t.dims, t.role, None, None)
    held = isinstance(t.raw, jax.Array)
    rest = t.home if t.copies else t.rest
    if t.role != PARAMETER or (t.copies and rest is None) or _rests_over(rest, mapped_axes()):
        own = _axes_held(t, None) if held else _NOTHING
        return (t.local(own) if own or not t.settled else t.raw,), (t.dims, t.role, t.scope, None)
    assert not t.partial
    own = _axes_held(t, rest) if held else _NOTHING
    raw = t.at_home() if held and t.copies else t.raw
    return (collectives.vary(raw, own, t.scope.sums) if own else raw,), (t.dims, t.role, t.scope, rest)


def _rests_over(rest: Split | None, axes: frozenset[str]) -> bool:
    """Whether a parameter rests over axes that a surrounding ``vmap`` has taken: each position has its own gradient."""
    return bool(axes) and any(axes.intersection(some) for some in rest or ())


def _axes_held(t: Tensor, rest: Split | None) -> frozenset[str]:
    """The axes over which a slice varies once its promises are kept, or, a parameter's, as it is held. A tensor goes
    into a loop or a jitted function varying over all of them, so that what comes round has the type of what went in."""
    assert t.scope is not None
    parts = [t.scope.split(t.dims, "A tensor"), rest or ()]
    return mapped_axes().union(a for part in parts for axes in part for a in axes)


def _flatten_with_keys(t: Tensor) -> tuple[tuple[Any], Any]:
    children, aux = _flatten(t)
    return ((jax.tree_util.GetAttrKey("array"), children[0]),), aux


def _unflatten(aux: Any, children: Any) -> Tensor:
    these, role, scope, rest = aux
    t = object.__new__(Tensor)
    held = children[0] if scope is None else Cell(children[0])
    _set(t, held, these, role, scope, rest)
    return t


jax.tree_util.register_pytree_with_keys(Tensor, _flatten_with_keys, _unflatten, _flatten)
