"""Lineage: what the values of a program are made from.

Two facts are followed through a program, by the operations that make values and through loops and branches:

- a value that is a *parameter*, moved or cast but not computed with: its gather is the price of the layout at rest,
  while an activation's gather may be a mistake;
- a value made of *positions* alone (``iota``): a comparison in two dims is a mask by position, as causal attention
  has it.
"""

from dataclasses import dataclass, field

from ..tensor import PARAMETER
from .program import Argument, Block, Choice, Loop, Op, Program, Value, reads_of

_MOVES = frozenset({
    "all_gather", "all_gather_invariant", "all_gather_reduced", "broadcast_in_dim", "concatenate",
    "convert_element_type", "copy", "copy_p", "dynamic_slice", "expand_dims", "name", "pcast", "pvary",
    "reduce_precision", "reshape", "rev", "sharding_constraint", "slice", "squeeze", "transpose",
})  # fmt: skip
"""Operations whose result is what they are given, elsewhere, in another form or in part."""
_COMPARISONS = frozenset({"ge", "gt", "le", "lt"})


@dataclass
class Lineage:
    """What is known of a program's values."""

    parameters: dict[int, Argument] = field(default_factory=dict)
    """By the value's id, the argument that it is."""
    positions: set[int] = field(default_factory=set)
    """The ids of values made of positions."""
    causal: bool = False
    """Whether some mask compares positions with positions."""

    def parameter(self, value: Value | None) -> Argument | None:
        """The parameter that a value is; None when it is computed."""
        return self.parameters.get(id(value)) if value is not None else None

    @classmethod
    def of(cls, program: Program) -> "Lineage":
        found = cls()
        for argument in program.arguments:
            if argument.role == PARAMETER:
                found.parameters[id(argument.value)] = argument
        found._walk(program.block)
        return found

    def _walk(self, block: Block) -> None:
        for node in block.nodes:
            if isinstance(node, Op):
                self._op(node)
            elif isinstance(node, Loop):
                reads = reads_of(node)
                self._pass(reads, node.body.ins[len(node.body.ins) - len(reads) :])
                self._walk(node.body)
            elif isinstance(node, Choice):
                for branch in node.branches:
                    self._walk(branch)

    def _pass(self, given: tuple[Value | None, ...], taken: tuple[Value, ...]) -> None:
        """A loop's body knows what the loop is given, and what a barrier gives is what it was given."""
        for outer, inner in zip(given, taken, strict=False):
            if outer is not None and id(outer) in self.parameters:
                self.parameters[id(inner)] = self.parameters[id(outer)]
            if id(outer) in self.positions:
                self.positions.add(id(inner))

    def _op(self, op: Op) -> None:
        if op.name == "optimization_barrier":  # several values, each of which stays what it is
            self._pass(op.ins, op.outs)
            return
        known = [v for v in op.ins if v is not None]
        if op.name in _MOVES and known and (argument := self.parameter(known[0])) is not None:
            self.parameters.update((id(v), argument) for v in op.outs)
        made = op.name in ("iota", "axis_index") or all(id(v) in self.positions for v in known)
        if not made:
            return
        self.positions.update(id(v) for v in op.outs)
        if op.name in _COMPARISONS and sum(n > 1 for n in op.outs[0].shape) > 1:
            self.causal = True
