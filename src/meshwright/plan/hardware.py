"""Hardware: what a device can do, as data.

``hardware.toml`` has a table for each chip, with the public figures and which of them were not checked; a machine that
``mw.calibrate`` measured is a file of the same form. A figure is that of one device, as JAX counts devices.

    >>> chip = Hardware.named("v5p")
    >>> chip.title, chip.peak_flops / chip.hbm_bytes_per_second > 100
    ('TPU v5p', True)
"""

import functools
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import fail
from ..notation import check_known
from ..topology import CHIPS

NETWORKS = ("torus", "switch", "measured")
_KINDS = {
    r"TPU v2": "v2", r"TPU v3": "v3", r"TPU v4$": "v4", r"TPU v5 ?(lite|e)": "v5e", r"TPU v5p?$": "v5p",
    r"TPU v6 ?(lite|e)": "v6e", r"TPU ?v?7x?": "v7x", r"A100.*40GB": "a100-40", r"A100": "a100", r"GB200": "gb200",
    r"B200": "b200", r"H200": "h200", r"H100": "h100",
}  # fmt: skip
"""From what JAX calls a device to the name of its chip; the first that is found in it."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What products of one size reach."""

    size: int
    """Of one product of matrices the harmonic mean of rows, columns and summed: the work for each element moved."""
    fraction: float
    """Of the peak."""


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """A collective as it was measured: ``alpha_seconds``, and ``bytes_per_second`` of what a device sends."""

    kind: str
    group_size: int
    alpha_seconds: float
    bytes_per_second: float
    axis: str = ""
    """The mesh axis it was measured on; "" where that does not matter."""

    def seconds(self, sent_bytes: float) -> float:
        return self.alpha_seconds + sent_bytes / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device and the networks that join it to others."""

    name: str
    """As topologies write it: ``v5p``."""
    title: str
    """As a person writes it: ``TPU v5p``."""
    platform: str
    """``tpu``, ``gpu``, or what JAX calls the platform of a measured machine."""
    peak_flops: float
    """Dense bfloat16 operations a second; of a measured machine, the best that was measured."""
    hbm_bytes: int
    """Memory; 0 where it is not known."""
    hbm_bytes_per_second: float
    """What a device reads and writes."""
    network: str
    """``torus``, ``switch``, or ``measured``: then ``achieved`` has every kind."""
    matmul: tuple[Rate, ...]
    """What products reach, the smallest size first; between two sizes, in proportion to the logarithm."""
    tile: int
    """The side of the matrix unit: a shorter dim of a product leaves a part of it idle."""
    scratch_bytes: int = 0
    """Memory on the chip that a compiler gives to temporaries (of a TPU, its VMEM; of a v4, its CMEM); 0: none."""
    scratch_collectives: bool = True
    """Whether the results of collectives may lie there."""
    usable_bytes: int = 0
    """Memory that programs may use; 0: all of it. Of TPUs, what their compiler takes as there, in its own rounding."""
    wraps: str = ""
    """Of a torus, where a dimension closes to a ring: ``multiples of 4``, ``at 16``."""
    domain: int = 0
    """Of a switch, how many devices it joins."""
    link_bytes_per_second: float = 0.0
    """One way: of a link of a chip in a torus, of a device on a switch."""
    core_bytes_per_second: float = 0.0
    """One way, between the devices of one chip; 0: half of ``hbm_bytes_per_second``, as each byte is read and written
    once."""
    alpha_seconds: float = 0.0
    """The latency: of a hop in a torus, of a collective on a switch."""
    slow_bytes_per_second: float = 0.0
    """One way, a chip, between slices or domains; 0 where it is not known."""
    achieved: tuple[Achieved, ...] = ()
    """Measured collectives, which are taken before the formulas."""
    cache_bytes: int = 0
    """The room in a cache; 0: there is none that matters."""
    cache_bytes_per_second: float = 0.0
    """What a device reads and writes of what the cache holds."""
    elementwise_flops: float = 0.0
    """Elementwise operations a second, where they limit a pass and not the memory; 0: they never do."""
    launch_seconds: float = 0.0
    """What a product, or a pass of elementwise operations, takes whatever its size."""
    overlap: bool = True
    """Whether collectives run beside the computation."""
    unchecked: tuple[str, ...] = ()
    """Fields that could not be checked against their source."""
    assumed: tuple[str, ...] = ()
    """Fields without a source: the nearest relative's."""

    def __post_init__(self) -> None:
        check_known([self.network], NETWORKS, f"hardware {self.name!r}: there is no network {{}}.")
        if self.wraps and not re.fullmatch(r"(at|multiples of) \d+", self.wraps):
            raise fail(f"hardware {self.name!r}: wraps is {self.wraps!r}. Write 'at 16' or 'multiples of 4'.")
        if not self.matmul or min(self.peak_flops, self.hbm_bytes_per_second) <= 0:
            raise fail(f"hardware {self.name!r}: peak_flops, hbm_bytes_per_second and matmul must be positive.")
        if self.cache_bytes and self.cache_bytes_per_second <= 0:
            raise fail(f"hardware {self.name!r}: there is a cache, so cache_bytes_per_second must be positive.")
        self._check_network()

    def _check_network(self) -> None:
        """What the formulas of a network divide by, and what they look up."""
        needed = {"torus": ("link_bytes_per_second",), "switch": ("link_bytes_per_second", "domain")}
        for name in needed.get(self.network, ()):
            if getattr(self, name) <= 0:
                raise fail(f"hardware {self.name!r}: the network is a {self.network}, so {name} must be positive.")
        if self.network == "torus":
            said = f"hardware: the name of a chip on a torus says how it lies there, and {{}} is none ({self.title})."
            check_known([self.platform], CHIPS, f"hardware {self.name!r}: there is no platform {{}} with a torus.")
            check_known([self.name], CHIPS[self.platform], said)

    @classmethod
    def named(cls, name: str) -> "Hardware":
        """A chip of the table.

        Raises:
            ValueError: there is none of that name; the nearest is named.
        """
        chips = table()
        check_known([name.lower()], chips, "hardware: there is no chip {}.")
        return chips[name.lower()]

    @classmethod
    def load(cls, path: str | Path) -> "Hardware":
        """The one machine that a file describes, as ``mw.calibrate`` writes it.

        Raises:
            ValueError: there is no such file, it does not describe one machine, or a field is unknown.
        """
        if not Path(path).is_file():
            raise fail(f"hardware: there is no file {str(path)!r}. mw.calibrate(path={str(path)!r}) writes it.")
        chips = _chips(Path(path).read_text(), str(path))
        if len(chips) != 1:
            raise fail(f"hardware: {path} describes {len(chips)} machines; a profile describes one.")
        return next(iter(chips.values()))

    @classmethod
    def of_kind(cls, device_kind: str) -> "Hardware | None":
        """The chip of a device that JAX calls ``device_kind``; None when the table has none."""
        return next((table()[name] for form, name in _KINDS.items() if re.search(form, device_kind)), None)

    @property
    def memory_bytes(self) -> int:
        """What a program may use of a device's memory; 0 where it is not known."""
        return self.usable_bytes or self.hbm_bytes

    def closes(self, length: int) -> bool:
        """Whether a whole dimension of a torus, ``length`` chips long, closes to a ring."""
        how, _, number = self.wraps.rpartition(" ")
        return bool(how) and (length == int(number) if how == "at" else length % int(number) == 0)

    def pass_seconds(self, memory_bytes: int, cached_bytes: int, flops: int) -> float:
        """How long an elementwise pass takes that moves so many bytes of memory and of what a cache holds, and does so
        many operations."""
        if not memory_bytes + cached_bytes:
            return 0.0
        moving = memory_bytes / self.hbm_bytes_per_second
        if cached_bytes:
            moving += cached_bytes / self.cache_bytes_per_second
        doing = flops / self.elementwise_flops if self.elementwise_flops else 0.0
        return max(moving, doing) + self.launch_seconds

    def matmul_flops(self, sizes: tuple[int, ...]) -> float:
        """The rate that a product of matrices with these sizes (rows, columns, summed) reaches, operations a second.

        A size is rounded up to the matrix unit's side, as the unit does: a dim half as long takes as long.
        """
        rounded = [-(-n // self.tile) * self.tile for n in sizes]
        filled = math.prod(sizes) / math.prod(rounded)
        return self.peak_flops * self._fraction(len(rounded) / sum(1 / n for n in rounded)) * filled

    def _fraction(self, size: float) -> float:
        below = [r for r in self.matmul if r.size <= size]
        above = [r for r in self.matmul if r.size > size]
        if not below or not above:
            return (below[-1] if below else above[0]).fraction
        low, high = below[-1], above[0]
        part = math.log(size / low.size) / math.log(high.size / low.size)
        return low.fraction + part * (high.fraction - low.fraction)

    def toml(self) -> str:
        """The machine as a file of the table's form."""
        lines = ["[[chip]]"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("matmul", "achieved") and value:
                lines += [f"{field.name} = [", *(f"    {_toml(each)}," for each in value), "]"]
            elif value != field.default:
                lines.append(f"{field.name} = {_toml(value)}")
        return "\n".join(lines) + "\n"


@functools.cache
def table() -> Mapping[str, Hardware]:
    """Every chip that is known, by name."""
    path = Path(__file__).with_name("hardware.toml")
    return _chips(path.read_text(), path.name)


def _chips(text: str, where: str) -> dict[str, Hardware]:
    try:
        written = tomllib.loads(text).get("chip", [])
    except tomllib.TOMLDecodeError as error:
        raise fail(f"hardware: {where} is not TOML: {error}") from None
    return {chip.name: chip for chip in (_chip(entry, where) for entry in written)}


def _chip(entry: dict[str, Any], where: str) -> Hardware:
    said = f"hardware: {where}, chip {entry.get('name', '?')!r}"
    lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
    parts = {
        key: tuple(_made(form, each, f"{said}, {key}") for each in entry.get(key, ()))
        for key, form in (("matmul", Rate), ("achieved", Achieved))
    }
    return _made(Hardware, {**entry, **lists, **parts}, said)


def _made(form: Any, entry: Any, said: str) -> Any:
    """A table of a file as what it describes."""
    if not isinstance(entry, dict):
        raise fail(f"{said}: {entry!r} is no table. Write {{ field = value }}.")
    known: dict[str, Any] = {field.name: field for field in fields(form)}
    check_known(entry, known, f"{said} has the field {{}}.")
    for key, value in entry.items():
        if known[key].type in (int, float) and not isinstance(value, int | float):
            raise fail(f"{said}: {key} is {value!r}, which is no number.")
        if known[key].type is bool and not isinstance(value, bool):
            raise fail(f"{said}: {key} is {value!r}; it is true or false.")
    numbers = {key: float(value) for key, value in entry.items() if known[key].type is float}
    try:
        return form(**{**entry, **numbers})
    except TypeError as error:
        raise fail(f"{said}: {error}.") from None


def _toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, Rate | Achieved):
        shown = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in shown.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(float(f"{value:.6g}")) if isinstance(value, float) else repr(value)
