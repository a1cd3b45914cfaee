"""Described devices that a compiler knows: TPUs, ahead of time, on a machine that has none.

TPUs' library (libtpu) holds the compiler that a TPU program is made by, and needs no TPU to run it. It describes the
devices of a topology; a mesh over them is like any other, except that nothing can be put on it.

    Topology.parse("tpu:v5p:8x8x8")     what the user writes
    v5p:8x8x8, one slice                what the library is asked for
    512 devices                         what it describes, in which XLA compiles

For GPUs there is no such compiler outside a machine that has one.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh as JaxMesh

from ..devices import expect_no_tpu
from ..errors import fail
from ..mesh import Mesh
from ..scope import Axes
from ..topology import Topology

_NAMES = {"v7x": "tpu7x"}
"""What the library calls a chip, where that is another name."""
_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}
"""Of a chip whose two cores are one device only when asked for so."""


def described_mesh(topology: Topology, slow: Axes, sizes: Mapping[str, int]) -> JaxMesh:
    """A mesh of described devices with these axes, of which ``slow`` cross the slow network; one axis for a program
    that has none.

    Raises:
        ValueError: there is no compiler for the topology here, or the axes do not fit it.
    """
    devices = described_devices(topology)
    axes = dict(sizes) or {"device": len(devices)}
    found: JaxMesh = Mesh(axes, devices, topology=topology, dcn=slow).jax_mesh
    return found


def described_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, as the compiler for it describes them.

    Raises:
        ValueError: there is no such compiler here, or it does not know the topology.
    """
    _check_there_is_a_compiler(topology)
    expect_no_tpu()
    slices = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{_NAMES.get(topology.chip, topology.chip)}:{'x'.join(map(str, topology.shape))}",
            chips_per_host_bounds=_host(topology.shape),
            **slices,
            **_OPTIONS.get(topology.chip, {}),
        )
    except jax.errors.JaxRuntimeError as error:
        raise fail(f"compile: libtpu does not describe {topology}. It says: {_told(str(error))}") from None
    return list(found.devices)


def _check_there_is_a_compiler(topology: Topology) -> None:
    if topology.platform != "tpu":
        raise fail(
            f"compile: there is no compiler for {topology} on this machine: XLA compiles for GPUs only where one is.\n"
            "  The plan needs none: print(plan.on(mesh)) estimates memory and time. For the compiler's word run the "
            "same lines on a machine with such GPUs, with a mesh of its devices."
        )
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        raise fail(
            f"compile: the compiler for {topology} is not installed. Install it: pip install 'meshwright[tpu-plan]' "
            "(there is one for Linux on x86-64; it needs no TPU)."
        )


def _host(shape: tuple[int, ...]) -> list[int]:
    """How many chips one host has along each dimension: two by two where that fits. Programs do not depend on it."""
    return [*(2 if n % 2 == 0 else 1 for n in shape[:2]), 1]


def _told(message: str) -> str:
    """What the library said, and a way out where it is known."""
    if "lockfile" in message:
        return (
            "another process of this machine holds it, which is how it guards TPUs. Set ALLOW_MULTIPLE_LIBTPU_LOAD=1 "
            "before JAX is imported, or wait for that process."
        )
    return message.strip().splitlines()[0]
