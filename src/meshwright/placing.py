"""Placing: tensors onto the devices of a mesh, and back.

``shard`` lays a tree out as regions expect it: each tensor split by the compute rules of its names and by the rules at
rest of its role, everything without names whole on every device. A region called on a tree that lies otherwise moves
it first, so placing once, before the first step, is what saves memory and time; it never changes a result.

    params = mw.shard(params, mesh, layout)
    state = mw.shard(optimizer.init(params), mesh, layout, role="optimizer")

Optax maps over parameters and state together, so the tensors of its state carry the role of the parameters they were
made from. They keep it; ``role="optimizer"`` says by whose rules they are placed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from . import collectives
from .dims import Dims
from .errors import fail
from .explain import path_text
from .layout import Layout
from .mesh import Mesh
from .scope import Scope, Split, current
from .tensor import Role, Tensor, is_tensor

_ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


def shard(tree: Any, mesh: Mesh | str, layout: Layout | str, role: Role | None = None) -> Any:
    """A tree of tensors, placed on the devices of ``mesh`` as ``layout`` says.

    Args:
        tree: a pytree of tensors and arrays. On values this places them (with several processes each gives the same
            whole values, and keeps the slices of its own devices); under ``jax.jit`` it states their sharding to
            XLA's partitioner; shapes (``jax.ShapeDtypeStruct``) get the sharding. Python numbers stay as they are.
        mesh: the mesh, or its text.
        layout: the layout, or its rules.
        role: the role whose rules at rest hold for every tensor, "optimizer" for the optimizer's state; None: each its
            own. The tensors keep the role they have.

    Returns:
        The same tree. Arrays without names are whole on every device.

    Raises:
        ValueError: a tensor cannot be split as the layout says (nothing is placed then), the mesh is only described and
            the tree holds values, or this is called inside a region.
    """
    if current() is not None:
        raise fail("shard: inside a region tensors are placed by their names already. Call mw.shard outside mw.spmd.")
    mesh = mesh if isinstance(mesh, Mesh) else Mesh(mesh)
    layout = layout if isinstance(layout, Layout) else Layout(layout)
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_tensor)
    scope = layout.scope(mesh)
    splits = [_split_of(x, scope, layout, role, path_text(path)) for path, x in paths]
    leaves = [_leaf_placed(x, mesh, split) for (_, x), split in zip(paths, splits, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def unshard(tree: Any) -> Any:
    """A tree of tensors with their whole values on the host.

    With several processes every process must call it, on the same tree, and every one gets the whole: arrays travel
    over the network one after the other, each for a moment whole on every device.

    Returns:
        The same tree; the tensors and arrays hold NumPy arrays (random keys stay JAX's, on one device). Shapes lose
        their sharding. Whatever is not an array stays as it is.

    Raises:
        ValueError: the tree holds traced values, which have no place to be taken from.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_tensor)
    for path, x in paths:
        if isinstance(x.raw if isinstance(x, Tensor) else x, Tracer):
            what = path_text(path) or "the tensor"
            raise fail(
                f"unshard: {what} is traced (under jax.jit or jax.grad): it has no values yet. Call mw.unshard on what "
                "the compiled function returns."
            )
    return jax.tree.unflatten(structure, [jax.tree.map(_whole, x) for _, x in paths])


def _split_of(x: Any, scope: Scope, layout: Layout, role: Role | None, path: str) -> Split:
    """The axes of each dim where the leaf is to lie; empty for what has no names."""
    if not isinstance(x, Tensor):
        return ()
    asked = f"shard: {path or 'the tensor'}"
    if x.scope is not None:
        raise fail(f"{asked} is a slice from inside a region. Return it from the function given to mw.spmd first.")
    return _whole_split(scope, layout, x.dims, role or x.role, asked)


def _whole_split(scope: Scope, layout: Layout, these: Dims, role: Role, asked: str) -> Split:
    rest = layout.at_rest(scope, these, role, asked)
    return tuple(a + b for a, b in zip(scope.split(these, asked), rest, strict=True))


def _leaf_placed(x: Any, mesh: Mesh, split: Split) -> Any:
    if isinstance(x, Tensor):
        return jax.tree.unflatten(jax.tree.structure(x), [_placed(x.raw, mesh, split)])
    return _placed(x, mesh, split) if isinstance(x, _ARRAYS) else x


def _placed(array: Any, mesh: Mesh, split: Split) -> Any:
    if isinstance(array, Tracer):
        return collectives.constrain(array, mesh.jax_mesh, split)
    where = NamedSharding(mesh.jax_mesh, collectives.spec(split))
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)
    if mesh.described:
        raise fail(
            f"shard: {mesh!r} is only described: it has no devices to hold values. Give shapes (jax.eval_shape), or "
            "use a mesh of present devices."
        )
    if where.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, where)
    return _from_host(array, where)


def _from_host(array: Any, where: NamedSharding) -> Any:
    """An array over several processes, each of which has the whole of it: nothing is sent."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _from_host(jax.random.key_data(array), NamedSharding(where.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def _whole(array: Any) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    if not isinstance(array, jax.Array):
        return array
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_whole(jax.random.key_data(array)), impl=jax.random.key_impl(array))
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
