"""Calibrate: measure the machine that is here, as a profile that ``plan.time`` accepts.

    profile = mw.calibrate(path="here.toml")
    mw.plan(step, state, batch).on(profile)

What is measured: products of square matrices of several sizes, an elementwise pass over memory and one within a cache,
the least that any operation takes, and for each kind of collective and each size of a group its latency (alpha) and the
bytes a second that a device sends. All devices work at once, each group of an axis beside the others, as they do in a
program: virtual devices share cores, and real ones share links.

A measurement is one compiled program that does the same many times, so that the cost of starting it is not counted: on
one array after the other, as a step finds its weights and gradients (MOST_ARRAYS or PASS_BYTES of them), or, for what a
cache holds and for the least of an operation, on one array again and again. The median of several runs is taken.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .. import collectives
from ..devices import present
from ..errors import fail
from ..mesh import Mesh
from ..scope import Axes
from .hardware import Achieved, Hardware, Rate
from .traffic import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, KINDS, PERMUTE, REDUCE_SCATTER

MATMUL_SIZES = (64, 128, 256, 512, 1024)
"""Of accelerators' products, four times as much."""
PAYLOADS = (4 * 1024, 256 * 1024, 4 * 1024 * 1024)
"""Bytes of the buffers that collectives are measured with."""
PASS_BYTES, CACHED_BYTES = 32 * 1024 * 1024, 256 * 1024
"""Of arrays that together reach memory, and of the smallest one that is looked for in a cache."""
MOST_ARRAYS, LEAST_ARRAYS = 32, 4
"""How many arrays a measurement goes through."""
NUM_RUNS = 5
TURN_SECONDS = 0.05
"""About how long one run of a measurement takes."""

Body = Callable[[jax.Array], jax.Array]


def calibrate(mesh: Mesh | None = None, path: str | Path | None = None) -> Hardware:
    """Measure the devices of a mesh, or all that there are.

    Args:
        mesh: its axes are measured, each by its name; None: groups of every size that divides the number of devices.
        path: where to write the profile, ``"here.toml"``; None: nowhere.

    Returns:
        The profile, for ``plan.on`` and ``plan.time``.

    Raises:
        ValueError: the mesh is only described.
    """
    if mesh is not None and mesh.described:
        raise fail("calibrate: the mesh is only described: there is nothing to measure. Use a mesh of present devices.")
    devices = list(mesh.devices) if mesh is not None else present()
    first, everyone = devices[0], Mesh({"devices": len(devices)}, devices)
    wide = first.platform != "cpu"
    dtype: Any = jnp.bfloat16 if wide else jnp.float32
    rates = {size * (4 if wide else 1): _matmul(everyone, size * (4 if wide else 1), dtype) for size in MATMUL_SIZES}
    launch = _seconds(everyone, lambda x: x @ x, jnp.zeros((8, 8), dtype))
    memory = _bandwidth(everyone)
    room, cached = _cache(everyone, memory, launch)
    known = Hardware.of_kind(first.device_kind)
    peak = max(rates.values())
    profile = Hardware(
        name="measured",
        title=f"{len(devices)} x {first.device_kind}, measured",
        platform=first.platform,
        peak_flops=peak,
        hbm_bytes=known.hbm_bytes if known is not None else 0,
        usable_bytes=known.usable_bytes if known is not None else 0,
        scratch_bytes=known.scratch_bytes if known is not None else 0,
        scratch_collectives=known is None or known.scratch_collectives,
        hbm_bytes_per_second=memory,
        cache_bytes=room,
        cache_bytes_per_second=cached,
        elementwise_flops=_elementwise(everyone),
        network="measured",
        matmul=tuple(Rate(size=size, fraction=rate / peak) for size, rate in rates.items()),
        tile=1,
        achieved=tuple(_collectives(mesh, devices)),
        launch_seconds=launch,
        overlap=wide,
    )
    if path is not None:
        Path(path).write_text(profile.toml())
    return profile


def _matmul(mesh: Mesh, size: int, dtype: Any) -> float:
    """Operations a second on each device."""
    return 2 * size**3 / _seconds_through(mesh, lambda x: x @ x, (size, size), dtype)


def _bandwidth(mesh: Mesh) -> float:
    """Bytes a second that each device reads and writes in an elementwise pass over memory, each array in place."""
    x = jnp.zeros(PASS_BYTES // MOST_ARRAYS // 4, jnp.float32)
    seconds = _median(mesh, lambda *given: [_pass(x) for x in given], [x] * MOST_ARRAYS, in_place=True)
    return 2 * MOST_ARRAYS * x.nbytes / seconds


def _cache(mesh: Mesh, memory: float, launch: float) -> tuple[int, float]:
    """The room in a cache, and the bytes a second that each device reads and writes of what it holds; zeros where that
    is no faster than ``memory``."""
    rates = {}
    for size in (CACHED_BYTES * 2**i for i in range(6)):
        seconds = _seconds(mesh, _pass, jnp.zeros(size // 4, jnp.float32))
        rates[size] = 2 * size / max(seconds - launch, seconds / 10)
    best = max(rates.values())
    if best < 2 * memory:
        return 0, 0.0
    return max(size for size, rate in rates.items() if rate > math.sqrt(best * memory)), best


def _pass(x: jax.Array) -> jax.Array:
    return jnp.maximum(x * 0.5, x + 0.25)


def _elementwise(mesh: Mesh) -> float:
    """Elementwise operations a second on each device, one in four of them an exponential."""
    x = jnp.zeros(CACHED_BYTES // 4, jnp.float32)
    return 4 * x.size / _seconds(mesh, lambda x: jnp.exp(x * -0.5) * 0.5 + x, x)


def _collectives(mesh: Mesh | None, devices: Sequence[Any]) -> Iterator[Achieved]:
    if mesh is not None:
        groups = [(mesh, axis, axis) for axis, size in mesh.axes.items() if size > 1]
    else:
        num = len(devices)
        sizes = [n for n in range(2, num + 1) if num % n == 0]
        groups = [(Mesh({"others": num // n, "group": n}, devices), "group", "") for n in sizes]
    for on, axis, name in groups:
        for kind in KINDS:
            alpha, rate = _fit(kind, on, axis)
            yield Achieved(kind=kind, group_size=on.axes[axis], alpha_seconds=alpha, bytes_per_second=rate, axis=name)


def _fit(kind: str, mesh: Mesh, axis: str) -> tuple[float, float]:
    """Alpha and the rate of one kind: the line of least relative error through the measurements."""
    n = mesh.axes[axis]
    points = []
    for payload in PAYLOADS:
        given = payload // n if kind == ALL_GATHER else payload
        body = functools.partial(_collective, kind, (axis,), n)
        seconds = _seconds_through(mesh, body, (given // 4,))
        shares = {ALL_REDUCE: 2 * (n - 1) / n, PERMUTE: 1.0}
        points.append((payload * shares.get(kind, (n - 1) / n), seconds))
    return line(points)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """From (bytes, seconds) to alpha and bytes a second: seconds = alpha + bytes / rate, the relative errors' least
    squares; both are positive."""
    sent, seconds = (np.array(column, float) for column in zip(*points, strict=True))
    columns = np.stack([1 / seconds, sent / seconds], axis=1)
    alpha, slope = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)[0]
    if alpha < 0:
        alpha, slope = 0.0, float(np.sum(sent / seconds) / np.sum((sent / seconds) ** 2))
    if slope <= 0:
        alpha, slope = float(np.median(seconds)), 0.0
    return float(alpha), 1 / float(slope) if slope > 0 else 1e15


def _collective(kind: str, axes: Axes, n: int, x: jax.Array) -> jax.Array:
    """One collective on a slice."""
    if kind == ALL_REDUCE:
        return collectives.all_sum(x, axes)
    if kind == ALL_GATHER:
        return collectives.gather(x, axes, 0)
    if kind == REDUCE_SCATTER:
        return collectives.sum_scatter(x, axes, 0)
    if kind == ALL_TO_ALL:
        return collectives.exchange(x, axes, 0, 0)
    return collectives.rotate(x, axes, n, 1)


def _seconds(mesh: Mesh, body: Body, x: jax.Array) -> float:
    """How long ``body`` takes on every device at once, on what it made the turn before."""

    def program(turns: int) -> float:
        def loop(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, turns, lambda _, x: body(x), x)

        return _median(mesh, loop, [x])

    turns = max(4, min(200, math.ceil(TURN_SECONDS / max(program(1), 1e-6))))
    return program(turns) / turns


def _seconds_through(mesh: Mesh, body: Body, shape: tuple[int, ...], dtype: Any = jnp.float32) -> float:
    """How long ``body`` takes on every device at once, going through arrays of this shape one after the other."""
    x = jnp.zeros(shape, dtype)
    num = max(LEAST_ARRAYS, min(MOST_ARRAYS, PASS_BYTES // x.nbytes))

    def program(*given: jax.Array) -> list[jax.Array]:
        """One element of each result. For the barriers a compiler makes all of it, and joins no small collectives."""
        made, ends = given[0], []
        for x in given:
            x, _ = jax.lax.optimization_barrier((x, made))
            made = jax.lax.optimization_barrier(body(x))
            ends.append(made.ravel()[-1:])
        return ends

    return _median(mesh, program, [x] * num) / num


def _median(mesh: Mesh, program: Callable[..., Any], given: Sequence[jax.Array], in_place: bool = False) -> float:
    """The median time of a program of each device's slices; ``in_place``: it gives as many of the same shapes, which
    take their places."""
    axes = tuple(mesh.axes)
    spec, every = PartitionSpec(axes), frozenset(axes)

    def whole(x: jax.Array) -> jax.Array:
        sharding = NamedSharding(mesh.jax_mesh, spec)
        return jax.device_put(jnp.zeros((mesh.size * x.shape[0], *x.shape[1:]), x.dtype), sharding)

    def region(*slices: jax.Array) -> Any:
        made = program(*(collectives.vary(x, every) for x in slices))
        return jax.tree.map(lambda x: collectives.vary(x, every), made)

    arrays = [whole(x) for x in given]
    compiled = jax.jit(
        jax.shard_map(region, mesh=mesh.jax_mesh, in_specs=spec, out_specs=spec),
        donate_argnums=tuple(range(len(given))) if in_place else (),
    )
    taken = []
    for _ in range(NUM_RUNS + 1):
        start = time.perf_counter()
        made = jax.block_until_ready(compiled(*arrays))
        taken.append(time.perf_counter() - start)
        arrays = made if in_place else arrays
    return statistics.median(taken[1:])
