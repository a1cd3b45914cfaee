"""Layout: rules from the names of dims to axes of the mesh.

    >>> layout = Layout("batch:data, heads:model", params="embed:data")
    >>> layout.rules
    {'batch': ('data',), 'heads': ('model',)}

A layout has two kinds of rules. *Compute rules* say how tensors are split while they are used: every dim of that name
is split over those axes, in every tensor. Rules *at rest* say over which further axes parameters, and the optimizer's
state, are split between uses; they are written in one of two ways:

``params="embed:data"``   the dims called ``embed`` are split over ``data``; an axis that does not divide is an error.
``params="data"``         each parameter is split over ``data`` along the dim that suits it: of the dims that the axes
                          divide, the one with the most left on a device; never the first, which is often a stack of
                          layers, where another does; of equals the last. Where none does, it stays whole.

In both an axis over which a tensor is already split by a compute rule is not used on that tensor again. A layout knows
nothing of devices; ``check`` and ``scope`` hold it against a mesh, ``explain`` shows what it does to a tree of tensors.
"""

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Never

import jax.numpy as jnp

from .collectives import TIME
from .dims import Dims, show
from .errors import fail, fail_type, nearest
from .explain import Explanation, explain
from .inherit import LIKE, Inherited, inherited_text, read_inherited, resolved, with_bases
from .mesh import Mesh
from .notation import Notation, check_known
from .scope import Axes, Scope, Split, Stages
from .summing import Summing
from .tensor import ACTIVATION, PARAMETER, Role

OPTIMIZER = "optimizer"
ROLES = (ACTIVATION, PARAMETER, OPTIMIZER)
GATHERS = ("use", "step")
SCHEDULES = ("1f1b", "gpipe")
OPTIONS = (
    "params", "optimizer", "gather", "strict", "sums", "overlap", "like", "microbatches", "pipeline", "schedule",
    "virtual_stages",
)  # fmt: skip

Pairs = tuple[tuple[str, Axes], ...]
RulesLike = str | Mapping[str, Any] | Iterable[tuple[str, Any]] | None

_LIKE = dict(read_inherited(LIKE))
_OVERLAP = Notation("Layout: overlap=", "axis", 'an axis or several, "model" or "(model,pod)"', ":", "model")
_NOTATION = Notation("Layout", "dim", "dim:axis or dim:(axis,axis)", ":", "batch:(pod,data), heads:model")


@dataclass(frozen=True)
class AtRest:
    """Rules for what a tensor is split over between uses: for dims by name, or axes for whichever dim suits."""

    pairs: Pairs = ()
    axes: Axes = ()

    @classmethod
    def read(cls, given: Any, option: str) -> "AtRest":
        """From ``"embed:data"``, ``{"embed": "data"}`` and pairs, or from ``"data"``, ``"(pod,data)"`` and names."""
        if isinstance(given, AtRest):
            return given
        form = 'dim:axis, or axes alone ("data" or "(pod,data)")'
        notation = Notation(f"Layout: {option}=", "dim", form, ":", "embed:data")
        if not given:
            return cls()
        names = isinstance(given, tuple | list) and all(isinstance(item, str) for item in given)
        if names or (isinstance(given, str) and ":" not in given):
            if isinstance(given, str) and len(notation.parts(given)) > 1:
                raise fail(f'{notation.asked}: {given!r}: write several axes for one dim as "({given})".')
            return cls(axes=notation.names(given, "axis", given))
        return cls(pairs=_read(notation, given))

    def split(self, scope: Scope, these: Dims, compute: Split, asked: str) -> Split:
        """The axes of each dim beyond ``compute``, its compute rules'; the module's text has the rules."""
        used = {axis for axes in compute for axis in axes}
        if self.axes:
            return self._along_best(scope, these, compute, tuple(a for a in self.axes if a not in used))
        found: dict[str, Axes] = {}
        sizes = {d.name: d.size for d in these}
        for name, axes in self.pairs:
            if name in sizes:
                found[name] = tuple(a for a in axes if a not in used and scope.size((a,)) > 1)
                used.update(found[name])
        rest = tuple(found.get(d.name, ()) for d in these)
        for i, (d, axes) in enumerate(zip(these, rest, strict=True)):
            if d.size % scope.size(compute[i] + axes):
                raise fail(self._indivisible(scope, these, i, compute[i], axes, asked))
        return rest

    def inherited(self, names: Iterable[str], like: Mapping[str, Inherited]) -> "AtRest":
        """The same, with rules for those of these names that inherit one."""
        rules = dict(self.pairs)
        more = ((name, resolved(name, rules, like)) for name in names if name in like and name not in rules)
        return replace(self, pairs=(*self.pairs, *((name, axes) for name, axes in more if axes)))

    @staticmethod
    def _along_best(scope: Scope, these: Dims, compute: Split, axes: Axes) -> Split:
        axes = tuple(a for a in axes if scope.size((a,)) > 1)
        local = scope.local_sizes(these, compute)
        fits = [i for i, size in enumerate(local) if axes and size and size % scope.size(axes) == 0]
        best = max(fits, key=lambda i: (i > 0, local[i], i), default=None)
        return tuple(axes if i == best else () for i in range(len(these)))

    def _indivisible(self, scope: Scope, these: Dims, i: int, compute: Axes, axes: Axes, asked: str) -> str:
        d, num = these[i], scope.size(compute + axes)
        over = " x ".join(f"{a!r} (size {scope.size((a,))})" for a in axes)
        already = f", split over {_join(compute)} in use," if compute else ""
        below, above = d.size // num * num, (d.size // num + 1) * num
        good = f"{below} or {above}" if below else f"{above}"
        return (
            f"{asked}: the dim {d.name!r} of size {d.size}{already} cannot be split at rest over {over}: "
            f"{d.size} is not a multiple of {num}.\n"
            f"  tensor: ({show(these)})\n"
            f"  layout: {scope.text}\n"
            f"  Make {d.name!r} a multiple of {num} ({good}), or name the axes alone, params={_axes_text(axes)!r}: "
            f"then each parameter is split along a dim that they divide. Nothing is padded silently."
        )

    @property
    def known_axes(self) -> Axes:
        return (*self.axes, *(axis for _, axes in self.pairs for axis in axes))

    def __str__(self) -> str:
        return _axes_text(self.axes) if self.axes else _rules_text(self.pairs)


@dataclass(frozen=True, init=False, repr=False)
class Layout:
    """Which dims are split over which axes. Immutable; equal when the rules and options are.

    Args:
        rules: compute rules: ``"batch:data, heads:model"`` (``;`` separates too), ``"batch:(pod,data)"`` for several
            axes (the first the slowest), a dict ``{"batch": "data", "embed": ("a", "b")}``, or pairs.
        params: rules at rest for parameters: for dims, ``"embed:data"``, or axes alone, ``"data"`` or ``"(pod,data)"``.
        optimizer: rules at rest for the optimizer's state, in the same forms; None: as for parameters.
        gather: when a parameter at rest is gathered: ``"use"``, at each use, again in the backward pass, or ``"step"``,
            once where it enters a region.
        strict: whether a rule whose dim a region never meets is an error; otherwise a warning.
        sums: the floating dtype in which sums across devices are taken ("float32"), and those over microbatches if it
            is wider than theirs; None: the dtype of the operand.
        overlap: an axis, or several ("(model,pod)"), over which a gather that feeds a product, or the sum of one that
            ends split, goes on beside it: the product is made slice by slice, while the next one is on its way
            (``ops/overlap.py``). Without effect under ``partitioner="xla"``.
        like: names that lie as another does where ``rules`` do not speak of them: ``"memory_length:length"``, or
            ``"memory_length:length-heads"`` for the axes of ``length`` less those of ``heads``. Added to those of this
            package's models (``inherit.LIKE``).
        microbatches: in how many parts a batch is worked on, one after the other: a number, for the dim ``batch``, or
            ``"examples:8"`` for another. Gradients are added up at rest; with ``pipeline`` split, the parts fill it.
        pipeline: the dim whose scan is a pipeline where the layout splits it and there are microbatches.
        schedule: the order of a pipeline's forward and backward passes: ``"1f1b"`` takes a microbatch's backward pass
            as soon as it can, ``"gpipe"`` after all forward passes.
        virtual_stages: how many separate runs of layers each device of a pipeline has.

    Raises:
        TypeError: an unknown option, or a value of the wrong type.
        ValueError: a rule cannot be read, a dim has two rules, an axis stands twice in a rule, or an option's value is
            unknown; the message shows the right form.
    """

    pairs: Pairs
    params: AtRest
    optimizer: AtRest
    gather: str
    strict: bool
    sums: str | None
    overlap: Axes
    like: tuple[tuple[str, Inherited], ...]
    microbatches: tuple[str, int] | None
    pipeline: str
    schedule: str
    virtual_stages: int

    def __init__(
        self,
        rules: RulesLike = "",
        *,
        params: Any = None,
        optimizer: Any = None,
        gather: str = "use",
        strict: bool = False,
        sums: Any = None,
        overlap: Any = None,
        like: Any = (),
        microbatches: Any = None,
        pipeline: str = "layers",
        schedule: str = "1f1b",
        virtual_stages: int = 1,
        **unknown: Never,
    ) -> None:
        for option in unknown:
            raise fail_type(f"Layout: there is no option {option!r}.{nearest(option, OPTIONS)}")
        if gather not in GATHERS:
            raise fail(f"Layout: gather={gather!r} is unknown.{nearest(str(gather), GATHERS)}")
        if schedule not in SCHEDULES:
            raise fail(f"Layout: schedule={schedule!r} is unknown.{nearest(str(schedule), SCHEDULES)}")
        if not isinstance(strict, bool):
            raise fail_type(f"Layout: strict={strict!r}: it must be True or False.")
        at_rest = AtRest.read(params, "params")
        values = {
            "pairs": _read(_NOTATION, rules if rules is not None else ()),
            "params": at_rest,
            "optimizer": at_rest if optimizer is None else AtRest.read(optimizer, "optimizer"),
            "gather": gather,
            "strict": strict,
            "sums": _floating(sums) if sums is not None else None,
            "overlap": _OVERLAP.names(overlap or None, "axis", overlap),
            "like": read_inherited(like, _LIKE),
            "microbatches": _microbatches(microbatches),
            "pipeline": pipeline,
            "schedule": schedule,
            "virtual_stages": _count(virtual_stages, "virtual_stages"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def replace(self, **options: Any) -> "Layout":
        """The same layout with other options: ``layout.replace(params="data")``; ``rules`` too."""
        kept = {"rules": self.pairs, **{name: getattr(self, name) for name in OPTIONS}}
        if "params" in options and self.optimizer == self.params:
            kept["optimizer"] = None
        return Layout(**{**kept, **options})

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.pairs, *(getattr(self, name) for name in OPTIONS)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def rules(self) -> dict[str, Axes]:
        """The compute rules: the axes of each dim."""
        return dict(self.pairs)

    @property
    def text(self) -> str:
        """The layout as it is written: the rules, then the options that are set."""
        rules = _rules_text(self.pairs)
        options = self._options()
        return f'"{rules}", {options}' if options else rules

    def _options(self) -> str:
        written = {
            "params": f'"{self.params}"' if self.params != AtRest() else "",
            "optimizer": f'"{self.optimizer}"' if self.optimizer != self.params else "",
            "gather": f'"{self.gather}"' if self.gather != "use" else "",
            "strict": "True" if self.strict else "",
            "sums": f'"{self.sums}"' if self.sums else "",
            "overlap": f'"{_axes_text(self.overlap)}"' if self.overlap else "",
            "like": f'"{inherited_text(self.like)}"' if self.like else "",
            "microbatches": _microbatches_text(self.microbatches) if self.microbatches else "",
            "pipeline": f'"{self.pipeline}"' if self.pipeline != "layers" else "",
            "schedule": f'"{self.schedule}"' if self.schedule != "1f1b" else "",
            "virtual_stages": str(self.virtual_stages) if self.virtual_stages != 1 else "",
        }
        return ", ".join(f"{name}={value}" for name, value in written.items() if value)

    @property
    def inherited(self) -> dict[str, Inherited]:
        """What names inherit where no rule speaks of them: what holds for this package's models, and ``like=``."""
        return {**_LIKE, **dict(self.like)}

    def for_dims(self, names: Collection[str]) -> "Layout":
        """The same, less the compute rules that say nothing of these names."""
        kept = with_bases(names, self.rules, self.inherited)
        kept |= {other for name in kept if name in self.inherited for other in self.inherited[name].less}
        return self.replace(rules=[(name, axes) for name, axes in self.pairs if name in kept])

    def names(self) -> tuple[str, ...]:
        """Every dim name that a rule of this layout speaks of."""
        every = (*self.pairs, *self.params.pairs, *self.optimizer.pairs)
        return tuple(dict.fromkeys(name for name, _ in every))

    def unused(self, met: Collection[str]) -> list[str]:
        """What of this layout is of no use to a region that met dims of these names: a mistake more often than not."""
        sets = map(dict, (self.pairs, self.params.pairs, self.optimizer.pairs))
        used = {*met, *(name for rules in sets for name in with_bases(met, rules, self.inherited) if name in rules)}
        inherited = dict(self.like)
        asked = [(f"the rule for {name!r}", name) for name in self.names()]
        asked += [(f"like= for {name!r}", name) for name in inherited]
        asked += [(f"microbatches= over {self.microbatches[0]!r}", self.microbatches[0])] if self.microbatches else []
        found = [
            f"{what} was not used: the region met no dim of that name.{nearest(name, sorted(met))}"
            for what, name in asked
            if name not in used
        ]
        known = {*met, *self.rules, *_LIKE, *inherited}
        for name, entry in inherited.items():
            found += [
                f"like= for {name!r} speaks of {other!r}, which has no rule, and the region met no dim of that name."
                f"{nearest(other, sorted(known))}"
                for other in (entry.base, *entry.less)
                if other not in known
            ]
        options = [n for n in ("pipeline", "schedule", "virtual_stages") if getattr(self, n) != getattr(Layout(), n)]
        if options and (self.microbatches is None or self.pipeline not in self.rules):
            found.append(
                f"{'=, '.join(options)}= was not used: a pipeline is made of microbatches= and a rule for "
                f"{self.pipeline!r}."
            )
        return found

    @property
    def known_axes(self) -> Axes:
        """Every axis that a rule of this layout speaks of."""
        compute = (axis for _, axes in self.pairs for axis in axes)
        return tuple(dict.fromkeys((*compute, *self.params.known_axes, *self.optimizer.known_axes)))

    def splits(self, in_time: bool = False) -> Pairs:
        """The compute rules, and the axes of every name that inherits some.

        Args:
            in_time: whether the dim of the microbatches is split over the axis of time too.
        """
        rules, inherited = self.rules, self.inherited
        if in_time and self.microbatches:
            name, _ = self.microbatches
            rules[name] = (*rules.get(name, ()), TIME)
        names = [*rules, *(name for name in inherited if name not in rules)]
        return tuple((name, resolved(name, rules, inherited)) for name in names)

    def check(self, mesh: Mesh) -> None:
        """Hold the layout against a mesh.

        Raises:
            ValueError: a rule or an option names an axis that the mesh lacks; the message proposes the nearest.
        """
        rules = [(f"the rule '{_rules_text((pair,))}'", pair[1]) for pair in self.pairs]
        rules += [("params='" + str(self.params) + "'", self.params.known_axes)]
        rules += [("optimizer='" + str(self.optimizer) + "'", self.optimizer.known_axes)]
        rules += [(f"overlap={_axes_text(self.overlap)!r}", self.overlap)] if self.overlap else []
        for rule, axes in rules:
            message = f"Layout: {rule} names the axis {{}}, which the mesh ({mesh.text}) lacks."
            check_known(axes, mesh.axes, message)

    def scope(self, mesh: Mesh, partitioner: str = "names", in_time: bool = False) -> Scope:
        """What the operations of a region see of this layout on ``mesh``; axes of size 1, which split nothing, are not
        among it. ``in_time``: what they see while one microbatch is worked on.

        Raises:
            ValueError: as ``check``.
        """
        return _scope(self, mesh, partitioner, in_time)

    def stages(self, mesh: Mesh) -> Stages | None:
        """The pipeline that this layout asks for on ``mesh``, or None.

        Raises:
            ValueError: another rule uses the axes of the pipeline.
        """
        axes = tuple(a for a in self.rules.get(self.pipeline, ()) if mesh.axes[a] > 1)
        if self.microbatches is None or not axes:
            return None
        rules = [*((name, found) for name, found in self.splits() if name != self.pipeline)]
        rules += [("params", self.params.known_axes)]
        for name, found in rules:
            if both := set(axes).intersection(found):
                raise fail(
                    f"Layout: the axis {min(both)!r} is that of the pipeline ({self.pipeline}:{_axes_text(axes)}), "
                    f"whose devices each work at another stage; the rule for {name!r} would have them work together.\n"
                    f"  layout: {self.text}\n  Give {name!r} another axis."
                )
        return Stages(self.pipeline, axes, self.virtual_stages)

    def at_rest(self, scope: Scope, these: Dims, role: Role, asked: str = "at rest") -> Split:
        """Over which axes each dim of a tensor is split at rest, beyond its compute rule.

        Raises:
            ValueError: the role is unknown, or a rule's axes do not divide the dim's size.
        """
        return _at_rest(self, scope, these, role, asked)

    def explain(self, tree: Any, mesh: Mesh | str, role: Role | None = None) -> Explanation:
        """What this layout does to a tree on ``mesh``: for each tensor its dims with their axes, the bytes of the whole
        and those on each device, the number of copies, pictures of the tiles, and which rules at rest split nothing.
        Prints itself.

        Args:
            tree: a pytree of tensors and arrays, or of their shapes (``jax.eval_shape``).
            mesh: the mesh, or its text.
            role: the role whose rules hold for every tensor, "optimizer" for the optimizer's state; None: each its own.

        Raises:
            ValueError: a tensor cannot be split as the layout says.
        """
        mesh = mesh if isinstance(mesh, Mesh) else Mesh(mesh)
        scope = self.scope(mesh)

        def place(these: Dims, own: Role, asked: str) -> tuple[Split, Split]:
            return scope.split(these, asked), self.at_rest(scope, these, role or own, asked)

        rules = {PARAMETER: self.params, OPTIMIZER: self.optimizer}
        named = {which: self._lying_by(rest) for which, rest in rules.items()}
        return explain(tree, mesh, place, repr(self), role, named)

    def _lying_by(self, rest: AtRest) -> dict[str, set[str]]:
        """For each name that a rule at rest speaks of, those that lie by it."""
        rules, like = dict(rest.pairs), self.inherited
        return {name: {n for n in (name, *like) if name in with_bases([n], rules, like)} for name in rules}

    def __repr__(self) -> str:
        options = self._options()
        return f'Layout("{_rules_text(self.pairs)}"' + (f", {options})" if options else ")")

    def __str__(self) -> str:
        lines = [(name, f"over {_join(axes)}" if axes else "not split") for name, axes in self.pairs]
        lines = lines or [("compute", "nothing is split")]
        lines.append(("params", _rest_text(self.params, self.gather)))
        if self.optimizer != self.params:
            lines.append(("optimizer", _rest_text(self.optimizer, "")))
        if self.microbatches:
            name, num = self.microbatches
            lines.append(("microbatches", f"{num} of {name!r}, one after the other"))
        if self.like:
            lines.append(("like", inherited_text(self.like)))
        if self.sums:
            lines.append(("sums", f"across devices in {self.sums}"))
        if self.overlap:
            over = _join(self.overlap)
            lines.append(("overlap", f"gathers and scatters over {over} go on beside the products that they serve"))
        if self.strict:
            lines.append(("strict", "a rule whose dim is never met is an error"))
        width = max(len(name) for name, _ in lines)
        return "\n".join([repr(self), *(f"  {name:<{width}}  {what}" for name, what in lines)])


@functools.lru_cache(maxsize=1024)
def _scope(layout: Layout, mesh: Mesh, partitioner: str, in_time: bool) -> Scope:
    """One for each layout and mesh: JAX's caches take regions of equal scopes for one, and so does what they met."""
    layout.check(mesh)
    sizes = dict(mesh.axes)
    if in_time and layout.microbatches:
        sizes[TIME] = layout.microbatches[1]
    splits = ((name, tuple(a for a in axes if sizes[a] > 1 or a == TIME)) for name, axes in layout.splits(in_time))
    kept = tuple((name, axes) for name, axes in splits if axes)
    sums = Summing(layout.sums, tuple(a for a in mesh.dcn if sizes[a] > 1))
    overlap = tuple(a for a in layout.overlap if sizes[a] > 1)
    return Scope(mesh.jax_mesh, kept, tuple(sizes.items()), partitioner, sums, overlap, layout.text)


@functools.lru_cache(maxsize=8192)
def _at_rest(layout: Layout, scope: Scope, these: Dims, role: Role, asked: str) -> Split:
    if role not in ROLES:
        raise fail(f"{asked}: a tensor has the role {role!r}.{nearest(str(role), ROLES)}")
    if role == ACTIVATION:
        return ((),) * len(these)
    rules = layout.optimizer if role == OPTIMIZER else layout.params
    rules = rules.inherited((d.name for d in these), layout.inherited) if rules.pairs else rules
    return rules.split(scope, these, scope.split(these, asked), asked)


def _read(notation: Notation, given: Any) -> Pairs:
    return tuple((name, notation.names(axes, "axis", given)) for name, axes in notation.pairs(given))


def _microbatches(given: Any) -> tuple[str, int] | None:
    """The dim that microbatches divide and their number."""
    if given is None:
        return None
    notation = Notation("Layout: microbatches=", "dim", "a number, or dim:number", ":", "batch:8")
    text = isinstance(given, str) and not given.strip().isdigit()
    pairs = notation.pairs(given) if text or isinstance(given, Mapping) else None
    if pairs is None and isinstance(given, tuple | list):
        pairs = notation.pairs([given])
    if pairs is not None and len(pairs) != 1:
        raise fail(f"{notation.asked}: {given!r} names {len(pairs)} dims; microbatches divide one. {notation.advice}")
    name, num = pairs[0] if pairs is not None else ("batch", given)
    return name, _count(num, "microbatches")


def _count(given: Any, option: str) -> int:
    try:
        num = int(given)
    except (TypeError, ValueError):
        num = 0
    if num < 1 or isinstance(given, float | bool):
        raise fail(f"Layout: {option}={given!r} is not a number of at least 1.")
    return num


def _microbatches_text(microbatches: tuple[str, int]) -> str:
    name, num = microbatches
    return str(num) if name == "batch" else f'"{name}:{num}"'


def _floating(dtype: Any) -> str:
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.floating):
        raise fail(f'Layout: sums={dtype!r} is not a floating dtype. Write sums="float32" or sums="bfloat16".')
    return known.name


def _axes_text(axes: Axes) -> str:
    return axes[0] if len(axes) == 1 else f"({','.join(axes)})"


def _rules_text(pairs: Pairs) -> str:
    return ", ".join(f"{name}:{_axes_text(axes)}" for name, axes in pairs)


def _join(axes: Axes) -> str:
    return " x ".join(axes)


def _rest_text(rules: AtRest, gather: str) -> str:
    when = {"use": "; gathered at each use", "step": "; gathered once a step"}.get(gather, "")
    if rules.axes:
        return f"each over {_join(rules.axes)}, along the dim that suits it{when}"
    if not any(axes for _, axes in rules.pairs):
        return "split by their compute rules alone"
    return ", ".join(f"{name} over {_join(axes)}" for name, axes in rules.pairs if axes) + when
