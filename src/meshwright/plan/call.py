"""Calls: a function and what it is called with, as ``jax.jit`` traces them.

Not everything that a function is given is data. An Equinox module may have a function among its leaves, and ``jax.jit``
takes some arguments as static. What is neither an array nor a number is bound to a function before it is compiled, as
a closure would; of a function that is compiled already, JAX's trace says which arguments it left out.

    mw.plan(loss, module, x)                          module.act, a function, is bound
    mw.plan(jax.jit(f, static_argnums=1), p, 3, x)    the trace's arguments are p and x
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh as JaxMesh
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, SequenceKey

from ..explain import path_text
from ..tensor import Tensor, is_tensor

_DATA = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | bool | int | float | complex
"""What ``jax.jit`` traces."""


@dataclass(frozen=True)
class Leaf:
    """One array that a program is given."""

    path: str
    """Its place among the arguments: ``0.blocks.wq``, or ``batch.ids`` of an argument given by name."""
    array: Any
    """Itself, its shape, or a number."""
    role: str
    """The role of its tensor; "" for an array without names."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """A function and its arguments, which can be traced again for other devices."""

    fn: Any
    """As ``jax.jit`` returns it."""
    args: tuple[Any, ...]
    """Without what is bound to the function."""
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Call":
        """The call of a function, compiled by ``jax.jit`` or not."""
        if isinstance(fn, jax.stages.Wrapped):
            return cls(fn, args, kwargs)
        leaves, tree = jax.tree.flatten((args, dict(kwargs)))
        if all(isinstance(x, _DATA) for x in leaves):
            return cls(jax.jit(fn), args, kwargs)
        bound = [None if isinstance(x, _DATA) else x for x in leaves]
        args, kwargs = tree.unflatten(x if isinstance(x, _DATA) else None for x in leaves)
        return cls(jax.jit(_binding(fn, tree, bound)), args, kwargs)

    def shapes(self) -> "Call":
        """The same call of shapes, which keeps no array alive."""
        args, kwargs = jax.tree.map(_shape_of, (self.args, dict(self.kwargs)))
        return Call(self.fn, args, kwargs)

    def trace(self) -> Any:
        """JAX's ``Traced``."""
        return self.fn.trace(*self.args, **self.kwargs)

    def over(self, mesh: JaxMesh) -> Any:
        """The trace for the devices of ``mesh``: each argument is split as it was."""

        def placed(x: Any) -> Any:
            if not isinstance(x, jax.ShapeDtypeStruct):
                return x
            spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else PartitionSpec()
            return x.update(sharding=NamedSharding(mesh, spec))

        args, kwargs = jax.tree.map(placed, (self.args, dict(self.kwargs)))
        return Call(self.fn, args, kwargs).trace()

    def leaves(self, traced: Any) -> list[Leaf]:
        """The arrays that the trace takes, in its order: those of the arguments that it did not take as static."""
        in_order, by_name = traced.args_info
        found = [leaf for i in self._traced(in_order) for leaf in _leaves((SequenceKey(i),), self.args[i])]
        for name in sorted(by_name):
            found += _leaves((DictKey(name),), self.kwargs[name])
        return found

    def _traced(self, described: Sequence[Any]) -> Iterator[int]:
        """The places of the arguments that a trace describes: it leaves out those that are static, and does not say
        which. No array is static, so two that could be meant are numbers, of which nothing but the path differs."""
        rest = iter(range(len(self.args)))
        for info in described:
            yield next(i for i in rest if len(self.args) == len(described) or _is_described(self.args[i], info))


def _binding(fn: Callable[..., Any], tree: Any, bound: Sequence[Any]) -> Callable[..., Any]:
    """``fn`` for arguments with None in the places of what is bound."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = tree.flatten_up_to((args, kwargs))
        args, kwargs = tree.unflatten(x if x is not None else b for x, b in zip(given, bound, strict=True))
        return fn(*args, **kwargs)

    return call


def _is_described(x: Any, info: Any) -> bool:
    leaves, tree = jax.tree.flatten(x)
    described, expected = jax.tree.flatten(info)
    if tree != expected:
        return False
    return all(isinstance(x, _DATA) and np.shape(x) == a.shape for x, a in zip(leaves, described, strict=True))


def _leaves(before: tuple[Any, ...], argument: Any) -> Iterator[Leaf]:
    for path, x in jax.tree_util.tree_flatten_with_path(argument, is_leaf=is_tensor)[0]:
        role, names = (x.role, x.names) if isinstance(x, Tensor) else ("", ())
        for array in jax.tree.leaves(x):
            yield Leaf(path_text((*before, *path)), array, role, names)


def _shape_of(x: Any) -> Any:
    if not isinstance(x, jax.Array | np.ndarray):
        return x
    where = x.sharding if isinstance(x, jax.Array) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=jax.typeof(x).weak_type)
