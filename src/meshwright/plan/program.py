"""A program: what one device does, in order, read from a trace.

``jax.jit(fn).trace(*args)`` says everything about a program before it is lowered: each operation, with the shapes of
one device's slices inside a region and of whole arrays outside. Here that becomes one tree: blocks of operations, loops
with their lengths, choices between branches; calls are opened where they stand. Whole arrays become slices too, by the
shardings of the arguments, which elementwise operations pass on (``outside.py``): so every size is that of one device.

What the plan says (traffic, work, memory, time) is read from this tree by functions that know nothing of JAX.

    jit(step)                        Block
      shard_map(...)                   opened: local shapes
        scan(length=32)                  Loop(32, Block)
          remat(...)                       opened
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from ..devices import show_sizes
from ..errors import fail
from ..scope import Split
from . import outside
from .call import Leaf
from .origin import Origin, origin_of
from .passes import Passes, Runs, passes_in

Sizes = dict[str, int]


@dataclass(eq=False, slots=True)
class Value:
    """An array as one device holds it."""

    shape: tuple[int, ...]
    """Of the slice."""
    dtype: Any
    varying: frozenset[str] = frozenset()
    """Inside a region: the axes over which devices hold different values."""
    split: Split = ()
    """Outside: over which axes each dim is split."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class Op:
    """One operation on one device."""

    name: str
    """JAX's primitive."""
    params: dict[str, Any]
    ins: tuple[Value | None, ...]
    """What it reads; None for constants written into the program."""
    outs: tuple[Value, ...]
    origin: Origin
    sizes: Sizes
    """The mesh's axes inside a region; empty outside."""


@dataclass(eq=False, slots=True)
class Loop:
    """A body that runs several times."""

    body: "Block"
    """One turn; of a while loop the condition first, which is its last result."""
    length: int | None
    """How often; None when that depends on values (a while loop)."""
    consts: tuple[Value | None, ...]
    """What the body reads and each turn finds the same, in the order of its first inputs."""
    carry: tuple[Value | None, ...]
    """The first values of what turns hand on; then come the body's inputs for them."""
    scanned: tuple[Value | None, ...]
    """Stacks of which each turn reads its slice; the body's last inputs."""
    outs: tuple[Value, ...]
    """The carry after the last turn, then the stacks of what each turn gives."""
    origin: Origin


@dataclass(eq=False, slots=True)
class Choice:
    """Branches of which one runs."""

    branches: tuple["Block", ...]
    ins: tuple[Value | None, ...]
    """What is chosen by, then what the branches read."""
    outs: tuple[Value, ...]
    origin: Origin
    passes: Passes | None = None
    """Of a pipeline's: which runs when, on each device."""


Node = Op | Loop | Choice


@dataclass(eq=False, slots=True)
class Block:
    """Operations in order."""

    ins: tuple[Value, ...]
    nodes: list[Node]
    outs: tuple[Value | None, ...]


@dataclass(frozen=True, eq=False)
class Argument:
    """One array that the program is given."""

    path: str
    value: Value
    role: str
    """The role of its tensor; "" for an array without names."""
    names: tuple[str, ...]
    donated: bool


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function."""

    block: Block
    arguments: tuple[Argument, ...]
    traced: Any
    """JAX's ``Traced``, which can be lowered and compiled."""
    sizes: Sizes
    """Every axis of the mesh, and its size."""
    unknown: tuple[Op, ...]
    """Operations outside every region whose communication is XLA's to choose."""
    mesh: Any
    """JAX's: one of devices where there is any, or else one that is only described; None where there is no mesh."""


@dataclass
class _Reader:
    """Turns a jaxpr into blocks."""

    sizes: Sizes = field(default_factory=dict)
    unknown: list[Op] = field(default_factory=list)
    spread: set[Value] = field(default_factory=set)
    """Values outside regions that are, or were made from, split ones: XLA may hold them otherwise than they say."""

    def meet(self, mesh: Sizes) -> None:
        """Take the axes of a mesh among the program's."""
        for axis, size in mesh.items():
            if self.sizes.get(axis, size) != size:
                raise fail(
                    f"plan: the program runs on two meshes whose axes {axis!r} differ: {show_sizes(self.sizes)} (size "
                    f"{self.sizes[axis]}) and {show_sizes(mesh)} (size {size}). The plan knows one size of an axis. "
                    "Give one of them another name, or plan the two parts apart."
                )
        self.sizes.update(mesh)

    def block(self, jaxpr: Jaxpr, given: Sequence[Value | None], chain: tuple[Any, ...], inside: Sizes) -> Block:
        """``jaxpr`` on the values ``given``."""
        env = dict(zip(jaxpr.invars, given, strict=True))
        nodes: list[Node] = []
        for eqn in jaxpr.eqns:
            ins = tuple(None if isinstance(v, Literal) else env.get(v) for v in eqn.invars)
            outs = self._node(eqn, ins, (eqn.source_info, *chain), inside, nodes)
            env.update(zip(eqn.outvars, outs, strict=True))
        results = tuple(None if isinstance(v, Literal) else env.get(v) for v in jaxpr.outvars)
        return Block(tuple(v for v in given if v is not None), nodes, results)

    def _node(
        self, eqn: Any, ins: tuple[Value | None, ...], chain: tuple[Any, ...], inside: Sizes, nodes: list[Node]
    ) -> Sequence[Value | None]:
        """Append what ``eqn`` does; its results."""
        name, params = eqn.primitive.name, eqn.params
        if name == "shard_map":
            return self._region(eqn, ins, chain, nodes)
        if name == "scan":
            return self._scan(eqn, ins, chain, inside, nodes)
        if name == "while":
            return self._while(eqn, ins, chain, inside, nodes)
        if name == "cond":
            return self._cond(eqn, ins, chain, inside, nodes)
        if (called := _called(name, params)) is not None:
            jaxpr = called.jaxpr if isinstance(called, ClosedJaxpr) else called
            consts = [_whole(c) for c in called.consts] if isinstance(called, ClosedJaxpr) else []
            inner = self.block(_with_consts(jaxpr), [*consts, *ins[len(ins) - len(jaxpr.invars) :]], chain, inside)
            nodes.extend(inner.nodes)
            return inner.outs
        outs = self._results(eqn, ins, inside)
        op = Op(name, params, ins, outs, origin_of(chain, name, bool(inside)), inside)
        if not inside:
            self._outside(op, *outside.communication(name, params, ins, outs, self.sizes), nodes)
        nodes.append(op)
        return op.outs

    def _results(self, eqn: Any, ins: Sequence[Value | None], inside: Sizes) -> tuple[Value, ...]:
        if inside:
            return tuple(_local(v.aval) for v in eqn.outvars)
        shapes = [tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars]
        splits = outside.splits(eqn.primitive.name, eqn.params, ins, shapes)
        return tuple(_slice(v.aval, split, self.sizes) for v, split in zip(eqn.outvars, splits, strict=True))

    def _outside(self, op: Op, added: list[outside.Added], known: bool, nodes: list[Node]) -> None:
        """What XLA's partitioner adds to an operation on split arrays."""
        arrays = [v for v in op.ins if v is not None and v.shape]
        if any(v.split and any(v.split) for v in (*arrays, *op.outs)) or any(v in self.spread for v in arrays):
            self.spread.update(op.outs)
            known = known and op.name in outside.KNOWN
        if not known:
            self.unknown.append(op)
        for kind, axes, shape in added:
            made = op.outs[0] if op.outs[0].shape == shape else Value(shape, op.outs[0].dtype)
            given = op.ins[0] if kind != "all_reduce" else made
            outs = op.outs if made is op.outs[0] or kind == "all_to_all" else (made, *op.outs)
            nodes.append(Op(kind, {"axes": axes}, (given,), outs, op.origin, self.sizes))

    def _region(self, eqn: Any, ins: tuple[Value | None, ...], chain: Any, nodes: list[Node]) -> Sequence[Value | None]:
        params = eqn.params
        sizes = dict(params["mesh"].shape)
        self.meet(sizes)
        given = [
            self._enter(v.aval, spec, outer, nodes, chain)
            for v, spec, outer in zip(params["jaxpr"].invars, params["in_specs"], ins, strict=True)
        ]
        inner = self.block(params["jaxpr"], given, chain, sizes)
        nodes.extend(inner.nodes)
        specs = [_split_of(spec, v.aval.ndim) for spec, v in zip(params["out_specs"], eqn.outvars, strict=True)]
        for value, split in zip(inner.outs, specs, strict=True):
            if value is not None:
                value.split = split
        return inner.outs

    def _enter(self, aval: Any, spec: PartitionSpec, outer: Value | None, nodes: list[Node], chain: Any) -> Value:
        """An array as its region sees it: the same one where it lies as the region expects it, else moved by XLA."""
        mine = _local(aval)
        mine.split = _split_of(spec, len(mine.shape))
        if outer is None:
            return mine
        added, known = outside.moved(outer, mine, self.sizes)
        known = known and (outer.shape == mine.shape or outer not in self.spread)
        if added or not known:
            op = Op("shard_map", {}, (outer,), (mine,), origin_of(chain, "shard_map", True), self.sizes)
            self._outside(op, added, known, nodes)
            nodes.append(op)
        if outer.shape != mine.shape or added:
            return mine
        outer.varying = mine.varying
        return outer

    def _scan(self, eqn: Any, ins: Any, chain: Any, inside: Sizes, nodes: list[Node]) -> Sequence[Value]:
        params, closed = eqn.params, eqn.params["jaxpr"]
        first, num_carry = _scan_parts(params)
        last = first + num_carry
        origin = origin_of(chain, "scan", bool(inside))
        if not inside:
            stacks = zip(eqn.invars[last:], ins[last:], strict=True)
            ins = (*ins[:last], *(self._gathered(v.aval, x, origin, nodes) for v, x in stacks))
        given = [
            _like(v.aval, x, inside, self.sizes, drop=i >= last)
            for i, (v, x) in enumerate(zip(closed.jaxpr.invars, ins, strict=True))
        ]
        self._stay_spread(given, ins)
        body = self._turn(eqn, closed, given, range(first, last), chain, inside)
        outs = tuple(
            _like(v.aval, x, inside, self.sizes, add=i >= num_carry)
            for i, (v, x) in enumerate(zip(eqn.outvars, (*given[first:last], *body.outs[num_carry:]), strict=True))
        )
        self._stay_spread(outs, body.outs)
        nodes.append(Loop(body, params["length"], ins[:first], ins[first:last], ins[last:], outs, origin))
        return outs

    def _gathered(self, aval: Any, stack: Value | None, origin: Origin, nodes: list[Node]) -> Value | None:
        """A stack as turns outside a region read it: whole, since every device takes every turn."""
        if stack is None or not any(stack.split[:1]):
            return stack
        whole = _slice(aval, ((), *stack.split[1:]), self.sizes)
        self.spread.add(whole)
        nodes.append(Op("all_gather", {"axes": stack.split[0]}, (stack,), (whole,), origin, self.sizes))
        return whole

    def _turn(
        self, eqn: Any, closed: ClosedJaxpr, given: list[Value], carry: range, chain: Any, inside: Sizes
    ) -> Block:
        """The body of a loop. Outside a region XLA lays what turns hand on one way before, in and after the loop: as
        finely split as the first value or as what a turn returns (sums of gradients begin as zeros that say nothing),
        which reading the body tells. ``given`` becomes what the body is given in the end."""
        while True:
            num_unknown, spread = len(self.unknown), set() if inside else set(self.spread)
            body = self.block(_with_consts(closed.jaxpr), [*map(_whole, closed.consts), *given], chain, inside)
            handed = [] if inside else list(zip(carry, body.outs, strict=False))
            lies = {i: outside.finest(given[i], v) for i, v in handed}
            finer = {i: split for i, split in lies.items() if split and split != given[i].split}
            if not finer:
                break
            del self.unknown[num_unknown:]
            self.spread = spread
            for i, split in finer.items():
                given[i] = _slice(closed.jaxpr.invars[i].aval, split, self.sizes)
                self.spread.add(given[i])
        name = eqn.primitive.name
        torn = [
            Op(name, {}, (v,), (given[i],), origin_of(chain, name, False), {}) for i, v in handed if lies[i] is None
        ]
        self.unknown.extend(torn)
        return body

    def _while(self, eqn: Any, ins: Any, chain: Any, inside: Sizes, nodes: list[Node]) -> Sequence[Value]:
        params = eqn.params
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        carry, closed, test = ins[tests + bodies :], params["body_jaxpr"], params["cond_jaxpr"]
        types = [*test.jaxpr.invars[:tests], *closed.jaxpr.invars]
        given = [_like(v.aval, x, inside, self.sizes) for v, x in zip(types, ins, strict=True)]
        self._stay_spread(given, ins)
        asked, taken = given[:tests], given[tests:]
        turn = self._turn(eqn, closed, taken, range(bodies, len(taken)), chain, inside)
        handed = taken[bodies:]
        before = self.block(_with_consts(test.jaxpr), [*map(_whole, test.consts), *asked, *handed], chain, inside)
        outs = tuple(_like(v.aval, x, inside, self.sizes) for v, x in zip(eqn.outvars, handed, strict=True))
        self._stay_spread(outs, turn.outs)
        body = Block((*asked, *taken), [*before.nodes, *turn.nodes], (*turn.outs, *before.outs))
        origin = origin_of(chain, "while_loop", bool(inside))
        nodes.append(Loop(body, None, ins[: tests + bodies], carry, (), outs, origin))
        return outs

    def _stay_spread(self, values: Sequence[Value], like: Sequence[Value | None]) -> None:
        self.spread.update(v for v, x in zip(values, like, strict=True) if x in self.spread)

    def _cond(self, eqn: Any, ins: Any, chain: Any, inside: Sizes, nodes: list[Node]) -> Sequence[Value]:
        branches = tuple(
            self.block(_with_consts(b.jaxpr), [*map(_whole, b.consts), *ins[1:]], chain, inside)
            for b in eqn.params["branches"]
        )
        outs = tuple(_local(v.aval) for v in eqn.outvars)
        origin = origin_of(chain, "cond", bool(inside))
        if not inside:
            ends = list(zip(*(b.outs for b in branches), strict=True))
            lies = [outside.finest(*made) for made in ends]
            outs = tuple(_slice(v.aval, split or (), self.sizes) for v, split in zip(eqn.outvars, lies, strict=True))
            for out, made, split in zip(outs, ends, lies, strict=True):
                self._stay_spread([out] * len(made), made)
                if split is None:
                    self.unknown.append(Op("cond", {}, made, (out,), origin, {}))
        nodes.append(Choice(branches, ins, outs, origin, passes_in(str(eqn.source_info.name_stack), len(branches))))
        return outs


def _scan_parts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs stay the same, and how many its turns hand on: as JAX 0.10 says it, or as 0.11."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "callee")
_OPENED = frozenset({
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "custom_lin", "core_closed_call", "run_state", "linear_call",
})  # fmt: skip


def _called(name: str, params: dict[str, Any]) -> Any:
    """The function that an equation calls, where it is no more than a call."""
    if name not in _OPENED:
        return None
    return next((params[key] for key in _CALLS if isinstance(params.get(key), Jaxpr | ClosedJaxpr)), None)


def _with_consts(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with its constants as its first inputs."""
    if not jaxpr.constvars:
        return jaxpr
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def _local(aval: Any) -> Value:
    kind = getattr(aval, "manual_axis_type", None)
    return Value(tuple(getattr(aval, "shape", ())), _dtype(aval), kind.varying if kind is not None else frozenset())


def _slice(aval: Any, split: Split, sizes: Sizes) -> Value:
    shape = tuple(getattr(aval, "shape", ()))
    split = split if len(split) == len(shape) else ((),) * len(shape)
    parts = (math.prod(sizes.get(a, 1) for a in axes) for axes in split)
    local = tuple(-(-size // n) for size, n in zip(shape, parts, strict=True))
    return Value(local, _dtype(aval), split=split)


def _like(aval: Any, x: Value | None, inside: Sizes, sizes: Sizes, *, drop: bool = False, add: bool = False) -> Value:
    """A value of type ``aval`` that lies as ``x`` does: without the first dim of ``x``, or with one more before."""
    if inside:
        return _local(aval)
    split = x.split if x is not None else ()
    split = split[1:] if drop else ((), *split) if add and x is not None else split
    return _slice(aval, split, sizes)


def _whole(const: Any) -> Value:
    return Value(tuple(np.shape(const)), _dtype(const))


class _Key:
    """The dtype of random keys, as far as sizes go."""

    itemsize = 8
    name = "key"


def _dtype(aval: Any) -> Any:
    dtype = getattr(aval, "dtype", np.result_type(aval) if np.isscalar(aval) else np.dtype(np.int32))
    return _Key if jnp.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype)


def _split_of(spec: PartitionSpec, ndim: int) -> Split:
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(entries + [()] * (ndim - len(entries)))


def sharded(x: Any) -> tuple[Split, Sizes]:
    """How an argument lies, by its sharding: the axes of each dim, and the sizes of the mesh's axes."""
    found = getattr(x, "sharding", None)
    if not isinstance(found, NamedSharding):
        return (), {}
    return _split_of(found.spec, len(x.shape)), dict(found.mesh.shape)


def read(traced: Any, leaves: Sequence[Leaf]) -> Program:
    """The program of a trace.

    Args:
        traced: what ``jax.jit(fn).trace(...)`` returns.
        leaves: the arrays (or their shapes) it was traced on.
    """
    reader = _Reader()
    lies = [sharded(leaf.array) for leaf in leaves]
    closed = traced.jaxpr
    meshes = [x.array.sharding.mesh for x, (_, sizes) in zip(leaves, lies, strict=True) if sizes]
    meshes += _meshes(closed.jaxpr)
    for mesh in meshes:
        reader.meet(dict(mesh.shape))
    values = [_slice(v.aval, split, reader.sizes) for v, (split, _) in zip(closed.jaxpr.invars, lies, strict=True)]
    block = reader.block(_with_consts(closed.jaxpr), [*map(_whole, closed.consts), *values], (), {})
    block = pruned(block)
    donated = set(traced.donate_argnums or ())
    arguments = tuple(
        Argument(leaf.path, value, leaf.role, leaf.names, i in donated)
        for i, (leaf, value) in enumerate(zip(leaves, values, strict=True))
    )
    mesh = min(meshes, key=lambda mesh: isinstance(mesh, AbstractMesh), default=None)
    return Program(block, arguments, traced, reader.sizes, tuple(reader.unknown), mesh)


def _meshes(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every mesh that a region or a sharding constraint is made for."""
    for eqn in jaxpr.eqns:
        mesh = eqn.params.get("mesh", getattr(eqn.params.get("sharding"), "mesh", None))
        if mesh is not None:
            yield mesh
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner) and eqn.primitive.name != "shard_map":
                yield from _meshes(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


def pruned(block: Block) -> Block:
    """The block without what nothing needs, as JAX leaves it out when it lowers a program."""
    nodes, _ = _needed(block, {id(v) for v in block.outs if v is not None})
    return Block(block.ins, nodes, block.outs)


def _needed(block: Block, wanted: set[int]) -> tuple[list[Node], set[int]]:
    """The nodes that lead to the values wanted, and every value that they and their ends need."""
    kept: list[Node] = []
    for node in reversed(block.nodes):
        if not any(id(v) in wanted for v in node.outs):
            continue
        if isinstance(node, Loop):
            node = _pruned_loop(node, wanted)
        elif isinstance(node, Choice):
            node = _pruned_choice(node, wanted)
        kept.append(node)
        wanted |= {id(v) for v in reads_of(node) if v is not None}
    return kept[::-1], wanted


def reads_of(node: Node) -> tuple[Value | None, ...]:
    """What an operation, a loop or a choice reads."""
    return (*node.consts, *node.carry, *node.scanned) if isinstance(node, Loop) else node.ins


def _pruned_choice(choice: Choice, wanted: set[int]) -> Choice:
    """A choice whose branches do what the results wanted need, and read no more."""
    branches, reads = [], {id(choice.ins[0])}
    for branch in choice.branches:
        outs = tuple(v if id(out) in wanted else None for v, out in zip(branch.outs, choice.outs, strict=True))
        nodes, needed = _needed(branch, {id(v) for v in outs if v is not None})
        branches.append(Block(branch.ins, nodes, outs))
        reads |= needed
    ins = tuple(v if id(v) in reads else None for v in choice.ins)
    return dataclasses.replace(choice, branches=tuple(branches), ins=ins)


def _pruned_loop(loop: Loop, wanted: set[int]) -> Loop:
    """A loop whose body does what the results wanted need: those, and the carry that leads to them."""
    num_carry, first = len(loop.carry), len(loop.body.ins) - len(reads_of(loop))
    inner = loop.body.ins[first:]
    turns_need = {i for i, v in enumerate(loop.outs) if id(v) in wanted}
    if loop.length is None:
        turns_need |= set(range(len(loop.body.outs)))
    while True:
        ends = {id(v) for i, v in enumerate(loop.body.outs) if i in turns_need and v is not None}
        nodes, reads = _needed(loop.body, set(ends))
        carried = {i for i in range(num_carry) if id(inner[len(loop.consts) + i]) in reads}
        if carried <= turns_need:
            break
        turns_need |= carried
    used = [id(v) in reads for v in inner]

    def only(values: tuple[Value | None, ...], start: int) -> tuple[Value | None, ...]:
        return tuple(v if used[start + i] else None for i, v in enumerate(values))

    consts, carry = only(loop.consts, 0), loop.carry
    carry = tuple(v if i in turns_need else None for i, v in enumerate(carry))
    scanned = only(loop.scanned, len(loop.consts) + num_carry)
    outs = tuple(v if i in turns_need else None for i, v in enumerate(loop.body.outs))
    return Loop(Block(loop.body.ins, nodes, outs), loop.length, consts, carry, scanned, loop.outs, loop.origin)


def each(block: Block, runs: Runs, sure: bool = True) -> Iterator[tuple[Op, Runs, bool]]:
    """Every operation with how often it runs when the block does so ``runs`` times, and whether that is sure: not in a
    loop of unknown length (its turns count once) nor in a branch, unless it is known which runs when."""
    for node in block.nodes:
        if isinstance(node, Loop):
            known = node.length is not None
            turns = node.length if node.length is not None else 1
            yield from each(node.body, tuple(n * turns for n in runs), sure and known)
        elif isinstance(node, Choice):
            for i, branch in enumerate(node.branches):
                within = node.passes.runs(i, runs) if node.passes is not None else runs
                yield from each(branch, within, sure and node.passes is not None)
        else:
            yield node, runs, sure


def devices_along(block: Block) -> int:
    """How many devices the pipeline of a program has; 1 without one."""
    num = 1
    for node in block.nodes:
        if isinstance(node, Choice) and node.passes is not None:
            num = max(num, node.passes.order.num_devices)
        inner = (node.body,) if isinstance(node, Loop) else node.branches if isinstance(node, Choice) else ()
        num = max(num, *map(devices_along, inner), 1)
    return num
