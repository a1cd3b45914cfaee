"""The flags that say where a program runs: devices, mesh and layout. Every command that runs something has them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from ..devices import present
from ..errors import fail
from ..layout import Layout
from ..mesh import Mesh, counted
from ..train import Place

DEFAULT_RULES = "batch:data"
DEFAULT_PARAMS = "data"


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where it runs: nothing here changes a result."""

    devices: int | None = None
    """How many devices to use. Where there is no accelerator, so many virtual CPU devices are made. None: all that
    there are."""
    mesh: str | None = None
    """Axes and their sizes: "data=4, model=2". None: every device on one axis, "data"."""
    layout: str | None = None
    """Which dims are split over which axes: "batch:data, heads:model, ff:model, vocab:model". None: "batch:data", with
    the parameters split over "data" at rest (FSDP) unless PARAMS says otherwise."""
    params: str | None = None
    """How parameters are split at rest: "embed:data", or an axis alone, "data"; "" for not at all."""
    optimizer: str | None = None
    """How the optimizer's state is split at rest. None: as the parameters."""
    gather: Literal["use", "step"] = "use"
    """When a parameter at rest is gathered: at each use, or once a step."""
    sums: str | None = None
    """The dtype of sums across devices: "float32" with --dtype bfloat16 loses less. None: as they are computed."""
    partitioner: Literal["names", "xla"] = "names"
    """Who makes the collectives: this package from the names, or XLA's partitioner."""

    def __post_init__(self) -> None:
        if self.devices is not None and self.devices < 1:
            raise fail(f"--devices {self.devices}: it takes at least one device.")

    def place(self) -> Place:
        """The mesh and the layout. JAX starts here, with the number of devices asked for.

        Raises:
            ValueError: there are fewer devices, the mesh does not fit them, or the layout does not fit the mesh.
        """
        devices = find_devices(self.devices)
        chosen = devices if len(devices) < jax.device_count() else None
        mesh = Mesh(self.mesh if self.mesh is not None else {"data": len(devices)}, chosen)
        params = self.params if self.params is not None or self.layout is not None else DEFAULT_PARAMS
        layout = Layout(
            self.layout if self.layout is not None else DEFAULT_RULES,
            params=params,
            optimizer=self.optimizer,
            gather=self.gather,
            sums=self.sums,
            strict=True,
        )
        layout.check(mesh)
        return Place(mesh, layout, self.partitioner)


def find_devices(number: int | None) -> Sequence[Any]:
    """The first ``number`` devices. On a machine without accelerators they are made: this must come before JAX's first
    use of a device.

    Raises:
        ValueError: there are fewer.
    """
    if number is None:
        return present()
    with contextlib.suppress(RuntimeError):  # JAX has started already: it has the devices that it has.
        jax.config.update("jax_num_cpu_devices", number)
    found = present()
    if len(found) < number:
        there = f"there {'is' if len(found) == 1 else 'are'} {counted(len(found), 'device')} ({found[0].device_kind})"
        raise fail(f"--devices {number}: {there}.")
    return found[:number]


def unused_axes(place: Place) -> list[str]:
    """The mesh's axes over which nothing is split: all devices along them do the same work."""
    layout = place.layout
    used = {axis for _, axes in layout.pairs for axis in axes} | {
        *layout.params.known_axes,
        *layout.optimizer.known_axes,
    }
    return [axis for axis, size in place.mesh.axes.items() if size > 1 and axis not in used]


def place_rows(place: Place) -> Iterator[tuple[str, str]]:
    """Where a program runs, as words and what they are."""
    mesh = place.mesh
    processes = f", {mesh.num_processes} processes" if mesh.num_processes > 1 else ""
    yield "mesh", f"{mesh.text}: {counted(mesh.size, 'device')} ({mesh.kind}){processes}"
    yield "layout", place.layout.replace(strict=False).text
    idle = unused_axes(place)
    if idle:
        yield "note", f"no rule uses the mesh's {', '.join(idle)}: the devices along it do the same work"
