"""Compiling: a planned program given to XLA.

For a described TPU topology this is the TPU compiler, ahead of time (``described.py``); else the compiler of the
devices that are here. A described mesh has no devices to compile for, so the function is traced once more, on arguments
that lie over the devices which the compiler describes. Its regions follow them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import Mesh as JaxMesh

from ..devices import present
from ..errors import fail
from ..mesh import Mesh
from ..scope import Axes
from ..topology import Topology
from .call import Call
from .compiled import Compiled, CompiledMemory, Planned
from .described import described_mesh
from .exhausted import Allocation, Exhausted, read_exhausted
from .hardware import Hardware
from .hlo import compiled_collectives, compiled_cycles
from .memory import Memory
from .network import Machine, shares_of
from .program import Block, Choice, Loop, Op, Program, Value

NUM_LARGEST = 8
"""How many tensors of a program that does not fit are listed."""


@dataclass(frozen=True)
class Target:
    """What is compiled for."""

    name: str
    """As a person names it."""
    hardware: Hardware | None
    """The device, where the table has it."""
    platform: str
    topology: Topology | None = None
    """None: what is here."""
    slow: Axes = ()

    @classmethod
    def of(cls, on: str | Topology | Mesh | None, machine: Machine | None, program: Program) -> "Target":
        """The target of a program: see ``Plan.compile``."""
        here = isinstance(program.mesh, JaxMesh)
        asked = on if on is not None or here else machine
        topology, slow = _topology_of(asked)
        if here and asked is not None:
            raise fail(
                f"compile: the program's mesh has devices of its own ({_kind(program)}), and is compiled for those. To "
                f"compile it for {topology or 'others'}, plan it on a described mesh: mw.Mesh(..., topology=...)."
            )
        if topology is not None:
            return cls(str(topology), Hardware.named(topology.chip), topology.platform, topology, slow)
        if isinstance(program.mesh, AbstractMesh):
            raise fail(
                "compile: the program's mesh is only described: which devices is it to be compiled for? Write "
                "plan.compile('tpu:v5p:8x8x8'), or plan.on(mesh).compile() with a mesh that has a topology."
            )
        kind = _kind(program)
        return cls(kind, Hardware.of_kind(kind), _devices(program)[0].platform)

    def slices(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """Over how many slices each axis is dealt out."""
        return shares_of(sizes, self.topology.num_slices, self.slow) if self.topology is not None else {}


def _topology_of(on: str | Topology | Mesh | Machine | None) -> tuple[Topology | None, Axes]:
    """The topology that is meant, and the axes that cross its slow network."""
    if isinstance(on, Mesh):
        if on.topology is None:
            raise fail(
                f"compile: {on!r} has no topology that could be compiled for. Write mw.Mesh(..., "
                "topology='tpu:v5p:8x8x8'); a program that is planned on present devices is compiled for those."
            )
        return on.topology, on.dcn
    if isinstance(on, Machine):
        return on.topology, on.slow
    return (Topology.parse(on) if isinstance(on, str) else on), ()


def _devices(program: Program) -> list[Any]:
    return list(program.mesh.devices.flat) if isinstance(program.mesh, JaxMesh) else present()


def _kind(program: Program) -> str:
    kind: str = _devices(program)[0].device_kind
    return kind


def compiled(program: Program, call: Call, target: Target, planned: Planned, options: Mapping[str, Any]) -> Compiled:
    """What XLA makes of a program.

    Args:
        program: as it was planned.
        call: the same, to be traced for the devices that a compiler describes.
        target: what it is compiled for.
        planned: the plan's figures.
        options: XLA's.
    """
    if target.topology is not None:
        lowered = call.over(described_mesh(target.topology, target.slow, program.sizes)).lower()
    else:
        lowered = program.traced.lower()
    began = time.monotonic()
    try:
        made = lowered.compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        exhausted = read_exhausted(str(error))
        if exhausted is None:
            raise
        return _refused(exhausted, target, time.monotonic() - began, planned)
    return _accepted(made, target, time.monotonic() - began, planned)


def _accepted(made: Any, target: Target, seconds: float, planned: Planned) -> Compiled:
    text, memory = made.as_text(), _memory(made.memory_analysis())
    there = target.hardware.memory_bytes or None if target.hardware is not None else None
    cycles, sure = compiled_cycles(text)
    return Compiled(
        name=planned.name,
        mesh=dict(planned.sizes),
        target=target.name,
        seconds=seconds,
        fits=_fits(memory, there, target),
        available_bytes=there,
        memory=memory,
        exhausted=None,
        collectives=compiled_collectives(text, planned.sizes, target.slices(planned.sizes)),
        cycles=cycles,
        cycles_sure=sure,
        planned=planned,
    )


def _fits(memory: CompiledMemory | None, there: int | None, target: Target) -> bool | None:
    """The verdict on a program that was compiled: TPUs' compiler would have refused one that does not fit."""
    if target.platform == "tpu":
        return True
    return memory.total_bytes <= there if memory is not None and there is not None else None


def _refused(exhausted: Exhausted, target: Target, seconds: float, planned: Planned) -> Compiled:
    return Compiled(
        name=planned.name,
        mesh=dict(planned.sizes),
        target=target.name,
        seconds=seconds,
        fits=False,
        available_bytes=exhausted.available_bytes,
        memory=None,
        exhausted=exhausted,
        collectives=(),
        cycles=None,
        cycles_sure=True,
        planned=planned,
    )


def _memory(stats: Any) -> CompiledMemory | None:
    """From XLA's figures, which not every backend gives."""
    if stats is None:
        return None
    return CompiledMemory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temporary_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
    )


def planned_memory(memory: Memory, target: Target) -> dict[str, int]:
    """The plan's memory by the names of ``CompiledMemory``, of temporaries what the target's compiler calls so; and
    what a device needs, which the compiler says when it refuses a program."""
    temporary = memory.reported_temporary_bytes if target.platform == "tpu" else memory.temporary_bytes
    return {
        "argument_bytes": memory.argument_bytes,
        "output_bytes": memory.output_bytes,
        "alias_bytes": memory.alias_bytes,
        "temporary_bytes": temporary,
        "total_bytes": memory.peak_bytes - memory.temporary_bytes + temporary,
        "peak_bytes": memory.peak_bytes,
    }


def largest_of(program: Program) -> tuple[Allocation, ...]:
    """The largest tensors that a program is given and makes, as one device holds them; of equal ones from one line only
    the first. XLA need not keep each: what it fuses never lies in memory."""
    found: dict[tuple[str, str, str], int] = {}
    for argument in program.arguments:
        found[_shape(argument.value, argument.names), f"argument {argument.path}", ""] = argument.value.num_bytes
    for value, operation, place in _made(program.block):
        found.setdefault((_shape(value), operation, place), value.num_bytes)
    order = sorted(found, key=lambda key: -found[key])
    return tuple(Allocation(found[key], *key) for key in order[:NUM_LARGEST])


def _made(block: Block) -> Iterator[tuple[Value, str, str]]:
    """Every value that a block makes of others, with the operation and the line that make it: what is made of constants
    alone (zeros, counts) takes no memory."""
    constants: set[Value | None] = {None}
    for node in block.nodes:
        if isinstance(node, Op) and constants.issuperset(node.ins):
            constants.update(node.outs)
            continue
        yield from ((value, node.origin.operation, node.origin.place) for value in node.outs)
        inner = (node.body,) if isinstance(node, Loop) else node.branches if isinstance(node, Choice) else ()
        for each in inner:
            yield from _made(each)


def _shape(value: Value, names: Sequence[str] = ()) -> str:
    """``float32[32,4096]``, with the dims' names where they are known."""
    named = [f"{name}={size}" for name, size in zip(names, value.shape, strict=True)] if names else value.shape
    return f"{value.dtype.name}[{', '.join(map(str, named))}]"
