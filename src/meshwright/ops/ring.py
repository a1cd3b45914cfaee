"""Attention between devices that split the length: keys and values go round a ring, and no device has all of them.

Each device keeps its queries and sees one device's keys after the other (Liu, Zaharia and Abbeel, "Ring attention with
blockwise transformers", 2023). While it works on one device's, the next one's are on their way. In the backward pass
keys and values go round once more, and their gradients behind them, which come home at the end.

Under a causal mask the last device of a line would work twice as long as the mean one. So each takes two halves of a
device's length, one from the beginning and one from the end, and every turn is two products of halves on every device:

    devices                0     1     2     3
    halves as they lie    0 1   2 3   4 5   6 7
    halves in the ring    0 7   1 6   2 5   3 4      two permutes bring each operand there, two the result back

A window needs the nearest neighbours alone, and lies as it is.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import collectives
from ..scope import Axes
from .blocks import Seen, Sight, Tokens, kept, result, see, see_back, see_own, see_own_back

Array = Any


@dataclass(frozen=True)
class Ring:
    """Who sees what, and over which axes the length is split."""

    sight: Sight
    axes: Axes = ()
    """The first one the slowest; none: each device has the whole length."""
    num: int = 1
    """The devices along them."""

    def halved(self, length: int) -> bool:
        """Whether each device takes two halves of its ``length`` tokens."""
        return self.num > 1 and self.sight.causal and self.sight.window is None and length % 2 == 0

    def ways(self, which: int) -> list[tuple[int, int]]:
        """From each device to the one that works on its first (0) or second (1) half."""
        at = [2 * device + which for device in range(self.num)]
        return [(device, min(place, 2 * self.num - 1 - place)) for device, place in enumerate(at)]

    def walks(self, length: int) -> list[tuple[int, int]]:
        """In which direction keys go round, and how far. Devices beyond see nothing of them."""
        window, most = self.sight.window, self.num - 1
        far = most if window is None else min(most, -(-(window - 1) // length))
        if self.sight.causal or 2 * far < most:
            return [(1, far), *([] if self.sight.causal else [(-1, far)])] if far else []
        return [(1, most)] if most else []


Pieces = Sequence[Any]
"""(keys, values, segments) of tokens that lie together: of a device's, or of each half of them."""


@dataclass(frozen=True)
class _Either:
    """The first of two pieces where this holds, else the second."""

    first: Array

    def of(self, one: Any, two: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(self.first, a, b), one, two)


Which = int | _Either
Job = tuple[Which, Which, Sight]
"""Which queries see which keys, and how."""


def _take(pieces: Sequence[Any], which: Which) -> Any:
    return pieces[which] if isinstance(which, int) else which.of(*pieces)


def _put(pieces: Sequence[Any], which: Which, new: Any) -> list[Any]:
    if isinstance(which, int):
        return [new if i == which else x for i, x in enumerate(pieces)]
    return [which.of(new, pieces[0]), which.of(pieces[1], new)]


def _add(pieces: Sequence[Any], which: Which, more: Any) -> list[Any]:
    return _put(pieces, which, jax.tree.map(jnp.add, _take(pieces, which), more))


class _Device:
    """A device's part in the ring."""

    def __init__(self, ring: Ring, length: int, beside: Array) -> None:
        self.ring, self.length, self.beside = ring, length, beside
        self.halved = ring.halved(length)
        self.here = self._not_before(collectives.index(ring.axes) if ring.axes else jnp.int32(0))

    def _not_before(self, x: Any) -> Any:
        """``x``, not to be had before the queries are there. What depends on nothing that a loop over layers hands on
        (masks, made of positions and segments) JAX takes out of that loop, and holds it whole for every block."""
        first = lax.slice(self.beside, (0,) * self.beside.ndim, [min(1, n) for n in self.beside.shape])
        return lax.optimization_barrier((x, first))[0]

    # Where tokens lie

    def apart(self, x: Any, dim: int) -> list[Any]:
        """A device's slice along ``dim`` as the pieces that it works on: itself, or the two halves that are its own."""
        if x is None or not self.halved:
            return [x] * (1 + self.halved)
        even, odd = (self._bring(half, i) for i, half in enumerate(jnp.split(x, 2, dim)))
        return [jnp.where(self._first_is_even, even, odd), jnp.where(self._first_is_even, odd, even)]

    def together(self, pieces: Sequence[Array], dim: int) -> Array:
        """What ``apart`` took apart."""
        if not self.halved:
            return pieces[0]
        one, two = pieces
        halves = jnp.where(self._first_is_even, one, two), jnp.where(self._first_is_even, two, one)
        return jnp.concatenate([self._bring(half, i, home=True) for i, half in enumerate(halves)], dim)

    @property
    def _first_is_even(self) -> Array:
        """Whether the first half that a device works on is the first half of some device's slice."""
        return self.here % 2 == 0

    def _bring(self, half: Array, which: int, home: bool = False) -> Array:
        """Every device's first or second half to the device that works on it, or back."""
        pairs = self.ring.ways(which)
        return collectives.permute(half, self.ring.axes, [(b, a) for a, b in pairs] if home else pairs)

    def tokens(self, piece: Any, which: Which, device: Array) -> Tokens:
        """The tokens of a piece of a device's."""
        size = piece[0].shape[2]
        if self.halved:
            firsts = [device * size, (2 * self.ring.num - 1 - device) * size]
        else:
            firsts = [device * size]
        segments = None if piece[2] is None else self._not_before(piece[2])
        return Tokens(_take(firsts, which) + jnp.arange(size, dtype=jnp.int32), segments)

    # Who works on what

    def own(self) -> list[tuple[int, int, Sight]]:
        """What a device does with its own keys."""
        if not self.halved:
            return [(0, 0, self.ring.sight)]
        return [(0, 0, self.ring.sight), (1, 0, Sight()), (1, 1, self.ring.sight)]

    def turn(self, origin: Array) -> list[Job]:
        """What a device does with the keys of ``origin``: those before a query are seen, those after it are not."""
        if not self.halved:
            return [(0, 0, self.ring.sight)]
        either = _Either(origin < self.here)
        return [(1, 0, Sight()), (either, either, Sight())]

    def walk(self, state: Any, pieces: Pieces, direction: int, hops: int, work: Callable[..., Any]) -> Any:
        """``work(state, pieces, origin)`` on what others hold, the nearest first. ``pieces`` are on their way already;
        while a device works on some, the next are on theirs."""

        def visit(carried: Any, hop: Any) -> tuple[Any, None]:
            state, pieces = carried
            following = self.send(pieces, direction)
            return (work(state, pieces, self.origin(direction * hop)), following), None

        if hops > 1:
            (state, pieces), _ = lax.scan(visit, (state, pieces), jnp.arange(1, hops, dtype=jnp.int32))
        return work(state, pieces, self.origin(direction * hops))

    def send(self, pieces: Any, distance: int) -> Any:
        """To the device so far along the ring."""
        return jax.tree.map(lambda x: collectives.rotate(x, self.ring.axes, self.ring.num, distance), pieces)

    def origin(self, distance: Any) -> Array:
        """Whose pieces come from so far."""
        return (self.here - distance) % self.ring.num


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(ring: Ring, q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """softmax(q . k) . v over the keys that each query sees, on a device's slices.

    The shapes are those of ``blocks.py``, of segments (batch, tokens); all vary over the same axes.
    """
    return _forward(ring, q, k, v, segments)[0]


def _forward(ring: Ring, q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Any]:
    on = _Device(ring, k.shape[2], q)
    queries = on.apart(q, 3)
    pieces = list(zip(on.apart(k, 2), on.apart(v, 2), on.apart(segments, 1), strict=True))

    def work(seen: list[Seen], theirs: Pieces, origin: Array) -> list[Seen]:
        for to, by, sight in on.turn(origin):
            k, v, _ = piece = _take(theirs, by)
            mine = on.tokens(_take(pieces, to), to, on.here)
            new = see(_take(seen, to), _take(queries, to), k, v, mine, on.tokens(piece, by, origin), sight)
            seen = _put(seen, to, new)
        return seen

    walks = [(direction, hops, on.send(pieces, direction)) for direction, hops in ring.walks(on.length)]
    seen: list[Seen | None] = [None] * len(queries)
    for to, by, sight in on.own():
        k, v, _ = pieces[by]
        mine, theirs = (on.tokens(pieces[i], i, on.here) for i in (to, by))
        function = see_own if to == by else see
        seen[to] = function(seen[to], queries[to], k, v, mine, theirs, sight)
    for direction, hops, theirs in walks:
        seen = on.walk(seen, theirs, direction, hops, work)
    outs, logs = zip(*(result(each, q.dtype) for each in seen if each is not None), strict=True)
    return on.together(outs, 3), (queries, pieces, outs, logs)


def _backward(ring: Ring, residuals: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    queries, pieces, outs, logs = residuals
    on = _Device(ring, sum(k.shape[2] for k, _, _ in pieces), gradient)
    of = [kept(*each) for each in zip(queries, outs, logs, on.apart(gradient, 3), strict=True)]

    def work(direction: int, state: Any, theirs: Pieces, origin: Array) -> Any:
        to_q, to_theirs = state
        to_theirs = on.send(to_theirs, direction)  # they come behind their keys
        for to, by, sight in on.turn(origin):
            k, v, _ = piece = _take(theirs, by)
            mine = on.tokens(_take(pieces, to), to, on.here)
            more, *to_piece = see_back(_take(of, to), k, v, mine, on.tokens(piece, by, origin), sight)
            to_q, to_theirs = _add(to_q, to, more), _add(to_theirs, by, to_piece)
        return to_q, to_theirs

    walks = [(direction, hops, on.send(pieces, direction)) for direction, hops in ring.walks(on.length)]
    wide = logs[0].dtype
    to_q = [lax.full_like(q, 0, wide) for q in queries]
    to_own = [[lax.full_like(x, 0, wide) for x in piece[:2]] for piece in pieces]
    for to, by, sight in on.own():
        k, v, _ = pieces[by]
        mine, theirs = (on.tokens(pieces[i], i, on.here) for i in (to, by))
        function = see_own_back if to == by else see_back
        more, *to_piece = function(of[to], k, v, mine, theirs, sight)
        to_q, to_own = _add(to_q, to, more), _add(to_own, by, to_piece)
    for direction, hops, theirs in walks:
        to_q, going = on.walk((to_q, to_own), theirs, direction, hops, functools.partial(work, direction))
        to_own = on.send(going, -direction * hops)
    to_k, to_v = zip(*to_own, strict=True)

    def whole(gradients: Sequence[Array], like: Array, dim: int) -> Array:
        return on.together([x.astype(like.dtype) for x in gradients], dim)

    k, v, _ = pieces[0]
    return whole(to_q, queries[0], 3), whole(to_k, k, 2), whole(to_v, v, 2), None


attend.defvjp(_forward, _backward)
