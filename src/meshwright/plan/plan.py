"""``plan``: from a function and its arguments to everything that is known before it runs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from ..errors import fail_type
from ..explain import path_text
from ..tensor import Tensor
from .program import Program, read
from .traffic import Collective, collectives_of
from .work import Flops, flops_in


@dataclass(frozen=True, eq=False)
class Plan:
    """What one call of a program does on one device."""

    program: Program

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """One row for each collective of the trace, in the program's order."""
        return collectives_of(self.program)

    @functools.cached_property
    def flops(self) -> Flops:
        """The floating-point operations."""
        return flops_in(self.program)


def plan(fn: Callable[..., Any], *args: Any) -> Plan:
    """What ``fn(*args)`` will do, read from its trace: nothing is compiled, nothing runs.

    Args:
        fn: any function that contains regions, compiled by ``jax.jit`` or not: a loss, its gradient, a training step.
        args: real arguments, or their shapes (``jax.eval_shape``; placed by ``mw.shard``, which says how they lie).

    Raises:
        TypeError: ``fn`` cannot be called.
    """
    if not callable(fn):
        raise fail_type(f"plan: expected a function, found {type(fn).__name__}. Write mw.plan(step, state, batch).")
    compiled: Any = fn if isinstance(fn, jax.stages.Wrapped) else jax.jit(fn)
    traced = compiled.trace(*args)
    paths, _ = jax.tree_util.tree_flatten_with_path(args, is_leaf=lambda x: isinstance(x, Tensor))
    leaves, about = [], []
    for path, x in paths:
        role, names = (x.role, x.names) if isinstance(x, Tensor) else ("", ())
        leaves.append(x.raw if isinstance(x, Tensor) else x)
        about.append((path_text(path), role, names))
    return Plan(read(traced, leaves, about))
