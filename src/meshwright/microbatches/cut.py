"""Cut: a traced microbatch taken apart at its pipeline.

The scan over layers leaves one call in a trace, named ``STAGE``: what goes round the scan, the parameters stacked along
it, and what its body closes over (positions, segments) are its arguments. A program around it is cut into

    stacks   the stacked parameters, from the arguments alone: made once
    before   what goes into the first stage, and what every stage closes over
    stage    the call: one stage on one device's layers
    after    the results, from what the last stage gives

each a function of its own. What stages close over is made again by each of them; what ``after`` takes from before the
scan it makes again: nothing but what goes round the scan travels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from ..errors import fail
from ..ops.stages import STAGE
from .sums import PART, inner, kinds

Arrays = list[Any]


@dataclass(frozen=True)
class Cut:
    """The parts of a program. ``arrays`` are its arguments, ``i`` the microbatch's number."""

    stacks: Callable[[Arrays], Arrays]
    """``(arrays)``"""
    closed_over: Callable[[Arrays, Any], Arrays]
    """``(arrays, i)``"""
    before: Callable[[Arrays, Any], Arrays]
    """``(arrays, i)``: what goes into the first stage."""
    stage: Callable[[Arrays, Arrays, Arrays, Any], Arrays]
    """``(closed over, what goes round, stacks, run)``"""
    after: Callable[[Arrays, Any, Arrays], Arrays]
    """``(arrays, i, what the last stage gives)``: the results."""
    travelling: list[Any]
    """The types of what goes round."""


def has_stages(jaxpr: Jaxpr) -> bool:
    """Whether a pipeline stands in a trace."""
    return _count(jaxpr) > 0


def leads_through_stages(closed: ClosedJaxpr, which: Sequence[bool]) -> bool:
    """Whether a pipeline stands on the way to any of the results that ``which`` says."""
    outs = [v for v, wanted in zip(closed.jaxpr.outvars, which, strict=True) if wanted]
    return any(_is_stage(eqn) for eqn in _needed(_opened(closed.jaxpr), outs))


def _count(jaxpr: Jaxpr) -> int:
    return sum(1 if _is_stage(eqn) else _count(body) if (body := _body(eqn)) is not None else 0 for eqn in jaxpr.eqns)


def _body(eqn: JaxprEqn) -> Jaxpr | None:
    return eqn.params["jaxpr"].jaxpr if eqn.primitive.name == "scan" else inner(eqn)


def _is_stage(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name == "jit" and eqn.params["name"].startswith(STAGE)


def cut(closed: ClosedJaxpr) -> Cut:
    """The parts of a program, traced as a function of its arguments and the microbatch's number.

    Raises:
        ValueError: there are several pipelines, or the one stands inside another loop or a rematerialised function.
    """
    jaxpr, eqns = closed.jaxpr, _opened(closed.jaxpr)
    at = [k for k, eqn in enumerate(eqns) if _is_stage(eqn)]
    if len(at) != 1 or _count(jaxpr) != 1:
        raise fail(
            f"scan: {_count(jaxpr)} scans over layers that are split into stages, of which {len(at)} by themselves; a "
            "program has one pipeline, that stands in no other loop or rematerialised function. Write mw.scan(..., "
            "remat=…) for its body, and another name for the layers of the other scan."
        )
    call = eqns[at[0]]
    others = [eqn for eqn in eqns if eqn is not call]
    num_travelling = len(call.outvars)
    body: ClosedJaxpr = call.params["jaxpr"]
    num_closed = len(call.invars) - num_travelling - _num_stacks(call) - 1
    given = list(call.invars)
    ends = {"closed": given[:num_closed], "travelling": given[num_closed : num_closed + num_travelling]}
    stacks = given[num_closed + num_travelling : -1]
    arguments, number = jaxpr.invars[:-1], jaxpr.invars[-1]
    consts = closed.consts
    _check_same(jaxpr, others, stacks)

    def part(ins: Sequence[Var], outs: Sequence[Any]) -> Callable[..., Any]:
        return _function(jaxpr, consts, ins, outs, others)

    run_stage = jaxpr_as_fun(body)
    make_stacks = part(arguments, stacks)
    make_closed, make_first = part(jaxpr.invars, ends["closed"]), part(jaxpr.invars, ends["travelling"])
    finish = part([*arguments, number, *call.outvars], jaxpr.outvars)
    return Cut(
        lambda arrays: make_stacks(*arrays),
        lambda arrays, i: make_closed(*arrays, i),
        lambda arrays, i: make_first(*arrays, i),
        lambda over, x, stacks, run: run_stage(*over, *x, *stacks, run),
        lambda arrays, i, x: finish(*arrays, i, *x),
        [v.aval for v in call.outvars],
    )


def _num_stacks(call: JaxprEqn) -> int:
    """How many stacks a stage reads: its explicit arguments are what goes round, the stacks, and the run's number."""
    return int(call.params["name"].removeprefix(STAGE))


def _check_same(jaxpr: Jaxpr, eqns: list[JaxprEqn], stacks: Sequence[Any]) -> None:
    trace = _part(jaxpr, jaxpr.invars, stacks, eqns)
    given = [*("same" for _ in jaxpr.invars[:-1]), PART]
    if PART in kinds(trace, given):
        raise fail(
            "scan: the layers of a pipeline read something that is stacked along them and depends on the batch. Stages "
            "hold parameters; let what depends on the batch go round with the carry, or be closed over."
        )


def _opened(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations, with the calls opened that hold the pipeline."""
    found: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        body = inner(eqn)
        if eqn.primitive.name == "jit" and not _is_stage(eqn) and body is not None and _count(body):
            found += _renamed(eqn)
        else:
            found.append(eqn)
    return found


def _renamed(call: JaxprEqn) -> list[JaxprEqn]:
    """The equations of a call, reading what it is given and making what it gives."""
    body: ClosedJaxpr = call.params["jaxpr"]
    if body.consts:
        raise fail("scan: a jitted function that holds a pipeline closes over arrays. Pass them to it as arguments.")
    names: dict[Any, Any] = dict(zip(body.jaxpr.invars, call.invars, strict=True))
    outs = dict(zip(body.jaxpr.outvars, call.outvars, strict=True))
    found = []
    for eqn in _opened(body.jaxpr):
        ins = [v if isinstance(v, Literal) else names.get(v, v) for v in eqn.invars]
        names.update({v: outs[v] for v in eqn.outvars if v in outs})
        found.append(eqn.replace(invars=ins, outvars=[names.get(v, v) for v in eqn.outvars]))
    return found


def _needed(eqns: Sequence[JaxprEqn], outs: Sequence[Any]) -> list[JaxprEqn]:
    """The equations that lead to some results."""
    wanted = {v for v in outs if isinstance(v, Var)}
    kept = []
    for eqn in reversed(eqns):
        if wanted.intersection(eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in eqn.invars if isinstance(v, Var))
    return kept[::-1]


def _function(
    jaxpr: Jaxpr, consts: Sequence[Any], ins: Sequence[Var], outs: Sequence[Any], eqns: Sequence[JaxprEqn]
) -> Callable[..., Any]:
    return jaxpr_as_fun(ClosedJaxpr(_part(jaxpr, ins, outs, eqns), consts))


def _part(jaxpr: Jaxpr, ins: Sequence[Var], outs: Sequence[Any], eqns: Sequence[JaxprEqn]) -> Jaxpr:
    names = jaxpr.debug_info._replace(arg_names=("",) * len(ins), result_paths=("",) * len(outs))
    return jaxpr.replace(invars=list(ins), outvars=list(outs), eqns=_needed(eqns, outs), debug_info=names)
