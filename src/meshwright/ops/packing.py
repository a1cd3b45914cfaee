"""Packing: tensors as arrays, and back, for JAX's functions that hand arrays on.

What goes round a loop, through ``vmap`` or into a custom gradient are arrays; the form in which a device held each
tensor is kept beside them, so that what comes out is held as what went in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .. import collectives
from ..dims import Dims, names_of, show
from ..errors import fail, fail_type
from ..held import slice_own
from ..here import check_here
from ..scope import Axes, Split, current_manual, mapped_axes
from ..tensor import PARAMETER, Role, Tensor, is_tensor, make


@dataclass(frozen=True)
class Held:
    """A tensor's dims and how a device holds it, or a plain array (dims None)."""

    dims: Dims | None
    role: Role = ""
    rest: Split | None = None
    copies: Axes = ()
    home: Split | None = None
    dtype: Any = None
    """Of what was packed; None where it may still be promoted."""

    def unpack(self, x: Any, asked: str) -> Any:
        """The array of ``x`` in this form; its type varies over all the axes that it can."""
        if self.dims is None:
            if isinstance(x, Tensor):
                raise fail(f"{asked}: a tensor ({show(x.dims)}) where a plain array came in.")
            return collectives.vary(jnp.asarray(x), mapped_axes()) if mapped_axes() else jnp.asarray(x)
        if not isinstance(x, Tensor) or set(x.dims) != set(self.dims):
            found = f"({show(x.dims)})" if isinstance(x, Tensor) else "a value without dims"
            raise fail(f"{asked}: expected a tensor with the dims ({show(self.dims)}), found {found}.")
        if self.dtype is not None and x.dtype != self.dtype:
            raise fail_type(
                f"{asked}: ({show(x.dims)}) went in as {self.dtype} and came back as {x.dtype}. What is handed on "
                f"keeps its dtype: write .astype('{self.dtype}') where it comes back, or begin with {x.dtype}."
            )
        check_here(x, asked)
        x = x.reorder(*names_of(self.dims))
        scope = current_manual()
        if scope is None:
            return x.raw
        as_it_is = (x.rest, x.copies, x.partial) == (self.rest, self.copies, ())
        axes = {a for part in (scope.split(self.dims, asked), self.rest or ()) for axes in part for a in axes}
        varying = frozenset(axes | set(self.copies)) | mapped_axes()
        if as_it_is:
            return collectives.vary(x.raw, varying, scope.sums)
        whole = x.local(varying)
        return collectives.vary(slice_own(whole, scope, self.rest) if self.rest else whole, varying, scope.sums)

    def pack(self, array: Any, asked: str) -> Any:
        if self.dims is None:
            return array
        return make(array, self.dims, asked=asked, role=self.role, rest=self.rest, copies=self.copies, home=self.home)

    def without(self, at: int) -> "Held":
        """The form of one position along the dim at ``at``, which every device holds the whole of."""
        assert self.dims is not None
        rest, home = (split[:at] + split[at + 1 :] if split else None for split in (self.rest, self.home))
        at_home = self.home is not None and bool(self.home[at])  # then no device has its slice of one position
        kept = self.dims[:at] + self.dims[at + 1 :]
        return Held(kept, self.role, rest, self.copies, None if at_home else home, self.dtype)


def held_as(x: Any) -> Held:
    """The form in which ``x`` is handed on. A parameter stays at rest; other promises are kept first."""
    if not isinstance(x, Tensor):
        return Held(None)
    dtype = None if getattr(x.raw, "weak_type", False) else x.dtype
    if x.role == PARAMETER:
        return Held(x.dims, x.role, x.rest, x.copies, x.home, dtype)
    return Held(x.dims, x.role, dtype=dtype)


class Packing:
    """A pytree of tensors as a list of arrays, and back."""

    def __init__(self, tree: Any, asked: str) -> None:
        paths, self.structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_tensor)
        self.held = [held_as(x) for _, x in paths]
        self.where = [f"{asked}{jax.tree_util.keystr(path)}" for path, _ in paths]
        self.asked = asked

    def unpack(self, tree: Any) -> list[Any]:
        leaves, structure = jax.tree.flatten(tree, is_leaf=is_tensor)
        if structure != self.structure:
            raise fail_type(f"{self.asked}: came back as {structure}, went in as {self.structure}.")
        return [h.unpack(x, where) for h, x, where in zip(self.held, leaves, self.where, strict=True)]

    def pack(self, arrays: Sequence[Any]) -> Any:
        leaves = [h.pack(a, where) for h, a, where in zip(self.held, arrays, self.where, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)
