"""``plan``: from a function and its arguments to everything that is known before it runs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from rich.console import Console, ConsoleOptions, RenderableType

from ..devices import show_sizes
from ..errors import fail, fail_type
from ..mesh import Mesh
from ..topology import Topology
from .call import Call, Leaf
from .compiled import Compiled, Planned
from .compiling import Target, compiled, largest_of, planned_memory
from .hardware import Hardware
from .known import Known
from .lineage import Lineage
from .memory import Memory, memory_of
from .network import Machine, machine
from .page import html
from .pipeline import Pipeline, pipelines_of
from .program import Program, read
from .report import as_text, comparison, page
from .summary import Summary, summary
from .time import Times, times_of
from .traffic import Collective, collectives_of
from .warnings import PlanWarning, warnings_of
from .work import Flops, flops_along


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What one call of a program does on one device. ``print`` shows it; rich shows it in colour."""

    program: Program
    call: Call
    """The function and its arguments' shapes."""
    machine: Machine | None = None
    """What it runs on: without one, nothing is known of times."""
    name: str = "the program"
    """The function's."""

    def on(self, hardware: "str | Hardware | Topology | Mesh | Machine") -> "Plan":
        """The same plan on a machine: a mesh with its topology, ``"tpu:v5p:8x8x8"``, a chip (``"h100"``), a profile
        of ``mw.calibrate`` or its file.

        Raises:
            ValueError: the machine is not known, or has another number of devices.
        """
        return dataclasses.replace(self, machine=machine(hardware, self.program.sizes))

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """One row for each collective of the trace, in the program's order."""
        return collectives_of(self.program)

    @functools.cached_property
    def flops(self) -> Flops:
        """The floating-point operations: along a pipeline, those of the device that does most."""
        return max(self._flops_along, key=lambda flops: flops.total)

    @functools.cached_property
    def pipelines(self) -> tuple[Pipeline, ...]:
        """The pipelines: what each device along one does, keeps and, on a machine, how long it waits."""
        runs = self._times.pipelines if self.machine is not None else ()
        flops = [flops.total for flops in self._flops_along]
        return pipelines_of(self.program, flops, self.memory.peak_bytes, runs)

    @functools.cached_property
    def memory(self) -> Memory:
        """What a device holds, and when: arguments, what is saved for the backward pass, temporaries."""
        return memory_of(self.program, self._lineage, self.machine.hardware if self.machine is not None else None)

    def time(self, hardware: "str | Hardware | Topology | Mesh | Machine | None" = None) -> Times:
        """How long a call takes, and what it waits for.

        Args:
            hardware: as for ``on``; None: the plan's own machine.

        Raises:
            ValueError: no machine is known.
        """
        if hardware is not None:
            return self.on(hardware)._times
        if self.machine is None:
            raise fail(
                "plan.time: nothing is known of the speed of this machine. Name one: plan.time('v5p'), "
                "plan.time('gpu:h100:64'), a mesh with a topology, or mw.calibrate()'s profile of this one."
            )
        return self._times

    @functools.cached_property
    def warnings(self) -> tuple[PlanWarning, ...]:
        """What is probably not as it should be, the most expensive first; without a machine, what needs none."""
        known = Known.of(self.program, self._lineage, self.machine, self.memory.peak_bytes, self.pipelines)
        return warnings_of(known)

    @functools.cached_property
    def summary(self) -> Summary:
        """Everything that the report shows, as data."""
        times = self._times if self.machine is not None else None
        known = self.flops, self.collectives, self.memory, self.warnings, self.pipelines
        return summary(self.name, self.program, self.machine, times, *known)

    def to_json(self) -> str:
        """The summary as JSON: times in seconds, sizes in bytes, of one device in one call."""
        return self.summary.json()

    def save(self, path: str | Path) -> None:
        """Write the plan to a file: ``plan.html``, one page that needs no network, or ``plan.json``.

        Raises:
            ValueError: the file's name ends otherwise, or its folder is not there.
        """
        path = Path(path)
        if path.suffix not in (".html", ".json"):
            found = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
            raise fail(f"plan.save: {str(path)!r} {found}. Write plan.save('plan.html') for a page, or 'plan.json'.")
        if not path.parent.is_dir():
            raise fail(f"plan.save: {str(path)!r}: there is no folder {str(path.parent)!r}.")
        text = self.to_json()
        path.write_text(html(text) if path.suffix == ".html" else text, encoding="utf-8")

    def compile(self, on: "str | Topology | Mesh | None" = None, options: Mapping[str, Any] | None = None) -> Compiled:
        """The compiler's word: its memory, collectives and cycles beside the plan's, or why it refuses the program.

        Args:
            on: for a described mesh, the topology to compile for, or a mesh that has one; None: that of ``plan.on``.
                A program on present devices is compiled for those.
            options: XLA's, as ``jax.stages.Lowered.compile`` takes them.

        Raises:
            ValueError: no topology is known, there is no compiler for it here, or it has other devices than the mesh.
        """
        target = Target.of(on, self.machine, self.program)
        memory = planned_memory(memory_of(self.program, self._lineage, target.hardware), target)
        planned = Planned(self.name, self.program.sizes, memory, self.collectives, largest_of(self.program))
        return compiled(self.program, self.call, target, planned, options or {})

    def compare(self, other: "Plan", names: tuple[str, str] = ("this", "other")) -> "Comparison":
        """This plan and another, side by side.

        Raises:
            TypeError: the other is no plan.
        """
        if not isinstance(other, Plan):
            raise fail_type(f"plan.compare: expected a plan, found {type(other).__name__}. Write mw.plan(step, ...).")
        return Comparison(((names[0], self.summary), (names[1], other.summary)))

    def __repr__(self) -> str:
        on = f" on {self.machine.hardware.title}" if self.machine is not None else ""
        return f"<Plan of {self.name}{on}: {show_sizes(self.program.sizes) or 'one device'}>"

    def __rich_console__(self, console: Console, _: ConsoleOptions) -> Sequence[RenderableType]:
        return [page(self.summary, plain=console.color_system is None)]

    def __str__(self) -> str:
        return as_text(page(self.summary, plain=True))

    @functools.cached_property
    def _flops_along(self) -> tuple[Flops, ...]:
        return flops_along(self.program)

    @functools.cached_property
    def _lineage(self) -> Lineage:
        return Lineage.of(self.program)

    @functools.cached_property
    def _times(self) -> Times:
        assert self.machine is not None
        return times_of(self.program, self.machine, self._lineage)


@dataclass(frozen=True)
class Comparison:
    """Plans side by side: ``print`` shows a table."""

    sides: tuple[tuple[str, Summary], ...]
    """Each one's name and figures."""

    def __rich__(self) -> RenderableType:
        return comparison(self.sides)

    def __str__(self) -> str:
        return as_text(comparison(self.sides))


def plan(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Plan:
    """What ``fn(*args, **kwargs)`` will do, read from its trace: nothing is compiled, nothing runs.

    Args:
        fn: any function that contains regions, compiled by ``jax.jit`` or not: a loss, its gradient, a training step.
        args: real arguments, or their shapes (``jax.eval_shape``; placed by ``mw.shard``, which says how they lie).
            What is neither array nor number (a string, a function that is a leaf of a module) is static.
        kwargs: arguments given by name.

    Raises:
        TypeError: ``fn`` cannot be called.
    """
    if not callable(fn):
        raise fail_type(f"plan: expected a function, found {type(fn).__name__}. Write mw.plan(step, state, batch).")
    call = Call.of(fn, args, kwargs)
    traced = call.trace()
    leaves = call.leaves(traced)
    return Plan(read(traced, leaves), call.shapes(), _present(leaves), traced.fun_name)


def _present(leaves: Sequence[Leaf]) -> Machine | None:
    """The machine on which the arguments lie, when it is in the table."""
    for x in (leaf.array for leaf in leaves):
        found = x.sharding if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else None
        if isinstance(found, NamedSharding) and isinstance(found.mesh, jax.sharding.Mesh):
            chip = Hardware.of_kind(found.mesh.devices.flat[0].device_kind)
            return machine(chip, dict(found.mesh.shape)) if chip is not None else None
    return None
