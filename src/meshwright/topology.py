"""Topologies: devices that are described, not present.

``"tpu:v5p:8x8x8"`` is a torus of 8 x 8 x 8 TPU v5p chips, ``"gpu:h100:64"`` is 64 H100 GPUs, ``"tpu:v5e:16x16*2"`` is
two slices of 256 chips joined by the slow network. A mesh over a topology counts its devices and lets programs be
traced, planned and compiled for a machine that nobody has at hand.

A device is what JAX calls one. TPU v2, v3 and v7x show two devices a chip; the two cores of a v4 or v5p chip act as
one device (megacore), v5e and v6e have one core. Sources: the vendors' documentation of each chip.

    >>> pod = Topology.parse("tpu:v5p:8x8x8")
    >>> pod.num_chips, pod.num_devices
    (512, 512)
"""

import math
import re
from dataclasses import dataclass

from .errors import fail
from .notation import check_known


@dataclass(frozen=True)
class Chip:
    """What counting needs to know of one kind of chip."""

    num_dims: int
    """The dimensions of its torus; 1 for GPUs, which are only counted."""
    devices_per_chip: int = 1
    domain: int | None = None
    """How many GPUs one fast network joins; None for TPUs, where a slice is one."""


CHIPS: dict[str, dict[str, Chip]] = {
    "tpu": {
        "v2": Chip(2, devices_per_chip=2),
        "v3": Chip(2, devices_per_chip=2),
        "v4": Chip(3),
        "v5e": Chip(2),
        "v5p": Chip(3),
        "v6e": Chip(2),
        "v7x": Chip(3, devices_per_chip=2),
    },
    "gpu": {
        "a100": Chip(1, domain=8),
        "h100": Chip(1, domain=8),
        "h200": Chip(1, domain=8),
        "b200": Chip(1, domain=8),
        "gb200": Chip(1, domain=72),
    },
}
"""Chips by platform and name."""

_ADVICE = 'Write platform:chip:size, as in "tpu:v5p:8x8x8" or "gpu:h100:64"; "tpu:v5e:16x16*2" is two slices.'


@dataclass(frozen=True)
class Topology:
    """Described devices: a platform, a chip, the chips of one slice along each dimension, and the number of slices."""

    platform: str
    chip: str
    shape: tuple[int, ...]
    num_slices: int = 1
    """Parts joined by the slow network: TPU slices, or GPUs' NVLink domains."""

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """The topology that a string describes.

        Raises:
            ValueError: the platform or chip is unknown (the nearest is named), or the size does not suit the chip.
        """
        fields = [field.strip().lower() for field in text.split(":")]
        if len(fields) != 3:
            raise fail(f"topology: {text!r} has {len(fields)} of 3 fields. {_completed(fields) or _ADVICE}")
        platform, name, size = fields
        check_known([platform], CHIPS, f"topology: in {text!r} the platform {{}} is unknown.")
        check_known([name], CHIPS[platform], f"topology: in {text!r} the {platform.upper()} {{}} is unknown.")
        chip = CHIPS[platform][name]
        found = re.fullmatch(r"(\d+(?:x\d+)*)(?:\*(\d+))?", size)
        shape = tuple(int(n) for n in found[1].split("x")) if found else ()
        num_slices = int(found[2] or 1) if found else 0
        if len(shape) != chip.num_dims or 0 in shape or num_slices < 1:
            example = ":".join((platform, name, "x".join(["8"] * chip.num_dims)))
            needs = f"{chip.num_dims} positive sizes" if chip.num_dims > 1 else "a count"
            raise fail(f"topology: the size {size!r} in {text!r} does not suit {name}: it has {needs}, as {example!r}.")
        if chip.domain is not None:
            shape, num_slices = _in_domains(math.prod(shape) * num_slices, chip.domain, text)
        return cls(platform, name, shape, num_slices)

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def devices_per_chip(self) -> int:
        return CHIPS[self.platform][self.chip].devices_per_chip

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.devices_per_chip

    @property
    def kind(self) -> str:
        """``TPU v5p``, ``GPU H100``: as a person names the device."""
        return f"TPU {self.chip}" if self.platform == "tpu" else f"GPU {self.chip.upper()}"

    def __str__(self) -> str:
        if self.platform == "gpu":
            return f"gpu:{self.chip}:{self.num_chips}"
        slices = f"*{self.num_slices}" if self.num_slices > 1 else ""
        return f"{self.platform}:{self.chip}:{'x'.join(map(str, self.shape))}{slices}"


def _completed(fields: list[str]) -> str:
    """What to write for a chip of a known platform and its size, where the platform alone is left out."""
    known = [platform for platform, chips in CHIPS.items() if len(fields) == 2 and fields[0] in chips]
    return f"Write {known[0]}:{':'.join(fields)}." if known else ""


def _in_domains(num_gpus: int, domain: int, text: str) -> tuple[tuple[int, ...], int]:
    """GPUs as domains of equal size."""
    if num_gpus > domain and num_gpus % domain:
        below = num_gpus // domain * domain
        raise fail(
            f"topology: {num_gpus} GPUs in {text!r} do not fill domains of {domain}, which one fast network joins.\n"
            f"  Write {below}, {below + domain} or another multiple of {domain}, or fewer than {domain}."
        )
    return ((min(num_gpus, domain),), max(1, num_gpus // domain))
