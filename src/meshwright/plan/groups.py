"""Groups of devices that speak together, as HLO writes them, and the mesh axes that they are.

Devices are counted in the order of the mesh, so the axes of a group are the coordinates in which its members differ:
``{{0,4},{1,5},{2,6},{3,7}}`` is ``x`` on a mesh ``x=2, y=4``. XLA writes the same groups in several forms, listed, as
``[4,2]<=[2,4]T(1,0)`` or along axes of a mesh of its own; a permute has pairs of a sender and a receiver.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..scope import Axes

_GROUPS = re.compile(
    r"replica_groups=(\{(?:\{[\d,]*\},?)*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[[^{]*\{[^}]*\})"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)|=)?(\d+)?")
_ORDER = re.compile(r"device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\)")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def spoken_over(attributes: str, sizes: tuple[tuple[str, int], ...], asked: str) -> tuple[Axes, int]:
    """The axes that a collective speaks over, () when its groups are not those of whole axes; the size of a group.

    Args:
        attributes: what the line says after the operands.
        asked: what an error begins with.
        sizes: every axis and its size.

    Raises:
        ValueError: the groups are stated in a form that is not known.
    """
    pairs = _PAIRS.search(attributes)
    if pairs is not None:
        numbers = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return axes_of_pairs([(int(a), int(b)) for a, b in numbers], sizes)
    groups = _GROUPS.search(attributes)
    if groups is None:
        raise ValueError(f"{asked} states its groups of devices in a form that is not known: {attributes[-700:]}")
    return axes_of_groups(_groups(groups[1], math.prod(size for _, size in sizes)), sizes)


def _groups(text: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    if text.startswith("mesh"):
        return _groups_along(text)
    if (iota := _IOTA.match(text)) is not None:
        shape, reshaped = _numbers(iota[1]), _numbers(iota[2])
        devices = np.arange(math.prod(reshaped)).reshape(reshaped)
        devices = devices.transpose(_numbers(iota[3])) if iota[3] else devices
        return tuple(map(tuple, devices.reshape(shape).tolist()))
    groups = tuple(tuple(_numbers(g)) for g in re.findall(r"\{([\d,]+)\}", text))
    return groups or (tuple(range(num_devices)),)


def _groups_along(text: str) -> tuple[tuple[int, ...], ...]:
    """From ``mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(2)2}``: along the axes in braces, of which ``(2)2`` is
    the part of size 2 that has 2 slower places before it. The mesh is XLA's own; without ``device_ids`` its devices
    stand in order."""
    mesh, along = text.split("{")
    sizes = {name: int(size) for name, _, size in _AXIS.findall(mesh.split("]")[0])}
    chosen = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(along)}
    parts: list[tuple[str, int]] = []
    for name, size in sizes.items():
        before, length = chosen.get(name, (size, 1))
        parts += [(f"{name} before", before), (name, length), (f"{name} after", size // (before * length))]
    groups = np.array(_groups_of(tuple(chosen), tuple(parts)))
    return tuple(map(tuple, _devices_in_order(mesh, math.prod(sizes.values()))[groups].tolist()))


def _devices_in_order(text: str, num_devices: int) -> Any:
    order = _ORDER.search(text)
    if order is None:
        return np.arange(num_devices)
    if order[3]:
        return np.array(_numbers(order[3]))
    shape = _numbers(order[1])
    devices = np.arange(math.prod(shape)).reshape(shape)
    return (devices.transpose(_numbers(order[2])) if order[2] else devices).ravel()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


@functools.lru_cache(maxsize=4096)
def axes_of_groups(groups: tuple[tuple[int, ...], ...], sizes: tuple[tuple[str, int], ...]) -> tuple[Axes, int]:
    """The axes along which the members of each group differ, () when no axes make these groups; the group's size."""
    shape = [size for _, size in sizes]
    places = np.array(np.unravel_index(groups[0], shape)).T
    axes = tuple(axis for (axis, _), column in zip(sizes, places.T, strict=True) if len(set(column.tolist())) > 1)
    made = frozenset(frozenset(group) for group in _groups_of(axes, sizes))
    return axes if made == frozenset(map(frozenset, groups)) else (), len(groups[0])


def _groups_of(axes: Axes, sizes: tuple[tuple[str, int], ...]) -> list[list[int]]:
    names = [axis for axis, _ in sizes]
    devices = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
    order = sorted(range(len(names)), key=lambda i: names[i] in axes)
    length = math.prod(size for axis, size in sizes if axis in axes)
    return devices.transpose(order).reshape(-1, length).tolist()  # type: ignore[no-any-return]


def axes_of_pairs(pairs: Sequence[tuple[int, int]], sizes: tuple[tuple[str, int], ...]) -> tuple[Axes, int]:
    """The axes along which any device sends, and the number of devices along them."""
    shape = [size for _, size in sizes]
    ends = [np.array(np.unravel_index(list(side), shape)) for side in zip(*pairs, strict=True)]
    moves = (ends[0] != ends[1]).any(axis=1).tolist() if pairs else [False] * len(sizes)
    axes = tuple(axis for (axis, _), moved in zip(sizes, moves, strict=True) if moved)
    return axes, math.prod(size for axis, size in sizes if axis in axes)
