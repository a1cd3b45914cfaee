"""Sums: what a traced microbatch says of its results, and which of its parameters' gradients can wait.

A function of a batch, run on one microbatch after the other, gives its result on the whole batch only where the result
is put together from those of the parts. Whether it is, its trace says. Every value is of one of these kinds:

======  ====================================================  =======================================
kind    what it is                                            how the parts are put together
======  ====================================================  =======================================
SAME    does not depend on the microbatch                     any of them
PART    depends on the microbatch                             joined along the dim, if it has that dim
SUM     one microbatch's addend (marked by ``collectives``),  added up; what is the same in each (an
        or linear in such                                     added penalty) is counted once
======  ====================================================  =======================================

A sum may be scaled, negated, added to others, reshaped: what is linear. Anything else would take one microbatch's
addend for the sum, and is an error.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from ..collectives import SUMMED
from ..errors import fail

SAME, PART, SUM, SHIFTED = "same", "part", "sum", "shifted sum"
"""SHIFTED: a sum to which something that is the same in each microbatch was added."""

_SUMS = (SUM, SHIFTED)
_LINEAR = {
    "neg", "reshape", "broadcast_in_dim", "squeeze", "transpose", "slice", "reduce_sum", "copy", "expand_dims",
    "reduce_precision", "real", "imag", "rev", "stop_gradient", "name", "dynamic_slice", "reduce_scatter",
    "all_gather", "all_gather_invariant",
}  # fmt: skip
_EACH = {"optimization_barrier", "psum", "psum_invariant", "pvary"}
"""What gives a result for each operand."""
_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "remat": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr",
}  # fmt: skip
_SAME_VALUES = {"convert_element_type", "reshape", "transpose", "slice", "dynamic_slice", "squeeze", "copy", "name"}
"""What hands on its first operand's values, so that its gradient is the operand's."""


def inner(eqn: Any) -> Jaxpr | None:
    """The body of an equation that calls a function once."""
    body = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    return body.jaxpr if isinstance(body, ClosedJaxpr) else body


def kinds(jaxpr: Jaxpr, given: Sequence[str]) -> list[str]:
    """The kinds of a trace's results, of its arguments' kinds.

    Raises:
        ValueError: a sum over microbatches is used as if it were complete.
    """
    known: dict[Var, str] = dict(zip(jaxpr.invars, given, strict=True))

    def kind_of(v: Any) -> str:
        return SAME if isinstance(v, Literal) else known.get(v, SAME)

    for eqn in jaxpr.eqns:
        found = _of_equation(eqn, [kind_of(v) for v in eqn.invars])
        known.update(zip(eqn.outvars, found, strict=True))
    return [kind_of(v) for v in jaxpr.outvars]


def _of_equation(eqn: Any, given: list[str]) -> list[str]:
    name, num = eqn.primitive.name, len(eqn.outvars)
    body = inner(eqn)
    if body is not None:
        return kinds(body, given)
    if name == "scan":
        return _of_scan(eqn, given)
    if name == "name" and eqn.params["name"] == SUMMED:
        if given[0] in _SUMS:
            raise _not_linear(eqn)
        return [SUM]
    if any(_holds_sum(value) for value in eqn.params.values()):
        raise _not_linear(eqn)
    if name in _EACH and len(given) == num:
        return given
    if not any(kind in _SUMS for kind in given):
        return [PART if PART in given else SAME] * num
    return [_of_linear(eqn, name, given)] * num


def _of_linear(eqn: Any, name: str, given: list[str]) -> str:
    kind = SHIFTED if SHIFTED in given else SUM
    others = [k for k in given if k not in _SUMS]
    if PART in others:
        raise _not_linear(eqn)
    if name in ("add", "sub", "add_any", "concatenate"):
        return SHIFTED if others else kind
    if name in ("mul", "dot_general") and len(others) == 1:
        return kind
    if name == "div" and given[0] in _SUMS and others and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
        return kind
    if name == "select_n" and given[0] not in _SUMS:
        return SHIFTED if len(others) > 1 else kind
    if name == "convert_element_type" and jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        return kind
    if name in _LINEAR and given[0] in _SUMS and not any(k in _SUMS for k in given[1:]):
        return kind
    raise _not_linear(eqn)


def _of_scan(eqn: Any, given: list[str]) -> list[str]:
    params = eqn.params
    body, first, num_carry = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
    given = list(given)
    while True:
        found = kinds(body, given)
        handed = [_joined(eqn, a, b) for a, b in zip(given[first : first + num_carry], found, strict=False)]
        if handed == given[first : first + num_carry]:
            return found
        given[first : first + num_carry] = handed


def _joined(eqn: Any, one: str, two: str) -> str:
    """The kind of what is either ``one`` or ``two``: what a loop begins with and what it hands on."""
    order = (SAME, PART, SUM, SHIFTED)
    if PART in (one, two) and (one in _SUMS or two in _SUMS):
        raise _not_linear(eqn)
    if {one, two} == {SAME, SUM} or {one, two} == {SAME, SHIFTED}:
        return SHIFTED
    return max(one, two, key=order.index)


def _holds_sum(value: Any) -> bool:
    """Whether a parameter of an equation is a function (or several) in which a sum is marked."""
    if isinstance(value, tuple | list):
        return any(map(_holds_sum, value))
    jaxpr = value.jaxpr if isinstance(value, ClosedJaxpr) else value
    return isinstance(jaxpr, Jaxpr) and any(
        (eqn.primitive.name == "name" and eqn.params["name"] == SUMMED) or any(map(_holds_sum, eqn.params.values()))
        for eqn in jaxpr.eqns
    )


def sums_under_rules(jaxpr: Jaxpr) -> bool:
    """Whether a function with a gradient of its own sums over microbatches."""
    return any(_sums_under_rule(eqn) or any(map(sums_under_rules, _bodies(eqn.params.values()))) for eqn in jaxpr.eqns)


def _sums_under_rule(eqn: Any) -> bool:
    body = inner(eqn)
    is_mark = body is not None and [e.params.get("name") for e in body.eqns] == [SUMMED]
    return eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call") and not is_mark and _holds_sum(body)


def _bodies(values: Iterable[Any]) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _bodies(value)
        elif isinstance(value, ClosedJaxpr | Jaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value


def check_rule(trace: ClosedJaxpr, parts: Sequence[bool]) -> None:
    """Hold the trace of a custom gradient's rule, whose arguments are sums, against what may be done with such.

    Raises:
        ValueError: a sum is used as if it were complete; a gradient that each microbatch has its part of is made of
            one; or something is added to one, which would be added by each microbatch.
    """
    for kind, part in zip(kinds(trace.jaxpr, [SUM] * len(trace.jaxpr.invars)), parts, strict=True):
        if kind == SHIFTED or (kind == SUM and part):
            raise fail(
                "microbatches: the rule of a custom gradient takes what one microbatch adds to a sum (over the dim "
                "that microbatches divide, or of a parameter's gradient) for the whole sum.\n  It may scale such a sum "
                "and return it for an argument that has not that dim. Do the rest outside the region, or leave "
                "microbatches= out of the layout."
            )


def _not_linear(eqn: Any) -> ValueError:
    return fail(
        f"microbatches: a sum (or mean) over the dim of the microbatches is used by {eqn.primitive.name!r} before all "
        "microbatches are in: what follows such a sum may scale it, add to it and return it, for it is complete only "
        "at the end.\n  Normalise by known sizes, do the rest outside the region, or leave microbatches= out of the "
        "layout."
    )


def waits_over(jaxpr: Jaxpr, v: Var) -> frozenset[str] | None:
    """The axes over which every use of an argument lets it vary first: the sum of its gradient over them can be taken
    once, after all microbatches. None where nothing uses it."""
    if any(v is out for out in jaxpr.outvars):
        return frozenset()
    found: frozenset[str] | None = None
    for eqn in jaxpr.eqns:
        for i in (i for i, given in enumerate(eqn.invars) if given is v):
            axes = _varied_by(jaxpr, eqn, i)
            if axes is not None:
                found = axes if found is None else found & axes
    return found


def _varied_by(jaxpr: Jaxpr, eqn: Any, i: int) -> frozenset[str] | None:
    name, body = eqn.primitive.name, inner(eqn)
    if name == "pvary":
        return frozenset(eqn.params["axes"])
    if name == "custom_vjp_call":  # its rule gives a gradient for what came, and may have summed it already
        return frozenset()
    if body is not None:
        return waits_over(body, body.invars[i])
    if name == "scan":
        first, last = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
        return (
            frozenset()
            if first <= i < last
            else waits_over(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].jaxpr.invars[i])
        )
    if i == 0 and name in _SAME_VALUES:
        return waits_over(jaxpr, eqn.outvars[0])
    return frozenset()
