"""Devices: what a mesh is made of, and where each of them stands in it.

Devices are present, as JAX lists them, or described by a topology, as a count. Present ones are laid out by JAX's
``mesh_utils``, which knows the physical coordinates of TPUs. Where some axes cross the slow network, the devices are
taken in parts, slices or processes: each such axis gets its share of the parts, and what is left of its size lies
within one. Eight devices in two processes are, with ``dcn="data"``, two parts of ``data=2, model=2`` in a mesh of
``data=4, model=2``.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType

from .errors import fail, fail_type
from .topology import Topology

Sizes = dict[str, int]
"""The size of each axis, the slowest first."""


_WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
"""What TPUs' library asks the machine for when it is loaded. Without a TPU nobody answers: it complains on stderr,
keeps logs in /tmp and locks itself against other processes, though there is no chip that they could share."""


def present() -> list[Any]:
    """All of JAX's devices, of every process. JAX looks for them here, if it has not."""
    expect_no_tpu()
    return jax.devices()


def expect_no_tpu() -> None:
    """Where JAX has found no TPU, tell TPUs' library so before it is loaded; what the user has set stays.

    The library may be installed all the same (``meshwright[tpu-plan]``): it compiles for TPUs that are elsewhere.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":  # JAX's mark, made when it is imported
        for name, value in _WITHOUT_TPU.items():
            os.environ.setdefault(name, value)


def counted(num: int, thing: str) -> str:
    """``1 device``, ``8 devices``."""
    return f"{num} {thing}{'' if num == 1 else 's'}"


def show_sizes(sizes: Mapping[str, int]) -> str:
    """``data=4, model=2``."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


@dataclass(frozen=True)
class Devices:
    """What a mesh is to be made of: devices, or the count of described ones."""

    present: tuple[Any, ...] | None
    topology: Topology | None
    given: bool
    """Whether the user listed them."""

    @classmethod
    def find(cls, devices: Iterable[Any] | None, topology: Topology | None) -> "Devices":
        expect_no_tpu()
        if devices is None:
            return cls(None if topology is not None else tuple(jax.devices()), topology, False)
        listed = tuple(np.asarray(devices, dtype=object).flat) if isinstance(devices, np.ndarray) else tuple(devices)
        for d in listed:
            if not isinstance(d, jax.Device):
                raise fail_type(f"Mesh: devices= holds {d!r}; expected devices such as jax.devices()[0].")
            if listed.count(d) > 1:
                raise fail(f"Mesh: the device {d} stands twice in devices=. A mesh holds each device once.")
        if topology is not None and len(listed) != topology.num_devices:
            num = counted(len(listed), "device")
            raise fail(f"Mesh: {num} for the topology {topology}, which has {topology.num_devices}.")
        return cls(listed, topology, True)

    @property
    def num(self) -> int:
        return len(self.present) if self.present is not None else self.topology.num_devices if self.topology else 0

    @property
    def text(self) -> str:
        """``there are 8 devices (cpu)``, as errors say it."""
        if self.topology is not None:
            chips = f" ({self.topology.num_chips} chips of 2)" if self.topology.devices_per_chip == 2 else ""
            return f"the topology {self.topology} has {counted(self.num, 'device')}{chips}"
        if self.given:
            return f"{counted(self.num, 'device')} {'was' if self.num == 1 else 'were'} given"
        kinds = ", ".join(dict.fromkeys(d.device_kind for d in self.present or ()))
        return f"there {'is' if self.num == 1 else 'are'} {counted(self.num, 'device')} ({kinds})"

    def laid_out(self, sizes: Sizes, slow: tuple[str, ...]) -> Any:
        """JAX's mesh of these sizes, with the axes ``slow`` across slices or processes."""
        names, types = tuple(sizes), (AxisType.Auto,) * len(sizes)
        outer = self._shares(sizes, slow)
        if self.present is None:
            return AbstractMesh(tuple(sizes.values()), names, axis_types=types)
        if math.prod(outer) > 1:
            inner = [size // n for size, n in zip(sizes.values(), outer, strict=True)]
            array = mesh_utils.create_hybrid_device_mesh(
                inner, outer, self.present, process_is_granule=self._by_process(), allow_split_physical_axes=True
            )
        else:
            shape = tuple(sizes.values())
            array = mesh_utils.create_device_mesh(shape, self.present, allow_split_physical_axes=True)
        return jax.sharding.Mesh(array, names, axis_types=types)

    def _slices(self) -> dict[Any, int]:
        """How many devices each slice has. Only TPUs and GPUs know their slice."""
        counts: dict[Any, int] = {}
        for d in self.present or ():
            key = getattr(d, "slice_index", None)
            counts[key] = counts.get(key, 0) + 1
        return counts

    def _by_process(self) -> bool:
        """Whether processes are the parts between which the network is slow: nothing says that slices are."""
        return len(self._slices()) <= 1

    def _parts(self) -> tuple[str, list[int]]:
        """What the slow network joins, "slices" or "processes", and the number of devices of each."""
        if self.present is None:
            num = self.topology.num_slices if self.topology else 1
            return "slices", [self.num // num] * num
        if not self._by_process():
            return "slices", list(self._slices().values())
        processes = [d.process_index for d in self.present]
        return "processes", [processes.count(p) for p in dict.fromkeys(processes)]

    def _shares(self, sizes: Sizes, slow: tuple[str, ...]) -> list[int]:
        """For each axis, over how many slices or processes it is dealt out."""
        what, parts = self._parts()
        written = show_sizes({a: sizes[a] for a in slow})
        if not slow:
            self._check_one_slice(what, parts)
        elif len(parts) == 1 and math.prod(sizes[a] for a in slow) > 1 and not self._virtual():
            raise fail(
                f"Mesh: dcn= says that {written} crosses the slow network, but the {self.num} devices are not in "
                f"several {what}.\n  Leave dcn= out, or describe several slices: topology='tpu:v5p:8x8x8*2'."
            )
        elif len(set(parts)) > 1:
            raise fail(f"Mesh: the {what} hold {parts} devices; axes that cross them (dcn=) need equal numbers.")
        left, shares = len(parts), []
        for name, size in sizes.items():
            shares.append(math.gcd(size, left) if name in slow else 1)
            left //= shares[-1]
        if slow and left > 1:
            raise fail(
                f"Mesh: the devices are in {len(parts)} {what}, and the axes that cross them (dcn=, {written}) cannot "
                f"hold them: their sizes must multiply to a multiple of {len(parts)}."
            )
        return shares

    def _check_one_slice(self, what: str, parts: list[int]) -> None:
        platform = self.topology.platform if self.topology else self.present[0].platform if self.present else ""
        if platform == "tpu" and what == "slices" and len(parts) > 1:
            raise fail(
                f"Mesh: the devices are in {len(parts)} slices. Say which axis crosses the slow network between them: "
                "mw.Mesh(..., dcn='data'), or --dcn data for the commands."
            )

    def _virtual(self) -> bool:
        return self.present is not None and all(d.platform == "cpu" for d in self.present)
