"""The only file that calls JAX's collectives.

Every function here works on one device's positional array inside a region and takes the mesh axes it speaks over. The
gradients are JAX's own: each array's type says over which axes it varies between devices (``check_vma=True``), and a
collective's transpose follows from the types.

==================  =====================  ==================  =====================
function            communicates           type of the result  in the backward pass
==================  =====================  ==================  =====================
``vary``            nothing                varying             all-reduce
``all_sum``         all-reduce             equal everywhere    nothing
``sum_scatter``     reduce-scatter         varying             all-gather
``gather``          all-gather             varying             reduce-scatter
``gather_equal``    all-gather             equal everywhere    slice
``own_slice``       nothing                varying             (by its index)
``exchange``        all-to-all             varying             all-to-all
``permute``         point to point         varying             point to point
==================  =====================  ==================  =====================

``axes`` is a tuple of axis names; several axes act as one long axis, the first the slowest. How a sum over them is
taken, in the backward pass too, ``sums`` says (``summing.py``): in a wider dtype, or in steps where some axes cross a
slow network.

One axis is not of the mesh: ``TIME``, along which a device takes the microbatches of a batch one after the other. What
is split over it is seen a microbatch at a time; sums along it are left to the end, when all have been seen, and nothing
else can be had along it (``microbatches/``).
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call
from jax.sharding import NamedSharding, PartitionSpec

from .errors import fail
from .summing import PLAIN, Summing

Array = jax.Array
Axes = tuple[str, ...]

TIME = "microbatches"
"""The axis along which microbatches follow each other."""
SUMMED = "meshwright.summed_over_microbatches"
"""The name, in a trace, of values of which the microbatches' sum is meant."""


@dataclass(frozen=True, eq=False)
class Turn:
    """The microbatch that is being worked on."""

    index: Any
    """Which one: an int32 scalar."""
    num: int
    """How many there are."""
    without_sums: bool = False
    """Whether sums over microbatches are taken for nought: what is left of a result does not depend on the batch."""
    apart: Axes = ()
    """The axes along which devices are at different stages of a pipeline, and cannot work together."""
    traced_first: bool = False
    """Whether the function is being traced to see what it does, before any gradient of it is taken."""
    in_step: bool = False
    """Whether the devices' runtime lets no permute begin before every device is there, as XLA's for CPUs does: devices
    at other stages never come, so a permute among those of one stage is a gather there."""
    in_rule: bool = False
    """Whether the rule of a custom gradient is being traced to see what it does."""
    judge: Callable[..., None] | None = None
    """What such a trace is held against (``microbatches/sums.py``)."""


_turn = jax.make_user_context(None)


def taking(turn: Turn) -> AbstractContextManager[None]:
    """A context in which ``turn`` is the microbatch that is seen."""
    return _turn(turn)  # type: ignore[no-any-return]


def varies_over(x: Any) -> frozenset[str]:
    """The axes over which the devices hold different values of ``x``, by its type."""
    return jax.typeof(x).manual_axis_type.varying  # type: ignore[no-any-return]


def _ordered(axes: Sequence[str] | frozenset[str]) -> Axes:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(a for a in mesh.axis_names if a in axes)


def vary(x: Array, axes: frozenset[str], sums: Summing = PLAIN) -> Array:
    """Let ``x`` vary over ``axes`` too. No data moves; the gradient is summed over the axes added, as ``sums`` says."""
    missing = _ordered(axes - varies_over(x) - {TIME})
    if not missing:
        return x
    if sums.in_steps(missing, x.nbytes):
        return _vary_for_steps(x, missing, sums)
    return _in_dtype(lambda y: lax.pcast(y, missing, to="varying"), x, sums)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _vary_for_steps(x: Array, axes: Axes, sums: Summing) -> Array:
    """``vary``, where the sum of the gradient is taken in steps: the transpose of JAX's is one all-reduce."""
    return lax.pcast(x, axes, to="varying")


@_vary_for_steps.defjvp
def _vary_for_steps_jvp(
    axes: Axes, sums: Summing, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    def tangent(_: tuple[()], t: Array) -> Array:
        return lax.pcast(t, axes, to="varying")

    def transposed(_: tuple[()], g: Array) -> Array:
        return _in_dtype(lambda y: _added(y, axes, sums), g, sums)

    return _vary_for_steps(*primals, axes, sums), linear_call(tangent, transposed, (), *tangents)


def index(axes: Axes) -> Array:
    """This device's position along ``axes``: an int32 scalar."""
    if TIME not in axes:
        return lax.axis_index(axes[0] if len(axes) == 1 else axes)
    at = axes.index(TIME)
    place = _turn.value.index
    if before := axes[:at]:
        place = index(before) * _turn.value.num + place
    if after := axes[at + 1 :]:
        place = place * lax.axis_size(after) + index(after)
    return place


def at_once(axes: Axes, what: str) -> Axes:
    """``axes``, when ``what`` can be had along them: not between microbatches, nor between stages of a pipeline."""
    if _turn.value is not None and (apart := set(axes).intersection(_turn.value.apart)):
        raise fail(
            f"pipeline: {what} along the axis {min(apart)!r}, whose devices are at different stages, each in its own "
            "time. A dim of layers that a pipeline splits can be scanned over, and nothing else.\n"
            "  Do this outside the region (a penalty on stacked weights, for instance), or leave the dim unsplit."
        )
    if TIME in axes:
        raise fail(
            f"microbatches: {what} along a dim of which each microbatch has a part. With microbatches= in the layout a "
            "program may keep that dim, and sum or average over it at its end: what else looks at several examples at "
            "once (a maximum, a normalisation, a shift, another name for the dim) would see one microbatch alone.\n"
            "  Leave microbatches= out of the layout, or do this outside the region."
        )
    return axes


def all_sum(x: Array, axes: Axes, sums: Summing = PLAIN) -> Array:
    """The sum over the devices along ``axes``, taken as ``sums`` says."""
    if TIME in axes:
        return _summed_later(x, tuple(a for a in axes if a != TIME), sums)
    x = vary(x, frozenset(at_once(axes, "a sum")))
    return _in_dtype(lambda y: _added(y, axes, sums), x, sums)


def _summed_later(x: Array, now: Axes, sums: Summing) -> Array:
    """The addend of one microbatch, marked as such: whoever runs the microbatches adds them up."""
    if _turn.value.without_sums:
        return all_sum(jnp.zeros_like(x), now, sums) if now else jnp.zeros_like(x)
    total = all_sum(x, now, sums) if now else x
    return _marked(total) if _turn.value.traced_first or _turn.value.in_rule else total


@jax.custom_jvp
def _marked(x: Array) -> Array:
    return checkpoint_name(x, SUMMED)


@_marked.defjvp
def _marked_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    if _turn.value is not None and _turn.value.traced_first:
        raise fail(
            "microbatches: a gradient taken inside the region, of a sum over the dim that microbatches divide, would "
            "be that of one microbatch.\n  Take it outside, of the function that mw.spmd returns, or leave "
            "microbatches= out of the layout."
        )
    return _marked(*primals), tangents[0]


def check_rule(rule: Callable[..., Sequence[Array]], given: Sequence[Array], parts: Sequence[bool]) -> None:
    """Hold the rule of a custom gradient against what may be done with sums over microbatches, while there are any.

    Args:
        rule: of arrays to arrays; it is traced, not run.
        given: its arguments; each is one microbatch's addend.
        parts: for each result, filled in by the rule, whether it has the dim that microbatches divide.

    Raises:
        ValueError: the rule takes one microbatch's addend for the sum.
    """
    turn = _turn.value
    if turn is not None and turn.judge is not None:
        with taking(replace(turn, traced_first=False, in_rule=True)):
            turn.judge(jax.make_jaxpr(rule)(*given), parts)


def _added(x: Array, axes: Axes, sums: Summing) -> Array:
    """The sum, in one collective or in steps. In steps a dim is dealt out that the fast axes divide, the first one:
    XLA's compilers scatter it as it lies. Where there is none they deal out the elements, if those can be."""
    fast = sums.fast(axes)
    if not sums.in_steps(axes, x.nbytes) or x.size % lax.axis_size(fast):
        return lax.psum(x, axes)
    dims = (i for i, size in enumerate(x.shape) if size % lax.axis_size(fast) == 0)
    dim = next(dims, None)
    if dim is None:
        return _added(x.reshape(-1), axes, sums).reshape(x.shape)
    return _added_in_steps(x, fast, sums.crossing(axes), dim)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _added_in_steps(x: Array, fast: Axes, slow: Axes, dim: int) -> Array:
    share = lax.psum(lax.psum_scatter(x, fast, scatter_dimension=dim, tiled=True), slow)
    return lax.all_gather(share, fast, axis=dim, tiled=True, to="invarying")


@_added_in_steps.defjvp
def _added_in_steps_jvp(
    fast: Axes, slow: Axes, dim: int, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """The tangents' sum is one collective, whose transpose moves nothing: that of the steps would gather."""
    return _added_in_steps(*primals, fast, slow, dim), lax.psum(tangents[0], (*slow, *fast))


def sum_scatter(x: Array, axes: Axes, dim: int, sums: Summing = PLAIN) -> Array:
    """The sum over the devices along ``axes``, of which each keeps its slice along position ``dim``."""
    x = vary(x, frozenset(at_once(axes, "a sum that ends split")))
    return _in_dtype(lambda y: _scattered(y, axes, dim, sums), x, sums)


def _scattered(x: Array, axes: Axes, dim: int, sums: Summing) -> Array:
    runs = _runs(axes, x.nbytes, sums)
    if not runs:
        return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    sizes = [lax.axis_size(run) for run in runs]
    block = x.shape[dim] // math.prod(sizes)
    x = x.reshape(*x.shape[:dim], *sizes, block, *x.shape[dim + 1 :])
    for k in sorted(range(2), key=lambda k: runs[k] == sums.crossing(axes)):
        x = lax.psum_scatter(x, runs[k], scatter_dimension=dim + k, tiled=True)
    return x.reshape(*x.shape[:dim], block, *x.shape[dim + 3 :])


def _runs(axes: Axes, num_bytes: int, sums: Summing) -> list[Axes]:
    """The two parts of ``axes``, the slow ones and the fast ones in the order they have there, when a collective over
    them is taken in steps and each kind stands together; else nothing."""
    runs = [sums.crossing(axes), sums.fast(axes)]
    fitting = [two for two in (runs, runs[::-1]) if two[0] + two[1] == axes]
    return fitting[0] if fitting and sums.in_steps(axes, num_bytes) else []


def _in_dtype(collective: Any, x: Array, sums: Summing) -> Array:
    if not _is_wider(x, sums):
        return collective(x)  # type: ignore[no-any-return]
    return collective(x.astype(sums.dtype)).astype(x.dtype)  # type: ignore[no-any-return]


def _is_wider(x: Array, sums: Summing) -> bool:
    """Whether sums of ``x`` are taken in another dtype than its own."""
    return sums.dtype is not None and x.dtype != sums.dtype and jnp.issubdtype(x.dtype, jnp.floating)


def all_max(x: Array, axes: Axes) -> Array:
    """The greatest over the devices along ``axes``. Has no gradient: callers stop it or state theirs."""
    return lax.pmax(vary(x, frozenset(at_once(axes, "a maximum"))), axes)


def all_min(x: Array, axes: Axes) -> Array:
    """The least over the devices along ``axes``. Has no gradient: callers stop it or state theirs."""
    return lax.pmin(vary(x, frozenset(at_once(axes, "a minimum"))), axes)


def gather(x: Array, axes: Axes, dim: int, sums: Summing = PLAIN) -> Array:
    """Join the devices' slices along position ``dim``; the backward pass reduce-scatters, as ``sums`` says."""
    x = vary(x, frozenset(at_once(axes, "a gather")))
    if not x.size:
        return _joined_nothing(x, axes, dim, varies_over(x))
    return _gather_wide(x, axes, dim, sums) if _is_wider(x, sums) else _joined(x, axes, dim, sums)


def _joined(x: Array, axes: Axes, dim: int, sums: Summing) -> Array:
    runs = _runs(axes, x.nbytes * lax.axis_size(axes), sums)
    if not runs:
        return lax.all_gather(x, axes, axis=dim, tiled=True)
    shape = (*x.shape[:dim], -1, *x.shape[dim + 1 :])
    x = x.reshape(*x.shape[:dim], 1, 1, *x.shape[dim:])
    for k in sorted(range(2), key=lambda k: runs[k] != sums.crossing(axes)):
        x = lax.all_gather(x, runs[k], axis=dim + k, tiled=True)
    return x.reshape(shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _gather_wide(x: Array, axes: Axes, dim: int, sums: Summing) -> Array:
    """A gather whose gradient is summed in a wider dtype than it moved in: no transpose of JAX's says that."""
    return _joined(x, axes, dim, sums)


@_gather_wide.defjvp
def _gather_wide_jvp(
    axes: Axes, dim: int, sums: Summing, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    def tangent(_: tuple[()], t: Array) -> Array:
        return _gather_wide(t, axes, dim, sums)

    def transposed(_: tuple[()], g: Array) -> Array:
        return sum_scatter(g, axes, dim, sums)

    return _gather_wide(*primals, axes, dim, sums), linear_call(tangent, transposed, (), *tangents)


def gather_equal(x: Array, axes: Axes, dim: int) -> Array:
    """Join the devices' slices along position ``dim`` into a value that counts as equal everywhere."""
    x = vary(x, frozenset(at_once(axes, "a gather")))
    if not x.size:
        return _joined_nothing(x, axes, dim, varies_over(x) - frozenset(axes))
    return lax.all_gather(x, axes, axis=dim, tiled=True, to="invarying")


def _joined_nothing(x: Array, axes: Axes, dim: int, varying: frozenset[str]) -> Array:
    """What slices without elements are joined to: XLA takes no all-gather of them."""
    shape = [n * lax.axis_size(axes) if i == dim else n for i, n in enumerate(x.shape)]
    return vary(jnp.zeros(shape, x.dtype), varying)


def own_slice(x: Array, axes: Axes, dim: int, num: int) -> Array:
    """This device's slice of ``x`` along position ``dim``, when ``num`` devices along ``axes`` share it out."""
    size = x.shape[dim] // num
    x = vary(x, frozenset(axes))
    return lax.dynamic_slice_in_dim(x, index(axes) * size, size, dim)


def exchange(x: Array, axes: Axes, split_dim: int, join_dim: int) -> Array:
    """All-to-all: from split along position ``join_dim`` to split along position ``split_dim``."""
    x = vary(x, frozenset(at_once(axes, "an all-to-all")))
    return lax.all_to_all(x, axes, split_dim, join_dim, tiled=True)


def permute(x: Array, axes: Axes, pairs: Sequence[tuple[int, int]]) -> Array:
    """Send ``x`` from device to device, by pairs (from, to) along ``axes``; a device nobody sends to gets zeros."""
    x = vary(x, frozenset(at_once(axes, "an exchange between neighbours")))
    if _turn.value is not None and _turn.value.apart and _turn.value.in_step:
        return _taken_of_all(x, axes, pairs)
    ordered = _ordered(axes)
    if ordered != axes:
        place = _places(axes, ordered)
        pairs = [(place[source], place[target]) for source, target in pairs]
    return lax.ppermute(x, ordered, pairs)


def rotate(x: Array, axes: Axes, num: int, distance: int) -> Array:
    """Send ``x`` to the device ``distance`` further along ``axes``, on which there are ``num``, round their end."""
    return permute(x, axes, [(device, (device + distance) % num) for device in range(num)])


def _taken_of_all(x: Array, axes: Axes, pairs: Sequence[tuple[int, int]]) -> Array:
    """A permute as a gather, of which each device takes what was sent to it."""
    sources = np.full(math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes), -1, np.int32)
    for source, target in pairs:
        sources[target] = source
    mine = jnp.asarray(sources)[index(axes)]
    found = lax.dynamic_index_in_dim(lax.all_gather(x, axes), jnp.maximum(mine, 0), keepdims=False)
    return jnp.where(mine >= 0, found, jnp.zeros_like(found))


def _places(axes: Axes, ordered: Axes) -> list[int]:
    """For each device along ``axes``, in order, its place along the same axes in the mesh's order: JAX's permute,
    unlike its other collectives, counts devices in the order of the mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    counted = np.arange(math.prod(sizes[a] for a in axes)).reshape([sizes[a] for a in ordered])
    return np.transpose(counted, [ordered.index(a) for a in axes]).ravel().tolist()  # type: ignore[no-any-return]


def from_first(x: Array, axes: Axes, sums: Summing = PLAIN) -> Array:
    """A value that is equal along ``axes`` but typed as varying, made equal in type too: one all-reduce.

    Its gradient goes to the first device only, so that a later sum over the devices counts it once.
    """
    return from_one(x, index(axes) == 0, axes, sums)


def from_one(x: Array, is_it: Array, axes: Axes, sums: Summing = PLAIN) -> Array:
    """The value of the one device along ``axes`` for which ``is_it`` holds, on every device: one all-reduce."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = from_one(jax.random.key_data(x), is_it, axes, sums)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if x.dtype == jnp.bool_:
        return from_one(x.astype(jnp.int32), is_it, axes, sums) > 0
    return _added(vary(jnp.where(is_it, x, jnp.zeros_like(x)), frozenset(axes)), axes, sums)


def constrain(x: Array, mesh: Any, split: Sequence[Axes]) -> Array:
    """For XLA's partitioner: state that ``x`` is split over ``split``."""
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec(split)))


def spec(split: Sequence[Axes]) -> PartitionSpec:
    """A JAX partition spec, an entry for each dim."""
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in split))
