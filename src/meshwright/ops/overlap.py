"""Products that overlap with what they communicate: the collective matmul.

A product whose operand is gathered first waits for the gather, and one whose sum ends split has the sum wait for it.
Taken slice by slice, each hides the other (Wang et al., "Overlap communication with dependent computation via
decomposition in large deep learning models", ASPLOS 2023). The devices along an axis stand in a ring:

    gather, then multiply      a device multiplies its own slice while the neighbours' come in, then theirs while the
                               next ones do, and so on; each product is put where it belongs
    multiply, then scatter     a sum that will stay with one device goes round, and each device that it passes adds its
                               addend, which it makes while the sum is on its way

Slices go round in both directions, half of them each way: as many bytes as one gather or one reduce-scatter moves. The
slices that pass by are put together as well: other products of the same tensor find it gathered, and the product for
the weight's gradient is one. The backward pass of each of the two is the other one, so that a layer that begins with
the one and ends with the other has no collective that nothing hides.

The layout asks for it (``overlap="model"``). Which dim is cut follows from the names: of ``x`` the dim that is gathered
or to be scattered, which must stand in no other operand.

    x (length, embed)   .   w (embed, ff)   ->   out (length, ff)      cut along length
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from .. import collectives
from ..dims import Dims, names_of
from ..held import merge_runs, told
from ..scope import Axes, Scope, current_manual, current_stages
from ..tensor import ACTIVATION, Tensor
from .lowering import at_rest

Array = Any
Product = Callable[..., Array]


@dataclass(frozen=True)
class Ring:
    """The devices along some axes, and what goes round."""

    axes: Axes
    """The first one the slowest."""
    num: int
    """The devices along them."""
    dims: Dims
    """Those of what goes round, for profilers and the plan."""
    sums: str | None
    """The dtype of sums; None: that of the addends."""

    def walks(self) -> list[tuple[int, int]]:
        """In which directions slices go round, and how far."""
        return [(1, self.num // 2), (-1, (self.num - 1) // 2)]

    def at(self, distance: int) -> Array:
        """The place of the device so far along the ring."""
        return (collectives.index(self.axes) + distance) % self.num

    def send(self, x: Array, distance: int) -> Array:
        """To the device so far along the ring."""
        with told(self.dims):
            return collectives.rotate(x, self.axes, self.num, distance)

    def passing(self, x: Array) -> Iterator[tuple[Array, Array]]:
        """Every device's ``x``, the nearest first, each with the place of its device."""
        yield self.at(0), x
        going: dict[int, Array] = dict.fromkeys((1, -1), x)
        for hop in range(1, self.num // 2 + 1):
            for direction, hops in self.walks():
                if hop <= hops:
                    going[direction] = self.send(going[direction], direction)
                    yield self.at(-direction * hop), going[direction]

    def collected(self, addend: Callable[[Array], Array]) -> Array:
        """The sum over the devices of ``addend(place)``, for the place of each."""
        going: dict[int, Array] = {}
        for hop in range(self.num // 2, 0, -1):
            for direction, hops in self.walks():
                if hop <= hops:
                    more = self._wide(addend(self.at(direction * hop)))
                    so_far = going.get(direction)
                    going[direction] = self.send(more if so_far is None else so_far + more, direction)
        own = addend(self.at(0))
        return functools.reduce(operator.add, going.values(), self._wide(own)).astype(own.dtype)

    def _wide(self, x: Array) -> Array:
        return x if self.sums is None or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(self.sums)


@dataclass(frozen=True, eq=False)
class Job:
    """A product of ``x`` and ``w`` in a ring."""

    ring: Ring
    dim: int
    """The position in ``x`` of the dim that is cut."""
    out_dim: int
    """Its position in the product."""
    runs: tuple[int, ...]
    """How the product merges dims of ``x``."""
    shape: tuple[int, ...]
    """Of all of ``x``."""
    part: Product
    """Of a slice of ``x`` and ``w``, the slice of the product."""
    whole: Product
    """Of ``x`` and ``w``, the product."""
    ready: tuple[Callable[[Array], Array], Callable[[Array], Array]]
    """What makes ``x`` and ``w`` of what is kept of them for the backward pass: a parameter is kept as it rests."""

    def of_slices(self, x: Array, function: Callable[[Array], Array], dim: int, out_dim: int) -> tuple[Array, Array]:
        """``function`` of every device's ``x``, put together along ``out_dim``, and every ``x`` along ``dim``."""
        whole = out = None
        for place, piece in self.ring.passing(x):
            whole = self._put(whole, piece, place, dim)
            out = self._put(out, function(piece), place, out_dim)
        return out, whole

    def _put(self, whole: Array | None, piece: Array, place: Array, dim: int) -> Array:
        size = piece.shape[dim]
        if whole is None:
            shape = [size * self.ring.num if i == dim else n for i, n in enumerate(piece.shape)]
            whole = collectives.vary(jnp.zeros(shape, piece.dtype), collectives.varies_over(piece))
        return lax.dynamic_update_slice_in_dim(whole, piece, place * size, dim)

    def cut(self, whole: Array, place: Array, dim: int) -> Array:
        """The slice of the device at ``place``."""
        size = whole.shape[dim] // self.ring.num
        return lax.dynamic_slice_in_dim(whole, place * size, size, dim)

    def to_x(self, x: Array, w: Array) -> Callable[[Array], Array]:
        """What makes the gradient of a slice of ``x`` of that of the product's."""
        piece = jax.eval_shape(lambda x: lax.slice_in_dim(x, 0, x.shape[self.dim] // self.ring.num, axis=self.dim), x)
        transposed = jax.linear_transpose(lambda piece: self.part(piece, w), piece)
        return lambda gradient: transposed(gradient)[0]

    def to_w(self, x: Array, w: Array, gradient: Array) -> Array:
        """The gradient of ``w``."""
        return jax.linear_transpose(lambda w: self.whole(x, w), w)(gradient)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather_multiply(job: Job, x: Array, w: Array) -> tuple[Array, Array]:
    """The product of ``x``, gathered, and ``w``; and ``x`` gathered, merged as the product merges it: the form that is
    kept for the backward pass, and that other products keep too."""
    return _gather_multiply(job, x, w)[0]


def _gather_multiply(job: Job, x: Array, w: Array) -> tuple[Any, Any]:
    ready = job.ready[1](w)
    out, whole = job.of_slices(x, lambda piece: job.part(piece, ready), job.dim, job.out_dim)
    merged = merge_runs(whole, job.runs)
    return (out, merged), (merged, w)


def _gather_multiply_back(job: Job, kept: Any, gradients: Any) -> tuple[Array, Array]:
    (merged, w), (of_out, of_whole) = kept, gradients
    whole, of_whole = (lax.reshape(array, job.shape) for array in (merged, of_whole))
    ready, back = jax.vjp(job.ready[1], w)
    to_x = job.to_x(whole, ready)

    def addend(place: Array) -> Array:
        return to_x(job.cut(of_out, place, job.out_dim)) + job.cut(of_whole, place, job.dim)

    return job.ring.collected(addend), *back(job.to_w(merged, ready, of_out))


gather_multiply.defvjp(_gather_multiply, _gather_multiply_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply_scatter(job: Job, x: Array, w: Array) -> Array:
    """The sum over the ring of the products of ``x`` and ``w``, each device's slice of it."""
    return _multiply_scatter(job, x, w)[0]


def _multiply_scatter(job: Job, x: Array, w: Array) -> tuple[Array, Any]:
    ready_x, ready_w = (make(kept) for make, kept in zip(job.ready, (x, w), strict=True))
    return job.ring.collected(lambda place: job.part(job.cut(ready_x, place, job.dim), ready_w)), (x, w)


def _multiply_scatter_back(job: Job, kept: Any, gradient: Array) -> tuple[Array, Array]:
    (x, back_x), (w, back_w) = (jax.vjp(make, held) for make, held in zip(job.ready, kept, strict=True))
    of_x, whole = job.of_slices(gradient, job.to_x(x, w), job.out_dim, job.dim)
    return *back_x(of_x), *back_w(job.to_w(x, w, whole))


multiply_scatter.defvjp(_multiply_scatter, _multiply_scatter_back)


# Which products of named tensors go in rings


@dataclass(frozen=True, eq=False)
class Rings:
    """A contraction of two tensors, under a layout that overlaps some axes."""

    tensors: Sequence[Tensor]
    out: Dims
    want: frozenset[str]
    sizes: dict[str, int]
    """Those of the slices."""
    runs: Sequence[tuple[int, ...]]
    """For each operand, how the product merges its dims."""
    product: Callable[[dict[str, int]], Product]
    """The product of slices of given sizes."""
    scope: Scope
    rests: list[bool]
    """For each operand, whether it is a parameter kept as it rests."""

    def gathered(self) -> Array | None:
        """The product, in a ring with the gather that an operand waits for; None where there is none to overlap."""
        for k, x in enumerate(self.tensors):
            promised = [(i, axes) for i, axes in enumerate(x.rest or ()) if axes]
            if x.role != ACTIVATION or x.copies or len(promised) != 1 or not x.awaits_gather(self.want):
                continue
            (i, axes), piece = promised[0], x.summed()
            # What varies over more axes only in this product is gathered as it is, for products that it does not.
            if self._overlaps(axes) and self.want <= collectives.varies_over(piece) and self._free(x.names[i]) == k:
                job = self._job(k, x.names[i], axes, x.dims)
                made = gather_multiply(job, piece, self._kept(1 - k))
                result, merged = cast(tuple[Array, Array], made)
                x.gather_made(self.want, lax.reshape(merged, job.shape), job.runs, merged)
                return result
        return None

    def scattered(self, axes: Axes, i: int) -> Array | None:
        """The product summed over ``axes`` and split over them along position ``i``; None where it is not to be
        overlapped."""
        name = self.out[i].name
        k = self._free(name)
        if k is None or not self._overlaps(axes):
            return None
        return multiply_scatter(self._job(k, name, axes, self.out), self._kept(k), self._kept(1 - k))

    def _overlaps(self, axes: Axes) -> bool:
        return set(axes) <= self.want.intersection(self.scope.overlap)

    def _free(self, name: str) -> int | None:
        """The operand that a dim of the result stands in, if that is one only."""
        found = [k for k, x in enumerate(self.tensors) if name in x.names]
        return found[0] if len(found) == 1 and name in names_of(self.out) else None

    def _job(self, k: int, name: str, axes: Axes, dims: Dims) -> Job:
        self.scope.overlapped.update(axes)
        ring = Ring(axes, self.scope.size(axes), dims, self.scope.sums.dtype)
        part = self.product({**self.sizes, name: self.sizes[name] // ring.num})
        part, whole = (p if k == 0 else _swapped(p) for p in (part, self.product(self.sizes)))
        names, ready = self.tensors[k].names, (self._ready(k), self._ready(1 - k))
        shape = tuple(self.sizes[n] for n in names)
        dims_cut = names.index(name), names_of(self.out).index(name)
        return Job(ring, *dims_cut, self.runs[k], shape, part, whole, ready)

    def _kept(self, k: int) -> Array:
        """What is kept of an operand for the backward pass."""
        x = self.tensors[k]
        return x.at_use(self.want) if self.rests[k] else x.local(self.want)

    def _ready(self, k: int) -> Callable[[Array], Array]:
        x = self.tensors[k]
        return (lambda kept: x.for_use(kept, self.want)) if self.rests[k] else (lambda kept: kept)


def _swapped(product: Product) -> Product:
    return lambda x, w: product(w, x)


def in_rings(
    tensors: Sequence[Tensor],
    out: Dims,
    want: frozenset[str],
    sizes: dict[str, int],
    runs: Sequence[tuple[int, ...]],
    product: Callable[[dict[str, int]], Product],
) -> Rings | None:
    """The rings that a contraction may be taken in; None where the layout overlaps nothing, or it is not of two tensors
    of floating point. Nor between the stages of a pipeline: a permute waits for every device of the mesh, and those at
    another stage do not come."""
    scope = current_manual()
    if scope is None or not want.intersection(scope.overlap) or len(tensors) != 2 or current_stages() is not None:
        return None
    if not all(jnp.issubdtype(x.dtype, jnp.inexact) for x in tensors) or not all(sizes.values()):
        return None
    return Rings(tuple(tensors), out, want, sizes, runs, product, scope, at_rest(tensors, want))
