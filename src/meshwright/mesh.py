"""Mesh: an n-dimensional array of devices with named axes.

The devices are those that JAX has (``jax.devices()``, every process's), a list of them, or those of a described
topology, which exist only as a count and a shape: for them a program can be traced and planned, not run.

    >>> mesh = Mesh("data=64, model=8", topology="tpu:v5p:8x8x8")
    >>> mesh
    Mesh('data=64, model=8', topology='tpu:v5p:8x8x8')
    >>> mesh.size, mesh.axes["model"]
    (512, 8)

The first axis is the slowest: neighbours along the last one are neighbours in the machine. Which device stands where is
JAX's decision (``mesh_utils``), made from the physical coordinates of TPUs; elsewhere devices keep their order, which
holds those of one process together. Axes named in ``dcn`` cross the slow network between slices or processes.
"""

import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from .devices import Devices, Sizes, counted, show_sizes
from .errors import fail, fail_type
from .notation import Notation, check_known
from .topology import Topology

AxesLike = str | Mapping[str, SupportsIndex | str] | Iterable[Sequence[Any]] | jax.sharding.Mesh | AbstractMesh

_NOTATION = Notation("Mesh", "axis", "axis=size", "=:", "data=4, model=2")


@dataclass(frozen=True, init=False, repr=False)
class Mesh:
    """Devices laid out along named axes. Immutable; equal when axes, devices, topology and slow axes are.

    Args:
        axes: ``"data=4, model=2"`` (``;`` and ``:`` also do), a dict, pairs, or a mesh of JAX's, whose axis types
            become Auto. The first axis is the slowest. One size may be -1: what the others leave of the devices.
        devices: the devices to use; all of ``jax.devices()``, of every process, when None. With a topology: the
            devices that its compiler describes.
        topology: described devices instead of present ones: ``"tpu:v5p:8x8x8"``, ``"gpu:h100:64"``.
        dcn: the axes that cross the slow network, ``"pod"`` or ``("pod", "data")``. Slices (or processes) are dealt out
            to them in order; what is left of such an axis lies within a slice. Virtual devices of one process can
            stand for several: there the axes are only remembered.

    Raises:
        TypeError: a size is not an integer, or ``axes`` is none of the above.
        ValueError: a name is wrong or stands twice, a size is not positive, the sizes do not multiply to the number of
            devices (the message lists sizes that do), or the slow axes do not hold the slices.
    """

    jax_mesh: Any
    """JAX's mesh, all its axes of type Auto: a ``Mesh``, or an ``AbstractMesh`` where there are no devices."""
    topology: Topology | None
    dcn: tuple[str, ...]

    def __init__(
        self,
        axes: AxesLike,
        devices: Iterable[Any] | None = None,
        *,
        topology: str | Topology | None = None,
        dcn: str | Sequence[str] = (),
    ) -> None:
        described = Topology.parse(topology) if isinstance(topology, str) else topology
        if isinstance(axes, jax.sharding.Mesh | AbstractMesh):
            if devices is not None or described is not None:
                raise fail("Mesh: a mesh of JAX's has its devices already; leave devices= and topology= out.")
            slow = _slow_axes(dcn, dict(axes.shape))
            jax_mesh = _with_auto_axes(axes)
        else:
            found = Devices.find(devices, described)
            sizes = _fill(_sizes(axes), found)
            slow = _slow_axes(dcn, sizes)
            jax_mesh = found.laid_out(sizes, slow)
        object.__setattr__(self, "jax_mesh", jax_mesh)
        object.__setattr__(self, "topology", described)
        object.__setattr__(self, "dcn", slow)

    def over(self, devices: Iterable[Any]) -> "Mesh":
        """The same axes over other devices, such as those that a topology's compiler describes."""
        return Mesh(self.axes, devices, topology=self.topology, dcn=self.dcn)

    @property
    def axes(self) -> Sizes:
        """The size of each axis, the slowest first."""
        return dict(self.jax_mesh.shape)

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.axes.values())

    @property
    def described(self) -> bool:
        """Whether there are no devices behind the mesh: programs can be traced for it, not run."""
        return isinstance(self.jax_mesh, AbstractMesh)

    @property
    def devices(self) -> tuple[Any, ...]:
        """JAX's devices in the mesh's order; none for a described mesh."""
        return () if self.described else tuple(self.jax_mesh.devices.flat)

    @functools.cached_property
    def device_ids(self) -> np.ndarray:
        """The id of the device at each place of the mesh, an array of the axes' sizes; 0, 1, … where described."""
        ids = [d.id for d in self.devices] or range(self.size)
        array = np.reshape(np.asarray(ids), tuple(self.axes.values()))
        array.flags.writeable = False
        return array

    @property
    def num_processes(self) -> int:
        """The number of processes that the devices belong to; 1 for a described mesh."""
        return len({d.process_index for d in self.devices}) or 1

    @property
    def kind(self) -> str:
        """What the devices are: "cpu", "TPU v5p"."""
        if self.topology is not None:
            return self.topology.kind
        return ", ".join(dict.fromkeys(d.device_kind for d in self.devices)) or "abstract"

    @property
    def text(self) -> str:
        """The axes as they are written: ``data=4, model=2``."""
        return show_sizes(self.axes)

    def __repr__(self) -> str:
        topology = f", topology={str(self.topology)!r}" if self.topology is not None else ""
        dcn = f", dcn={self.dcn!r}" if self.dcn else ""
        return f"Mesh({self.text!r}{topology}{dcn})"

    def __str__(self) -> str:
        """The axes with the devices that stand along each of them, counted from the first device."""
        origin = f", {self.topology}" if self.topology is not None else ""
        processes = f", {self.num_processes} processes" if self.num_processes > 1 else ""
        lines = [f"Mesh of {counted(self.size, 'device')}: {self.kind}{origin}{processes}"]
        name_width, size_width = max(map(len, self.axes)), len(str(max(self.axes.values())))
        for i, (name, size) in enumerate(self.axes.items()):
            first = (0,) * i, (0,) * (len(self.axes) - i - 1)
            ids = [str(n) for n in self.device_ids[(*first[0], slice(None), *first[1])]]
            ids = ids if size <= 8 else [*ids[:3], "…", ids[-1]]
            slow = ", crosses the slow network" if name in self.dcn else ""
            lines.append(f"  {name:<{name_width}}  {size:>{size_width}}  devices {', '.join(ids)}{slow}")
        return "\n".join(lines)


def _with_auto_axes(mesh: jax.sharding.Mesh | AbstractMesh) -> Any:
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _sizes(axes: Any) -> Sizes:
    """The axes as written, checked one by one: at most one size is -1."""
    sizes = {name: _size(name, size, axes) for name, size in _NOTATION.pairs(axes)}
    if not sizes:
        raise fail(f"Mesh: {axes!r} names no axis. {_NOTATION.advice}")
    if list(sizes.values()).count(-1) > 1:
        raise fail(f"Mesh: {axes!r} leaves two sizes open; at most one may be -1.")
    return sizes


def _size(name: str, size: Any, axes: Any) -> int:
    try:
        number = int(size) if isinstance(size, str) else operator.index(size)
    except (TypeError, ValueError):
        raise fail_type(f"Mesh: the size {size!r} of the axis {name!r} in {axes!r} is not an integer.") from None
    if isinstance(size, bool) or number == 0 or number < -1:
        raise fail(f"Mesh: the axis {name!r} in {axes!r} has size {size}; write a positive one, or -1 for the rest.")
    return number


def _slow_axes(dcn: str | Sequence[str], sizes: Sizes) -> tuple[str, ...]:
    written = f"({dcn})" if isinstance(dcn, str) and "(" not in dcn else dcn
    slow = _NOTATION.names(written, "axis", dcn)
    check_known(slow, sizes, f"Mesh: dcn= names the axis {{}}, which the mesh ({show_sizes(sizes)}) lacks.")
    return slow


def _fill(sizes: Sizes, found: Devices) -> Sizes:
    """The sizes with -1 filled in, when they multiply to the number of devices."""
    known = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if known > 0 and open_axes and found.num % known == 0:
        sizes = {name: found.num // known if size == -1 else size for name, size in sizes.items()}
    if not any(size == -1 for size in sizes.values()) and math.prod(sizes.values()) == found.num:
        return sizes
    needs = f"a multiple of {known} devices" if open_axes else counted(known, "device")
    fitting = "; ".join(show_sizes(fit) for fit in fitting_sizes(sizes, found.num))
    raise fail(
        f"Mesh: '{show_sizes(sizes)}' needs {needs}; {found.text}.\n"
        f"  Sizes that fit {counted(found.num, 'device')}: {fitting}." + _way_out(sizes, known, found)
    )


def _way_out(sizes: Sizes, known: int, found: Devices) -> str:
    if found.topology is not None:
        return "\n  Or describe a topology of another size."
    if known > found.num:
        return (
            f"\n  To try it without the hardware, make virtual CPU devices: --devices {known} for the commands, or set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={known} before JAX starts."
        )
    if found.given:
        return f"\n  Or give {counted(known, 'device')}."
    usable = found.num // known * known if -1 in sizes.values() else known
    return f"\n  Or use a part of the devices: mw.Mesh('{show_sizes(sizes)}', devices=jax.devices()[:{usable}])."


def fitting_sizes(sizes: Mapping[str, int], num_devices: int, limit: int = 5) -> list[Sizes]:
    """Sizes for the same axes that multiply to ``num_devices``, the nearest to the sizes asked for first."""

    def distance(fit: tuple[int, ...]) -> tuple[int, float, tuple[int, ...]]:
        asked = [(n, s) for n, s in zip(fit, sizes.values(), strict=True) if s != -1]
        return sum(n != s for n, s in asked), sum(abs(math.log(n / s)) for n, s in asked), fit

    fits = sorted(_factorisations(num_devices, len(sizes)), key=distance)
    return [dict(zip(sizes, fit, strict=True)) for fit in fits[:limit]]


def _factorisations(number: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``number`` as an ordered product."""
    if num_factors == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        for others in _factorisations(number // first, num_factors - 1):
            yield (first, *others)
