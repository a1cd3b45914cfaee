"""Networks: which wires each axis of a mesh crosses, and how long a collective takes on them.

A machine is a chip, the sizes of a mesh, and how the mesh lies on the chips. An axis is a number of devices within a
chip, dimensions of the torus (or devices on one switch), and slices or domains that the slow network joins. For a
buffer of S bytes in a group of N devices, on links of W bytes a second one way:

==============  ===============================  =================  =================  =================================
kind            torus that closes, k dimensions  line               switch             across M parts of G, W_slow each
==============  ===============================  =================  =================  =================================
all_gather      S (N-1)/N / 2Wk + hops alpha     S (N-1)/N / W      S (N-1)/N / W      S (M-1)/M / G W_slow; of switches
                                                                                       S (N-1)/N / G W_slow
reduce_scatter  the same                         the same           the same           the same
all_reduce      twice                            twice              twice              twice
all_to_all      a quarter, of S = N slices       half, of the same  slice (N-1)/N / W  slice (M-1)/M / W_slow
permute         slice / W + alpha                the same           slice / W          slice / W_slow
==============  ===============================  =================  =================  =================================

Across and within: TPUs' compiler makes one collective over both of a collective within the slices and one across,
after each other, so their times add up. On switches a ring runs through all N devices at once, many times side by side
so that it leaves a part by every wire: the slower of the two counts, and what crosses is the whole ring's share.
``hops`` is ceil(N/2) on a ring and N - 1 on a line; a switch has one alpha. Dimensions work side by side, so their
rates add up. Two devices of a chip that speak in different groups share its links; among themselves they are as on a
switch of ``core_bytes_per_second``. Measured figures (``achieved``) stand before the formulas of a switch. How a mesh
lies on a torus is JAX's choice for present devices; here each axis, from the last, takes the devices of a chip and
whole dimensions whose product it is, or else parts of them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import fail, fail_type
from ..mesh import Mesh
from ..scope import Axes
from ..topology import CHIPS, Topology
from .hardware import Achieved, Hardware
from .traffic import ALL_REDUCE, ALL_TO_ALL, PERMUTE, Collective


def show_axes(axes: Iterable[str], sizes: Mapping[str, int]) -> str:
    """``data x model``: axes that speak as one, in the mesh's order, whatever the order of the collective's."""
    return " x ".join(in_order(axes, sizes))


def in_order(axes: Iterable[str], sizes: Mapping[str, int]) -> Axes:
    """Axes in the mesh's order."""
    chosen = frozenset(axes)
    return tuple(axis for axis in sizes if axis in chosen)


@dataclass(frozen=True)
class Stretch:
    """A part of one dimension of a torus."""

    length: int
    closes: bool
    """Whether it is a ring."""


@dataclass(frozen=True)
class Path:
    """What a group of devices speaks over."""

    cores: int = 1
    """Devices of one chip."""
    stretches: tuple[Stretch, ...] = ()
    """Dimensions of a torus."""
    switched: int = 1
    """Devices on one switch."""
    parts: int = 1
    """Slices or domains across the slow network."""

    @property
    def within(self) -> int:
        """Devices in one part."""
        return self.cores * self.switched * math.prod(s.length for s in self.stretches)

    @property
    def slow(self) -> bool:
        """Whether it crosses the slow network."""
        return self.parts > 1

    def joined(self, other: "Path") -> "Path":
        """Two axes as one."""
        return Path(
            self.cores * other.cores,
            self.stretches + other.stretches,
            self.switched * other.switched,
            self.parts * other.parts,
        )

    def __str__(self) -> str:
        """``ring of 8``, ``line of 4 x ring of 8``, ``switch of 8, 4 on the slow network``."""
        pieces = [f"{'ring' if s.closes else 'line'} of {s.length}" for s in self.stretches]
        pieces += [f"switch of {self.switched}"] * (self.switched > 1)
        pieces += [f"{self.cores} cores of a chip"] * (self.cores > 1)
        slow = [f"{self.parts} on the slow network"] * self.slow
        return ", ".join([" x ".join(pieces)] * bool(pieces) + slow) or "one device"


@dataclass(frozen=True, eq=False)
class Machine:
    """A chip, and how a mesh lies on many of it."""

    hardware: Hardware
    sizes: Mapping[str, int]
    paths: Mapping[str, Path]
    devices_per_chip: int = 1
    topology: Topology | None = None
    """What was described, if anything was."""
    slow: Axes = ()
    """The axes that were said to cross the slow network."""

    def path(self, axes: Axes) -> Path:
        """What a group along several axes speaks over."""
        return functools.reduce(Path.joined, (self.paths[axis] for axis in axes), Path())

    def seconds(self, row: Collective) -> float:
        """How long one run of a collective takes."""
        hardware = self.hardware
        found = _nearest(hardware.achieved, row) if hardware.network != "torus" else None
        path = self.path(row.axes)
        if found is not None and not path.slow:
            return found.seconds(row.sent_bytes)
        twice = 2 if row.kind == ALL_REDUCE else 1
        within = twice * _within(row, path, hardware, self.devices_per_chip)
        if found is not None and path.within > 1:
            within = found.seconds(dataclasses.replace(row, group_size=path.within).sent_bytes)
        if not path.slow:
            return within
        if not hardware.slow_bytes_per_second:
            raise fail(
                f"time: {row.kind} over {' x '.join(row.axes)} crosses the slow network, and {hardware.title} has no "
                "slow_bytes_per_second. Write a profile with it: Hardware.load('profile.toml')."
            )
        across = twice * _across(row, path, hardware, self.devices_per_chip)
        both = within + across if hardware.network == "torus" else max(within, across)
        return both + hardware.alpha_seconds


def _within(row: Collective, path: Path, hardware: Hardware, per_chip: int) -> float:
    """One pass within a part: a reduce-scatter or an all-gather; an all-reduce is two."""
    n, size = path.within, row.payload_bytes
    if n == 1:
        return 0.0
    chips = n // path.cores
    within_chip = hardware.core_bytes_per_second or hardware.hbm_bytes_per_second / 2
    switched = hardware.network == "switch"
    rate = within_chip if chips == 1 and not switched else hardware.link_bytes_per_second / (per_chip // path.cores)
    if row.kind == PERMUTE:
        return size / rate + hardware.alpha_seconds
    if switched or chips == 1:
        return size * (n - 1) / n / rate + hardware.alpha_seconds
    rate *= sum(2 if s.closes else 1 for s in path.stretches)
    hops = sum(-(-s.length // 2) if s.closes else s.length - 1 for s in path.stretches)
    if row.kind != ALL_TO_ALL:
        return size * (chips - 1) / chips / rate + hops * hardware.alpha_seconds
    share = 4 if all(s.closes for s in path.stretches) else 2
    return size * n * (chips - 1) / chips / rate / share + hops * hardware.alpha_seconds


def _across(row: Collective, path: Path, hardware: Hardware, per_chip: int) -> float:
    """One pass between parts, with the wires of every member of a part."""
    rate = hardware.slow_bytes_per_second / (per_chip // path.cores)
    if row.kind == PERMUTE:
        return row.payload_bytes / rate
    n = path.parts * path.within if hardware.network == "switch" and row.kind != ALL_TO_ALL else path.parts
    crossing = row.payload_bytes * (n - 1) / n
    return crossing / rate if row.kind == ALL_TO_ALL else crossing / (rate * (path.within // path.cores))


def _nearest(achieved: Sequence[Achieved], row: Collective) -> Achieved | None:
    """The measurement that fits best: of the kind, of the axis, of the nearest size of a group."""
    same = [a for a in achieved if a.kind == row.kind]
    axis = row.axes[0] if len(row.axes) == 1 else ""

    def distance(a: Achieved) -> tuple[bool, float]:
        return (bool(a.axis) and a.axis != axis), abs(math.log(a.group_size / row.group_size))

    return min(same, key=distance, default=None)


def machine(on: "str | Hardware | Topology | Mesh | Machine", sizes: Mapping[str, int]) -> Machine:
    """The machine that a program with these axes runs on.

    Args:
        on: a mesh, which knows its topology and its slow axes; a topology, ``"tpu:v5p:8x8x8"``; a chip, ``"h100"``, of
            which there are as many as the program needs; a profile that ``mw.calibrate`` measured, or its file.
        sizes: the program's axes.

    Raises:
        ValueError: it is not known, or has another number of devices than the program.
        TypeError: it is none of these.
    """
    if isinstance(on, Machine):
        return on
    if isinstance(on, Mesh):
        return _of_mesh(on, sizes)
    if isinstance(on, str):
        on = Hardware.load(on) if on.endswith(".toml") else Topology.parse(on) if ":" in on else Hardware.named(on)
    if isinstance(on, Hardware):
        return _of_chip(on, sizes)
    if isinstance(on, Topology):
        return _of_topology(on, sizes, ())
    raise fail_type(
        f"time: {type(on).__name__} is no machine. Write a chip, 'v5p', a topology, 'tpu:v5p:8x8x8', a mesh that has "
        "one, or a profile of mw.calibrate()."
    )


def _of_mesh(mesh: Mesh, sizes: Mapping[str, int]) -> Machine:
    if mesh.topology is not None:
        return _of_topology(mesh.topology, sizes or mesh.axes, mesh.dcn)
    found = Hardware.of_kind(mesh.kind)
    if found is None:
        raise fail(
            f"time: nothing is known of the speed of the mesh's devices ({mesh.kind}). Name a chip, 'v5p', or a "
            "topology, 'tpu:v5p:8x8x8', or measure this machine: mw.calibrate()."
        )
    return _of_chip(found, sizes, mesh.dcn)


def _of_chip(chip: Hardware, sizes: Mapping[str, int], slow: Axes = ()) -> Machine:
    """As many of a chip as there are devices: on a torus, each axis a dimension of its own."""
    num = math.prod(sizes.values())
    if chip.network == "measured":
        return Machine(chip, sizes, {axis: Path(switched=size) for axis, size in sizes.items()})
    if chip.network == "switch":
        per_part = min(num, chip.domain)
        return Machine(chip, sizes, _switched(sizes, per_part, max(1, num // per_part), slow))
    per_chip = CHIPS[chip.platform][chip.name].devices_per_chip
    paths: dict[str, Path] = {}
    for axis, size in reversed(list(sizes.items())):
        free = size % per_chip == 0 and all(p.cores == 1 for p in paths.values())
        cores = per_chip if free else 1
        paths[axis] = Path(cores, _stretches([(size // cores, size // cores)], chip))
    return Machine(chip, sizes, paths, per_chip)


def _of_topology(topology: Topology, sizes: Mapping[str, int], slow: Axes) -> Machine:
    chip = Hardware.named(topology.chip)
    num = math.prod(sizes.values())
    if sizes and num != topology.num_devices:
        written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise fail(f"time: the program's mesh ({written}) has {num} devices; {topology} has {topology.num_devices}.")
    if topology.platform == "gpu":
        paths = _switched(sizes, topology.shape[0], topology.num_slices, slow)
    else:
        paths = _on_torus(sizes, topology, slow, chip)
    return Machine(chip, sizes, paths, topology.devices_per_chip, topology, slow)


def shares_of(sizes: Mapping[str, int], parts: int, slow: Axes) -> dict[str, int]:
    """Over how many slices or domains each axis is dealt out: the slow ones in order, or else the slowest first."""
    left, shares = parts, {}
    for axis, size in sizes.items():
        shares[axis] = math.gcd(size, left) if axis in slow or not slow else 1
        left //= shares[axis]
    return shares


def _switched(sizes: Mapping[str, int], per_part: int, parts: int, slow: Axes) -> dict[str, Path]:
    shares = shares_of(sizes, parts, slow)
    return {axis: Path(switched=size // shares[axis], parts=shares[axis]) for axis, size in sizes.items()}


def _on_torus(sizes: Mapping[str, int], topology: Topology, slow: Axes, chip: Hardware) -> dict[str, Path]:
    shares = shares_of(sizes, topology.num_slices, slow)
    left, cores_left = list(topology.shape), topology.devices_per_chip
    paths: dict[str, Path] = {}
    for axis, size in reversed(list(sizes.items())):
        size //= shares[axis]
        cores, taken = 1, _whole(size, left)
        with_cores = _whole(size // cores_left, left) if cores_left > 1 and size % cores_left == 0 else None
        if with_cores is not None:
            cores, cores_left, taken = cores_left, 1, with_cores
        pairs = _pairs(size // cores, left, topology.shape, taken)
        paths[axis] = Path(cores, _stretches(pairs, chip), parts=shares[axis])
    return paths


def _whole(size: int, left: Sequence[int]) -> tuple[int, ...] | None:
    """The most dimensions whose product is ``size``."""
    if size == 1:
        return ()
    free = [i for i, n in enumerate(left) if n > 1]
    subsets = (c for k in range(len(free), 0, -1) for c in itertools.combinations(free, k))
    return next((c for c in subsets if math.prod(left[i] for i in c) == size), None)


def _pairs(size: int, left: list[int], shape: Sequence[int], taken: tuple[int, ...] | None) -> list[tuple[int, int]]:
    """The length that an axis takes of each dimension, with the dimension's whole length; takes them from ``left``."""
    pairs = []
    for i in taken if taken is not None else reversed(range(len(left))):
        part = math.gcd(size, left[i])
        left[i] //= part
        size //= part
        pairs.append((part, shape[i]))
    return pairs


def _stretches(pairs: Sequence[tuple[int, int]], chip: Hardware) -> tuple[Stretch, ...]:
    return tuple(Stretch(part, part == whole and chip.closes(whole)) for part, whole in pairs if part > 1)
