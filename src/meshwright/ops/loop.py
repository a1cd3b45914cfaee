"""Control flow: scan, fold, while_loop, cond, on pytrees of named tensors.

They are JAX's own, with names: ``scan`` runs over a dim, and its body sees tensors without it. What goes round a loop
must come back as it went in; here that is checked by name, and the order of dims and the promises of a tensor (a sum
still to be taken, a gather still to be made) are put right on the way.

A scan over a dim that the layout splits runs every step on every device: what it reads is gathered first, what it
stacks is sliced after. With microbatches a scan of parameters over layers is a pipeline instead: each device has its
own steps (``stages.py``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import collectives
from ..dims import Dim, find, show
from ..errors import fail, fail_type
from ..here import check_here
from ..scope import Axes, current_manual, current_stages
from ..tensor import PARAMETER, Tensor, is_tensor, make
from .lowering import axes_of, is_scalar
from .packing import Held, Packing, held_as
from .stages import run_stages
from .transform import remat as rematerialised


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    *,
    over: str | Dim,
    reverse: bool = False,
    unroll: int | bool = 1,
    remat: Any = None,
) -> tuple[Any, Any]:
    """Run ``f(carry, x) -> (carry, y)`` for each position along a dim, as ``jax.lax.scan`` does.

    Args:
        f: sees in ``x`` each tensor of ``xs`` without the dim ``over``.
        init: the carry to start with; ``f`` must return one with the same names and dtypes.
        xs: a pytree of tensors that have the dim ``over``, and of arrays whose first axis is as long; None when only
            the count matters (then ``over`` is a Dim).
        over: the dim's name, or the Dim.
        reverse: from the last position to the first.
        unroll: how many steps one iteration of the compiled loop does; True for all.
        remat: what the backward pass recomputes; see ``mw.remat``. None saves what JAX saves.

    Returns:
        The last carry, and the ``y`` of every step stacked along ``over``, which comes first.

    Raises:
        ValueError: a tensor of ``xs`` lacks the dim; the carry changes its names.
    """
    d = _over_dim(xs, over)
    stages = current_stages()
    tensors = [x for x in jax.tree.leaves(xs, is_leaf=is_tensor) if isinstance(x, Tensor)]
    in_stages = stages is not None and stages.dim == d.name and any(x.role == PARAMETER for x in tensors)
    if stages is not None and stages.dim == d.name and tensors and not in_stages:
        raise fail(
            f"scan: none of the tensors scanned over {d.name!r}, the dim of the pipeline, is a parameter. Stages hold "
            "parameters: make the weights with mw.param(...), or leave microbatches= out of the layout."
        )
    stacked, take = _sliced(xs, d, kept=stages.axes if stages is not None and in_stages else ())
    carry = Packing(init, "scan: carry")
    out: list[Packing] = []

    def step(arrays: Any, slices: Any) -> Any:
        new, y = _pair(f(carry.pack(arrays), take(slices)))
        out[:] = [Packing(y, "scan: output")]
        return carry.unpack(new), out[0].unpack(y)

    body = rematerialised(step, remat, in_loop=True) if remat else step
    if stages is not None and in_stages:
        return carry.pack(run_stages(_carrying(body, reverse), carry.unpack(init), stacked, d, stages, unroll)), None
    last, ys = jax.lax.scan(body, carry.unpack(init), stacked, length=d.size, reverse=reverse, unroll=unroll)
    return carry.pack(last), _stacked(out[0], ys, d)


def _carrying(body: Callable[..., Any], reverse: bool) -> Callable[..., list[Any]]:
    """A body as the stages of a pipeline run it: on what goes round alone."""
    if reverse:
        raise fail("scan: a pipeline runs its stages from the first to the last: leave out reverse=True.")

    def step(arrays: Any, slices: Any) -> list[Any]:
        new, ys = body(arrays, slices)
        if jax.tree.leaves(ys):
            raise fail(
                "scan: the layers of a pipeline give something to be stacked. What is to leave a pipeline goes round "
                "with the carry: write mw.fold, and let each layer add its part there."
            )
        return new

    return step


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple | list) or len(result) != 2:
        kind = "array" if isinstance(result, jax.Array) else type(result).__name__
        found = f"one {kind}" if not isinstance(result, tuple | list) else f"a {kind} of {len(result)}"
        raise fail_type(
            f"scan: the body returned {found}; it must return (carry, y), where y is what is stacked, or None. Write "
            "mw.fold for a body that returns the carry alone."
        )
    return result[0], result[1]


def fold(
    f: Callable[[Any, Any], Any],
    init: Any,
    xs: Any = None,
    *,
    over: str | Dim,
    reverse: bool = False,
    unroll: int | bool = 1,
    remat: Any = None,
) -> Any:
    """``scan`` for a body that only carries: ``f(carry, x) -> carry``; returns the last carry."""

    def step(carry: Any, x: Any) -> tuple[Any, None]:
        return f(carry, x), None

    return scan(step, init, xs, over=over, reverse=reverse, unroll=unroll, remat=remat)[0]


def _over_dim(xs: Any, over: str | Dim) -> Dim:
    if isinstance(over, Dim):
        return over
    for x in jax.tree.leaves(xs, is_leaf=is_tensor):
        if isinstance(x, Tensor):
            return find(x.dims, over, "scan")
    raise fail(f"scan: no tensor in xs has the dim {over!r}, so its size is unknown; pass over=mw.Dim({over!r}, size).")


def _sliced(xs: Any, d: Dim, kept: Axes = ()) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of ``xs`` with the dim ``d`` first and whole, and what makes a step's tensors of their slices. Over
    the axes ``kept`` it stays split."""
    paths, tree = jax.tree_util.tree_flatten_with_path(xs, is_leaf=is_tensor)
    arrays, forms = [], []
    for path, x in paths:
        where = f"scan: xs{jax.tree_util.keystr(path)}"
        array, form = _leading(x, d, where, kept)
        arrays.append(array)
        forms.append((form, where))

    def take(slices: Sequence[Any]) -> Any:
        steps = [form.pack(a, where) for (form, where), a in zip(forms, slices, strict=True)]
        return jax.tree.unflatten(tree, steps)

    return arrays, take


def _leading(x: Any, d: Dim, where: str, kept: Axes) -> tuple[Any, Held]:
    if not isinstance(x, Tensor):
        if is_scalar(x) or x.shape[0] != d.size:
            raise fail(
                f"{where}: an array's first axis must be as long as {d.name}={d.size}; its shape is {jnp.shape(x)}."
            )
        scope = current_manual()
        return collectives.own_slice(x, kept, 0, scope.size(kept)) if scope is not None and kept else x, Held(None)
    check_here(x, where)
    at = x.position(d.name, where)
    if x.dims[at] != d:
        raise fail(f"{where}: the dim {d.name!r} has size {x.dims[at].size}, the scan runs over {d.size}.")
    scope = current_manual()
    form = held_as(x)
    array = x.raw if x.role == PARAMETER else x.array
    if scope is not None:
        across = scope.axes_of(d.name)[len(kept) :] + (form.rest[at] if form.rest else ())
        if across:
            array = collectives.gather_equal(array, across, at)
    return jnp.moveaxis(array, at, 0) if at else array, form.without(at)


def _stacked(packing: Packing, arrays: Sequence[Any], d: Dim) -> Any:
    split = axes_of(d)

    def one(form: Held, array: Any, where: str) -> Any:
        if form.dims is None:
            return make(_own(array), (d,), asked=where) if array.ndim == 1 else array
        rest = ((), *form.rest) if form.rest else None
        return make(_own(array), (d, *form.dims), asked=where, role=form.role, rest=rest, copies=form.copies)

    def _own(array: Any) -> Any:
        if split is None:
            return array
        scope, axes = split
        return collectives.own_slice(array, axes, 0, scope.size(axes))

    leaves = [one(*group) for group in zip(packing.held, arrays, packing.where, strict=True)]
    return jax.tree.unflatten(packing.structure, leaves)


def while_loop(condition: Callable[[Any], Any], body: Callable[[Any], Any], init: Any) -> Any:
    """Run ``body`` while ``condition(state)``, a boolean scalar, holds. Like JAX's, it has no reverse-mode gradient."""
    state = Packing(init, "while_loop: state")
    last = jax.lax.while_loop(
        lambda arrays: condition(state.pack(arrays)),
        lambda arrays: state.unpack(body(state.pack(arrays))),
        state.unpack(init),
    )
    return state.pack(last)


def cond(predicate: Any, if_true: Callable[..., Any], if_false: Callable[..., Any], *operands: Any) -> Any:
    """One of two functions of ``operands``, chosen at run time by a boolean scalar.

    Raises:
        ValueError: the branches' results differ in names.
        TypeError: the predicate has dims (``mw.where`` chooses element by element), or the results' trees differ.
    """
    if isinstance(predicate, Tensor):
        raise fail_type(
            f"cond: the predicate has the dims ({show(predicate.dims)}); it must be a scalar. mw.where chooses element "
            "by element; predicate.any() or .all() makes a scalar."
        )
    given = Packing(operands, "cond: operand ")
    out: list[Packing] = []

    def branch(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arrays: Any) -> Any:
            result = f(*given.pack(arrays))
            if not out:
                out.append(Packing(result, "cond: result"))
            return out[0].unpack(result)

        return run

    arrays = jax.lax.cond(predicate, branch(if_true), branch(if_false), *given.unpack(operands))
    return out[0].pack(arrays)
