"""The arithmetic of windows that move along dims: what convolution and pooling share.

Output i along a dim looks at the inputs ``i * stride - before + t * dilation`` for t from 0 to taps - 1; inputs beyond
the ends are padding. A transposed convolution is the same on inputs that lie ``spread`` positions apart, with zeros in
between. All of it is static integers, a ``Reach`` for each dim.

Where the dim is split, the outputs are too, in contiguous blocks: device k makes the outputs from k * block on, and
needs the stretch of inputs that they look at. That stretch is a window of the dim (``window.py``): the device's own
slice and a halo from its neighbours, or from further away where a kernel is wider than a slice. Eight inputs over two
devices, taps=3, stride=1, padding "SAME":

    inputs       0 1 2 3 | 4 5 6 7
    device 0   p 0 1 2 3   4              p: padding, zeros; 4 comes from device 1
    device 1           3 | 4 5 6 7 p      3 comes from device 0
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..dims import Dim, Dims, find, show
from ..errors import fail, fail_type, nearest
from ..scope import current
from ..tensor import Tensor
from .along import shared_out, whole
from .window import window

Array = Any
ByName = int | Mapping[str, int]
"""An int for every dim, or for some by name."""
Ends = str | int | tuple[int, int] | list[int]
Padding = Ends | Mapping[str, Ends]
"""``"SAME"``, ``"VALID"``, a width for both ends or a pair (before, after); for every dim, or for each by name."""

PADDINGS = ("SAME", "VALID")


@dataclass(frozen=True)
class Reach:
    """How the outputs along one dim reach into its inputs."""

    name: str
    size: int
    """The inputs."""
    taps: int
    """The inputs that an output looks at."""
    stride: int = 1
    """How far the next output's are."""
    dilation: int = 1
    """How far apart they lie."""
    before: int = 0
    after: int = 0
    """The padding at both ends."""
    spread: int = 1
    """How far apart the inputs themselves lie, zeros in between: the stride of a transposed convolution."""

    @property
    def span(self) -> int:
        """From the first input that an output looks at to the last."""
        return (self.taps - 1) * self.dilation + 1

    @property
    def num_outputs(self) -> int:
        padded = (self.size - 1) * self.spread + 1 + self.before + self.after
        return max((padded - self.span) // self.stride + 1, 0) if self.size else 0

    def num_real(self) -> np.ndarray:
        """For each output, how many of the inputs that it looks at are not padding."""
        first = np.arange(self.num_outputs)[:, None] * self.stride - self.before
        places = first + np.arange(self.taps)[None] * self.dilation
        return ((places >= 0) & (places < self.size)).sum(1)


@dataclass(frozen=True)
class _Share:
    """What each of several devices reads for its block of the outputs."""

    starts: tuple[int, ...]
    """Where its stretch of the inputs begins."""
    length: int
    """How many inputs a stretch is."""
    ends: tuple[int, int]
    """The padding that is left to do, counted in spread positions: negative where the stretch is too long."""
    skips: tuple[int, ...]
    """How many of the outputs made come before its own; none of several when all skip alike."""


@functools.lru_cache(maxsize=1024)
def _share(reach: Reach, num: int) -> _Share:
    """A stretch begins at the first input that its outputs look at. With spread inputs, the positions looked at may
    begin between two, ``lead`` before that input: as far as that is alike on all devices the padding says it, otherwise
    some outputs more are made and skipped."""
    block, spread = reach.num_outputs // num, reach.spread
    length = (block - 1) * reach.stride + reach.span
    firsts = [k * block * reach.stride - reach.before for k in range(num)]
    starts, leads = tuple(-(-p // spread) for p in firsts), [-p % spread for p in firsts]
    count = max((p + length - 1) // spread - start + 1 for p, start in zip(firsts, starts, strict=True))
    most, least = max(leads), min(leads)
    after = length - least - (count - 1) * spread - 1
    return _Share(starts, count, (most, after), tuple(most - lead for lead in leads) if most > least else ())


@dataclass(frozen=True)
class Stretch:
    """A device's inputs along its dims, halos and all, and what is left to do with them."""

    array: Array
    ends: tuple[tuple[int, int], ...]
    """The padding left to do, for each reach."""
    skips: tuple[tuple[int, ...], ...]
    """The outputs to skip, for each reach: of the devices along its axes."""


def stretch(array: Array, reaches: Sequence[Reach], at: Sequence[int], fill: Any = 0) -> Stretch:
    """A device's slice with the halos that its outputs look at; along a dim that is not split, nothing is done.

    Args:
        array: a device's positional slice.
        reaches: one for each dim, which lies at the position ``at``.
        fill: what padding is made of.
    """
    ends, skips = [], []
    for reach, position in zip(reaches, at, strict=True):
        scope, axes, num = shared_out(Dim(reach.name, reach.size))
        if num == 1:
            ends.append((reach.before, reach.after))
            skips.append(())
            continue
        share = _share(reach, num)
        array = window(array, scope, axes, position, share.starts, share.length, fill=fill)
        ends.append(share.ends)
        skips.append(share.skips)
    return Stretch(array, tuple(ends), tuple(skips))


def skipped(array: Array, reaches: Sequence[Reach], at: Sequence[int], skips: Sequence[tuple[int, ...]]) -> Array:
    """A device's own outputs, of some more that were made."""
    for reach, position, by_device in zip(reaches, at, skips, strict=True):
        if by_device:
            _, axes, num = shared_out(Dim(reach.name, reach.size))
            start = jnp.asarray(by_device, jnp.int32)[collectives.index(axes)]
            array = lax.dynamic_slice_in_dim(array, start, reach.num_outputs // num, position)
    return array


def whole_for_xla(array: Array, these: Dims, names: Sequence[str]) -> Array:
    """Under XLA's partitioner: ``array`` with the dims ``names`` whole on every device, the others split as ever."""
    scope = current()
    if scope is None or scope.manual or not any(scope.axes_of(name) for name in names):
        return array
    kept = [() if d.name in names else scope.axes_of(d.name) for d in these]
    return collectives.constrain(array, scope.mesh, kept)


def summed_in(dtype: Any) -> Any:
    """The dtype in which a window's elements are added up: float32 for narrower floating point."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.dtype(jnp.float32 if narrow else dtype)


# From what a user writes to reaches


def make_reaches(
    x: Tensor, taps: Mapping[str, int], strides: ByName, dilation: ByName, padding: Padding, asked: str,
    *, step: Mapping[str, int] | None = None, transposed: bool = False,
) -> tuple[Reach, ...]:  # fmt: skip
    """The reach along each dim of ``taps``.

    Args:
        taps: the dims, and the size of the window along each.
        step: the strides of the dims that a mapping ``strides`` leaves out; 1 when None.
        transposed: ``strides`` are those of the convolution that this one is the transpose of.

    Raises:
        ValueError: a name is unknown, a number is not positive, or a window is wider than the padded dim.
        TypeError: a number is not a static int.
    """
    for name, count in taps.items():
        if count < 1:
            raise fail(f"{asked}: the window along {name!r} has size {count}; it must be at least 1.")
    ones = dict.fromkeys(taps, 1)
    by_stride = by_name(strides, step or ones, "stride", asked)
    by_dilation = by_name(dilation, ones, "dilation", asked)
    if isinstance(padding, Mapping):
        _check_known(padding, taps, "padding", asked)
        if missing := [n for n in taps if n not in padding]:
            raise fail(f"{asked}: the padding of {missing[0]!r} is not given; for none, write {missing[0]}=(0, 0).")
    ends = _ends_transposed if transposed else _ends_forward
    reaches = []
    for name, count in taps.items():
        size, stride = find(x.dims, name, asked).size, by_stride[name]
        bare = Reach(name, size, count, dilation=by_dilation[name])
        bare = replace(bare, spread=stride) if transposed else replace(bare, stride=stride)
        before, after = _given_ends(padding[name] if isinstance(padding, Mapping) else padding, bare, asked, ends)
        reach = replace(bare, before=before, after=after)
        _check_fits(reach, x.dims, asked)
        reaches.append(reach)
    return tuple(reaches)


def resized_dims(these: Dims, reaches: Sequence[Reach]) -> Dims:
    """The dims with the sizes of the outputs."""
    sizes = {reach.name: reach.num_outputs for reach in reaches}
    return tuple(Dim(d.name, sizes.get(d.name, d.size)) for d in these)


def by_name(given: ByName, default: Mapping[str, int], what: str, asked: str) -> dict[str, int]:
    """A number for each dim of ``default``, which has those of the dims that a mapping leaves out.

    Raises:
        ValueError: a mapping has another name, or a number is not positive.
        TypeError: a number is not a static int.
    """
    if isinstance(given, Mapping):
        _check_known(given, default, what, asked)
        found = {n: whole(given.get(n, default[n]), f"the {what} of {n!r}", asked) for n in default}
    else:
        instead = f" For each dim by name: {{{next(iter(default))!r}: 2}}."
        found = dict.fromkeys(default, whole(given, f"the {what}", asked, instead))
    for name, number in found.items():
        if number < 1:
            raise fail(f"{asked}: the {what} of {name!r} is {number}; it must be at least 1.")
    return found


def _check_known(given: Mapping[str, Any], names: Iterable[str], what: str, asked: str) -> None:
    for name in given:
        if name not in names:
            raise fail(f"{asked}: a {what} for {name!r}, over which no window moves.{nearest(str(name), names)}")


def _given_ends(
    given: Ends, bare: Reach, asked: str, named: Callable[[str, Reach], tuple[int, int]]
) -> tuple[int, int]:
    """The padding before and after, from what was asked for."""
    if isinstance(given, str):
        if given not in PADDINGS:
            raise fail(f"{asked}: there is no padding {given!r}.{nearest(given, PADDINGS)}")
        return named(given, bare)
    pair = tuple(given) if isinstance(given, tuple | list) else (given, given)
    if len(pair) != 2:
        raise fail_type(f"{asked}: the padding of {bare.name!r} is {given!r}; give (before, after), or 'SAME'.")
    before, after = (whole(width, f"the padding of {bare.name!r}", asked) for width in pair)
    if before < 0 or after < 0:
        raise fail(f"{asked}: the padding {pair} of {bare.name!r} is negative; to leave out inputs, slice them off.")
    return before, after


def _ends_forward(given: str, bare: Reach) -> tuple[int, int]:
    """Enough for size / stride outputs, rounded up, where "SAME" is given; of an odd width, one more after."""
    if given == "VALID":
        return 0, 0
    total = max((-(-bare.size // bare.stride) - 1) * bare.stride + bare.span - bare.size, 0)
    return total // 2, total - total // 2


def _ends_transposed(given: str, bare: Reach) -> tuple[int, int]:
    """As ``jax.lax.conv_transpose``: "SAME" makes size * stride outputs, "VALID" those that any input reaches, and at
    least as many."""
    span, stride = bare.span, bare.spread
    if given == "VALID":
        return span - 1, stride - 1 + max(span - stride, 0)
    total = span + stride - 2
    before = span - 1 if stride > span - 1 else -(-total // 2)
    return before, total - before


def _check_fits(reach: Reach, these: Dims, asked: str) -> None:
    if reach.num_outputs < 1:
        padded = f", with the padding {reach.size + reach.before + reach.after}" if reach.before + reach.after else ""
        dilated = f" at dilation {reach.dilation}" if reach.dilation > 1 else ""
        raise fail(
            f"{asked}: the window of {reach.taps}{dilated} spans {reach.span}, but {reach.name!r} has size "
            f"{reach.size}{padded}: nothing is left.\n  tensor: ({show(these)})\n"
            f"  Use padding 'SAME', a smaller window, or a longer dim."
        )
