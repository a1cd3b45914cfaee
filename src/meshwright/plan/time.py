"""Time: how long a program takes on a machine, and what it waits for.

Each operation has a cost. A product of matrices takes the longer of its arithmetic, at the rate that its size reaches,
and of its way through memory; everything else takes its way through memory (``touched.py``). A collective takes what
its network says (``network.py``).

A device has one unit that computes, in the program's order as far as operands are there, and a port to the network of
each axis, which takes collectives in the same way: what needs no result of a running collective goes on beside it.
Between the turns of a loop nothing overlaps. Where the hardware cannot overlap, everything runs in one line. What
comes out of it:

    seconds = compute + memory + the time that only collectives run

    MFU = model FLOPs / (seconds x peak)          the products of the program, once: not what is recomputed, nor the
                                                  copies that other devices compute as well
    HFU = all FLOPs of products / (seconds x peak)   recomputed ones and copies as well

In both, attention under a causal mask counts half: a product of two activations with a batch dim, in a program with a
mask made of positions. Products of every dtype count at the peak of bfloat16.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from .lineage import Lineage
from .network import Machine
from .origin import RECOMPUTE, Origin
from .program import Block, Choice, Loop, Node, Op, Program, Value
from .touched import reads_of, touched_bytes
from .traffic import rows_of
from .work import CONVOLUTION, ELEMENTWISE, MATMUL, copies_of, flops_of

COMPUTE, MEMORY = "compute", "memory"


@dataclass(frozen=True)
class Span:
    """One thing that takes time, in one turn of what it stands in."""

    name: str
    """The primitive, or the kind of collective; ``loop`` for a loop."""
    stream: str
    """``compute``, ``memory``, or the axes of the network: ``data``, ``pod x data``; ``loop``."""
    start_seconds: float
    """From the beginning of what it stands in."""
    seconds: float
    """Of all its turns."""
    turns: int
    """How often it runs; of a loop, its length."""
    origin: Origin
    inside: tuple["Span", ...] = ()
    """One turn of a loop."""
    alone_seconds: float = 0.0
    """Of a collective: how much of it no computation hides."""


@dataclass(frozen=True)
class AxisTime:
    """The collectives over one axis, or over several that act as one."""

    axes: str
    """``data``, ``pod x data``."""
    seconds: float
    """How long its network is busy."""
    exposed_seconds: float
    """How much of that no computation hides."""
    path: str
    """What it crosses: ``ring of 8``."""


@dataclass(frozen=True)
class Times:
    """How long one call of a program takes."""

    machine: Machine = field(repr=False)
    seconds: float
    """The whole call."""
    compute_seconds: float
    """What arithmetic limits."""
    memory_seconds: float
    """What the way through memory limits."""
    exposed_seconds: float
    """While collectives run and nothing is computed."""
    axes: tuple[AxisTime, ...]
    mfu: float
    hfu: float
    sure: bool
    """False when a loop of unknown length counted as one turn, or the longest of several branches was taken."""
    spans: tuple[Span, ...] = field(repr=False)
    """The timeline."""

    @property
    def bottleneck(self) -> str:
        """What takes the largest part of the time: ``compute``, ``memory`` or an axis."""
        parts = {COMPUTE: self.compute_seconds, MEMORY: self.memory_seconds}
        parts.update({axis.axes: axis.exposed_seconds for axis in self.axes})
        return max(parts, key=lambda name: parts[name])

    def lines(self) -> dict[tuple[str, int], dict[str, float]]:
        """For each line of the user's, the seconds of each stream; of networks, what is not hidden."""
        found: dict[tuple[str, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for span, turns in every_span(self.spans):
            seconds = span.seconds if span.stream in (COMPUTE, MEMORY) else span.alone_seconds
            found[span.origin.file, span.origin.line][span.stream] += seconds * turns
        return {line: dict(parts) for line, parts in found.items()}


def every_span(spans: Iterable[Span], turns: int = 1) -> Iterator[tuple[Span, int]]:
    """Every span that is no loop, with how often it runs."""
    for span in spans:
        if span.inside:
            yield from every_span(span.inside, turns * span.turns)
        elif span.stream != "loop":
            yield span, turns


def times_of(program: Program, machine: Machine, lineage: Lineage) -> Times:
    """How long a program takes on a machine."""
    scheduler = _Scheduler(machine)
    seconds, spans = scheduler.block(program.block)
    busy: dict[str, float] = defaultdict(float)
    alone: dict[str, float] = defaultdict(float)
    for span, turns in every_span(spans):
        busy[span.stream] += span.seconds * turns
        alone[span.stream] += span.alone_seconds * turns
    axes = tuple(
        AxisTime(name, busy[name], alone[name], str(machine.path(tuple(name.split(" x ")))))
        for name in busy
        if name not in (COMPUTE, MEMORY)
    )
    model, executed = _products(program.block, lineage, program.sizes)
    peak = machine.hardware.peak_flops * seconds or math.inf
    return Times(
        machine,
        seconds,
        busy[COMPUTE],
        busy[MEMORY],
        max(0.0, seconds - busy[COMPUTE] - busy[MEMORY]),
        tuple(sorted(axes, key=lambda axis: -axis.seconds)),
        model / peak,
        executed / peak,
        scheduler.sure,
        spans,
    )


def op_seconds(op: Op, touched: int, machine: Machine) -> tuple[str, float]:
    """Which unit an operation keeps busy, and how long."""
    kind, flops = flops_of(op)
    memory = touched / machine.hardware.hbm_bytes_per_second
    if kind == ELEMENTWISE or not flops:
        return MEMORY, memory
    compute = flops / machine.hardware.matmul_flops(product_sizes(op))
    return (COMPUTE, compute) if compute >= memory else (MEMORY, memory)


def product_sizes(op: Op) -> tuple[int, int, int]:
    """The rows, columns and summed size of a product, for one place of its batch dims; of a convolution, those of
    the product that it is: positions, channels out, and taps."""
    kind, flops = flops_of(op)
    out = op.outs[0]
    if kind == CONVOLUTION:
        columns = out.shape[op.params["dimension_numbers"].out_spec[1]]
        rows = out.num_elements // columns
        return rows, columns, max(1, flops // (2 * out.num_elements))
    if op.name != "dot_general":
        return (*out.shape[-2:], max(1, flops // (2 * out.num_elements)))  # type: ignore[return-value]
    (left, _), (batch, _) = op.params["dimension_numbers"]
    given = op.ins[0] if op.ins[0] is not None else op.outs[0]
    summed = math.prod(given.shape[i] for i in left)
    rows = math.prod(n for i, n in enumerate(given.shape) if i not in left and i not in batch)
    copies = math.prod(given.shape[i] for i in batch)
    return rows, max(1, out.num_elements // max(1, rows * copies)), summed


def _products(block: Block, lineage: Lineage, sizes: Mapping[str, int], turns: int = 1) -> tuple[float, float]:
    """The operations of a block's products, for the MFU and for the HFU."""
    model = executed = 0.0
    for node in block.nodes:
        if isinstance(node, Op):
            kind, flops = flops_of(node)
            if kind not in (MATMUL, CONVOLUTION) or not flops:
                continue
            flops = flops * turns / (2 if lineage.causal and _attends(node, lineage) else 1)
            executed += flops
            if node.origin.direction != RECOMPUTE:
                model += flops / copies_of(node, dict(sizes))
            continue
        parts = [node.body] if isinstance(node, Loop) else node.branches
        length = (node.length if node.length is not None else 1) if isinstance(node, Loop) else 1
        found = [_products(part, lineage, sizes, turns * length) for part in parts]
        model += max(m for m, _ in found)
        executed += max(e for _, e in found)
    return model, executed


def _attends(op: Op, lineage: Lineage) -> bool:
    """Whether a product is one of attention: of two activations, for each place of a batch."""
    if op.name != "dot_general" or not op.params["dimension_numbers"][1][0]:
        return False
    return all(v is not None and lineage.parameter(v) is None for v in op.ins)


@dataclass
class _Scheduler:
    """Lays the nodes of blocks out in time."""

    machine: Machine
    sure: bool = True

    def block(self, block: Block) -> tuple[float, tuple[Span, ...]]:
        """How long one run of a block takes, and its timeline."""
        touched = touched_bytes(block)
        free: dict[str, float] = defaultdict(float)
        spans: list[Span] = []
        end = 0.0
        for node, ready in _Order(block):
            span = self._span(node, touched)
            streams = _streams(span, free)
            start = max([ready.seconds, *(free[stream] for stream in streams)])
            free.update(dict.fromkeys(streams, start + span.seconds))
            ready.finished(node, start + span.seconds)
            end = max(end, start + span.seconds)
            if span.seconds:
                spans.append(_at(span, start))
        return end, _alone(spans)

    def _span(self, node: Node, touched: dict[int, int]) -> Span:
        if isinstance(node, Op):
            rows = list(rows_of(node))
            if rows:
                seconds = sum(map(self.machine.seconds, rows))
                return Span(rows[0].kind, " x ".join(rows[0].axes), 0.0, seconds, 1, node.origin)
            stream, seconds = op_seconds(node, touched.get(id(node), 0), self.machine)
            return Span(node.name, stream, 0.0, seconds, 1, node.origin)
        if isinstance(node, Loop):
            self.sure &= node.length is not None
            seconds, inside = self.block(node.body)
            length = node.length if node.length is not None else 1
            return Span("loop", "loop", 0.0, seconds * length, length, node.origin, inside)
        self.sure = False
        seconds, inside = max((self.block(branch) for branch in node.branches), key=lambda found: found[0])
        return Span("cond", "loop", 0.0, seconds, 1, node.origin, inside)
