"""Contraction: products summed over names.

The names say everything: a name that stands in ``out`` is kept, one that does not is summed over, and a summed name
must stand in at least two operands, so that a misspelt name cannot quietly grow the result.

Locally this is a chain of two-operand products. Runs of dims that stay together are merged into one before each
product and split again after it: XLA's matrix product of rank two is the fast one on every backend. Between devices
each contracted dim that is split leaves addends; their sum is pending in the result (``partial``) until it is used.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import opt_einsum

from .. import collectives
from ..dims import Dims, Names, as_names, check_unique, find, names_of, show, sizes_of, union, without
from ..errors import fail, fail_type, nearest
from ..held import merge_runs
from ..scope import Axes, current_manual
from ..tensor import PARAMETER, Tensor, make
from .lowering import check_operand, copied, local_sizes, run, wanted
from .overlap import in_rings


def einsum(*tensors: Tensor, out: Names, preferred_element_type: Any = None, precision: Any = None) -> Any:
    """The product of tensors, summed over every name that is not in ``out``.

    Args:
        tensors: one or more.
        out: the names of the result, in its order: ``("batch", "ff")`` or ``"batch ff"``.
        preferred_element_type: the dtype of products and sums, as in ``jax.lax.dot_general``.
        precision: as in ``jax.lax.dot_general``.

    Returns:
        A tensor with the dims ``out``; a scalar when there are none. The dtype is the operands' common one.

    Raises:
        ValueError: a summed name stands in one operand only; a name of ``out`` stands in none; sizes of one name
            differ.
    """
    asked = "einsum"
    if not tensors:
        raise fail_type("einsum: no tensors. Write mw.einsum(x, w, out=('batch', 'ff')).")
    for x in tensors:
        check_operand(x, asked, scalars=False)
    every = union([x.dims for x in tensors], asked)
    names = as_names(out, f"{asked}: out")
    _check_names(tensors, every, names)
    kept = tuple(find(every, name, asked) for name in names)
    check_unique(kept, "einsum: out")
    recipe = _chain(tuple(x.dims for x in tensors), kept)
    dtype = jnp.result_type(*(x.raw for x in tensors))
    sizes = dict(zip(names_of(every), local_sizes(every, f"{asked}, its operands together"), strict=True))
    chain = functools.partial(_run_chain, preferred_element_type=preferred_element_type, precision=precision)
    product = functools.partial(chain, recipe, dtype, sizes)
    summed = without(every, names)
    want = wanted(f"{asked}, its operands together", every)
    copies = copied(tensors, want)
    want = want.union(copies)
    of_sizes = functools.partial(functools.partial, chain, recipe, dtype)
    rings = in_rings(tensors, kept, want, sizes, recipe.runs, of_sizes)
    again = any(
        x.role == PARAMETER and (x.dtype != dtype or len(runs) < x.ndim)
        for x, runs in zip(tensors, recipe.runs, strict=True)
    )
    result = rings.gathered() if rings is not None else None
    if result is None:
        result = run(product, tensors, want, again=again, runs=recipe.runs)
    axes = _axes_of(summed)
    if axes and result.dtype == jnp.bool_:  # a sum of booleans is "or", which no device can leave to a later addition
        return make(collectives.all_max(result.astype(jnp.int32), axes) > 0, kept, asked=asked, copies=copies)
    made = make(result, kept, asked=asked, partial=axes, copies=copies)
    if rings is not None and axes and kept:
        made.made_by(rings.scattered)
    return made


def dot(x: Tensor, w: Tensor, over: Names, *, preferred_element_type: Any = None, precision: Any = None) -> Any:
    """The product of two tensors, summed over the names ``over``.

    Every other name is kept: first those of ``x``, then those of ``w`` that ``x`` lacks. A name that both have and that
    is not in ``over`` is a batch dim: the product runs for each of its positions.

    Raises:
        ValueError: a name of ``over`` is missing in one of the two.
    """
    for operand in (x, w):
        check_operand(operand, "dot", scalars=False)
    summed = as_names(over, "dot: over")
    for name in summed:
        for operand in (x, w):
            find(operand.dims, name, "dot")
    every = union([x.dims, w.dims], "dot")
    return einsum(
        x, w, out=names_of(without(every, summed)), preferred_element_type=preferred_element_type, precision=precision
    )


def _check_names(tensors: Sequence[Tensor], every: Dims, out: Sequence[str]) -> None:
    operands = "; ".join(f"({show(x.dims)})" for x in tensors)
    for name in out:
        if name not in names_of(every):
            raise fail(
                f"einsum: out has the name {name!r}, which stands in no operand.{nearest(name, names_of(every))}\n"
                f"  operands: {operands}\n  To repeat along a new dim, use x.broadcast(dim)."
            )
    for d in every:
        if d.name not in out and sum(d.name in x.names for x in tensors) < 2:
            raise fail(
                f"einsum: the dim {d.name!r} would be summed over, but it stands in one operand only.\n"
                f"  operands: {operands}\n  out: ({', '.join(out)})\n"
                f"  If you mean the sum, take it first: x.sum({d.name!r}). If the name should stay, put it in out; "
                f"if it is misspelt, rename it."
            )


def _axes_of(these: Dims) -> Axes:
    scope = current_manual()
    return tuple(axis for d in these for axis in scope.axes_of(d.name)) if scope is not None else ()


# The local product: a cached recipe, then a short apply.


@dataclass(frozen=True)
class _Step:
    """One product: which operands, how each is merged, the dimension numbers, and the shape that comes out."""

    left: int
    right: int
    left_runs: tuple[int, ...]
    right_runs: tuple[int, ...]
    numbers: Any
    out: tuple[str, ...]


@dataclass(frozen=True)
class _Chain:
    steps: tuple[_Step, ...]
    first: tuple[str, ...]
    """The names of the first operand."""
    out: tuple[str, ...]
    runs: tuple[tuple[int, ...], ...]
    """For each operand, how its dims are merged before its product: the number of dims in each merged one."""


@functools.lru_cache(maxsize=4096)
def _chain(operands: tuple[Dims, ...], out: Dims) -> _Chain:
    names = [names_of(these) for these in operands]
    steps = []
    runs = [(1,) * len(x) for x in names]
    pool = list(names)
    operand: list[int | None] = list(range(len(names)))
    for left, right in _pairs(operands, out):
        later = {n for i, x in enumerate(pool) if i not in (left, right) for n in x} | set(names_of(out))
        step = _step(pool, left, right, later)
        swapped = _step(pool, right, left, later)
        if len(pool) == 2 and step.out != swapped.out == names_of(out):
            step = swapped  # the product the other way round comes out in the order asked for: nothing to transpose
        steps.append(step)
        for i, merged in ((step.left, step.left_runs), (step.right, step.right_runs)):
            number = operand[i]
            if number is not None:
                runs[number] = merged
        pool = [x for i, x in enumerate(pool) if i not in (left, right)] + [step.out]
        operand = [n for i, n in enumerate(operand) if i not in (left, right)] + [None]
    return _Chain(tuple(steps), names[0], names_of(out), tuple(runs))


def _pairs(operands: tuple[Dims, ...], out: Dims) -> list[tuple[int, int]]:
    """The order of products: for three and more operands, the one with the fewest multiplications."""
    if len(operands) < 3:
        return [(0, 1)] if len(operands) == 2 else []
    letters: dict[str, str] = {}
    for d in union(operands, "einsum"):
        letters[d.name] = opt_einsum.get_symbol(len(letters))
    terms = ["".join(letters[d.name] for d in these) for these in operands]
    expression = ",".join(terms) + "->" + "".join(letters[d.name] for d in out)
    method = "optimal" if len(operands) < 6 else "greedy"
    path, _ = opt_einsum.contract_path(expression, *map(sizes_of, operands), shapes=True, optimize=method)
    return [(min(pair), max(pair)) for pair in path]


def _step(pool: Sequence[tuple[str, ...]], i: int, j: int, later: set[str]) -> _Step:
    left, right = pool[i], pool[j]
    batch = {n for n in left if n in right and n in later}
    summed = {n for n in left if n in right and n not in later}
    left_groups = _groups(left, batch, summed, right)
    right_groups = _groups(right, batch, summed, left)
    batch_names = [n for n in left if n in batch]
    summed_groups = [g for g in left_groups if g[0] in summed]
    numbers = (
        (tuple(left_groups.index(g) for g in summed_groups), tuple(right_groups.index(g) for g in summed_groups)),
        (
            tuple(left_groups.index((n,)) for n in batch_names),
            tuple(right_groups.index((n,)) for n in batch_names),
        ),
    )
    free = [n for n in left if n not in batch | summed] + [n for n in right if n not in batch | summed]
    return _Step(i, j, tuple(map(len, left_groups)), tuple(map(len, right_groups)), numbers, (*batch_names, *free))


def _groups(
    names: tuple[str, ...], batch: set[str], summed: set[str], other: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    """Runs of dims to merge: free dims side by side, and summed dims that stand side by side in both operands."""
    groups: list[list[str]] = []
    for n in names:
        last = groups[-1][-1] if groups else None
        free = n not in batch and n not in summed
        joins_free = free and last is not None and last not in batch and last not in summed
        joins_summed = n in summed and last in summed and _follows(other, last, n)
        if joins_free or joins_summed:
            groups[-1].append(n)
        else:
            groups.append([n])
    return tuple(tuple(g) for g in groups)


def _follows(names: tuple[str, ...], first: str | None, second: str) -> bool:
    return any(pair == (first, second) for pair in itertools.pairwise(names))


def _run_chain(
    chain: _Chain, dtype: Any, sizes: dict[str, int], *arrays: Any, preferred_element_type: Any, precision: Any
) -> Any:
    """The products, one after the other. An array comes with its dims as they are, or merged already."""
    pool = [x if x.dtype == dtype else x.astype(dtype) for x in arrays]
    for step in chain.steps:
        result = jax.lax.dot_general(
            merge_runs(pool[step.left], step.left_runs),
            merge_runs(pool[step.right], step.right_runs),
            step.numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        shape = tuple(sizes[n] for n in step.out)
        result = jax.lax.reshape(result, shape) if result.shape != shape else result
        pool = [x for k, x in enumerate(pool) if k not in (step.left, step.right)] + [result]
    names = chain.steps[-1].out if chain.steps else chain.first
    array = pool[0]
    if not chain.steps and preferred_element_type is not None:
        array = array.astype(preferred_element_type)
    return array if names == chain.out else jax.lax.transpose(array, [names.index(n) for n in chain.out])
