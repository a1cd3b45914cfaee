"""Attention: the products of which a causal mask makes half needless.

A mask by position is a comparison of positions in two dims, and what logic makes of it. What a select under such a
mask gives is masked, and so is what elementwise operations and casts make of that, as long as no element of it is
summed away. Half of a product counts where

    scores = q · k            what it gives is masked next: so is the gradient of the probabilities, which the
                              probabilities are multiplied with
    values = p · v            an operand is masked: so it is in the gradients for queries, keys and values

when it is of two activations with a batch dim. Other products of that form in the same program, those of experts,
count whole: neither their operands nor what they give meets the mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .lineage import Lineage
from .primitives import BINARY
from .program import Block, Choice, Loop, Op, Program, Value
from .work import ELEMENTWISE, flops_of

_COMPARISONS = frozenset({"ge", "gt", "le", "lt"})


def masked_products(program: Program, lineage: Lineage) -> frozenset[int]:
    """The ids of the products of which half counts."""
    if not lineage.causal:
        return frozenset()
    marks = _Marks(lineage.positions)
    marks.walk(program.block)
    marks.walk_back(program.block)
    return frozenset(_halved(program.block, marks, lineage))


def _halved(block: Block, marks: "_Marks", lineage: Lineage) -> set[int]:
    found: set[int] = set()
    for node in block.nodes:
        if not isinstance(node, Op):
            found = found.union(*(_halved(b, marks, lineage) for b in _parts(node)))
        elif node.name == "dot_general" and node.params["dimension_numbers"][1][0]:
            meets = any(id(v) in marks.masked for v in node.ins) or id(node.outs[0]) in marks.before
            if meets and all(v is not None and lineage.parameter(v) is None for v in node.ins):
                found.add(id(node))
    return found


def _parts(node: Loop | Choice) -> Sequence[Block]:
    return [node.body] if isinstance(node, Loop) else node.branches


@dataclass
class _Marks:
    """What is known of values, by their ids."""

    positions: set[int]
    """Made of positions alone."""
    masks: set[int] = field(default_factory=set)
    """Truth values that compare positions."""
    masked: set[int] = field(default_factory=set)
    """What a select under a mask gives, and what is made from it element by element."""
    before: set[int] = field(default_factory=set)
    """What is masked next."""

    def walk(self, block: Block) -> None:
        """Follow masks and what is masked."""
        for node in block.nodes:
            if isinstance(node, Op):
                self._op(node)
            elif isinstance(node, Loop):
                reads = (*node.consts, *node.carry, *node.scanned)
                inner = node.body.ins[len(node.body.ins) - len(reads) :]
                carried = inner[len(node.consts) :][: len(node.carry)]
                self._pass(reads, inner)
                self.walk(node.body)
                while self._pass(node.body.outs[: len(carried)], carried):
                    self.walk(node.body)
                self._pass(node.body.outs, node.outs)
            else:
                for branch in node.branches:
                    self.walk(branch)
                    self._pass(branch.outs, node.outs)

    def _pass(self, given: Sequence[Value | None], taken: Sequence[Value]) -> bool:
        """What goes by another name on the other side of a loop's or branch's edge; whether that was news."""
        news = False
        for known in (self.masks, self.masked):
            more = {id(inner) for outer, inner in zip(given, taken, strict=True) if id(outer) in known} - known
            known |= more
            news |= bool(more)
        return news

    def _op(self, op: Op) -> None:
        known = [v for v in op.ins if v is not None]
        square = bool(op.outs) and sum(n > 1 for n in op.outs[0].shape) > 1
        compares = op.name in _COMPARISONS and bool(known) and all(id(v) in self.positions for v in known)
        if square and op.outs[0].dtype == np.bool_ and (compares or any(id(v) in self.masks for v in known)):
            self.masks.update(map(id, op.outs))
        elif self._masks(op):
            self.masked.update(map(id, op.outs))
        elif flops_of(op)[0] == ELEMENTWISE:
            most = max((v.num_elements for v in known if id(v) in self.masked), default=0)
            self.masked.update(id(v) for v in op.outs if 0 < most <= v.num_elements)

    def _masks(self, op: Op) -> bool:
        return op.name == "select_n" and id(op.ins[0]) in self.masks

    def walk_back(self, block: Block) -> None:
        """Find what is masked next: within a block, through operations that keep every element."""
        for node in reversed(block.nodes):
            if not isinstance(node, Op):
                for inner in _parts(node):
                    self.walk_back(inner)
                continue
            meets = self._masks(node) or any(id(v) in self.before for v in node.outs)
            meets |= node.name in BINARY and any(id(v) in self.masked for v in node.ins)
            if meets and flops_of(node)[0] == ELEMENTWISE:
                size = node.outs[0].num_elements
                self.before.update(id(v) for v in node.ins if v is not None and v.num_elements == size)
