"""Time: how long a program takes on a machine, and what it waits for.

Each operation has a cost. A product of matrices takes the longer of its arithmetic, at the rate that its size reaches,
and of its way through memory; everything else takes its way through memory, or through a cache (``touched.py``). A
collective takes what its network says (``network.py``).

A device has one unit that computes and ports to its networks: on a torus one for each axis (a group along several uses
that of the first), else one for the switch and one for the slow network. Each takes what has been ready longest, so
what needs no result of a running collective goes on beside it: a whole loop too, if it has no collectives. Between the
turns of a loop nothing overlaps, and where the hardware cannot overlap, everything runs in one line.

    seconds = compute + HBM + the time that only collectives run + the bubble of a pipeline

    MFU = model FLOPs / (seconds x peak)          the products of the program, once: not what is recomputed, nor the
                                                  copies that other devices compute as well
    HFU = all FLOPs of products / (seconds x peak)   recomputed ones and copies as well

In both, attention under a causal mask counts half (``attention.py`` says which products those are). Products of every
dtype count at the peak of bfloat16.

Along a pipeline devices do different passes; its loops are played through turn by turn (``pipeline.py``). What the time
goes to is then said of the device that is busiest, and the MFU and HFU are of the mean of all.
"""

import bisect
import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from ..microbatches.order import BACKWARD, FORWARD
from .attention import masked_products
from .lineage import Lineage
from .network import Machine, show_axes
from .origin import RECOMPUTE, Origin
from .passes import Passes, Runs
from .pipeline import Chosen, Everywhere, Handed, Played, Step, played
from .program import Block, Choice, Loop, Node, Op, Program, devices_along, reads_of
from .touched import Moved, touched_bytes
from .traffic import rows_of
from .work import CONVOLUTION, ELEMENTWISE, MATMUL, copies_of, flops_of

COMPUTE, HBM, LOOP, BUBBLE = "compute", "HBM", "loop", "bubble"


@dataclass(frozen=True)
class Span:
    """One thing that takes time, in one turn of what it stands in."""

    name: str
    """The primitive, or the kind of collective; ``loop`` for a loop."""
    stream: str
    """``compute``, ``HBM``, or the axes of the network: ``data``, ``pod x data``; ``loop``; ``bubble`` where a device
    waits for others of its pipeline."""
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
    hbm_seconds: float
    """What the way through memory limits."""
    exposed_seconds: float
    """While collectives run and nothing is computed."""
    bubble_seconds: float
    """While the device waits for others of its pipeline; 0 without one."""
    axes: tuple[AxisTime, ...]
    mfu: float
    hfu: float
    sure: bool
    """False when a loop of unknown length counted as one turn, or the longest of several branches was taken."""
    spans: tuple[Span, ...] = field(repr=False)
    """The timeline; of a pipeline's loops, that of the device which is busiest, like passes together."""
    pipelines: tuple[Played, ...] = field(repr=False)
    """The loops of pipelines, as they run on all devices."""

    @property
    def bottleneck(self) -> str:
        """What takes the largest part of the time: ``compute``, ``HBM``, an axis or the ``bubble``."""
        parts = {COMPUTE: self.compute_seconds, HBM: self.hbm_seconds, BUBBLE: self.bubble_seconds}
        parts.update({axis.axes: axis.exposed_seconds for axis in self.axes})
        return max(parts, key=lambda name: parts[name])

    def lines(self) -> dict[tuple[str, int], dict[str, float]]:
        """For each line of the user's, the seconds of each stream; of networks, what is not hidden."""
        found: dict[tuple[str, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for span, turns in every_span(self.spans):
            seconds = span.seconds if span.stream in (COMPUTE, HBM, BUBBLE) else span.alone_seconds
            found[span.origin.file, span.origin.line][span.stream] += seconds * turns
        return {line: dict(parts) for line, parts in found.items()}


def every_span(spans: Iterable[Span], turns: int = 1) -> Iterator[tuple[Span, int]]:
    """Every span that is no loop, with how often it runs."""
    for span in spans:
        if span.inside:
            yield from every_span(span.inside, turns * span.turns)
        elif span.stream != LOOP:
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
        if name not in (COMPUTE, HBM, BUBBLE)
    )
    halved, num = masked_products(program, lineage), devices_along(program.block)
    model, executed = (n / num for n in _products(program.block, halved, program.sizes, (1,) * num))
    peak = machine.hardware.peak_flops * seconds or math.inf
    return Times(
        machine,
        seconds,
        busy[COMPUTE],
        busy[HBM],
        max(0.0, seconds - busy[COMPUTE] - busy[HBM] - busy[BUBBLE]),
        busy[BUBBLE],
        tuple(sorted(axes, key=lambda axis: -axis.seconds)),
        model / peak,
        executed / peak,
        scheduler.sure,
        spans,
        tuple(scheduler.pipelines),
    )


def op_seconds(op: Op, moved: Moved, machine: Machine) -> tuple[str, float]:
    """Which unit an operation keeps busy, and how long."""
    kind, flops = flops_of(op)
    hardware = machine.hardware
    if kind == ELEMENTWISE or not flops:
        return HBM, hardware.pass_seconds(moved.memory_bytes, moved.cache_bytes, flops)
    moving = hardware.pass_seconds(moved.memory_bytes, moved.cache_bytes, 0)
    compute = flops / hardware.matmul_flops(product_sizes(op)) + hardware.launch_seconds
    return (COMPUTE, compute) if compute >= moving else (HBM, moving)


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


def _products(block: Block, halved: Set[int], sizes: Mapping[str, int], runs: Runs) -> tuple[float, float]:
    """The operations of a block's products, for the MFU and for the HFU, on all devices along a pipeline together; half
    of those under a mask."""
    model = executed = 0.0
    for node in block.nodes:
        if isinstance(node, Op):
            kind, flops = flops_of(node)
            if kind not in (MATMUL, CONVOLUTION) or not flops:
                continue
            flops = flops * sum(runs) / (2 if id(node) in halved else 1)
            executed += flops
            if node.origin.direction != RECOMPUTE:
                model += flops / copies_of(node, dict(sizes))
            continue
        if isinstance(node, Loop):
            turns = node.length if node.length is not None else 1
            found = [_products(node.body, halved, sizes, tuple(n * turns for n in runs))]
        elif node.passes is not None:
            within = ((branch, node.passes.runs(i, runs)) for i, branch in enumerate(node.branches))
            parts = [_products(branch, halved, sizes, each) for branch, each in within]
            found = [(sum(m for m, _ in parts), sum(e for _, e in parts))]
        else:
            found = [_products(branch, halved, sizes, runs) for branch in node.branches]
        model += max(m for m, _ in found)
        executed += max(e for _, e in found)
    return model, executed


@dataclass
class _Scheduler:
    """Lays the nodes of blocks out in time."""

    machine: Machine
    sure: bool = True
    pipelines: list[Played] = field(default_factory=list)

    def block(self, block: Block) -> tuple[float, tuple[Span, ...]]:
        """How long one run of a block takes, and its timeline: each unit takes what has been ready longest."""
        touched = touched_bytes(block, self.machine.hardware.cache_bytes)
        waits_for, feeds = _dependencies(block)
        ready = [0.0] * len(block.nodes)
        queue = [(0.0, i) for i, num in enumerate(waits_for) if not num]
        free: dict[str, float] = defaultdict(float)
        spans: list[Span] = []
        while queue:
            since, i = heapq.heappop(queue)
            span = self._span(block.nodes[i], touched)
            start = since
            if span.seconds:
                port = self._port(span)
                start = max(since, max(free.values(), default=0.0) if port == "" else max(free[port], free[""]))
                free[port] = start + span.seconds
                spans.append(dataclasses.replace(span, start_seconds=start))
            for j in feeds[i]:
                ready[j] = max(ready[j], start + span.seconds)
                waits_for[j] -= 1
                if not waits_for[j]:
                    heapq.heappush(queue, (ready[j], j))
        return max(free.values(), default=0.0), _with_alone(spans)

    def _port(self, span: Span) -> str:
        """The unit that a span keeps busy; "" keeps all of them."""
        if not self.machine.hardware.overlap:
            return ""
        if span.stream == LOOP:
            return "" if any(inner.stream not in (COMPUTE, HBM) for inner, _ in every_span(span.inside)) else COMPUTE
        if span.stream in (COMPUTE, HBM):
            return COMPUTE
        axes = tuple(span.stream.split(" x "))
        path = self.machine.path(axes)
        return "slow" if path.slow else axes[0] if path.stretches else "switch"

    def _span(self, node: Node, touched: dict[int, Moved]) -> Span:
        if isinstance(node, Op):
            rows = list(rows_of(node))
            if rows:
                seconds = sum(map(self.machine.seconds, rows))
                return Span(rows[0].kind, show_axes(rows[0].axes, self.machine.sizes), 0.0, seconds, 1, node.origin)
            stream, seconds = op_seconds(node, touched.get(id(node), Moved()), self.machine)
            return Span(node.name, stream, 0.0, seconds, 1, node.origin)
        if isinstance(node, Loop) and any(isinstance(x, Choice) and x.passes is not None for x in node.body.nodes):
            return self._pipeline(node)
        if isinstance(node, Loop):
            self.sure &= node.length is not None
            seconds, inside = self.block(node.body)
            length = node.length if node.length is not None else 1
            return Span("loop", LOOP, 0.0, seconds * length, length, node.origin, inside)
        self.sure = False
        seconds, inside = max((self.block(branch) for branch in node.branches), key=lambda found: found[0])
        return Span("branch", LOOP, 0.0, seconds, 1, node.origin, inside)

    def _pipeline(self, loop: Loop) -> Span:
        """A loop over ticks: the passes of the busiest device, like ones together, what it does between them, and how
        long it waits."""
        assert loop.length is not None
        touched = touched_bytes(loop.body, self.machine.hardware.cache_bytes)
        steps: list[Step] = []
        between: list[tuple[Span, Collection[int]]] = []
        timelines: list[tuple[Passes, list[tuple[float, tuple[Span, ...]]]]] = []
        for node in loop.body.nodes:
            if isinstance(node, Choice) and node.passes is not None:
                found = [self.block(branch) for branch in node.branches]
                timelines.append((node.passes, found))
                steps.append(Chosen(node.passes, tuple(seconds for seconds, _ in found)))
            elif (span := self._span(node, touched)).seconds:
                pairs = node.params["perm"] if isinstance(node, Op) and node.name == "ppermute" else ()
                steps.append(Handed(tuple(pairs), span.seconds) if pairs else Everywhere(span.seconds))
                between.append((span, {d for pair in pairs for d in pair}))
        run = played(steps, loop.length)
        self.pipelines.append(run)
        device = max(range(run.order.num_devices), key=lambda d: run.busy_seconds[d])
        inside = list(_passes_on(device, timelines, loop))
        inside += _between(between, device, loop)
        waiting = run.seconds - sum(span.seconds for span in inside)
        inside.append(Span("bubble", BUBBLE, 0.0, max(0.0, waiting), 1, loop.origin))
        return Span("pipeline", LOOP, 0.0, run.seconds, 1, loop.origin, _end_to_end(inside))


def _passes_on(
    device: int, timelines: Sequence[tuple[Passes, list[tuple[float, tuple[Span, ...]]]]], loop: Loop
) -> Iterator[Span]:
    """The passes of one device, each kind as a loop of as many turns."""
    assert loop.length is not None
    for passes, found in timelines:
        for branch, turns in passes.on(device, loop.length):
            seconds, spans = found[branch]
            if spans:
                kind = passes.order.forms(passes.ticks)[branch][0]
                name = {FORWARD: "pass forward", BACKWARD: "pass backward"}.get(kind, "waiting")
                yield Span(name, LOOP, 0.0, seconds * turns, turns, loop.origin, spans)


def _between(spans: Sequence[tuple[Span, Collection[int]]], device: int, loop: Loop) -> Iterator[Span]:
    """What one device does in each turn between its passes: all that no device is named for, and the permutes that it
    takes part in, which nothing hides."""
    assert loop.length is not None
    mine = (span for span, devices in spans if not devices or device in devices)
    inside = _end_to_end(
        dataclasses.replace(span, alone_seconds=0.0 if span.stream in (COMPUTE, HBM, LOOP) else span.seconds)
        for span in mine
    )
    if inside:
        seconds = loop.length * sum(span.seconds for span in inside)
        yield Span("between passes", LOOP, 0.0, seconds, loop.length, loop.origin, inside)


def _end_to_end(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans one after the other."""
    found, now = [], 0.0
    for span in spans:
        found.append(dataclasses.replace(span, start_seconds=now))
        now += span.seconds
    return tuple(found)


def _dependencies(block: Block) -> tuple[list[int], list[list[int]]]:
    """For each node, how many nodes make what it reads, and which nodes read what it makes."""
    maker: dict[int, int] = {}
    waits_for, feeds = [0] * len(block.nodes), [[] for _ in block.nodes]
    for i, node in enumerate(block.nodes):
        for j in {maker[id(v)] for v in reads_of(node) if id(v) in maker}:
            feeds[j].append(i)
            waits_for[i] += 1
        maker.update((id(v), i) for v in node.outs)
    return waits_for, feeds


def _with_alone(spans: list[Span]) -> tuple[Span, ...]:
    """The timeline in order; each collective knows how much of it nothing hides."""
    spans = sorted(spans, key=lambda span: span.start_seconds)
    busy = [(s.start_seconds, s.start_seconds + s.seconds) for s in spans if s.stream in (COMPUTE, HBM, LOOP)]
    starts = [start for start, _ in busy]
    done = []
    for span in spans:
        if span.stream in (COMPUTE, HBM, LOOP):
            done.append(span)
            continue
        begin, end = span.start_seconds, span.start_seconds + span.seconds
        near = busy[max(0, bisect.bisect_right(starts, begin) - 1) : bisect.bisect_left(starts, end)]
        hidden = sum(max(0.0, min(e, end) - max(s, begin)) for s, e in near)
        done.append(dataclasses.replace(span, alone_seconds=max(0.0, span.seconds - hidden)))
    return tuple(done)
