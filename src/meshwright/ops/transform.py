"""Transformations of functions of named tensors: remat, vmap, apply.

``jax.jit``, ``jax.grad``, ``jax.checkpoint`` and custom gradients take functions of tensors as they are, tensors being
pytrees. What stands here needs names: a policy of rematerialisation by name, a vectorised dim, and a positional
function on named arrays.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .. import collectives
from ..dims import Dim, Dims, Names, as_dims, as_names, find, index_of, show, sizes_of, union, without
from ..errors import fail, fail_type, nearest
from ..here import check_here
from ..scope import current_manual, mapping
from ..tensor import ACTIVATION, PARAMETER, Tensor, is_tensor, make
from .lowering import align, check_operand, doing_again, run, split_of, wanted
from .packing import held_as

POLICIES: dict[str, Any] = {
    "nothing": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}
"""What a rematerialised function saves for its backward pass, by name."""


def remat(f: Callable[..., Any], save: Any = "nothing", *, in_loop: bool = False) -> Callable[..., Any]:
    """``f``, computed again in the backward pass instead of keeping its intermediate values.

    Args:
        f: a function of pytrees of tensors, arrays and static values.
        save: what is kept all the same: "nothing" (or True), "dots" (results of contractions), "dots_no_batch"
            (those without batch dims), "everything", a tuple of names given by ``mw.saved``, or a JAX policy.
            Parameters gathered from their rest are never kept.
        in_loop: ``f`` is the body of a loop, where the barrier against common subexpressions is not needed.

    Raises:
        ValueError: ``save`` names no policy.
    """
    policy = _never_gathered(_policy(save))
    context = doing_again if _keeps_results_only(save) else nullcontext

    @functools.wraps(f)
    def run_again(*args: Any, **kwargs: Any) -> Any:
        given, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_copy)
        copies = {i: x for i, x in enumerate(given) if _is_copy(x)}  # gathered already: not to be taken apart
        leaves, tree = jax.tree.flatten([x.raw if i in copies else x for i, x in enumerate(given)])
        dynamic = [isinstance(x, jax.Array) or jnp.isscalar(x) for x in leaves]

        def on_arrays(*arrays: Any) -> Any:
            given = iter(arrays)
            values = jax.tree.unflatten(tree, [next(given) if d else x for d, x in zip(dynamic, leaves, strict=True)])
            for i, x in copies.items():
                values[i] = held_as(x).pack(values[i], "remat")
            all_args, all_kwargs = jax.tree.unflatten(structure, values)
            with context():
                return f(*all_args, **all_kwargs)

        arrays = [x for d, x in zip(dynamic, leaves, strict=True) if d]
        return jax.checkpoint(on_arrays, policy=policy, prevent_cse=not in_loop)(*arrays)

    return run_again


def _is_copy(x: Any) -> bool:
    return isinstance(x, Tensor) and bool(x.copies)


def _keeps_results_only(save: Any) -> bool:
    """Whether no form of a parameter can be among what is saved, so that each is made once for a backward pass."""
    return save is True or isinstance(save, tuple | list) or save in ("nothing", "dots", "dots_no_batch")


def _policy(save: Any) -> Any:
    if save is True:
        save = "nothing"
    if isinstance(save, str) and save in POLICIES:
        return POLICIES[save]
    if isinstance(save, tuple | list):
        return jax.checkpoint_policies.save_only_these_names(*save)
    if callable(save):
        return save
    raise fail(f"remat: there is no policy {save!r}.{nearest(str(save), POLICIES)} A tuple gives names from mw.saved.")


def _never_gathered(policy: Any) -> Any:
    """The policy, less the gathers: keeping those would undo what a parameter at rest saves."""
    if policy is None:
        return None

    def keeps(primitive: Any, *args: Any, **params: Any) -> Any:
        return False if primitive.name.startswith("all_gather") else policy(primitive, *args, **params)

    return keeps


def saved(x: Any, name: str) -> Any:
    """``x`` under a name that ``mw.remat(f, save=(name,))`` keeps for the backward pass."""
    if not isinstance(x, Tensor):
        return checkpoint_name(x, name)
    return make(checkpoint_name(x.array, name), x.dims, asked="saved")


def vmap(f: Callable[..., Any], dim: str | Dim) -> Callable[..., Any]:
    """``f`` run for each position along a dim: it sees tensors without it, and its results have it, first.

    Args:
        f: a function of pytrees of tensors to a pytree of tensors and scalars.
        dim: the dim's name or the Dim; tensors that have it are mapped, the others are the same for every position.

    Raises:
        ValueError: a name is given and no argument has that dim.
    """

    @functools.wraps(f)
    def mapped(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args, is_leaf=is_tensor)
        d = dim if isinstance(dim, Dim) else _met(leaves, dim)
        axes = split_of((d,), "vmap")[0]
        taken = [_taken(x, d) for x in leaves]
        out: list[Any] = []

        def on_arrays(*arrays: Any) -> Any:
            tensors = [pack(a) for (_, _, pack), a in zip(taken, arrays, strict=True)]
            with mapping(axes):
                results, out_tree = jax.tree.flatten(f(*jax.tree.unflatten(tree, tensors)), is_leaf=is_tensor)
                out[:] = [out_tree, [(x.dims, x.role) if isinstance(x, Tensor) else ((), ACTIVATION) for x in results]]
                return [
                    collectives.vary(x.array if isinstance(x, Tensor) else jnp.asarray(x), frozenset(axes))
                    for x in results
                ]

        where = [at for _, at, _ in taken]
        size = d.size if not axes else d.size // current_manual().size(axes)  # type: ignore[union-attr]
        arrays = jax.vmap(on_arrays, in_axes=where, axis_size=size)(*(a for a, _, _ in taken))
        pairs = zip(arrays, out[1], strict=True)
        results = [make(a, (d, *these), asked="vmap", role=role) for a, (these, role) in pairs]
        return jax.tree.unflatten(out[0], results)

    return mapped


def _met(leaves: Sequence[Any], name: str) -> Dim:
    for x in leaves:
        if isinstance(x, Tensor) and name in x.names:
            return x.dim(name)
    raise fail(f"vmap: no argument has the dim {name!r}; pass mw.Dim({name!r}, size) to map over a new one.")


def _taken(x: Any, d: Dim) -> tuple[Any, int | None, Callable[[Any], Any]]:
    """An argument's array, the position to map over, and what makes the function's view of it."""
    if not isinstance(x, Tensor):
        return x, None, lambda a: a
    check_here(x, "vmap")
    form = held_as(x)
    if d.name not in x.names:
        return x.raw if x.role == PARAMETER else x.array, None, lambda a: form.pack(a, "vmap")
    at = index_of(x.dims, d.name, "vmap")
    if x.dims[at] != d:
        raise fail(f"vmap: the dim {d.name!r} has size {x.dims[at].size} in ({show(x.dims)}), and {d.size} elsewhere.")
    if form.rest and form.rest[at]:
        x = make(run(lambda a: a, [x], wanted("vmap", x.dims)), x.dims, asked="vmap")
        form = held_as(x)
    taken = form.without(at)
    return x.raw if x.role == PARAMETER else x.array, at, lambda a: taken.pack(a, "vmap")


def apply(f: Callable[..., Any], *tensors: Tensor, dims_in: Names | Sequence[Names], dims_out: Any) -> Any:
    """Any positional JAX function, for what the language lacks.

    ``f`` sees, of each tensor, an array of the dims named in ``dims_in``, in that order; it runs for every position of
    all the other dims, which broadcast by name and come first in the results.

    Args:
        f: a function of positional arrays to one array or a tuple of them.
        tensors: its arguments.
        dims_in: for each tensor the names that ``f`` works on; one entry for all when it is a string.
        dims_out: the dims of the result that ``f`` makes: names that stand in the arguments, or Dims; a list of these
            when it returns several arrays.

    Raises:
        ValueError: the layout splits one of the dims that ``f`` works on, of which a device sees a slice only; ``f``
            works on a dim of one tensor that it does not work on in another; or what it returns has not the dims
            ``dims_out``.
    """
    for x in tensors:
        check_operand(x, "apply", scalars=False)
    given = [dims_in] * len(tensors) if isinstance(dims_in, str) or not isinstance(dims_in, Sequence) else dims_in
    cores = [as_names(n, "apply: dims_in") for n in given]
    if len(cores) != len(tensors):
        raise fail_type(f"apply: {len(cores)} entries of dims_in for {len(tensors)} tensors.")
    every = union([x.dims for x in tensors], "apply")
    core_dims = [tuple(find(x.dims, n, "apply") for n in names) for x, names in zip(tensors, cores, strict=True)]
    several = isinstance(dims_out, list)
    results = [_result_dims(o, every) for o in (dims_out if several else [dims_out])]
    batch = without(every, [d.name for these in core_dims for d in these])
    _check_same_cores(tensors, core_dims)
    _check_whole([*core_dims, *results])

    def on_arrays(*arrays: Any) -> Any:
        aligned = [_batched(a, x.dims, batch, core) for a, x, core in zip(arrays, tensors, core_dims, strict=True)]
        run_all = f
        for i in reversed(range(len(batch))):
            where = [0 if batch[i].name in x.names else None for x in tensors]
            run_all = jax.vmap(run_all, in_axes=where) if any(w == 0 for w in where) else run_all
        return run_all(*aligned)

    found = run(on_arrays, list(tensors), wanted("apply", batch))
    arrays = _checked_results(found, several, len(batch), results)
    made = [make(a, batch + these, asked="apply") for a, these in zip(arrays, results, strict=True)]
    return made if several else made[0]


def _check_same_cores(tensors: Sequence[Tensor], core_dims: Sequence[Dims]) -> None:
    """Raise where a dim would be gone from one tensor, worked on, and be left in another."""
    for core in core_dims:
        for x, other in zip(tensors, core_dims, strict=True):
            for d in core:
                if d in x.dims and d not in other:
                    worked_on = ", ".join(f"({' '.join(d.name for d in these)})" for these in core_dims)
                    raise fail(
                        f"apply: the function works on the dim {d.name!r} of one tensor and is to run for each of its "
                        f"positions in another.\n  tensors: {'; '.join(f'({show(t.dims)})' for t in tensors)}\n"
                        f"  dims_in: {worked_on}\n"
                        f"  Name it in dims_in for every tensor that has it, or rename it in one: "
                        f"x.rename({d.name}={d.name + '_in'!r})."
                    )


def _checked_results(found: Any, several: bool, num_batch: int, results: Sequence[Dims]) -> list[Any]:
    """What a function given to ``apply`` returned, as a list, held against ``dims_out``."""
    is_sequence = isinstance(found, tuple | list)
    if is_sequence != several or (several and len(found) != len(results)):
        returned = f"a {type(found).__name__} of {len(found)}" if is_sequence else f"one {type(found).__name__}"
        raise fail(
            f"apply: the function returned {returned}; dims_out says "
            f"{f'a tuple of {len(results)} arrays' if several else 'one array'}. dims_out is a list, with an entry for "
            "each array, where the function returns a tuple of them."
        )
    arrays = [jnp.asarray(a) for a in (found if several else [found])]
    for i, (a, these) in enumerate(zip(arrays, results, strict=True)):
        if a.shape[num_batch:] != sizes_of(these):
            which = f"result {i}" if several else "the result"
            raise fail(
                f"apply: dims_out asks for ({show(these)}), so the shape {sizes_of(these)}; {which} of the function "
                f"has the shape {a.shape[num_batch:]}.\n"
                "  Give dims_out the names of what the function makes, with their sizes: mw.Dim(name, size)."
            )
    return arrays


def _batched(array: Any, have: Dims, batch: Dims, core: Dims) -> Any:
    out = tuple(d for d in batch if d in have) + core
    return align(array, have, out)


def _result_dims(out: Any, every: Dims) -> Dims:
    asked = "apply: dims_out"
    listed = out if isinstance(out, tuple | list) else (out,) if isinstance(out, Dim) else as_names(out, asked)
    return as_dims([d if isinstance(d, Dim) else find(every, d, asked) for d in listed], asked)


def _check_whole(all_dims: Sequence[Dims]) -> None:
    scope = current_manual()
    if scope is None:
        return
    for these in all_dims:
        for d in these:
            if scope.axes_of(d.name):
                raise fail(
                    f"apply: the function works on the dim {d.name!r}, which the layout splits over "
                    f"{', '.join(scope.axes_of(d.name))}, so a device sees only a slice of it.\n"
                    f"  layout: {scope.text}\n"
                    f"  Rename it to a name that is not split: x.rename({d.name}={d.name + '_whole'!r}) gathers it."
                )
