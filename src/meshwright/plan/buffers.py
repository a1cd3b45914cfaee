"""Buffers: what a program allocates on a device, and from when to when.

A program is read in its order, each operation one moment. A value becomes a buffer where compilers make one:

- what a product, a collective, a reduction or a lookup gives;
- an elementwise result that something outside its fused pass reads (``touched.py``), in the dtype in which it is read:
  where every reader casts it to fewer bytes, the pass writes those;
- the stacks that a loop fills, from its beginning, and what its turns hand on, once for all of them. What a turn makes
  for a stack is written there at once.

Views, slices and what is fused into its readers take nothing: who reads them reads what they are made of. An update in
place stays where it was. A loop that casts each slice of a stack of parameters casts the whole stack before it, as XLA
does, once for all loops that read it; so it does with a parameter that each turn casts. Branches are read one after the
other. What a pipeline's passes hand on, they change in place.

    scan(layer, x, blocks)         start ............................ end
      stack of saved activations   |===================================|=== read by the backward loop
      one turn's product             |=|
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .lineage import Lineage
from .origin import Origin
from .program import Block, Choice, Loop, Node, Op, Program, Value, reads_of
from .touched import VIEWS, Passes, passes_of
from .traffic import is_collective

_CAST = "convert_element_type"
_SLICES = frozenset({"dynamic_slice", "slice"})
_IN_PLACE = frozenset({"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"})
_FOREVER = 1 << 60


@dataclass(eq=False, slots=True)
class Buffer:
    """One allocation on a device."""

    num_bytes: int
    start: int
    """The moment of the operation that makes it."""
    end: int
    """The moment of the last that reads it."""
    origin: Origin
    """Of the operation that makes it; of a stack, of that which fills it."""
    in_turn: bool = False
    """Whether it is made in each turn of a loop anew."""
    in_loop_until: int = _FOREVER
    """Of a loop's results, the moment when the loop ends."""
    lasting: bool = False
    """Whether a loop hands it on or fills it: it stays in the device's large memory."""
    of_parameter: bool = False
    """Whether it holds a parameter, gathered or cast."""
    of_collective: bool = False
    """Whether a collective's result lies in it."""
    read_in: set[str] = field(default_factory=set)
    """The directions of the operations that read it."""


@dataclass
class Buffers:
    """A program's buffers, less its arguments."""

    lineage: Lineage
    found: list[Buffer] = field(default_factory=list)
    moments: list[Origin] = field(default_factory=list)
    """What runs, one operation after the other; one turn of each loop."""
    _of: dict[int, Buffer] = field(default_factory=dict)
    """Where a value is held, by its id."""
    _slots: dict[int, Buffer] = field(default_factory=dict)
    """The stacks into which values are written as they are made."""
    _fused: dict[int, tuple[Value | None, ...]] = field(default_factory=dict)
    """What a value that is never held is made of."""
    _casts: dict[tuple[int, int], Buffer] = field(default_factory=dict)
    """What was cast before a loop, by the value and the bytes of an element."""

    @classmethod
    def of(cls, program: Program, lineage: Lineage) -> "Buffers":
        """The buffers of a program, of whose values ``lineage`` tells."""
        buffers = cls(lineage)
        buffers._block(program.block, False)
        return buffers

    def holding(self, value: Value | None) -> Buffer | None:
        """The buffer that holds a value, itself or what it is a view of; None for arguments and constants."""
        return self._of.get(id(value))

    @property
    def _now(self) -> int:
        return len(self.moments) - 1

    def _make(self, value: Value, origin: Origin, in_turn: bool, itemsize: int = 0) -> Buffer:
        num_bytes = value.num_elements * (itemsize or value.dtype.itemsize)
        of_parameter = self.lineage.parameter(value) is not None
        buffer = Buffer(num_bytes, self._now, self._now, origin, in_turn, of_parameter=of_parameter)
        self.found.append(buffer)
        self._of[id(value)] = buffer
        return buffer

    def _read(self, value: Value | None, direction: str) -> None:
        """Something reads a value now: what holds it stays at least until then."""
        if value is None:
            return
        buffer = self._of.get(id(value))
        if buffer is not None:
            buffer.end = max(buffer.end, self._now)
            buffer.read_in.add(direction)
            return
        for part in self._fused.get(id(value), ()):
            self._read(part, direction)

    def _block(self, block: Block, in_turn: bool, into: Sequence[Buffer | None] = ()) -> None:
        """The buffers of a block, whose results are written into those that are given, where one is."""
        passes, narrow = passes_of(block), _narrowed(block)
        written = list(zip(block.outs, into or (None,) * len(block.outs), strict=True))
        self._slots.update((id(passes.source(v)), to) for v, to in written if v is not None and to is not None)
        for node in block.nodes:
            if isinstance(node, Op) and node.name in VIEWS:
                self._view(node)
                continue
            self.moments.append(node.origin)
            if isinstance(node, Loop):
                self._loop(node, in_turn)
                continue
            for v in node.ins:
                self._read(v, node.origin.direction)
            if isinstance(node, Choice):
                self._choice(node, in_turn)
            else:
                self._op(node, passes, narrow, in_turn)
        for v, to in written if self.moments else ():
            if to is None:
                self._read(v, self.moments[-1].direction)

    def _view(self, op: Op) -> None:
        buffer = self._of.get(id(op.ins[0])) if op.ins else None
        for v in op.outs:
            if buffer is not None:
                self._of[id(v)] = buffer
            else:
                self._fused[id(v)] = op.ins[:1]

    def _op(self, op: Op, passes: Passes, narrow: dict[int, int], in_turn: bool) -> None:
        sent = is_collective(op)
        for v in op.outs:
            if (stack := self._slots.get(id(v))) is not None:
                self._of[id(v)], stack.origin = stack, op.origin
            elif op.name in _IN_PLACE and (held := self._of.get(id(op.ins[0]))) is not None:
                self._of[id(v)] = held
            elif op.name in _SLICES or passes.keeps(op, v):
                self._fused[id(v)] = op.ins
            else:
                self._make(v, op.origin, in_turn, narrow.get(id(v), 0)).of_collective = sent

    def _choice(self, choice: Choice, in_turn: bool) -> None:
        """A result is where the branches make it. What a pipeline's state hands through a branch as it is, others
        change in place."""
        sources = [[passes_of(branch).source(v) for v in branch.outs] for branch in choice.branches]
        state = {id(v): self._of.get(id(v)) for v in choice.ins} if choice.passes is not None else {}
        made = list(zip(*sources, strict=True))
        into = [next((state[id(v)] for v in each if state.get(id(v)) is not None), None) for each in made]
        for branch in choice.branches:
            self._block(branch, True, into)
        for v, each, to in zip(choice.outs, made, into, strict=True):
            held = to or next((found for x in reversed(each) if (found := self._of.get(id(x))) is not None), None)
            if held is not None and held.num_bytes == v.num_bytes:
                self._of[id(v)] = held
            elif any(x is not None for x in each):
                self._make(v, choice.origin, in_turn)

    def _loop(self, loop: Loop, in_turn: bool) -> None:
        num_consts, num_carry = len(loop.consts), len(loop.carry)
        inside = loop.body.ins[len(loop.body.ins) - len(reads_of(loop)) :]
        results = [self._carried(loop, i, v, inside[num_consts + i], in_turn) for i, v in enumerate(loop.carry)]
        stacks = [self._make(stack, loop.origin, in_turn) for stack in loop.outs[num_carry:]]
        given = [*zip(loop.consts, inside, strict=False)]
        given += zip(loop.scanned, inside[num_consts + num_carry :], strict=True)
        reads = [self._pass_in(outer, inner, loop.origin, in_turn) for outer, inner in given]
        casts = self._cast_before(loop, inside, in_turn)
        self._block(loop.body, True, [*(None for _ in loop.body.outs[len(stacks) :]), *stacks])
        results += stacks
        for buffer in (*results, *casts, *(b for b in reads if b is not None)):
            buffer.end = max(buffer.end, self._now)
            buffer.lasting = True
        for buffer in results:
            buffer.in_loop_until = min(buffer.in_loop_until, self._now)

    def _carried(self, loop: Loop, i: int, given: Value | None, inner: Value, in_turn: bool) -> Buffer:
        """What turns hand on: where its first value is held, or, when that is an argument or a result of another
        loop's, which must stay as it is, a buffer of its own."""
        self._read(given, loop.origin.direction)
        buffer = self._of.get(id(given))
        if buffer is None or buffer.lasting:
            buffer = self._make(inner, loop.origin, in_turn)
        self._of[id(inner)] = self._of[id(loop.outs[i])] = buffer
        return buffer

    def _pass_in(self, outer: Value | None, inner: Value, origin: Origin, in_turn: bool) -> Buffer | None:
        """What every turn reads, or reads its slice of; made before the loop where nothing holds it yet."""
        self._read(outer, origin.direction)
        buffer = self._of.get(id(outer))
        if buffer is None and any(self._made_of(outer)):
            buffer = self._make(outer, origin, in_turn)  # type: ignore[arg-type]
        if buffer is not None:
            self._of[id(inner)] = buffer
        return buffer

    def _made_of(self, value: Value | None) -> Iterable[Buffer]:
        """The buffers that a fused value is made of."""
        for part in self._fused.get(id(value), ()):
            if (buffer := self._of.get(id(part))) is not None:
                yield buffer
            else:
                yield from self._made_of(part)

    def _cast_before(self, loop: Loop, inside: Sequence[Value], in_turn: bool) -> list[Buffer]:
        """What XLA casts to fewer bytes before a loop whose turns cast it: stacks, of which each turn casts a slice,
        and parameters, which every turn finds the same."""
        first = len(loop.consts) + len(loop.carry)
        outer = dict(zip(map(id, inside[first:]), loop.scanned, strict=True)) if loop.length is not None else {}
        stacks = set(outer)
        for given, v in zip(loop.consts, inside, strict=False):
            if given is not None and self.lineage.parameter(v) is not None:
                outer[id(v)] = given
        made = []
        for op in _straight(loop.body):
            i = id(op.ins[0]) if op.ins else 0
            if i not in outer or op.name not in VIEWS:
                continue
            given, cast = op.ins[0], op.outs[0]
            assert given is not None
            if op.name != _CAST:
                outer[id(cast)] = outer[i]
                stacks |= {id(cast)} if i in stacks else set()
            elif given.dtype.itemsize > cast.dtype.itemsize:
                length = (loop.length,) if i in stacks and loop.length is not None else ()
                made.append(self._cast_once(outer[i], Value((*length, *cast.shape), cast.dtype), loop.origin, in_turn))
        return made

    def _cast_once(self, given: Value | None, cast: Value, origin: Origin, in_turn: bool) -> Buffer:
        key = id(given), cast.dtype.itemsize
        if key not in self._casts:
            self._casts[key] = self._make(cast, origin, in_turn)
            self._casts[key].of_parameter = True
        return self._casts[key]


def _straight(block: Block) -> Iterator[Op]:
    """The operations of a block and of its choices, less those of its loops."""
    for node in block.nodes:
        if isinstance(node, Op):
            yield node
        elif isinstance(node, Choice):
            for branch in node.branches:
                yield from _straight(branch)


def _narrowed(block: Block) -> dict[int, int]:
    """For each value that all its readers cast to fewer bytes, the bytes of an element after the widest cast."""
    readers: dict[int, list[Node | None]] = defaultdict(list)
    for node in block.nodes:
        for v in reads_of(node):
            readers[id(v)].append(node)
    for v in block.outs:
        readers[id(v)].append(None)

    def read_as(value: Value) -> int | None:
        """The bytes of an element as the readers take it; None when one takes it as it is."""
        widest = 0
        for node in readers[id(value)]:
            if not isinstance(node, Op) or node.name not in VIEWS:
                return None
            given, result = value.dtype.itemsize, node.outs[0]
            size = result.dtype.itemsize if node.name == _CAST and result.dtype.itemsize < given else read_as(result)
            if size is None:
                return None
            widest = max(widest, size)
        return widest or None

    ops = (node for node in block.nodes if isinstance(node, Op))
    sizes = ((id(v), read_as(v)) for op in ops for v in op.outs)
    return {i: size for i, size in sizes if size is not None}
