"""Warnings: what a plan shows to be a mistake more often than not.

Each is a function of what is known of a program, and gives what it found: the user's line, what it costs in bytes and
in seconds, and what to write instead. Costs are those of one device in one call; seconds need a machine. What is too
small to matter is not told: less than a hundredth of the program's own work, traffic or arguments.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..devices import counted
from ..explain import show_bytes
from ..scope import Axes
from ..tensor import ACTIVATION, PARAMETER
from .context import contexts_of
from .known import Known, Ran, axes_of
from .network import in_order
from .origin import BACKWARD, FORWARD, Origin
from .program import Argument, Op
from .time import product_sizes
from .touched import VIEWS
from .traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Collective, rows_of
from .work import CONVOLUTION, ELEMENTWISE, MATMUL, flops_of

SHARE = 0.01
"""What is less than this share of its kind is not told."""
BUBBLE, FINE_BUBBLE = 0.15, 0.10
"""The part of a pipeline's ticks above which its bubble is told, and that which a remedy leaves at most."""
RIDGE = 128
"""Of a machine that is not known: rows for which weights are read in the time of their product."""


@dataclass(frozen=True)
class PlanWarning:
    """One thing that is probably not as it should be."""

    kind: str
    """``unknown``, ``duplicated``, ``gathered``, ``summed``, ``replicated``, ``small_batch``, ``slow_network``,
    ``uneven``, ``thin``, ``attention``, ``bubble`` or ``memory``."""
    file: str
    line: int
    message: str
    """What it is, with names and sizes."""
    num_bytes: int | None
    """What it costs a device: bytes moved, or held where it says so; None when that is not known."""
    seconds: float | None
    """What it costs in time, nothing of it hidden; None when no machine is known."""
    remedy: str

    @property
    def place(self) -> str:
        """``model.py:12``, or "" when no line is to blame."""
        return Origin("", "", (), self.file, self.line).place


def warnings_of(known: Known) -> tuple[PlanWarning, ...]:
    """Every warning: first what makes figures incomplete, then a lack of memory, then what takes the most time."""
    found = [warning for check in _CHECKS for warning in check(known)]
    return tuple(sorted(found, key=_rank))


def _rank(warning: PlanWarning) -> tuple[bool, bool, float, int]:
    first = warning.kind == "unknown", warning.kind == "memory"
    return not first[0], not first[1], -(warning.seconds or 0.0), -(warning.num_bytes or 0)


def _over(axes: Sequence[str], known: Known) -> str:
    return " x ".join(f"{axis}={known.program.sizes[axis]}" for axis in axes)


def _unknown(known: Known) -> Iterator[PlanWarning]:
    """Operations whose communication is not in the trace, because XLA's partitioner chooses it."""
    ops = known.program.unknown
    if not ops:
        return
    lines = dict.fromkeys(f"{op.name} at {op.origin.place}" if op.origin.file else op.name for op in ops)
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    first = next((op.origin for op in ops if op.origin.file), ops[0].origin)
    yield PlanWarning(
        "unknown",
        first.file,
        first.line,
        f"What {counted(len(ops), 'operation')} on split arrays outside every region will send is XLA's to choose: "
        f"{', '.join(list(lines)[:3])}{more}. Traffic, time, work and memory are incomplete without it.",
        None,
        None,
        'Put them into a region: mw.spmd with partitioner="names". Or ask the compiler what it chose: plan.compile().',
    )


def _duplicated(known: Known) -> Iterator[PlanWarning]:
    """Products that all devices along an axis do alike."""
    total = sum(flops_of(r.op)[1] * r.times for r in known.ran)
    by_axes: dict[Axes, list[Ran]] = defaultdict(list)
    for ran in known.ran:
        if flops_of(ran.op)[0] in (MATMUL, CONVOLUTION):
            by_axes[_idle_axes(ran.op, known)].append(ran)
    for axes, all_ran in by_axes.items():
        flops = sum(flops_of(r.op)[1] * r.times for r in all_ran)
        if not axes or flops < SHARE * total:
            continue
        copies = math.prod(known.program.sizes[a] for a in axes)
        worst = max(all_ran, key=lambda r: flops_of(r.op)[1] * r.times)
        held = sum(v.num_bytes * r.times for r in all_ran for v in r.op.outs) * (copies - 1) // copies
        yield PlanWarning(
            "duplicated",
            worst.op.origin.file,
            worst.op.origin.line,
            f"All {copies} devices along {_over(axes, known)} do the same products: {flops / total:.0%} of the work"
            f"{_elsewhere(worst.op.origin, [r.op.origin for r in all_ran])}.",
            held,
            _product_seconds(all_ran, known, (copies - 1) / copies),
            f"Split a dim of them over {' and '.join(axes)} (batch, heads, ff, vocab, length), or give the mesh fewer "
            "devices there.",
        )


def _idle_axes(op: Op, known: Known) -> Axes:
    values = [v for v in (*op.ins, *op.outs) if v is not None]
    busy = {a for v in values for a in (*v.varying, *(a for axes in v.split for a in axes))}
    return tuple(a for a, size in known.program.sizes.items() if size > 1 and a not in busy)


def _product_seconds(all_ran: Sequence[Ran], known: Known, share: float) -> float | None:
    if known.machine is None:
        return None
    hardware = known.machine.hardware
    each = (flops_of(r.op)[1] * r.times / hardware.matmul_flops(product_sizes(r.op)) for r in all_ran)
    return share * sum(each)


def _gathered(known: Known) -> Iterator[PlanWarning]:
    """Activations gathered whole, for a product that is not split over the axis either."""
    total = _traffic(known)
    groups: dict[Axes, list[Collective]] = defaultdict(list)
    for ran in known.ran:
        rows = list(rows_of(ran.op, (ran.times,)))
        if not rows or rows[0].kind != ALL_GATHER or ran.op.origin.direction != FORWARD or not ran.op.sizes:
            continue
        fed = _feeds_split_weights(ran.op, rows[0].axes, known) or _ends_a_sum(ran.op, rows[0].axes, known)
        if known.lineage.parameter(ran.op.ins[0]) is None and not fed:
            groups[in_order(rows[0].axes, known.program.sizes)] += rows
    for axes, rows in groups.items():
        sent = sum(row.total_sent_bytes for row in rows)
        if sent < SHARE * total:
            continue
        worst = max(rows, key=lambda row: row.total_sent_bytes)
        yield PlanWarning(
            "gathered",
            worst.origin.file,
            worst.origin.line,
            f"Each device along {_over(axes, known)} gathers the whole of an activation{_about(worst)}"
            f"{_elsewhere(worst.origin, [row.origin for row in rows])}.",
            sent,
            known.seconds(rows),
            f"Split over {' x '.join(axes)} a dim that this line does not mix, heads or ff rather than the length, "
            "or keep the dim's name, so that it stays split.",
        )


def _about(row: Collective) -> str:
    """The dims and the size of what is moved."""
    dims = f" ({', '.join(row.origin.dims)})" if row.origin.dims else ""
    return f"{dims}: {show_bytes(row.payload_bytes)}" + (f", {row.times} times" if row.times > 1 else "")


def _elsewhere(here: Origin, origins: Sequence[Origin]) -> str:
    """The other lines of the same fault."""
    others = sorted({origin.place for origin in origins} - {here.place, ""})
    more = f" and {len(others) - 3} more lines" if len(others) > 3 else ""
    return f"; also at {', '.join(others[:3])}{more}" if others else ""


def _feeds_split_weights(op: Op, axes: Axes, known: Known) -> bool:
    """Whether what is gathered meets a parameter that is split over the axis: then each device does its own part."""
    for reader in known.read_by(op.outs[0]):
        others = [v for v in reader.ins if v is not None and known.lineage.parameter(v) is not None]
        if flops_of(reader)[0] == MATMUL and any(set(known.splitting(v)) & set(axes) for v in others):
            return True
        if flops_of(reader)[0] == ELEMENTWISE and reader.outs and _leads_to_split_weights(reader, axes, known, 8):
            return True
    return False


def _ends_a_sum(op: Op, axes: Axes, known: Known) -> bool:
    """Whether a gather is the last step of a sum that was scattered before it crossed the slow network."""
    across = known.makers.get(id(op.ins[0]))
    scatter = known.makers.get(id(across.ins[0])) if across is not None and across.ins else None
    rows = list(rows_of(scatter)) if scatter is not None else []
    return any(row.kind == REDUCE_SCATTER and row.axes == axes for row in rows)


def _leads_to_split_weights(op: Op, axes: Axes, known: Known, depth: int) -> bool:
    for reader in (r for out in op.outs for r in known.read_by(out)):
        others = [v for v in reader.ins if v is not None and known.lineage.parameter(v) is not None]
        if flops_of(reader)[0] == MATMUL:
            if any(set(known.splitting(v)) & set(axes) for v in others):
                return True
        elif depth and _leads_to_split_weights(reader, axes, known, depth - 1):
            return True
    return False


def _summed(known: Known) -> Iterator[PlanWarning]:
    """Activations that a sum leaves whole on every device, which then all do the same to them."""
    total = _traffic(known)
    groups: dict[Axes, list[Collective]] = defaultdict(list)
    for ran in known.ran:
        for row in rows_of(ran.op, (ran.times,)):
            if row.kind != ALL_REDUCE or row.origin.direction != FORWARD or not ran.op.sizes:
                continue
            shape = ran.op.outs[0].shape
            if len(shape) > 1 and any(n % row.group_size == 0 for n in shape) and _of_product(ran, known):
                groups[in_order(row.axes, known.program.sizes)].append(row)
    for axes, rows in groups.items():
        saved = sum(row.total_sent_bytes for row in rows) // 2
        if saved < SHARE * total:
            continue
        seconds, worst = known.seconds(rows), max(rows, key=lambda row: row.total_sent_bytes)
        yield PlanWarning(
            "summed",
            worst.origin.file,
            worst.origin.line,
            f"A sum over {_over(axes, known)} leaves an activation whole on every device{_about(worst)}"
            f"{_elsewhere(worst.origin, [row.origin for row in rows])}.",
            saved,
            seconds / 2 if seconds is not None else None,
            f"Rename one of its dims to a name that the layout splits over {' x '.join(axes)} (in the decoder, "
            f"residual_length:{axes[0]}): the sum becomes a reduce-scatter, half the bytes, and the elementwise work "
            "after it is split.",
        )


def _of_product(ran: Ran, known: Known) -> bool:
    """Whether what is summed comes from a product: not a statistic, nor a lookup."""
    value, steps = ran.op.ins[0], 0
    while value is not None and id(value) in known.makers and steps < 16:
        maker = known.makers[id(value)]
        if flops_of(maker)[0] == MATMUL and flops_of(maker)[1]:
            return True
        if maker.name not in VIEWS and maker.name not in ("add", "mul"):
            return False
        value, steps = max((v for v in maker.ins if v is not None), key=lambda v: v.num_bytes, default=None), steps + 1
    return False


def _traffic(known: Known) -> int:
    return sum(row.total_sent_bytes for ran in known.ran for row in rows_of(ran.op, (ran.times,)))


def _replicated(known: Known) -> Iterator[PlanWarning]:
    """Parameters and optimizer state that every device along an axis holds whole: of the axis where that is most."""
    arguments = [a for a in known.program.arguments if a.role == PARAMETER]
    held = sum(a.value.num_bytes for a in known.program.arguments)
    found = []
    for axis, size in known.program.sizes.items():
        whole = [a for a in arguments if size > 1 and axis not in axes_of(a.value)]
        fit = [a for a in whole if any(n % size == 0 for n in a.value.shape)]
        found.append((sum(a.value.num_bytes for a in fit) * (size - 1) // size, axis, fit))
    saved, axis, fit = max(found, key=lambda each: each[0], default=(0, "", []))
    if not fit or saved < 0.1 * held:
        return
    worst = max(fit, key=lambda a: a.value.num_bytes)
    origin = _first_use(worst, known)
    yield PlanWarning(
        "replicated",
        origin.file if origin else "",
        origin.line if origin else 0,
        f"{len(fit)} tensors of parameters and optimizer state lie whole on each of the {known.program.sizes[axis]} "
        f"devices along {axis}: {show_bytes(saved)} a device held for nothing. The largest: {_named(worst)}.",
        saved,
        0.0 if known.machine is not None else None,
        f'Split them at rest: Layout(..., params="{axis}"). Gradients then need a reduce-scatter, and each use a '
        "gather: as many bytes as the all-reduce.",
    )


def _first_use(argument: Argument, known: Known) -> Origin | None:
    for ran in known.ran:
        if any(known.lineage.parameter(v) is argument for v in ran.op.ins) and ran.op.origin.file:
            return ran.op.origin
    return None


def _small_batch(known: Known) -> Iterator[PlanWarning]:
    """Products with so few rows that reading the weights takes longer than multiplying by them."""
    products = [r for r in known.ran if _multiplies(r, known) and r.op.origin.direction == FORWARD]
    few = [r for r in products if product_sizes(r.op)[0] < _ridge(r.op, known)]
    flops = sum(flops_of(r.op)[1] * r.times for r in products)
    if not few or sum(flops_of(r.op)[1] * r.times for r in few) < flops / 2:
        return
    worst = max(few, key=lambda r: flops_of(r.op)[1] * r.times)
    rows, ridge = product_sizes(worst.op)[0], _ridge(worst.op, known)
    weights = sum(v.num_bytes * r.times for r in few for v in r.op.ins if v and known.lineage.parameter(v))
    batch = [a for a in known.program.arguments if a.role == ACTIVATION and a.names]
    given = f" (the batch of a device: {_local(batch[0])})" if batch else ""
    yield PlanWarning(
        "small_batch",
        worst.op.origin.file,
        worst.op.origin.line,
        f"Products have {rows} rows on a device{given}; below about {ridge} it waits for the weights.",
        weights,
        _waiting(few, known),
        "Make the batch larger, accumulate gradients over fewer microbatches, or split the batch over fewer devices "
        "and heads, ff and vocab over more.",
    )


def _multiplies(ran: Ran, known: Known) -> bool:
    """Whether an operation is the product of an activation with a parameter."""
    if ran.op.name != "dot_general" or not ran.op.sizes:
        return False
    return sum(known.lineage.parameter(v) is not None for v in ran.op.ins) == 1


def _ridge(op: Op, known: Known) -> int:
    """Rows for which a product takes as long as reading its weights."""
    if known.machine is None:
        return RIDGE
    hardware = known.machine.hardware
    return math.ceil(hardware.peak_flops / hardware.hbm_bytes_per_second * op.outs[0].dtype.itemsize / 2)


def _local(argument: Argument) -> str:
    return ", ".join(f"{name}={size}" for name, size in zip(argument.names, argument.value.shape, strict=True))


def _waiting(few: Sequence[Ran], known: Known) -> float | None:
    if known.machine is None:
        return None
    hardware, total = known.machine.hardware, 0.0
    for ran in few:
        read = sum(v.num_bytes for v in (*ran.op.ins, *ran.op.outs) if v is not None)
        total += max(0.0, read / hardware.hbm_bytes_per_second - flops_of(ran.op)[1] / hardware.peak_flops) * ran.times
    return total


def _slow_network(known: Known) -> Iterator[PlanWarning]:
    """Collectives of every layer over the slow network, but for sums of a parameter's gradient: there is one for each
    layer, wherever it stands."""
    if known.machine is None:
        return
    parameters = [a.names for a in known.program.arguments if a.role == PARAMETER]
    groups: dict[Axes, list[tuple[Ran, Collective]]] = defaultdict(list)
    for ran in known.ran:
        for row in rows_of(ran.op, (ran.times,)):
            of_gradient = row.origin.direction == BACKWARD and _dims_of_one(row.origin.dims, parameters)
            if ran.looped and not of_gradient and known.machine.path(row.axes).slow:
                groups[in_order(row.axes, known.program.sizes)].append((ran, row))
    for axes, found in groups.items():
        rows = [row for _, row in found]
        worst = max(rows, key=lambda row: row.total_sent_bytes)
        yield PlanWarning(
            "slow_network",
            worst.origin.file,
            worst.origin.line,
            f"{len(rows)} collectives of every layer run over {_over(axes, known)}, which crosses the slow network "
            f"({known.machine.path(axes)}).",
            sum(row.total_sent_bytes for row in rows),
            known.seconds(rows),
            "Let that axis split the batch alone, with parameters whole along it or gather='step': then one sum of "
            "the gradients a step crosses it.",
        )


def _dims_of_one(dims: Sequence[str], parameters: Sequence[Sequence[str]]) -> bool:
    """Whether a value has the dims of a parameter, or of its slice along one dim."""
    return any(set(dims) <= set(names) and len(dims) >= len(names) - 1 for names in parameters)


def _uneven(known: Known) -> Iterator[PlanWarning]:
    """Parameters of which no free dim is a multiple of an axis that splits others, by its longest dim."""
    parameters = [a for a in known.program.arguments if a.role == PARAMETER and a.names]
    whole_bytes = sum(_whole_bytes(a, known) for a in parameters)
    told: dict[tuple[str, int, str], list[Argument]] = defaultdict(list)
    for axis, size in known.program.sizes.items():
        splitting = {n for a in parameters for n, axes in zip(a.names, a.value.split, strict=False) if axis in axes}
        for a in parameters if splitting and size > 1 else ():
            if axis in axes_of(a.value) or _whole_bytes(a, known) < SHARE * whole_bytes:
                continue
            free = {n: length for n, length in _free_dims(a, known) if length > size and n not in splitting}
            if free and all(length % size for _, length in _free_dims(a, known)):
                name = max(free, key=lambda n: free[n])
                told[name, free[name], axis].append(a)
    for (name, length, axis), found in told.items():
        size = known.program.sizes[axis]
        origin = _first_use(found[0], known)
        held = sum(a.value.num_bytes for a in found) * (size - 1) // size
        yield PlanWarning(
            "uneven",
            origin.file if origin else "",
            origin.line if origin else 0,
            f"{name}={length} is no multiple of {axis}={size}, so {_named(found[0])}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + f" cannot be split there: {show_bytes(held)} more a device.",
            held,
            0.0 if known.machine is not None else None,
            f"Make {name} a multiple of {size}: {-(-length // size) * size}"
            + (
                f", or of {known.tile} for the matrix unit as well: {_round(length, size, known.tile)}."
                if length > known.tile > 1
                else "."
            ),
        )


def _free_dims(argument: Argument, known: Known) -> Iterator[tuple[str, int]]:
    """The dims of a tensor that nothing splits, and their sizes."""
    split = argument.value.split or ((),) * len(argument.names)
    sizes = zip(argument.names, _whole_shape(argument, known), split, strict=True)
    yield from ((name, size) for name, size, axes in sizes if not axes)


def _named(argument: Argument) -> str:
    """A tensor by its place among the arguments."""
    return f"argument {argument.path}" if argument.path.isdigit() else argument.path or "the argument"


def _round(length: int, size: int, tile: int) -> int:
    unit = math.lcm(tile, size)
    return -(-length // unit) * unit


def _whole_shape(argument: Argument, known: Known) -> tuple[int, ...]:
    value, sizes = argument.value, known.program.sizes
    split = value.split or ((),) * len(value.shape)
    return tuple(n * math.prod(sizes[a] for a in axes) for n, axes in zip(value.shape, split, strict=True))


def _whole_bytes(argument: Argument, known: Known) -> int:
    return math.prod(_whole_shape(argument, known)) * argument.value.dtype.itemsize


def _thin(known: Known) -> Iterator[PlanWarning]:
    """Products whose local sizes leave a part of the matrix unit idle, because a dim is split."""
    total = sum(flops_of(r.op)[1] * r.times for r in known.ran)
    groups: dict[Axes, list[Ran]] = defaultdict(list)
    for ran in (r for r in known.ran if _multiplies(r, known) and r.op.origin.direction == FORWARD):
        axes = _weight_axes(ran.op, known)
        short = _width(ran.op)
        if short < known.tile and short * math.prod(known.program.sizes[a] for a in axes) > short:
            groups[axes].append(ran)
    for axes, found in groups.items():
        if sum(flops_of(r.op)[1] * r.times for r in found) < SHARE * total:
            continue
        worst = max(found, key=lambda r: flops_of(r.op)[1] * r.times / _width(r.op))
        idle = 1 - _width(worst.op) / known.tile
        yield PlanWarning(
            "thin",
            worst.op.origin.file,
            worst.op.origin.line,
            f"Split over {_over(axes, known)}, a product is only {_width(worst.op)} wide on a device: {idle:.0%} of a "
            f"matrix unit of {known.tile} is idle{_elsewhere(worst.op.origin, [r.op.origin for r in found])}.",
            sum(v.num_bytes * r.times for r in found for v in r.op.outs),
            _product_seconds(found, known, idle),
            f"Split it over fewer devices, so that {known.tile} stay, and the batch over more.",
        )


def _width(op: Op) -> int:
    """The shorter side of the parameter in a product."""
    return min(product_sizes(op)[1:])


def _weight_axes(op: Op, known: Known) -> Axes:
    """The axes that split the parameter of a product."""
    weight = next(v for v in op.ins if v is not None and known.lineage.parameter(v) is not None)
    return known.splitting(weight)


def _attention(known: Known) -> Iterator[PlanWarning]:
    """Attention round a ring where another dim split instead were cheaper, or the reverse: by time on a machine that is
    known, or else by bytes."""
    total = _traffic(known)
    for each in contexts_of(known):
        here, there = (each.ring, each.moved) if each.around else (each.moved, each.ring)
        saved = here.sent_bytes - there.sent_bytes
        slower = None if here.seconds is None or there.seconds is None else here.seconds - there.seconds
        if (saved if slower is None else slower) <= 0 or here.sent_bytes < SHARE * total:
            continue
        ring, moved = (f"{show_bytes(way.sent_bytes)}{_unhidden(way.seconds)}" for way in (each.ring, each.moved))
        over, length = " x ".join(each.axes), each.of.over
        yield PlanWarning(
            "attention",
            each.origin.file,
            each.origin.line,
            f"Attention over {_over(each.axes, known)} sends {ring} a device round a ring, and {moved} with {each.dim} "
            f"split while it runs, not {length}. This is {'the ring' if each.around else 'the latter'}.",
            max(0, saved),
            slower,
            f"Split {each.dim} over {over} too, while attention runs: in the decoder's layout "
            f"{each.dim}:{_rule((*each.of.k.axes_of(each.dim), *each.axes))}. Each device then sees the whole length."
            if each.around
            else f"Leave {length} split over {over}: in the decoder's layout, attention is a ring where no rule gives "
            f"{each.dim} that axis.",
        )


def _unhidden(seconds: float | None) -> str:
    return "" if seconds is None else f" ({1e3 * seconds:.3g} ms that no product hides)"


def _rule(axes: Axes) -> str:
    return axes[0] if len(axes) == 1 else f"({','.join(axes)})"


def _memory(known: Known) -> Iterator[PlanWarning]:
    """More than the device has."""
    there = known.machine.hardware.memory_bytes if known.machine is not None else 0
    if known.machine is None or not there or known.peak_bytes <= there:
        return
    largest = sorted(known.program.arguments, key=lambda a: -a.value.num_bytes)[:3]
    listed = ", ".join(f"{_named(a)} ({show_bytes(a.value.num_bytes)})" for a in largest)
    yield PlanWarning(
        "memory",
        "",
        0,
        f"A device needs {show_bytes(known.peak_bytes)} and a {known.machine.hardware.title} has {show_bytes(there)}. "
        f"The largest arguments: {listed}.",
        known.peak_bytes - there,
        0.0,
        'Split more: params="data" keeps a share of parameters and optimizer state on each device; remat="nothing" '
        "saves no activations; more devices, or a smaller batch.",
    )


def _bubble(known: Known) -> Iterator[PlanWarning]:
    """Pipelines that take long to fill and to empty, for what goes through them."""
    for pipeline in known.pipelines:
        p, v, m = pipeline.num_devices, pipeline.num_runs, pipeline.num_microbatches
        if pipeline.ticks_bubble <= BUBBLE:
            continue
        more, dealt = m if v == 1 else -(-m // p) * p, v  # several stages want a multiple of the devices
        while _waits(p, v, more) > FINE_BUBBLE:
            more *= 2
        while _waits(p, dealt, m) > FINE_BUBBLE:
            dealt *= 2
        other = (
            f"; virtual_stages={dealt} leaves {_waits(p, dealt, m):.0%}, where the layers are a multiple of {p * dealt}"
        )
        seconds = pipeline.seconds
        timed = f" Of the time it is {pipeline.bubble:.0%}." if seconds else ""
        yield PlanWarning(
            "bubble",
            "",
            0,
            f"{m} microbatches are few for {p * v} stages on {p} devices: for {pipeline.ticks_bubble:.0%} of the ticks "
            f"a device waits{_formula(p, v, m)}.{timed}",
            0,
            pipeline.ticks_bubble * seconds if seconds else None,
            f"microbatches={more} leaves {_waits(p, v, more):.0%}{'' if m % p else other}.",
        )


def _formula(p: int, v: int, m: int) -> str:
    """How the part of the ticks comes about in which a device of a pipeline waits."""
    if v > 1 and m % p:
        return f": {p} devices do not divide {m} microbatches, which leaves holes"
    return f", (P - 1) / (v m + P - 1) = {p - 1} / {v * m + p - 1}"


def _waits(num_devices: int, num_runs: int, num_microbatches: int) -> float:
    """The part of the ticks in which a device of a pipeline waits; with several stages, where the devices divide the
    microbatches."""
    return (num_devices - 1) / (num_runs * num_microbatches + num_devices - 1)


_CHECKS: tuple[Callable[[Known], Iterator[PlanWarning]], ...] = (
    _unknown, _memory, _duplicated, _gathered, _summed, _replicated, _small_batch, _slow_network, _uneven, _thin,
    _attention, _bubble,
)  # fmt: skip
