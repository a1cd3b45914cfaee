"""What a program communicates, read from its StableHLO."""

import collections
import math
import re
from collections.abc import Callable
from typing import Any

import jax

_COLLECTIVE = re.compile(
    r'"stablehlo\.(all_gather|all_reduce|reduce_scatter|all_to_all|collective_permute)"\('
    r".*?[>)] : \(tensor<([^>]*)>",
    re.DOTALL,
)


def communicated(fn: Callable[..., Any], *inputs: Any) -> list[tuple[str, int]]:
    """Each collective of ``fn`` in the program's order: its kind, and how many elements a device puts in."""
    text = jax.jit(fn).lower(*inputs).as_text()
    found = [(kind, math.prod(map(int, shape.split("x")[:-1]))) for kind, shape in _COLLECTIVE.findall(text)]
    assert len(found) == len(re.findall(r"stablehlo\.(?:all_|reduce_scatter|collective_)", text))
    return found


def counted(fn: Callable[..., Any], *inputs: Any) -> dict[str, int]:
    """How many collectives of each kind ``fn`` holds; kinds that it has none of are left out."""
    return dict(collections.Counter(kind for kind, _ in communicated(fn, *inputs)))
