"""spmd: a function of named tensors as a program for a mesh of devices.

``spmd(fn, mesh, layout)`` is ``jax.shard_map`` with the specs inferred from names. What comes in is split by its dims
and its role; inside, every operation asks the scope what its names mean; what goes out is split by its dims again.
The output specs need no second pass over the function: JAX reads them after it has traced the body, and the body
fills them in.

    step = jax.jit(jax.value_and_grad(mw.spmd(loss_fn, mesh, layout)))

Under ``partitioner="xla"`` there are no slices: the function runs on whole arrays, every result carries the sharding
that its names say as a constraint, and XLA's partitioner chooses the collectives.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, PartitionSpec

from . import collectives
from .collectives import TIME
from .dims import Dims, show
from .errors import at_user_line, fail, fail_type, nearest
from .held import gathered
from .here import check_here, check_names
from .layout import Layout
from .mesh import Mesh
from .microbatches.run import Microbatches
from .scope import Axes, Split, current, entered, mapped_axes
from .tensor import ACTIVATION, PARAMETER, Role, Tensor, is_tensor, make

PARTITIONERS = ("names", "xla")


def spmd(
    fn: Callable[..., Any], mesh: Mesh | str, layout: Layout | str, *, partitioner: str = "names"
) -> Callable[..., Any]:
    """``fn`` as a program for the devices of ``mesh``, each tensor split as ``layout`` says.

    Args:
        fn: a function of pytrees of tensors, arrays and static values to a pytree of tensors and scalars. Arrays that
            are not tensors have no names: every device gets the whole of them. Python numbers and booleans are traced
            as under ``jax.jit``; strings, functions and other hashable values are static. To keep a number static,
            bind it: ``mw.spmd(functools.partial(fn, train=True), mesh, layout)``.
        mesh: the mesh, or its text ("data=4, model=2").
        layout: the layout, or its rules.
        partitioner: "names": this package makes the collectives; "xla": XLA's partitioner does, from constraints.

    Returns:
        A function of the same arguments, on whole tensors. It composes with ``jax.jit``, ``jax.grad``,
        ``jax.checkpoint`` and ``jax.lax.scan``; called by itself it is compiled.

    Raises:
        ValueError: the layout names an axis that the mesh lacks; when called, a dim cannot be split as asked, or an
            output differs between devices.
        TypeError: ``fn`` is not a function; when called, an argument can be neither traced nor static, or an output is
            no tensor, array or number.
    """
    _check_order(fn, mesh, layout)
    mesh = mesh if isinstance(mesh, Mesh) else Mesh(mesh)
    layout = layout if isinstance(layout, Layout) else Layout(layout)
    if partitioner not in PARTITIONERS:
        raise fail(f"spmd: there is no partitioner {partitioner!r}.{nearest(str(partitioner), PARTITIONERS)}")
    region = Region(fn, layout, mesh, partitioner)
    compiled = jax.jit(region.run, static_argnums=(0,), inline=True)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = region.enter((args, kwargs))
        first = not region.traced and _tracing()
        region.traced |= first  # a region that one trace calls several times is traced twice, not each time
        return region.run(*given) if first else compiled(*given)

    return call


def _check_order(fn: Any, mesh: Any, layout: Any) -> None:
    """Raise unless a function comes first, then what may be a mesh and a layout."""
    swapped = isinstance(mesh, Layout) or isinstance(layout, Mesh) or callable(mesh) or callable(layout)
    if callable(fn) and not swapped:
        return
    found = ", ".join(type(x).__name__ for x in (fn, mesh, layout))
    hint = " The arguments are swapped." if swapped else ""
    raise fail_type(
        f"spmd: expected a function, a mesh and a layout, found {found}.{hint} Write mw.spmd(fn, mesh, layout)."
    )


def _tracing() -> bool:
    """Whether a function is being traced as a whole, as under ``jax.jit`` and ``jax.eval_shape``: nothing runs then,
    and a region is traced with what surrounds it. (``jax.grad`` alone runs each operation.)"""
    return isinstance(jnp.zeros(()), Tracer)


@dataclass(frozen=True)
class Inlet:
    """What is known of one argument before tracing: static, so that it is part of the key of a compiled region."""

    dims: Dims | None
    role: Role
    rest: Split
    static: Any


@dataclass(frozen=True)
class Inlets:
    """The arguments' tree and each leaf's inlet."""

    tree: Any
    leaves: tuple[Inlet, ...]


class Region:
    """One function under one layout on one mesh."""

    def __init__(self, fn: Callable[..., Any], layout: Layout, mesh: Mesh, partitioner: str) -> None:
        self.fn, self.layout = fn, layout
        self.scope = layout.scope(mesh, partitioner)
        self.in_time = layout.scope(mesh, partitioner, in_time=True)
        self.stages = layout.stages(mesh)
        self.warned = self.traced = False

    def enter(self, arguments: Any) -> tuple[Any, ...]:
        """The static description of the arguments, then the arrays among them."""
        if current() is not None:
            raise fail("spmd: a region inside a region. One region covers its whole function: call that directly.")
        self._check_present()
        paths, tree = jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_tensor)
        inlets, arrays = [], []
        for path, x in paths:
            inlet = self._inlet(x, f"spmd: argument {_where(path)}")
            inlets.append(inlet)
            if inlet.static is None:
                arrays.append(x.raw if isinstance(x, Tensor) else x)
        return (Inlets(tree, tuple(inlets)), *arrays)

    def _check_present(self) -> None:
        """A described mesh has no devices to run on; under a trace, as of ``jax.eval_shape``, nothing runs."""
        if isinstance(self.scope.mesh, AbstractMesh) and not _tracing():
            sizes = ", ".join(f"{axis}={size}" for axis, size in self.scope.sizes)
            raise fail(
                f"spmd: the mesh ({sizes}) is only described: it has no devices to run on. Trace the region with "
                "shapes, by jax.eval_shape or jax.make_jaxpr, or use a mesh of present devices."
            )

    def _inlet(self, x: Any, asked: str) -> Inlet:
        if isinstance(x, Tensor):
            if x.scope is not None:
                raise fail(f"{asked} is a slice from inside a region, not a whole tensor.")
            check_names(x, asked)
            self.scope.split(x.dims, asked)
            return Inlet(x.dims, x.role, self.layout.at_rest(self.scope, x.dims, x.role), None)
        if isinstance(x, _ARRAYS):
            return Inlet(None, "", (), None)
        try:
            hash(x)
        except TypeError:
            raise fail_type(
                f"{asked} is a {type(x).__name__}: it is no tensor, array or number to be traced, and cannot be "
                "static, because it is not hashable. Give a tuple or a frozenset, or bind it with functools.partial."
            ) from None
        return Inlet(None, "", (), x)

    def run(self, inlets: Inlets, *arrays: Any) -> Any:
        """The region on whole arrays: the function that is compiled."""
        if not self.scope.manual:
            return self._run_constrained(inlets, arrays)
        described = [i for i in inlets.leaves if i.static is None]
        in_specs = tuple(self._spec(i.dims, i.rest) if i.dims else PartitionSpec() for i in described)
        out_specs: list[PartitionSpec] = []
        outlets: list[Any] = []
        microbatches, places = self._microbatches(inlets)
        scope = self.scope if microbatches is None else self.in_time

        def once(slices: Sequence[Any]) -> tuple[list[Any], list[Split]]:
            with entered(scope):
                leaves, tree = jax.tree.flatten(self._call(inlets, slices), is_leaf=is_tensor)
                left = [self._leave(x) for x in leaves]
                splits = [scope.split(x.dims, "spmd") if isinstance(x, Tensor) else () for x in leaves]
            outlets[:] = [tree, [(x.dims, x.role) if isinstance(x, Tensor) else None for x in leaves]]
            out_specs[:] = [spec for _, spec in left]
            return [array for array, _ in left], splits

        def body(*slices: Any) -> Any:
            taken = [self._taken_in(i, x) for i, x in zip(described, slices, strict=True)]
            if microbatches is None:
                return once(taken)[0]
            return microbatches.run(once, taken, places, lambda k: _output_text(outlets, k))

        results = jax.shard_map(body, mesh=self.scope.mesh, in_specs=in_specs, out_specs=out_specs)(*arrays)
        tree, names = outlets
        whole = [x if n is None else make(x, n[0], role=n[1]) for x, n in zip(results, names, strict=True)]
        return jax.tree.unflatten(tree, whole)

    def _microbatches(self, inlets: Inlets) -> tuple[Microbatches | None, list[int | None]]:
        """How the batch is worked on in parts, if it is, and for each array the position of the dim they divide."""
        given = [i for i in inlets.leaves if i.static is None]
        splits = [self.in_time.split(i.dims, "spmd") if i.dims else () for i in given]
        places = [next((k for k, axes in enumerate(split) if TIME in axes), None) for split in splits]
        if self.layout.microbatches is None or all(at is None for at in places):
            return None, places
        num_devices = self.scope.size(self.stages.axes) if self.stages is not None else 1
        num = self.layout.microbatches[1]
        how = self.layout.schedule, self.stages, num_devices, self.scope.summing, _in_step(self.scope.mesh)
        return Microbatches(num, *how), places

    def _spec(self, these: Dims, rest: Split) -> PartitionSpec:
        compute = self.scope.split(these, "spmd")
        return collectives.spec([a + b for a, b in zip(compute, rest, strict=True)])

    def _call(self, inlets: Inlets, slices: Any) -> Any:
        given = iter(slices)
        leaves = [i.static if i.static is not None else self._arrive(i, next(given)) for i in inlets.leaves]
        args, kwargs = jax.tree.unflatten(inlets.tree, leaves)
        result = self.fn(*args, **kwargs)
        if any(i.role == ACTIVATION for i in inlets.leaves):
            self._report_unmet()
        return result

    def _copied(self, inlet: Inlet) -> Axes:
        """The axes over which an argument is gathered once a step, where it comes in."""
        return tuple(a for axes in inlet.rest for a in axes) if self.layout.gather == "step" else ()

    def _taken_in(self, inlet: Inlet, array: Any) -> Any:
        """An argument's slice as the function begins with it, on every microbatch."""
        copies = self._copied(inlet)
        return gathered(array, inlet.rest, frozenset(copies), self.scope) if copies else array

    def _arrive(self, inlet: Inlet, array: Any) -> Any:
        if inlet.dims is None:
            return array
        if not self.scope.manual:
            return make(array, inlet.dims, role=inlet.role)
        if copies := self._copied(inlet):
            return make(array, inlet.dims, role=inlet.role, copies=copies, home=inlet.rest)
        return make(array, inlet.dims, role=inlet.role, rest=inlet.rest, came=True)

    def _leave(self, x: Any) -> tuple[Any, PartitionSpec]:
        """An output's slice and its spec. A parameter leaves as it lies at rest."""
        if not isinstance(x, Tensor):
            _check_output(x)
            self._check_equal(x)
            return x, PartitionSpec()
        check_here(x, "spmd: an output")
        rest = self.layout.at_rest(self.scope, x.dims, x.role)
        if x.role == PARAMETER and x.rest == rest:
            return x.raw, self._spec(x.dims, rest)
        array = x.local(frozenset(a for axes in rest for a in axes))
        for i, axes in enumerate(rest):
            if axes:
                array = collectives.own_slice(array, axes, i, self.scope.size(axes))
        return array, self._spec(x.dims, rest)

    def _check_equal(self, x: Any) -> None:
        differs = collectives.varies_over(x) - mapped_axes() if isinstance(x, jax.Array) else frozenset()
        if differs:
            axes = ", ".join(sorted(differs))
            raise fail(
                f"spmd: an output without names, {x.dtype}{list(x.shape)}, differs between the devices along {axes}.\n"
                f"  A scalar or array that leaves a region must be the same everywhere. Give its dims names "
                f"(mw.Tensor), or reduce it by name (mw.sum, mw.mean, mw.max)."
            )

    def _run_constrained(self, inlets: Inlets, arrays: Any) -> Any:
        described = iter(i for i in inlets.leaves if i.static is None)
        pairs = zip(described, arrays, strict=True)
        held = [self._constrained(x, i.dims, i.rest) if i.dims else x for i, x in pairs]
        with entered(self.scope):
            leaves, tree = jax.tree.flatten(self._call(inlets, held), is_leaf=is_tensor)
            return jax.tree.unflatten(tree, [self._leave_constrained(x) for x in leaves])

    def _leave_constrained(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            _check_output(x)
            return x
        rest = self.layout.at_rest(self.scope, x.dims, x.role)
        with entered(None):
            return make(self._constrained(x.raw, x.dims, rest), x.dims, role=x.role)

    def _constrained(self, array: Any, these: Dims, rest: Split) -> Any:
        compute = self.scope.split(these, "spmd")
        whole = [a + b for a, b in zip(compute, rest, strict=True)]
        return collectives.constrain(array, self.scope.mesh, whole)

    def _report_unmet(self) -> None:
        """A rule whose dim the function never met is a mistake more often than not.

        (A function of parameters alone, such as an initialiser, is not expected to meet the names of the data.)
        """
        every = self.scope.met | self.in_time.met
        lines = self.layout.unused(every)
        overlapped = self.scope.overlapped | self.in_time.overlapped
        alone = [axis for axis in self.scope.overlap if self.scope.manual and axis not in overlapped]
        if not (lines or alone) or (self.warned and not self.layout.strict):
            return
        lines += [_alone_text(axis, self.stages is not None) for axis in alone]
        message = "layout " + repr(self.layout.text) + ": " + "\n  ".join(lines)
        if self.layout.strict:
            raise fail(message)
        self.warned = True
        warnings.warn(message + at_user_line(), UserWarning, stacklevel=2)


_ARRAYS = jax.Array | np.ndarray | np.generic | bool | int | float | complex


def _check_output(x: Any) -> None:
    if not isinstance(x, _ARRAYS):
        raise fail_type(
            f"spmd: an output is a {type(x).__name__}. A region returns tensors, arrays and numbers; what is known "
            "before it runs need not go through it."
        )


def _alone_text(axis: str, staged: bool) -> str:
    if staged:
        return f"overlap= over the axis {axis!r} was not used: between the stages of a pipeline nothing goes in a ring."
    return (
        f"overlap= over the axis {axis!r} was not used: the region met no product whose operand is gathered, or whose "
        f"sum is scattered, over it. Sequence parallelism has both: residual_length:{axis} beside ff:{axis}."
    )


def _in_step(mesh: Any) -> bool:
    """Whether the runtime of a mesh's devices lets no permute begin before every device is there."""
    return not isinstance(mesh, AbstractMesh) and mesh.devices.flat[0].platform == "cpu"


def _output_text(outlets: list[Any], k: int) -> str:
    """What an error calls a result of a region."""
    tree, names = outlets
    path, _ = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(tree, list(range(len(names)))))[0][k]
    dims = f" ({show(names[k][0])})" if names[k] is not None else ""
    return f"the output{jax.tree_util.keystr(path)}{dims}"


def _where(path: Any) -> str:
    """``0['ids']``: which argument a leaf belongs to, by position or keyword."""
    return jax.tree_util.keystr(path[1:]).lstrip(".") or "0"
