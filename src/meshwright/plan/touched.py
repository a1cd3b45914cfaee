"""Touched: the bytes that each operation moves between a device's memory and its units.

Compilers fuse: an elementwise operation reads what its neighbours made without a way through memory. Here elementwise
operations of a block that hand values to one another are one pass, which reads each value from outside once and
writes each value that something outside reads; a reduction ends the pass that feeds it. Views (reshapes, casts,
broadcasts, transposes) cost nothing: whoever reads one reads what it is a view of. A product reads its operands and
writes its result. A slice reads and writes what it cuts out, an update in place what it puts in.

A machine may have a cache. It holds the values that were read or written last, as far as they have room in it; one that
is larger pushes everything out. What is written costs no way through memory where it is read while the cache holds it.
What comes into a block and what leaves it goes through memory, and a loop leaves nothing in the cache.
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
    """What a cache holds, as operation after operation runs, the value touched last at the end."""

    def __init__(self, room: int, leaving: frozenset[int]) -> None:
        self.room, self.leaving = room, leaving
        self.held: dict[int, int] = {}
        self.full = 0
        self.writer: dict[int, int] = {}
        self.moved: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        """For each operation, the bytes that go through memory, and those that do not."""

    def run(self, op: Op, read: Iterable[Value], written: Iterable[Value], passed_bytes: int = 0) -> None:
        """An operation reads values and writes others, and moves so many bytes of a further one through memory."""
        mine = self.moved[id(op)]
        mine[0] += passed_bytes
        for v in read:
            found = id(v) in self.held
            mine[found] += v.num_bytes
            writer = self.writer.pop(id(v), None)
            if found and writer is not None:
                self.moved[writer][0] -= v.num_bytes
                self.moved[writer][1] += v.num_bytes
            self.touch(v)
        for v in written:
            mine[0] += v.num_bytes
            self.touch(v)
            if id(v) not in self.leaving:
                self.writer[id(v)] = id(op)

    def touch(self, v: Value) -> None:
        self.full += v.num_bytes - self.held.pop(id(v), 0)
        self.held[id(v)] = v.num_bytes
        while self.full > self.room:
            self.full -= self.held.pop(next(iter(self.held)))

    def clear(self) -> None:
        self.held.clear()
        self.full = 0


def touched_bytes(block: Block, cache_bytes: int = 0) -> dict[int, Moved]:
    """For each operation of a block, by its id, what one run moves; nothing of its loops' bodies."""
    passes = passes_of(block)
    read: dict[int, set[int]] = defaultdict(set)
    cache = _Cache(cache_bytes, frozenset(id(passes.source(v)) for v in block.outs))
    for node in block.nodes:
        if not isinstance(node, Op):
            cache.clear()
        elif node.name not in VIEWS:
            _touch(node, passes, read, cache)
    return {op: Moved(*parts) for op, parts in cache.moved.items()}


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


def _touch(op: Op, passes: Passes, read: dict[int, set[int]], cache: _Cache) -> None:
    sources = {id(v): v for v in map(passes.source, op.ins) if v is not None}
    if next(rows_of(op), None) is not None:  # a collective: its network says how long it takes
        for v in (*sources.values(), *op.outs):
            cache.touch(v)
    elif op.name in _CUTS:
        cache.run(op, (), op.outs, passed_bytes=sum(v.num_bytes for v in op.outs))
    elif op.name in _PUTS:
        put = passes.source(op.ins[_PUTS[op.name]])
        if put is not None:
            cache.run(op, [put], (), passed_bytes=put.num_bytes)
    elif id(op) not in passes.parent:
        cache.run(op, sources.values(), op.outs)
    else:
        mine = passes.name(id(op))
        new = [v for i, v in sources.items() if i not in read[mine] and not _made_in(v, mine, passes)]
        read[mine].update(map(id, new))
        cache.run(op, new, [v for v in op.outs if passes.readers[id(v)] - {mine}])


def _made_in(value: Value, mine: int, passes: Passes) -> bool:
    maker = passes.maker.get(id(value))
    return maker is not None and passes.name(maker) == mine
