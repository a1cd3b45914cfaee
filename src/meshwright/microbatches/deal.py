"""Deal: layers to the stages of a pipeline with several stages on each device.

A dim that is split lies in runs: device 0 has the first layers. With virtual stages each device works on several runs
that lie apart, ``P`` stages from each other, so the layers are dealt out first and their gradients brought back: each
moves once, by as many permutes as a device has runs.

    2 devices x 2 runs      at rest: 0 has stages 0 1, 1 has 2 3      at work: 0 has stages 0 2, 1 has 1 3
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import collectives
from ..scope import Stages

Arrays = list[Any]
Move = tuple[tuple[int, int], ...]
"""For each device the run that it gives away, and the stage that this is."""


def dealt(stacks: Arrays, stages: Stages, num_devices: int) -> Arrays:
    """Each device's layers as its stages work on them."""
    return stacks if stages.num == 1 else _moved(stacks, stages, num_devices, home=False)


def returned(stacks: Arrays, stages: Stages, num_devices: int) -> Arrays:
    """The inverse of ``dealt``."""
    return stacks if stages.num == 1 else _moved(stacks, stages, num_devices, home=True)


def _moved(stacks: Arrays, stages: Stages, num_devices: int, home: bool) -> Arrays:
    place, runs = collectives.index(stages.axes), stages.num
    rest = np.arange(num_devices * runs).reshape(num_devices, runs)
    work = np.arange(num_devices * runs).reshape(runs, num_devices).T
    source, target = (work, rest) if home else (rest, work)
    out = list(stacks)
    for pairs in rounds(tuple(map(tuple, source.tolist())), tuple(map(tuple, target.tolist()))):
        sent, kept = (jnp.asarray(t, jnp.int32)[place] for t in _runs(pairs, source, target))
        for k, x in enumerate(stacks):
            length = x.shape[0] // runs
            part = lax.dynamic_slice_in_dim(x, sent * length, length)
            part = collectives.permute(part, stages.axes, [(a, b) for a, b, _ in pairs])
            out[k] = lax.dynamic_update_slice_in_dim(out[k], part, kept * length, 0)
    return out


def _runs(pairs: Sequence[tuple[int, int, int]], source: np.ndarray, target: np.ndarray) -> tuple[Any, Any]:
    """For each device, the place of the run that it sends and that of the run that it receives."""
    sent, kept = np.zeros(len(source), int), np.zeros(len(source), int)
    for a, b, stage in pairs:
        sent[a] = np.flatnonzero(source[a] == stage)[0]
        kept[b] = np.flatnonzero(target[b] == stage)[0]
    return sent, kept


@functools.lru_cache(maxsize=64)
def rounds(
    source: tuple[tuple[int, ...], ...], target: tuple[tuple[int, ...], ...]
) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """Rounds in which every device sends one stage and receives one: (from, to, stage), every stage once.

    Every device has as many to send as to receive, so there is always a perfect matching among what is left
    (Kőnig, 1916).
    """
    owner = {stage: d for d, stages in enumerate(target) for stage in stages}
    left = [{stage: owner[stage] for stage in stages} for stages in source]
    found = []
    for _ in source[0]:
        chosen: dict[int, tuple[int, int]] = {}
        for d in range(len(source)):
            _match(d, left, chosen, set())
        found.append(tuple(sorted((a, b, stage) for b, (a, stage) in chosen.items())))
        for a, stage in chosen.values():
            del left[a][stage]
    return tuple(found)


def _match(d: int, left: list[dict[int, int]], chosen: dict[int, tuple[int, int]], seen: set[int]) -> bool:
    """Give device ``d`` a receiver, moving others aside where needed (an augmenting path)."""
    for stage, to in left[d].items():
        if to not in seen:
            seen.add(to)
            if to not in chosen or _match(chosen[to][0], left, chosen, seen):
                chosen[to] = d, stage
                return True
    return False
