"""Report: a plan as a page in the terminal.

From the top: what runs where, how long it takes and why, what is sent over each axis, what a device holds, the lines
of source that cost the most, and the warnings. One colour stands for one thing on the whole page: each axis has its
own, arithmetic and memory have theirs.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..devices import counted, show_sizes
from ..explain import UNKNOWN, WIDTH, show_bytes
from .pipeline import Pipeline
from .summary import AT_LEAST, AT_MOST, Line, Summary
from .time import BUBBLE, COMPUTE, HBM
from .warnings import PlanWarning

NUM_LINES = 8
BAR = 40
"""The length of a whole bar, in characters: beside it the figures have room in a terminal of 80."""


class Mark(NamedTuple):
    """How a thing is drawn wherever it stands on the page."""

    glyph: str
    """Without colours."""
    style: str


_UNITS = {COMPUTE: Mark("█", "color(71)"), HBM: Mark("▒", "color(67)"), BUBBLE: Mark("░", "color(245)")}
_AXES = tuple(map(Mark, "▞#=+x", ("color(172)", "color(133)", "color(37)", "color(167)", "color(143)")))
_KINDS = tuple(
    map(
        Mark,
        "█▓▒▞#=+x",
        ("color(67)", "color(103)", "color(172)", "color(133)", "color(71)", "color(37)", "color(143)", "color(167)"),
    )
)
_EMPTY = Mark("·", "color(240)")
_SEVERE = frozenset({"unknown", "memory", "duplicated", "slow_network", "gathered"})


def page(summary: Summary, plain: bool = False) -> RenderableType:
    """The whole page; ``plain`` tells the parts of bars apart by characters, not by colours."""
    styles = _marks(summary, plain)
    parts: list[RenderableType] = [_heading(summary), Text("")]
    parts += [*_time(summary, styles), Text(""), *_memory(summary, plain), Text("")]
    for pipeline in summary.pipelines:
        parts += [*_pipeline(pipeline), Text("")]
    if summary.traffic:
        parts += [_traffic(summary, styles), *_legend(summary), Text("")]
    parts += [_lines(summary, styles), Text("")]
    parts += _warnings(summary.warnings)
    if summary.unverified:
        parts += [Text(f"\n{summary.machine}: assumed or not checked: {', '.join(summary.unverified)}.", "dim")]
    return Group(*parts)


def as_text(renderable: RenderableType) -> str:
    """What is printed where colours are not known."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def show_seconds(seconds: float | None) -> str:
    """``1.25 ms``, ``830 µs``; ``N/A`` for None."""
    if seconds is None:
        return UNKNOWN
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            number = seconds / size
            return f"{number:.{0 if number >= 100 or number == 0 else 1 if number >= 10 else 2}f} {unit}"
    raise AssertionError(seconds)


def show_flops(num: float) -> str:
    """``1.25 TFLOP``."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if num >= size:
            number = num / size
            return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}FLOP"
    return f"{num:.0f} FLOP"


def _marks(summary: Summary, plain: bool) -> dict[str, Mark]:
    axes = [*summary.mesh, *(t.axes for t in summary.traffic if t.axes not in summary.mesh)]
    marks = {**_UNITS, **{axis: _AXES[i % len(_AXES)] for i, axis in enumerate(dict.fromkeys(axes))}}
    return marks if plain else _coloured(marks)


def _coloured(marks: Mapping[str, Mark]) -> dict[str, Mark]:
    return {name: Mark("█", mark.style) for name, mark in marks.items()}


def _heading(summary: Summary) -> Text:
    num = 1
    for size in summary.mesh.values():
        num *= size
    on = f" {summary.machine}" if summary.machine else ""
    where = f"{counted(num, 'device')}{': ' + show_sizes(summary.mesh) if summary.mesh else ''}"
    return Text.assemble(
        (f"Plan of {summary.name}", "bold"), f" on{on + ',' if on else ''} {where}", ("   one device, one call", "dim")
    )


def _time(summary: Summary, styles: Mapping[str, Mark]) -> Iterator[RenderableType]:
    """The time as one bar, and the figures under it."""
    work = summary.flops
    notes = [_bounded(summary.bound, show_flops(work["total"]))]
    notes += [
        f"{work[kind] / max(1, work['total']):.0%} {kind}"
        for kind in ("recomputed", "duplicated")
        if work[kind] > work["total"] / 200
    ]
    if summary.seconds is None:
        yield Text.assemble(("time    ", "bold"), f"{UNKNOWN}: .on('v5p') or another machine tells it", ("", ""))
        yield Text.assemble(("work    ", "bold"), ", ".join(notes))
        return
    parts = summary.parts_seconds
    yield Text.assemble(
        ("time    ", "bold"),
        _bar(parts, sum(parts.values()), styles),
        f"  {_bounded(summary.bound, show_seconds(summary.seconds))}",
    )
    yield _key({name: show_seconds(s) for name, s in parts.items() if s > 0}, styles)
    hidden = sum(summary.axis_seconds.values()) - sum(summary.axis_exposed_seconds.values())
    rates = ", ".join(
        f"{name} {UNKNOWN if rate is None else format(rate, '.0%')}"
        for name, rate in (("MFU", summary.mfu), ("HFU", summary.hfu))
    )
    hides = f"; computation hides {show_seconds(hidden)} of communication" if hidden > 0 else ""
    yield Text.assemble(("work    ", "bold"), ", ".join(notes), f"; {rates}{hides}")


def _bar(parts: Mapping[str, float], whole: float, styles: Mapping[str, Mark]) -> Text:
    """Parts of a whole, side by side; every part of a hundredth is seen."""
    bar, drawn = Text(), 0
    for name, size in parts.items():
        length = round(BAR * size / whole) if whole else 0
        length = min(max(length, int(size > whole / 100)), BAR - drawn)
        bar.append(styles[name].glyph * length, styles[name].style)
        drawn += length
    bar.append(_EMPTY.glyph * (BAR - drawn), _EMPTY.style)
    return bar


def _key(shown: Mapping[str, str], styles: Mapping[str, Mark]) -> RenderableType:
    """What the parts of a bar are; a part and its figure stay on one line."""
    parts = [
        Text.assemble((f"{styles[name].glyph} ", styles[name].style), f"{name} {text}") for name, text in shown.items()
    ]
    return Padding(Columns(parts, padding=(0, 3)), (0, 0, 0, 8))


def _memory(summary: Summary, plain: bool) -> Iterator[RenderableType]:
    there = summary.available_bytes
    whole = max(summary.peak_bytes, there or 0)
    parts = {kind: size for kind, size in summary.held_bytes.items() if size}
    styles = {kind: _KINDS[i % len(_KINDS)] for i, kind in enumerate(parts)}
    styles = styles if plain else _coloured(styles)
    of = f" of {show_bytes(there)}" if there else ""
    full = bool(there) and summary.peak_bytes > (there or 0)
    yield Text.assemble(
        ("memory  ", "bold"),
        _bar({k: float(v) for k, v in parts.items()}, float(whole), styles),
        (f"  {_bounded(summary.held_bound, show_bytes(summary.peak_bytes))}{of}", "bold red" if full else ""),
    )
    yield _key({kind: show_bytes(size) for kind, size in parts.items()}, styles)


def _bounded(bound: str, figure: str) -> str:
    """``at least 1.25 ms``."""
    return f"{bound} {figure}" if bound and figure != UNKNOWN else figure


def _legend(summary: Summary) -> Iterator[Text]:
    """What the ``+`` of the traffic's runs says."""
    if any(not t.sure for t in summary.traffic):
        once, one = "in a loop of unknown length: at least", "in a branch, of which one runs: at most"
        yield Text(
            f"+ {once if summary.bound == AT_LEAST else one if summary.bound == AT_MOST else f'{once}; {one}'}", "dim"
        )


def _pipeline(pipeline: Pipeline) -> Iterator[RenderableType]:
    """The order of a pipeline, how much of it is a bubble, and each device along it."""
    runs = f" x {pipeline.num_runs} runs" if pipeline.num_runs > 1 else ""
    how = f"{pipeline.schedule}, microbatches={pipeline.num_microbatches}, {counted(pipeline.num_devices, 'device')}"
    how += f"{runs}, {pipeline.num_ticks} ticks"
    bubble = f"bubble {pipeline.ticks_bubble:.0%} of the ticks"
    if pipeline.bubble is not None:
        bubble += f", {pipeline.bubble:.0%} of {show_seconds(pipeline.seconds)}"
    yield Text.assemble(("pipe    ", "bold"), f"{how}; {bubble}")
    table = new_table("device", "stages", "passes", "busy", "work", "in work", "kept", "memory", left=(1,))
    table.collapse_padding = True  # the widest of all tables: at 80 columns each figure is whole
    for d, device in enumerate(pipeline.devices):
        table.add_row(
            str(d),
            show_stages(device.stages),
            f"{device.forward} F {device.backward} B" if device.backward else f"{device.forward} F",
            show_seconds(device.busy_seconds),
            show_flops(device.flops),
            str(device.in_work),
            f"{device.kept}: {show_bytes(device.kept_bytes)}" if device.kept else "0",
            show_bytes(device.memory_bytes),
        )
    yield table
    yield Text("in work: microbatches with a pass backward to come; kept: inputs of stages, part of the memory", "dim")


def show_stages(stages: Sequence[int]) -> str:
    """``0, 4``: of many the first, the second and the last."""
    listed = [str(stage) for stage in stages]
    return ", ".join(listed if len(listed) <= 4 else [*listed[:2], "…", listed[-1]])


def new_table(*columns: str, left: Iterable[int] = (0,)) -> Table:
    """A table whose columns ``left`` hold words, and the others figures, which are not wrapped."""
    table = Table(show_edge=False, pad_edge=False, box=SIMPLE_HEAD, header_style="dim")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i in left else "right", no_wrap=True)
    return table


def _traffic(summary: Summary, styles: Mapping[str, Mark]) -> Table:
    table = new_table("axis", "crosses", "collective", "runs", "payload", "sent", "busy", left=(0, 1, 2))
    table.columns[1].no_wrap = False
    last = ""
    for t in sorted(summary.traffic, key=lambda t: (_order(t.axes, summary), -(t.seconds or 0.0), -t.sent_bytes)):
        first = t.axes != last
        last = t.axes
        crosses = summary.paths.get(t.axes, "") if first else ""
        table.add_row(
            Text(t.axes if first else "", styles[t.axes].style),
            Text(crosses, "dim"),
            t.kind,
            f"{t.runs}{'' if t.sure else '+'}",
            show_bytes(t.payload_bytes),
            show_bytes(t.sent_bytes),
            show_seconds(t.seconds),
        )
    return table


def _order(axes: str, summary: Summary) -> tuple[float, int]:
    same = [t for t in summary.traffic if t.axes == axes]
    return -sum(t.seconds or 0.0 for t in same), -sum(t.sent_bytes for t in same)


def _lines(summary: Summary, styles: Mapping[str, Mark]) -> Table:
    """The lines that cost the most, with their code."""
    timed = summary.seconds is not None
    cost = "time" if timed else "work"
    table = new_table("line", "", cost, "sent", "code", left=(0, 1, 4))
    table.columns[4].no_wrap = False
    table.columns[4].overflow = "ellipsis"
    shown = summary.lines[:NUM_LINES]
    most = max((line.total_seconds for line in shown), default=0.0) or 1.0
    flops = max((line.flops for line in shown), default=0) or 1
    for line in shown:
        bar = (
            _small_bar(line, most, styles)
            if timed
            else Text("█" * round(12 * line.flops / flops), styles[COMPUTE].style)
        )
        figure = show_seconds(line.total_seconds) if timed else show_flops(line.flops)
        sent = show_bytes(line.sent_bytes) if line.sent_bytes else ""
        code = Text(line.code, no_wrap=True, overflow="ellipsis")
        table.add_row(Text(line.place, "bold"), bar, figure, sent, code)
    if len(summary.lines) > NUM_LINES:
        rest = summary.lines[NUM_LINES:]
        figure = show_seconds(sum(x.total_seconds for x in rest)) if timed else show_flops(sum(x.flops for x in rest))
        sent = show_bytes(sum(x.sent_bytes for x in rest))
        table.add_row(Text(f"{len(rest)} more", "dim"), "", Text(figure, "dim"), Text(sent, "dim"), "")
    return table


def _small_bar(line: Line, most: float, styles: Mapping[str, Mark]) -> Text:
    bar, whole = Text(), round(12 * line.total_seconds / most)
    parts = sorted((line.seconds or {}).items(), key=lambda part: -part[1])
    for name, seconds in parts:
        length = min(round(12 * seconds / most), whole - len(bar))
        bar.append(styles[name].glyph * length, styles[name].style)
    return bar


def _warnings(warnings: Sequence[PlanWarning]) -> Iterator[RenderableType]:
    if not warnings:
        yield Text("No warnings.", "green")
        return
    yield Text(counted(len(warnings), "warning"), "bold")
    for warning in warnings:
        style = "red" if warning.kind in _SEVERE else "yellow"
        size = UNKNOWN if warning.num_bytes is None else show_bytes(warning.num_bytes)
        cost = size + (f", {show_seconds(warning.seconds)}" if warning.seconds else "")
        where = f"{warning.place}  " if warning.place else ""
        head = Text.assemble(("▲ ", style), (where, "bold"), (warning.kind.replace("_", " "), style), f"  {cost}")
        yield head
        yield Padding(Text(warning.message), (0, 0, 0, 2))
        yield Padding(Text(f"→ {warning.remedy}", "dim"), (0, 0, 0, 2))


def comparison(sides: Sequence[tuple[str, Summary]]) -> Table:
    """Plans side by side: of each figure the best in bold; with two, the ratio of the second to the first. A bound is
    neither the best nor a part of a ratio."""
    table = new_table("", *(name for name, _ in sides), *(["ratio"] if len(sides) == 2 else []))
    summaries = [summary for _, summary in sides]
    for label, values, show, most, bounds in _figures(summaries):
        known = [v for v in values if v is not None]
        if not any(known):
            continue
        best, differ = (max if most else min)(known), len(set(known)) > 1 and not any(bounds)
        shown = [_bounded(b, show(v)) if v is not None else UNKNOWN for v, b in zip(values, bounds, strict=True)]
        cells = [Text(text, "bold" * (differ and v == best)) for text, v in zip(shown, values, strict=True)]
        table.add_row(Text(label, "dim" * label.startswith(" ")), *cells, "" if any(bounds) else _ratio(values))
    return table


def _ratio(values: Sequence[float | None]) -> str:
    first, last = values[0], values[-1]
    if len(values) != 2 or not first or last is None:
        return ""
    ratio = last / first
    return f"{ratio:.2f}" if 0.005 <= ratio < 100 else ""


Figure = tuple[str, list[float | None], Callable[[float], str], bool, list[str]]
"""What it is, its values, how one is shown, whether the most is the best, and how each is to be read."""


def _figures(sides: Sequence[Summary]) -> Iterator[Figure]:
    run, held, exact = [s.bound for s in sides], [s.held_bound for s in sides], [""] * len(sides)
    yield "time", [s.seconds for s in sides], show_seconds, False, run
    yield "  compute", [s.compute_seconds for s in sides], show_seconds, False, run
    yield "  HBM", [s.hbm_seconds for s in sides], show_seconds, False, run
    yield "  communication alone", [s.exposed_seconds for s in sides], show_seconds, False, run
    yield "  bubble", [s.bubble_seconds for s in sides], show_seconds, False, run
    yield "MFU", [s.mfu for s in sides], _percent, True, exact
    yield "HFU", [s.hfu for s in sides], _percent, True, exact
    yield "work", [s.flops["total"] for s in sides], show_flops, False, run
    for kind in ("recomputed", "duplicated"):
        yield f"  {kind}", [s.flops[kind] for s in sides], show_flops, False, run
    yield "memory", [s.peak_bytes for s in sides], _bytes, False, held
    for kind in dict.fromkeys(kind for s in sides for kind in s.held_bytes):
        yield f"  {kind}", [s.held_bytes.get(kind, 0) for s in sides], _bytes, False, held
    yield "sent", [s.sent_bytes for s in sides], _bytes, False, run
    for axes in dict.fromkeys(t.axes for s in sides for t in s.traffic):
        sent = [sum(t.sent_bytes for t in s.traffic if t.axes == axes) for s in sides]
        yield f"  over {axes}", [float(n) for n in sent], _bytes, False, run
    yield "warnings", [len(s.warnings) for s in sides], lambda n: f"{n:.0f}", False, exact


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _bytes(num: float) -> str:
    return show_bytes(int(num))
