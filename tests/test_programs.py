"""Random programs on random layouts and meshes: law 1, hunted.

A program is drawn as the text of a Python function on named tensors, so that a failing one can be read, and pasted
and run. The layout is drawn first; every step is one that is legal under it. Results and gradients are compared in
float64 with the same program on one device, where a difference is a mistake and never rounding.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright import Tensor

from .laws import Way

Shape = tuple[tuple[str, int], ...]
"""The names and sizes of a value; () for a scalar."""

MESHES = ("x=2", "x=4", "x=8", "x=2,y=2", "x=2,y=4", "x=4,y=2", "x=1,y=4", "x=2,y=2,z=2")
NAMES = "abcdef"
MOST_ELEMENTS = 4096
UNARY = (
    "mw.tanh({x})", "mw.sin({x})", "mw.sigmoid({x})", "-{x}", "{x} * 0.5", "{x} + 0.25", "1.0 - {x}", "{x} / 3.0",
    "mw.exp({x} * 0.1)", "mw.square({x})", "{x}.astype(jnp.float32).astype(jnp.float64)", "mw.positive({x})",
    "mw.stop_gradient({x}) * {x}",
)  # fmt: skip
BINARY = ("{x} + {y}", "{y} + {x}", "{x} - {y}", "{x} * {y}", "{y} * mw.cos({x})", "{x} / ({y} * {y} + 1.0)")
REDUCTIONS = ("sum", "mean", "logsumexp", "var", "prod", "std")
INNER = (
    "jax.checkpoint(lambda t: mw.tanh(t) * {y})({x})",
    "jax.jit(lambda t: mw.sin(t) + {y})({x})",
    "jax.lax.scan(lambda c, _: (mw.tanh(c * 0.5 + {y}), None), {x} + {y}, None, length=2)[0]",
    "jax.lax.scan(jax.checkpoint(lambda c, s: (c * s + {y}, mw.mean(c * {y}))), {x} * {y}, jnp.ones(2) * 0.5)[0]",
    "jax.grad(lambda t: mw.sum(mw.sin(t) * {y}))({x})",
    "jax.jvp(lambda t: mw.sin(t) * {y}, ({x},), ({x},))[1]",
    "mw.sum({x} * {y}) * {x}",
    "jax.lax.cond(mw.sum({y}) > 0, lambda t: t * {y}, lambda t: t - {y}, {x})",
)


@dataclass
class Program:
    """A drawn program: its inputs, its lines, and the way to run it."""

    way: Way
    splits: dict[str, tuple[str, ...]]
    sizes: dict[str, int]
    inputs: list[tuple[Shape, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: dict[str, Shape] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        args = ", ".join(f"v{i}" for i in range(len(self.inputs)))
        about = "".join(
            f"    # v{i}: {role} ({', '.join(f'{n}={s}' for n, s in shape)})\n"
            for i, (shape, role) in enumerate(self.inputs)
        )
        body = "".join(f"    {line}\n" for line in self.lines)
        return f"# {self.way}\ndef program({args}):\n{about}{body}    return ({', '.join(self.outputs)},)\n"

    def legal(self, shape: Sequence[tuple[str, int]]) -> bool:
        """Whether the layout can split a tensor of this shape."""
        names = [n for n, _ in shape]
        axes = [axis for n in names for axis in self.splits.get(n, ())]
        divides = all(s % math.prod(self.sizes[a] for a in self.splits.get(n, ())) == 0 for n, s in shape)
        fits = math.prod(s for _, s in shape) <= MOST_ELEMENTS and len(names) <= 5
        return divides and fits and len(set(names)) == len(names) and len(set(axes)) == len(axes)

    def add(self, text: str, shape: Sequence[tuple[str, int]]) -> None:
        name = f"v{len(self.values)}"
        self.lines.append(f"{name} = {text}")
        self.values[name] = tuple(shape)

    def function(self) -> Callable[..., Any]:
        names: dict[str, Any] = {"mw": mw, "jax": jax, "jnp": jnp}
        exec(str(self), names)
        return names["program"]  # type: ignore[no-any-return]


Step = tuple[str, Sequence[tuple[str, int]]]


def _subsets(shape: Shape) -> Iterator[Shape]:
    for size in range(1, len(shape) + 1):
        yield from itertools.combinations(shape, size)


def _quoted(shape: Sequence[tuple[str, int]]) -> str:
    return '"' + " ".join(n for n, _ in shape) + '"'


def _steps(kind: str, p: Program, x: str) -> Iterator[Step]:
    """Every step of a kind on the value ``x`` whose result may be illegal still."""
    shape = p.values[x]
    others = [(y, s) for y, s in p.values.items() if s]
    contained = [y for y, s in others if set(s) <= set(shape)]
    if kind == "unary":
        yield from ((text.format(x=x), shape) for text in UNARY)
    elif kind == "binary":
        yield from ((text.format(x=x, y=y), shape) for y in contained for text in BINARY)
    elif kind == "where":
        yield from ((f"mw.where({y} > 0.1, {x}, {z})", shape) for y in contained[:3] for z in (*contained, "0.0"))
    elif kind == "reduce":
        for which in _subsets(shape):
            kept = tuple(d for d in shape if d not in which)
            yield from ((f"mw.{f}({x}, {_quoted(which)})", kept) for f in REDUCTIONS)
    elif kind == "softmax":
        yield from ((f"mw.{f}({x}, {_quoted(w)})", shape) for w in _subsets(shape) for f in ("softmax", "log_softmax"))
    elif kind == "rename":
        for n, m in itertools.product([n for n, _ in shape], NAMES):
            if n != m:
                yield f'{x}.rename({n}="{m}")', [(m if k == n else k, s) for k, s in shape]
    elif kind == "permute":
        names = [n for n, _ in shape]
        for order in itertools.permutations(names):
            pairs = ", ".join(f'{n}="{m}"' for n, m in zip(names, order, strict=True))
            yield f"{x}.rename({pairs})", [(m, s) for m, (_, s) in zip(order, shape, strict=True)]
    elif kind == "split":
        for i, (n, s) in enumerate(shape):
            for m, k, first in itertools.product(NAMES, NAMES, (2, 3, 4, 8)):
                if s % first == 0 and m != k:
                    parts = ((m, first), (k, s // first))
                    yield f'{x}.split("{n}", {m}={first}, {k}={s // first})', (*shape[:i], *parts, *shape[i + 1 :])
    elif kind == "merge":
        for which in itertools.chain(itertools.permutations(shape, 2), itertools.permutations(shape, 3)):
            at = shape.index(which[0])
            at -= sum(shape.index(d) < at for d in which)
            kept = [d for d in shape if d not in which]
            for m in NAMES:
                whole = (m, math.prod(s for _, s in which))
                yield f'{x}.merge({_quoted(which)}, "{m}")', [*kept[:at], whole, *kept[at:]]
    elif kind == "reorder":
        yield from ((f"{x}.reorder({_quoted(order)})", order) for order in itertools.permutations(shape))
    elif kind == "broadcast":
        for n, s in itertools.product(NAMES, (4, 8)):
            yield f'{x}.broadcast(mw.Dim("{n}", {s}))', ((n, s), *shape)
    elif kind == "inner":
        yield from ((text.format(x=x, y=y), shape) for y in contained for text in INNER)
    elif kind == "scalar":
        yield from ((f"{x} * {y}", shape) for y, s in p.values.items() if not s)


def _contractions(p: Program, operands: Sequence[str]) -> Iterator[Step]:
    shapes = [p.values[x] for x in operands]
    every = list(dict.fromkeys(d for shape in shapes for d in shape))
    if len({n for n, _ in every}) != len(every) or not p.legal(every):
        return
    free = [d for d in every if sum(d in shape for shape in shapes) < 2]
    shared = [d for d in every if d not in free]
    for summed in itertools.chain([()], _subsets(tuple(shared))):
        kept = [d for d in every if d not in summed]
        for out in (kept, kept[::-1]):
            yield f"mw.einsum({', '.join(operands)}, out={_quoted(out)})", out


KINDS = (
    "unary", "binary", "binary", "where", "reduce", "reduce", "softmax", "rename", "rename", "permute", "split",
    "merge", "reorder", "broadcast", "inner", "inner", "scalar", "einsum", "einsum", "einsum",
)  # fmt: skip


@st.composite
def programs(draw: st.DrawFn, most_steps: int = 8) -> Program:
    """A program of up to ``most_steps`` steps and a way to run it."""
    mesh = draw(st.sampled_from(MESHES))
    sizes = {part.split("=")[0]: int(part.split("=")[1]) for part in mesh.split(",")}
    orders = [o for k in range(1, len(sizes) + 1) for o in itertools.permutations(sizes, k)]
    rules = draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(orders), min_size=1, max_size=5))
    at_rest = st.sampled_from([*sizes, "(" + ",".join(sizes) + ")", *(f"{n}:{a}" for n in NAMES[:4] for a in sizes)])
    gathers = st.sampled_from(["use", "step"])
    options = draw(st.one_of(st.just({}), st.fixed_dictionaries({"params": at_rest, "gather": gathers})))
    partitioner = draw(st.sampled_from(["names"] * 5 + ["xla"]))
    splits = {n: tuple(a for a in axes if sizes[a] > 1) for n, axes in rules.items()}
    p = Program(Way(mesh, "", options, partitioner), splits, sizes)
    home = {n: draw(st.sampled_from((8, 4, 16, 6))) for n in NAMES[:4]}
    homes = [s for k in (1, 2, 3) for s in itertools.permutations(home.items(), k) if p.legal(s)]
    hypothesis.assume(homes)
    for i in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from(homes))
        p.inputs.append((shape, draw(st.sampled_from(["activation", "parameter"]))))
        p.values[f"v{i}"] = shape
    for _ in range(draw(st.integers(1, most_steps))):
        _draw_step(draw, p)
    hypothesis.assume(p.lines)
    p.outputs = tuple(list(p.values)[-draw(st.integers(1, 3)) :])
    met = {n for shape in p.values.values() for n, _ in shape}
    layout = ", ".join(f"{n}:({','.join(axes)})" for n, axes in rules.items() if n in met)
    p.way = Way(mesh, layout, options, partitioner)
    hypothesis.assume(_rest_divides(p, options.get("params", "")))
    return p


def _rest_divides(p: Program, rule: str) -> bool:
    """Whether a rule at rest for a dim can be kept wherever that dim stands, and it stands somewhere: Meshwright
    refuses the others, or warns."""
    name, _, axis = rule.partition(":")
    if axis and not any(n == name for shape in p.values.values() for n, _ in shape):
        return False
    num = math.prod(p.sizes[a] for a in {*p.splits.get(name, ()), axis}) if axis else 1
    return all(s % num == 0 for shape in p.values.values() for n, s in shape if n == name)


def _draw_step(draw: st.DrawFn, p: Program) -> None:
    kind = draw(st.sampled_from(KINDS))
    named = [x for x, s in p.values.items() if s]
    if kind == "einsum":
        operands = draw(st.lists(st.sampled_from(named), min_size=1, max_size=3))
        steps = list(_contractions(p, operands))
    else:
        x = draw(st.sampled_from(named[::-1]))
        steps = list(_steps(kind, p, x))
    steps = [step for step in steps if p.legal(step[1])]
    if steps:
        p.add(*draw(st.sampled_from(steps)))


def _inputs(p: Program) -> list[Tensor]:
    rng = np.random.default_rng(len(str(p)))
    return [
        Tensor(jnp.asarray(rng.normal(size=[s for _, s in shape]) * 0.5), " ".join(n for n, _ in shape), role)
        for shape, role in p.inputs
    ]


def _outcome(p: Program, region: Callable[..., Any]) -> Any:
    """Outputs and the gradients of a weighted sum of them, in float64."""
    fn, inputs = p.function(), _inputs(p)
    inside = region(fn)

    def total(inputs: Sequence[Tensor]) -> Any:
        out = inside(*inputs)
        leaves = [x.array if isinstance(x, Tensor) else x for x in out]
        weights = [np.cos(np.arange(x.size) * 1.7 + i).reshape(x.shape) for i, x in enumerate(leaves)]
        return sum(jnp.sum(x * w) for x, w in zip(leaves, weights, strict=True)), out

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, out), gradients = run(inputs)
    return out, gradients


def check(p: Program) -> None:
    """The program gives the same under its layout as on one device.

    Raises:
        AssertionError: it does not; the message is the program.
    """
    with jax.enable_x64(True):
        try:
            expected = _outcome(p, lambda fn: fn)
            found = _outcome(p, p.way.region)
        except Exception as error:
            error.add_note(f"\n{p}")
            raise
    assert jax.tree.structure(found) == jax.tree.structure(expected), f"\n{p}"
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        scale = max(1e-3, float(np.max(np.abs(b[np.isfinite(b)]), initial=0.0)))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8 * scale, err_msg=f"{jax.tree_util.keystr(path)}\n{p}")


CHECKS = [
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.data_too_large,
    hypothesis.HealthCheck.filter_too_much,
]
SETTINGS = hypothesis.settings(deadline=None, suppress_health_check=CHECKS, print_blob=False)


@hypothesis.settings(SETTINGS, max_examples=25, derandomize=True)
@hypothesis.given(programs())
def test_a_drawn_program_is_the_same_under_its_layout(p: Program) -> None:
    check(p)


@pytest.mark.slow
@hypothesis.settings(SETTINGS, max_examples=400)
@hypothesis.given(programs(most_steps=12))
def test_many_drawn_programs_are_the_same_under_their_layouts(p: Program) -> None:
    check(p)
