"""Memory: what a device holds while a program runs.

    arguments + temporaries + outputs - aliases

Arguments are their slices. An output that takes the place of a donated argument of its shape is an alias. Temporaries
are the buffers of the program (``buffers.py``), packed as allocators do (``heap.py``). Nothing of it is measured: the
order of a trace is not quite a compiler's, and ``plan.compile()`` has the compiler's own figures.

Each byte has a kind, told from who makes it and who reads it: what the forward pass makes and the backward pass reads
is a *saved activation*, what the backward pass makes and the update reads is a *gradient*. A gathered or cast parameter
is a *parameter copy*, and what is given back in no argument's place an *output*.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..tensor import PARAMETER
from .buffers import Buffer, Buffers
from .hardware import Hardware
from .heap import most_bytes, outside, packed
from .lineage import Lineage
from .origin import BACKWARD, FORWARD, RECOMPUTE, UPDATE, Origin
from .program import Argument, Block, Choice, Loop, Program, reads_of

KINDS: tuple[str, ...] = (
    "parameters",
    "optimizer state",
    "other arguments",
    "parameter copies",
    "gradients",
    "saved activations",
    "temporaries",
    "outputs",
)
PARAMETERS, OPTIMIZER, ARGUMENTS, COPIES, GRADIENTS, SAVED, TEMPORARIES, OUTPUTS = KINDS
MOST_MOMENTS = 400
"""Of a timeline: between two, what changes least is left out."""


@dataclass(frozen=True)
class Moment:
    """What a device holds while one operation runs."""

    by_kind: Mapping[str, int]
    origin: Origin
    """The operation."""


@dataclass(frozen=True)
class Saved:
    """What one line of the program keeps for the backward pass."""

    operation: str
    """The named operation that makes it, or the loop that stacks it."""
    dims: tuple[str, ...]
    """The names of the tensor's dims, where they are known."""
    num_bytes: int
    """Of all its turns."""
    origin: Origin


@dataclass(frozen=True)
class Memory:
    """What a device holds."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Of the outputs, what takes the place of donated arguments."""
    temporary_bytes: int
    """The memory in which the temporaries are packed."""
    reported_temporary_bytes: int
    """What TPUs' compiler calls temporaries: it adds the packed memory's fragmentation once more, and counts for it
    neither what the turns of loops make nor, after a loop, its results."""
    by_kind: Mapping[str, int]
    """What is held when most is held."""
    saved: tuple[Saved, ...]
    """What is kept for the backward pass, the largest first."""
    timeline: tuple[Moment, ...] = field(repr=False)
    """In the program's order; one turn of each loop."""

    @property
    def peak_bytes(self) -> int:
        """What a device must have."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes - self.alias_bytes


def memory_of(program: Program, lineage: Lineage, hardware: Hardware | None = None) -> Memory:
    """The memory of a program on a device of this kind; None: of any."""
    on_tpu = hardware is not None and hardware.platform == "tpu"
    buffers = Buffers.of(program, lineage)
    results = _results(program, buffers)
    returned = {id(buffer) for buffer in results.buffers}
    temporaries = [b for b in buffers.found if id(b) not in returned]
    if hardware is not None:
        temporaries = outside(temporaries, hardware.scratch_bytes, hardware.scratch_collectives)
    heap = packed(temporaries, as_made=on_tpu)
    counted = ((b.num_bytes, b.start, min(b.end, b.in_loop_until)) for b in temporaries if not b.in_turn)
    arguments = _arguments(program, lineage)
    held = [*((b, _kind_of(b)) for b in temporaries), *((b, OUTPUTS) for b in results.beside)]
    timeline = _timeline(buffers.moments, held, arguments)
    highest = max(timeline, key=lambda moment: sum(moment.by_kind.values()), default=None)
    return Memory(
        argument_bytes=sum(a.value.num_bytes for a in program.arguments),
        output_bytes=results.num_bytes,
        alias_bytes=results.alias_bytes,
        temporary_bytes=heap,
        reported_temporary_bytes=2 * heap - most_bytes(counted),
        by_kind=highest.by_kind if highest is not None else arguments,
        saved=_saved(temporaries),
        timeline=_thinned(timeline),
    )


@dataclass
class _Results:
    """What a program gives back."""

    num_bytes: int = 0
    alias_bytes: int = 0
    """Of them, what takes the place of donated arguments."""
    buffers: list[Buffer] = field(default_factory=list)
    """Where they lie."""
    beside: list[Buffer] = field(default_factory=list)
    """Those of them that take no argument's place."""


def _results(program: Program, buffers: Buffers) -> _Results:
    donated = Counter((a.value.shape, a.value.dtype) for a in program.arguments if a.donated)
    found = _Results()
    for v in (v for v in program.block.outs if v is not None):
        found.num_bytes += v.num_bytes
        in_place = donated[v.shape, v.dtype] > 0
        donated[v.shape, v.dtype] -= in_place
        found.alias_bytes += v.num_bytes * in_place
        if (buffer := buffers.holding(v)) is not None:
            found.buffers.append(buffer)
            if not in_place:
                found.beside.append(buffer)
    return found


def _arguments(program: Program, lineage: Lineage) -> dict[str, int]:
    found: dict[str, int] = dict.fromkeys(KINDS[:3], 0)
    used = _used_by_passes(program.block, lineage)
    for argument in program.arguments:
        found[_kind_of_argument(argument, used)] += argument.value.num_bytes
    return found


def _kind_of_argument(argument: Argument, used: set[int]) -> str:
    """Tensors of the optimizer's state have the role of the parameters they were made from; only the update reads
    them."""
    if argument.role != PARAMETER:
        return ARGUMENTS
    return PARAMETERS if not used or id(argument) in used else OPTIMIZER


def _used_by_passes(block: Block, lineage: Lineage) -> set[int]:
    """The ids of the parameters that the forward and the backward pass read."""
    found: set[int] = set()
    for node in block.nodes:
        if node.origin.direction != UPDATE:
            found.update(id(lineage.parameter(v)) for v in reads_of(node) if lineage.parameter(v) is not None)
        inner = (node.body,) if isinstance(node, Loop) else node.branches if isinstance(node, Choice) else ()
        for each in inner:
            found |= _used_by_passes(each, lineage)
    return found


def _kind_of(buffer: Buffer) -> str:
    made = buffer.origin.direction
    if buffer.of_parameter:
        return COPIES
    if made == FORWARD and buffer.read_in & {BACKWARD, RECOMPUTE}:
        return SAVED
    return GRADIENTS if made == BACKWARD and UPDATE in buffer.read_in else TEMPORARIES


def _timeline(
    moments: Sequence[Origin], held: Iterable[tuple[Buffer, str]], arguments: Mapping[str, int]
) -> list[Moment]:
    changes: dict[int, Counter[str]] = defaultdict(Counter)
    for buffer, kind in held:
        changes[buffer.start][kind] += buffer.num_bytes
        changes[buffer.end + 1][kind] -= buffer.num_bytes
    now: Counter[str] = Counter(arguments)
    found = []
    for at, origin in enumerate(moments):
        if at in changes or not found:
            for kind, change in changes[at].items():
                now[kind] += change
            found.append(Moment({kind: now[kind] for kind in KINDS}, origin))
    return found


def _thinned(timeline: Sequence[Moment]) -> tuple[Moment, ...]:
    """At most ``MOST_MOMENTS``: of each stretch the one that holds most."""
    stretch = -(-len(timeline) // MOST_MOMENTS)
    parts = (timeline[i : i + stretch] for i in range(0, len(timeline), max(1, stretch)))
    return tuple(max(part, key=lambda moment: sum(moment.by_kind.values())) for part in parts)


def _saved(buffers: Iterable[Buffer]) -> tuple[Saved, ...]:
    sizes: Counter[Origin] = Counter()
    for buffer in buffers:
        if _kind_of(buffer) == SAVED:
            sizes[buffer.origin] += buffer.num_bytes
    found = (Saved(origin.operation, origin.dims, size, origin) for origin, size in sizes.items())
    return tuple(sorted(found, key=lambda saved: -saved.num_bytes))
