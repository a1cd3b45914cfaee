"""Rows: tokens sorted by the expert they go to, as many for each as there are, for products by groups.

    rows = to_rows(x(batch, length, embed), experts(batch, length, choices), Dim("experts", 8))
    rows = rows.dot(weight(experts, embed, ff), "embed").map(mw.relu).dot(back(experts, ff, embed), "ff")
    y, num_overflown = rows.to_tokens(weights(batch, length, choices))

How many rows a device has is known when the program runs, but arrays have a size: there is room for the most that can
come, the rows of all experts one after the other and zeros behind them. That number depends on the layout, so rows are
no tensor; they live between ``to_rows`` and ``to_tokens``.

==============================================  ==============================================================
experts split over                              between devices
==============================================  ==============================================================
axes that split tokens too                      all-to-all of rows and of their counts, and one back
axes along which tokens are whole               nothing: each device has rows for its own experts alone; the
                                                sum over them is pending in the result
==============================================  ==============================================================

Where ``choices`` are split, each device has rows for its own, as if these were more tokens; the sum over them is
pending.

The all-to-all sends each device as many rows as could go there: the most are all tokens of the sender, as often as it
has experts that one token can choose. ``bound`` makes room for that multiple of an even share instead: what exceeds it
is left out and counted. (JAX's ``ragged_all_to_all`` would send what there is, but XLA for CPU cannot run it.)
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import collectives
from ..dims import Dim, Dims, find, names_of, show, without
from ..errors import fail
from ..scope import Axes, Scope, current_manual
from ..tensor import Tensor, make
from .ids import all_axes
from .lowering import align, local_sizes, run, wanted
from .making import zeros

ASKED = "to_rows"
CHOICES = "choices"
ROWS = "routed_rows"
"""What rows are called for as long as an elementwise operation runs: a name that no layout splits."""


@dataclass(frozen=True)
class Rows:
    """One device's rows: inside a region not a tensor, for their number depends on the layout."""

    array: Any
    """(rows, the sizes of ``dims``)"""
    sizes: Any
    """How many rows each of this device's experts has, one after the other; int32."""
    dims: Dims
    """Of one row."""
    partial: Axes
    """The axes over which the sum is still to be taken."""
    way: "_Way"

    def dot(self, weight: Tensor, over: str) -> "Rows":
        """Each row times the matrix of its expert, summed over the dim ``over``.

        Args:
            weight: (experts, over, another dim), with the number of experts that ``to_rows`` was given.
        """
        asked = "Rows.dot"
        experts, summed, out = weight.dims
        assert experts == self.way.experts and (summed,) == self.dims and summed.name == over
        want = self.way.want | wanted(asked, weight.dims)
        for d in (summed, out):
            _check_apart(d, self.way.chosen, f"{asked}: of weights ({show(weight.dims)})")
        rows, sizes = self._tensor().local(want), collectives.vary(self.sizes, want)

        def product(matrices: Any) -> Any:
            return jax.lax.ragged_dot(rows, matrices, sizes)

        array = run(product, [weight], want)
        return dataclasses.replace(self, array=array, dims=(out,), partial=all_axes((summed,)))

    def map(self, function: Callable[..., Tensor], *others: "Rows") -> "Rows":
        """An elementwise function of named tensors, for rows."""
        result = function(*(rows._tensor() for rows in (self, *others)))
        return dataclasses.replace(self, array=result.held, partial=result.pending)

    def _tensor(self) -> Tensor:
        """What is here under names, for as long as an operation runs."""
        these = (Dim(ROWS, self.array.shape[0]), *self.dims)
        return make(self.array, these, asked=ASKED, partial=self.partial)  # type: ignore[no-any-return]

    def to_tokens(self, weights: Tensor) -> tuple[Tensor, Tensor | jax.Array]:
        """Each token's rows, added up times their weights, and for each group how many found no room.

        Args:
            weights: floating, with the dims of the experts that ``to_rows`` was given.

        Returns:
            (the tokens' dims, that of a row), and a float32 tensor of the tokens' dims but the last, or a scalar.
        """
        way = self.way
        want = way.want.union(self.partial, wanted(ASKED, self.dims))
        gates = align(weights.local(want), weights.dims, way.chosen).astype(self.array.dtype).reshape(-1)
        picks = collectives.vary(way.picks, want)
        array = way.sent_back(self.array) * jnp.take(gates, picks, mode="fill", fill_value=0)[:, None]
        blank = collectives.vary(jnp.zeros((way.num_tokens, array.shape[1]), array.dtype), want)
        added = blank.at[picks // way.num_choices].add(array, mode="drop")
        out = (*way.tokens, *self.dims)
        partial = self.partial + way.apart + all_axes((way.choices,))
        result = make(added.reshape(local_sizes(out, ASKED)), out, asked=ASKED, partial=partial)
        return result, way.num_overflown()


@dataclass(frozen=True, kw_only=True)
class _Way:
    """Where each row comes from, and how it goes back."""

    experts: Dim
    tokens: Dims
    choices: Dim
    want: frozenset[str]
    apart: Axes
    """Axes along which tokens and choices are whole and experts are split."""
    together: Axes
    """Axes that split both."""
    num_sent: int
    """Devices along these."""
    picks: Any
    """For each place that is sent, which choice it holds, counted through this device's tokens and its choices of
    theirs; one beyond all of them for none."""
    mine: Any
    """For each choice, whether this device, or one that it sends to, has that expert."""
    exact: bool
    """Whether there is room for all that may come."""
    inverse: Any
    """Where each row that came stands among those sorted by expert; None where nothing was sent."""

    @property
    def chosen(self) -> Dims:
        return (*self.tokens, self.choices)

    @property
    def num_choices(self) -> int:
        """On this device, of each of its tokens."""
        return local_sizes((self.choices,), ASKED)[0]

    @property
    def num_tokens(self) -> int:
        return math.prod(local_sizes(self.tokens, ASKED))

    def num_overflown(self) -> Any:
        """For each group, how many choices there was no room for."""
        groups, last = self.tokens[:-1], self.tokens[-1]
        if self.exact:
            return zeros(groups) if groups else jnp.float32(0)
        kept = jnp.zeros_like(self.mine).at[self.picks].set(True, mode="drop")
        lost = (self.mine & ~kept).reshape(local_sizes(self.chosen, ASKED))
        num = jnp.sum(lost, (-2, -1), dtype=jnp.float32)
        return make(num, groups, asked=ASKED, partial=self.apart + all_axes((last, self.choices)))

    def sent_back(self, array: Any) -> Any:
        """Rows sorted by expert, as the devices sent them that asked."""
        if self.inverse is None:
            return array
        array = _permuted(array, self.inverse).reshape(self.num_sent, -1, array.shape[1])
        array = collectives.exchange(array, self.together, 0, 0)
        return array.reshape(-1, array.shape[-1])


def _permuted(array: Any, order: Any) -> Any:
    order = collectives.vary(order, collectives.varies_over(array))
    return array.at[order].get(unique_indices=True, mode="promise_in_bounds")


def to_rows(x: Tensor, experts: Tensor, among: Dim, bound: float | None = None) -> Rows:
    """The tokens, each as often as it chose an expert, sorted by expert.

    Args:
        x: the dims of ``experts`` but ``choices``, and one more, that of a row.
        experts: int32, the tokens' dims, the last of them those of one group, and ``choices``: which of ``among`` a
            token goes to; the choices of one token differ. One outside of them goes nowhere.
        among: the experts: a dim of the name by which their weights are split.
        bound: room for the rows that one device may send to another, as a multiple of the even share; None: for all
            that may come.
    """
    choices, tokens = find(experts.dims, CHOICES, ASKED), without(experts.dims, (CHOICES,))
    num_choices = local_sizes((choices,), ASKED)[0]
    row = without(x.dims, names_of(tokens))
    _check(x, experts, row)
    _check_apart(row[0], (among, choices), f"{ASKED}: of x ({show(x.dims)})")
    places = wanted(ASKED, experts.dims) | wanted(ASKED, (among,))
    want = places | wanted(ASKED, x.dims)
    values = align(x.local(want), x.dims, tokens + row)
    values = values.reshape(-1, values.shape[-1])
    chosen = align(experts.local(places), experts.dims, (*tokens, choices)).reshape(-1)
    owners = _Owners.of(among, (*tokens, choices))
    key, mine = owners.key(chosen, among.size)
    most, room = (owners.room(values.shape[0], num_choices, limit) for limit in (None, bound))
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    every = jnp.arange(owners.num_sent * owners.num_own, dtype=jnp.int32)
    num = jnp.sum(key[:, None] == every[None], axis=0, dtype=jnp.int32)
    num = num.reshape(owners.num_sent, owners.num_own)
    ends = jnp.minimum(jnp.cumsum(num, 1), room)
    sizes = jnp.diff(ends, axis=1, prepend=0)
    sent = num.sum(1, dtype=jnp.int32)
    first = jnp.cumsum(sent) - sent
    place = jnp.arange(room, dtype=jnp.int32)[None]
    held = jnp.take(order, first[:, None] + place, mode="clip")
    picks = jnp.where(place < ends[:, -1:], held, chosen.shape[0])
    rows = jnp.take(values, collectives.vary(picks // num_choices, want), axis=0, mode="fill", fill_value=0)
    inverse = None
    if owners.together:
        rows, sizes = (collectives.exchange(a, owners.together, 0, 0) for a in (rows, sizes))
        which = jnp.sum(place[..., None] >= jnp.cumsum(sizes, 1)[:, None], axis=-1, dtype=jnp.int32)
        order = jnp.argsort(which.reshape(-1), stable=True)
        inverse = jnp.argsort(order)
        rows = _permuted(rows.reshape(-1, rows.shape[-1]), order)
    rows = rows.reshape(-1, rows.shape[-1])
    way = _Way(
        experts=among,
        tokens=tokens,
        choices=choices,
        want=want,
        apart=owners.apart,
        together=owners.together,
        num_sent=owners.num_sent,
        picks=picks.reshape(-1),
        mine=mine,
        exact=room == most,
        inverse=inverse,
    )
    return Rows(rows, sizes.sum(0, dtype=jnp.int32), row, (), way)


def _check(x: Tensor, experts: Tensor, row: Dims) -> None:
    if len(row) != 1:
        raise fail(
            f"{ASKED}: a row has one dim, and of x ({show(x.dims)}) {len(row)} are not among the dims of the experts "
            f"that tokens choose ({show(experts.dims)}): ({show(row)}).\n  Give the choices every dim of x but one: "
            f"each token has its own."
        )
    if (scope := current_manual()) is not None and (axes := scope.axes_of(ROWS)):
        raise fail(
            f"{ASKED}: the layout {scope.where} splits {ROWS!r} over {' x '.join(map(repr, axes))}. How many rows a "
            f"device has depends on where the experts are, which their own name says: leave {ROWS!r} out."
        )


def _check_apart(d: Dim, others: Dims, asked: str) -> None:
    """Devices along the axes that split ``others`` have other rows, of which ``d`` must not be split over them."""
    if both := set(all_axes((d,))).intersection(all_axes(others)):
        raise fail(
            f"{asked} the dim {d.name!r} and rows ({show(others)}) are both split over the axis {min(both)!r}.\n"
            f"  One axis splits at most one of the two. Give {d.name!r} another axis."
        )


@dataclass(frozen=True)
class _Owners:
    """Which devices have which experts."""

    scope: Scope | None
    axes: Axes
    """Over which experts are split."""
    together: Axes
    """Those of them that split tokens or choices too."""
    num_own: int
    """Experts on a device."""

    @classmethod
    def of(cls, among: Dim, chosen: Dims) -> "_Owners":
        axes, over = all_axes((among,)), all_axes(chosen)
        return cls(current_manual(), axes, tuple(a for a in axes if a in over), local_sizes((among,), ASKED)[0])

    @property
    def apart(self) -> Axes:
        return tuple(a for a in self.axes if a not in self.together)

    def _num(self, axes: Axes) -> int:
        return self.scope.size(axes) if self.scope is not None else 1

    @property
    def num_sent(self) -> int:
        """How many devices rows are sent to."""
        return self._num(self.together)

    def room(self, num_tokens: int, num_choices: int, bound: float | None) -> int:
        """Rows that may go from one device to one other."""
        most = num_tokens * min(num_choices, self.num_own)
        if bound is None or not self.axes:
            return most
        return min(most, math.ceil(bound * num_tokens * num_choices / self._num(self.axes)))

    def key(self, chosen: Any, num: int) -> tuple[Any, Any]:
        """What to sort choices by: the device to send to, then its expert; those that go nowhere, or are another
        device's to send, last. And which are not."""
        mine = (chosen >= 0) & (chosen < num)
        at = jnp.clip(chosen // self.num_own, 0, self._num(self.axes) - 1)
        if self.apart:
            mine &= jnp.take(self._along(self.apart), at) == collectives.index(self.apart)
        sent = jnp.take(self._along(self.together), at) if self.together else 0
        return jnp.where(mine, sent * self.num_own + chosen % self.num_own, self.num_sent * self.num_own), mine

    def _along(self, axes: Axes) -> Any:
        """For each owner, its place along ``axes``."""
        owner = np.arange(self._num(self.axes))
        places = dict(zip(self.axes, np.unravel_index(owner, [self._num((a,)) for a in self.axes]), strict=True))
        found = np.ravel_multi_index([places[a] for a in axes], [self._num((a,)) for a in axes])
        return jnp.asarray(found, jnp.int32)
