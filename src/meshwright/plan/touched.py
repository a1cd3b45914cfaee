"""Touched: the bytes that each operation moves between a device's memory and its units.

Compilers fuse: an elementwise operation reads what its neighbours made without a way through memory. Here elementwise
operations of a block that hand values to one another are one pass, which reads each value from outside once and
writes each value that something outside reads; a reduction ends the pass that feeds it. Views (reshapes, casts,
broadcasts, transposes) cost nothing: whoever reads one reads what it is a view of. A product reads its operands and
writes its result. A slice reads and writes what it cuts out, an update in place what it puts in.

A machine may have a cache. It holds what was read or written last: a value is found there when it, and all that was
moved since, have room in it (an LRU cache; the distance is Mattson's, "Evaluation techniques for storage hierarchies",
1970). What comes into a block and what leaves it goes through memory.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from .primitives import BINARY, READING, UNARY
from .program import Block, Op, Value, reads_of
from .traffic import rows_of

VIEWS = frozenset({
    "axis_index", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims", "iota", "name",
    "optimization_barrier", "pcast", "pvary", "random_unwrap", "random_wrap", "reduce_precision", "reshape",
    "sharding_constraint", "squeeze", "stop_gradient", "transpose",
})  # fmt: skip
_CUTS = frozenset({"slice", "dynamic_slice", "gather"})
_PUTS = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2, "scatter_add": 2}
"""Where the operand stands that is put in."""
_FUSED = (UNARY | BINARY | READING) - {*_PUTS, "sort", "top_k"}
_ENDS = -1
"""Reads what leaves the block."""


@dataclass
class Passes:
    """The passes of a block: which elementwise operations run together."""

    whole: dict[int, Value | None] = field(default_factory=dict)
    """What each view is a view of."""
    parent: dict[int, int] = field(default_factory=dict)
    """Operations that are joined, by id: each points towards the one that names its pass."""
    maker: dict[int, int] = field(default_factory=dict)
    """The operation of a pass that made a value."""
    readers: dict[int, set[int]] = field(default_factory=dict)
    """For each value, by its id, the passes and operations that read it."""

    def source(self, value: Value | None) -> Value | None:
        return self.whole.get(id(value), value)

    def name(self, op: int) -> int:
        while self.parent[op] != op:
            self.parent[op] = self.parent[self.parent[op]]
            op = self.parent[op]
        return op

    def join(self, op: Op) -> None:
        """Add an elementwise operation or a reduction."""
        self.parent[id(op)] = id(op)
        for v in op.ins:
            maker = self.maker.get(id(self.source(v)))
            if maker is not None:
                self.parent[self.name(id(op))] = self.name(maker)
        if op.name not in READING:
            self.maker.update((id(v), id(op)) for v in op.outs)

    def keeps(self, op: Op, value: Value) -> bool:
        """Whether a result of an operation stays within its pass: nothing else reads it."""
        return id(value) in self.maker and not self.readers[id(value)] - {self.name(id(op))}


def passes_of(block: Block) -> Passes:
    """The passes of a block; nothing of its loops' bodies."""
    passes = Passes()
    for op in (node for node in block.nodes if isinstance(node, Op)):
        if op.name in VIEWS:
            source = passes.source(op.ins[0]) if op.ins else None
            passes.whole.update((id(v), source) for v in op.outs)
        elif op.name in _FUSED:
            passes.join(op)
    passes.readers = _readers(block, passes)
    return passes


@dataclass(frozen=True)
class Moved:
    """The bytes that one run of an operation moves."""

    memory_bytes: int = 0
    cache_bytes: int = 0
    """Of what a cache holds."""


class _Cache:
    """What a cache holds, as operation after operation runs."""

    def __init__(self, room: int, leaving: frozenset[int]) -> None:
        self.room, self.leaving = room, leaving
        self.moved = 0
        self.last: dict[int, int] = {}

    def clear(self) -> None:
        """A loop runs: what its turns move pushes everything out."""
        self.moved += self.room

    def move(self, read: Iterable[Value], written: Iterable[Value], passed_bytes: int = 0) -> Moved:
        """Values are read, others written, and so many bytes of another one are passed through memory."""
        found = [0, 0]
        for v in read:
            found[self._holds(v)] += v.num_bytes
            self._touch(v)
        for v in written:
            found[v.num_bytes <= self.room and id(v) not in self.leaving] += v.num_bytes
            self._touch(v)
        self.moved += passed_bytes
        return Moved(found[False] + passed_bytes, found[True])

    def _holds(self, v: Value) -> bool:
        return id(v) in self.last and self.moved - self.last[id(v)] + v.num_bytes <= self.room

    def _touch(self, v: Value) -> None:
        self.moved += v.num_bytes
        self.last[id(v)] = self.moved


def touched_bytes(block: Block, cache_bytes: int = 0) -> dict[int, Moved]:
    """For each operation of a block, by its id, what one run moves; nothing of its loops' bodies."""
    passes = passes_of(block)
    read: dict[int, set[int]] = defaultdict(set)
    cache = _Cache(cache_bytes, frozenset(id(passes.source(v)) for v in block.outs))
    found = {}
    for node in block.nodes:
        if not isinstance(node, Op):
            cache.clear()
        elif node.name not in VIEWS:
            found[id(node)] = _touched(node, passes, read, cache)
    return found


def _readers(block: Block, passes: Passes) -> dict[int, set[int]]:
    found: dict[int, set[int]] = defaultdict(set)
    for node in block.nodes:
        if isinstance(node, Op) and node.name in VIEWS:
            continue
        reader = passes.name(id(node)) if id(node) in passes.parent else id(node)
        for v in reads_of(node):
            found[id(passes.source(v))].add(reader)
    for v in block.outs:
        found[id(passes.source(v))].add(_ENDS)
    return found


def _touched(op: Op, passes: Passes, read: dict[int, set[int]], cache: _Cache) -> Moved:
    if next(rows_of(op), None) is not None:
        return Moved()
    if op.name in _CUTS:
        return cache.move((), op.outs, passed_bytes=sum(v.num_bytes for v in op.outs))
    sources = {id(v): v for v in map(passes.source, op.ins) if v is not None}
    if op.name in _PUTS:
        put = passes.source(op.ins[_PUTS[op.name]])
        return cache.move([put], (), passed_bytes=put.num_bytes) if put is not None else Moved()
    if id(op) not in passes.parent:
        return cache.move(sources.values(), op.outs)
    mine = passes.name(id(op))
    new = [v for i, v in sources.items() if i not in read[mine] and not _made_in(v, mine, passes)]
    read[mine].update(map(id, new))
    return cache.move(new, [v for v in op.outs if passes.readers[id(v)] - {mine}])


def _made_in(value: Value, mine: int, passes: Passes) -> bool:
    maker = passes.maker.get(id(value))
    return maker is not None and passes.name(maker) == mine
