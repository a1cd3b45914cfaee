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
from ..scope import Axes
from ..train import Place

DEFAULT_RULES = "batch:data"
DEFAULT_PARAMS = "data"
DATA, MODEL = "data", "model"
"""The axes of a mesh that the user does not write."""
WIDEST_MODEL = 8
"""How long the second of them is at most: as many as the devices that one fast network joins, and a usual number of
key/value heads."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where it runs: nothing here changes a result."""

    devices: int | None = None
    """How many devices to use. Where there is no accelerator, so many virtual CPU devices are made. None: all that
    there are."""
    mesh: str | None = None
    """Axes and their sizes: "data=4, model=2". None: every device on one axis, "data"; where the layout names "model"
    as well, up to 8 on that."""
    dcn: str | None = None
    """The axes that cross the slow network between slices or processes: "pod", "(pod,data)"."""
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
    microbatches: str | None = None
    """In how many parts a batch is worked on, one after the other: "8". With the layers split ("layers:pipe") they go
    through a pipeline."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """The order of a pipeline's forward and backward passes."""
    virtual_stages: int = 1
    """How many separate runs of layers each device of a pipeline has."""
    overlap: str | None = None
    """The axes over which gathers and scatters go on beside the products that they serve: "model". None: none."""
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
        layout = self.make_layout()
        mesh = self.make_mesh(layout.known_axes)
        layout.check(mesh)
        return Place(mesh, layout, self.partitioner)

    def make_layout(self) -> Layout:
        """The layout, which knows no mesh yet."""
        params = self.params if self.params is not None or self.layout is not None else DEFAULT_PARAMS
        return Layout(
            self.layout if self.layout is not None else DEFAULT_RULES,
            params=params,
            optimizer=self.optimizer,
            gather=self.gather,
            sums=self.sums,
            microbatches=self.microbatches,
            schedule=self.schedule,
            virtual_stages=self.virtual_stages,
            overlap=self.overlap,
            strict=True,
        )

    def make_mesh(self, named: Axes) -> Mesh:
        """The mesh of present devices, for a layout that names these axes."""
        devices = find_devices(self.devices)
        chosen = devices if len(devices) < jax.device_count() else None
        return Mesh(self.axes(len(devices), named), chosen, dcn=self.dcn or ())

    def axes(self, num: int, named: Axes) -> str | dict[str, int]:
        """The axes of a mesh of ``num`` devices, as they are asked for or as the named axes need them."""
        if self.mesh is not None:
            return self.mesh
        if MODEL not in named:
            return {DATA: num}
        width = max(n for n in range(1, WIDEST_MODEL + 1) if num % n == 0 and n * n <= num)
        return {DATA: num // width, MODEL: width}


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
    used = place.layout.known_axes
    return [axis for axis, size in place.mesh.axes.items() if size > 1 and axis not in used]


def place_rows(place: Place) -> Iterator[tuple[str, str]]:
    """Where a program runs, as words and what they are."""
    mesh = place.mesh
    processes = f", {mesh.num_processes} processes" if mesh.num_processes > 1 else ""
    yield "mesh", f"{mesh.text}: {counted(mesh.size, 'device')} ({mesh.kind}){processes}{slow_text(place)}"
    yield "layout", f"{layout_text(place)}{lowered_text(place)}"
    idle = unused_axes(place)
    if idle:
        yield "note", f"no rule uses the mesh's {', '.join(idle)}: the devices along it do the same work"


def slow_text(place: Place) -> str:
    """The axes that were said to cross the slow network, as the end of a line about the mesh."""
    return f", dcn={','.join(place.mesh.dcn)}" if place.mesh.dcn else ""


def lowered_text(place: Place) -> str:
    """Who makes the collectives, as the end of a line about the layout; "" for this package."""
    return f", partitioner={place.partitioner}" if place.partitioner != "names" else ""


def layout_text(place: Place) -> str:
    """The layout as the user wrote it."""
    return place.layout.replace(strict=False).text
