"""The flags that say where a program would run: on devices that are here, or on any that can be described.

Layouts that stand side by side are each a string: the layout, then whatever else is different about that side, each
with a ``|`` before it.

    "batch:data, ff:model, heads:model | mesh=data=64, model=8 | params=embed:data"
"""

import dataclasses
from dataclasses import dataclass

import jax

from ..errors import fail
from ..mesh import Mesh
from ..notation import check_known
from ..scope import Axes
from ..topology import Topology
from .place import Where, find_devices

OPTIONS = ("mesh", "dcn", "params", "optimizer", "gather", "sums", "overlap", "partitioner")
"""What may be different about a side, besides its layout."""


@dataclass(frozen=True, kw_only=True)
class Anywhere(Where):
    """Where it would run: on devices that are here, or on some that are not."""

    topology: str | None = None
    """Described devices, which need not be here: "tpu:v5p:8x8x8", "gpu:h100:64", "tpu:v5e:16x16*2" for two slices.
    None: those of this machine."""
    hardware: str | None = None
    """How fast the devices are, where no TOPOLOGY says it: a chip, "h100", or a profile that mw.calibrate wrote,
    "here.toml". None: what is known of the devices that are here."""

    @property
    def num_devices(self) -> int:
        """How many there are."""
        if self.topology is not None:
            return Topology.parse(self.topology).num_devices
        return len(find_devices(self.devices))

    def make_mesh(self, named: Axes) -> Mesh:
        """A mesh of described devices, or of present ones."""
        if self.topology is None:
            return super().make_mesh(named)
        for flag, value in (("devices", self.devices), ("hardware", self.hardware)):
            if value is not None:
                raise fail(f"--topology says what the devices are and how many. Leave --{flag} {value} out.")
        described = Topology.parse(self.topology)
        jax.config.update("jax_platforms", "cpu")  # Nothing runs: an accelerator would be held for nothing.
        return Mesh(self.axes(described.num_devices, named), topology=described, dcn=self.dcn or ())

    def side(self, text: str) -> "Anywhere":
        """This place with another layout, ``text``, and what else is different about it.

        Raises:
            ValueError: ``text`` names an option that there is not.
        """
        layout, *options = (part.strip() for part in text.split("|"))
        changes = {"layout": layout}
        for option in options:
            name, equals, value = (part.strip() for part in option.partition("="))
            if not equals:
                raise fail(
                    f"--compare: {option!r} in {text!r} is not an option and its value. Write params=embed:data."
                )
            check_known([name], OPTIONS, f"--compare: in {text!r} there is no option {{}}.")
            changes[name] = value
        return dataclasses.replace(self, **changes)
