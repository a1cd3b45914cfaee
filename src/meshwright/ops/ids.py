"""How ids meet a tensor: the names they share, the places they mean, and the slices of both.

``take`` and ``gather`` read where ids point, ``scatter_add`` and ``scatter_set`` write there. What the two directions
share is here: the names worked out (``Meeting``), ids checked and turned into positions, and XLA's gather and scatter
told in names. What is communicated stands in ``indexing.py`` and ``scatter.py``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..dims import Dim, Dims, names_of, show, without
from ..errors import fail_type
from ..scope import Axes, current_manual
from ..tensor import Tensor
from .lowering import axes_of, check_operand, local_sizes

Ids = Tensor | int | np.integer | jax.Array


@dataclass(frozen=True)
class Meeting:
    """How ids meet the dims of a tensor."""

    whole: Dims
    """The dims of the indexed tensor."""
    names: tuple[str, ...]
    """The indexed ones."""
    picked: Dims
    """The dims of the ids, together."""
    joined: Axes = ()
    """The axes, of the ids' own dims, over which slices are joined first."""

    @property
    def batch(self) -> tuple[str, ...]:
        """The names shared, in the order of the indexed tensor, as XLA wants them."""
        picked = names_of(self.picked)
        return tuple(d.name for d in self.whole if d.name in picked and d.name not in self.names)

    @property
    def own(self) -> Dims:
        """The dims that only the ids have."""
        return without(self.picked, self.batch)

    @property
    def kept(self) -> Dims:
        """The dims that only the tensor has."""
        return without(self.whole, (*self.names, *self.batch))

    def joined_of(self, d: Dim) -> Axes:
        """The axes over which slices along ``d`` are joined."""
        split = axes_of(d) if d in self.own else None
        return tuple(a for a in split[1] if a in self.joined) if split is not None else ()

    def join(self, array: Any, these: Dims) -> Any:
        """A local array of dims ``these``, its slices joined along the ids' own dims."""
        for i, d in enumerate(these):
            if axes := self.joined_of(d):
                array = collectives.gather(array, axes, i)
        return array

    def read(self, array: Any, positions: Any, fill: Any) -> Any:
        """The entries at local positions (a last place for each name), ``fill`` outside; dims: the ids', then kept."""
        numbers = lax.GatherDimensionNumbers(
            offset_dims=self._window(),
            collapsed_slice_dims=tuple(sorted(_places(self.names, self.whole))),
            start_index_map=_places(self.names, self.whole),
            operand_batching_dims=_places(self.batch, self.whole),
            start_indices_batching_dims=_places(self.batch, self.picked),
        )
        kept = names_of(self.kept)
        sizes = tuple(s if d.name in kept else 1 for s, d in zip(array.shape, self.whole, strict=True))
        return lax.gather(array, positions, numbers, sizes, mode=lax.GatherScatterMode.FILL_OR_DROP, fill_value=fill)

    def write(self, scatter: Any, array: Any, positions: Any, updates: Any) -> Any:
        """``scatter`` (``lax.scatter_add`` or its like) into ``array`` at local positions along the one name."""
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=self._window(),
            inserted_window_dims=_places(self.names, self.whole),
            scatter_dims_to_operand_dims=_places(self.names, self.whole),
            operand_batching_dims=_places(self.batch, self.whole),
            scatter_indices_batching_dims=_places(self.batch, self.picked),
        )
        return scatter(array, positions[..., None], updates, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)

    def _window(self) -> tuple[int, ...]:
        return tuple(range(len(self.picked), len(self.picked) + len(self.kept)))


def _places(names: Sequence[str], these: Dims) -> tuple[int, ...]:
    return tuple(names_of(these).index(n) for n in names)


def check_ids(ids: Any, asked: str) -> None:
    """Raise a ``TypeError`` unless ids are a tensor or a scalar of integers."""
    check_operand(ids, asked)
    kind = ids.dtype if isinstance(ids, Tensor) else jnp.result_type(ids)
    if not jnp.issubdtype(kind, jnp.integer):
        what = f"the tensor ({show(ids.dims)})" if isinstance(ids, Tensor) else "the scalar"
        raise fail_type(f"{asked}: ids must be integers; {what} is of {kind}. Write ids.astype(jnp.int32).")


def dims_of(x: Any) -> Dims:
    """The dims of a tensor; a scalar has none."""
    return x.dims if isinstance(x, Tensor) else ()


def as_int32(ids: Any, size: int) -> Any:
    """Ids as int32; those that would not fit stay outside -size … size-1."""
    info = jnp.iinfo(ids.dtype)
    if info.bits > 32 or (info.bits == 32 and info.min == 0):
        ids = jnp.clip(ids, max(int(info.min), -size - 1), size)
    return lax.convert_element_type(ids, jnp.int32)


def from_start(ids: Any, size: int) -> Any:
    """Positions counted from the start: negative ids count from the end."""
    positions = as_int32(ids, size)
    return lax.select(lax.lt(positions, np.int32(0)), lax.add(positions, np.int32(size)), positions)


def from_first_held(positions: Any, d: Dim, asked: str) -> Any:
    """Positions counted from the first one along ``d`` that this device holds."""
    split = axes_of(d)
    if split is None:
        return positions
    return lax.sub(positions, lax.mul(collectives.index(split[1]), np.int32(local_sizes((d,), asked)[0])))


def all_axes(these: Iterable[Dim]) -> Axes:
    """The axes that split any of these dims."""
    scope = current_manual()
    return tuple(a for d in these for a in scope.axes_of(d.name)) if scope is not None else ()
