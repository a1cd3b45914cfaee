"""Attended: what an attention is of, as the program's operations carry it.

An attention ends up as products, permutes and selects, of which no reader of a trace can say how long the sequence was
or which dim held the heads. So the operation that scales the queries carries a name that says it, as names of scopes
do for profilers; ``Attended`` writes that name and reads it again.

    >>> dims = (Dim("batch", 8), Dim("length", 64), Dim("heads", 4), Dim("head_dim", 16))
    >>> queries = Lying(dims, ((), ("context",), (), ()), "float32")
    >>> text = Attended("length", "head_dim", True, None, queries, queries, queries).text
    >>> text[:53]
    'attention[over=length;summed=head_dim;causal=1;window'
    >>> Attended.read(f"jvp({text})/mul").k.axes_of("length")
    ('context',)
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..dims import Dim, Dims, find, names_of
from ..scope import Axes, Split

_TEXT = re.compile(r"attention\[([^\]]*)\]")


@dataclass(frozen=True)
class Lying:
    """A tensor's dims, and how they are split."""

    dims: Dims
    split: Split
    dtype: str

    def axes_of(self, name: str) -> Axes:
        return next(axes for d, axes in zip(self.dims, self.split, strict=True) if d.name == name)

    def size(self, name: str) -> int:
        return find(self.dims, name, "attention").size

    @property
    def names(self) -> tuple[str, ...]:
        return names_of(self.dims)

    def local_sizes(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one device's slice, where the axes have these sizes."""
        pairs = zip(self.dims, self.split, strict=True)
        return tuple(d.size // math.prod(sizes[a] for a in axes) for d, axes in pairs)

    @property
    def text(self) -> str:
        pairs = zip(self.dims, self.split, strict=True)
        return " ".join([self.dtype, *(f"{d.name}={d.size}:{'+'.join(axes)}" for d, axes in pairs)])

    @classmethod
    def read(cls, text: str) -> "Lying":
        dtype, *parts = text.split()
        found = [re.split("[=:]", part) for part in parts]
        dims = tuple(Dim(name, int(size)) for name, size, _ in found)
        return cls(dims, tuple(tuple(axes.split("+")) if axes else () for _, _, axes in found), dtype)


@dataclass(frozen=True)
class Attended:
    """The operands of an attention."""

    over: str
    """The dim along which tokens look at one another."""
    summed: str
    """The dim along which queries and keys are multiplied."""
    causal: bool
    window: int | None
    q: Lying
    k: Lying
    v: Lying

    @property
    def out(self) -> Lying:
        """The results: the queries' dims, with the values' head."""
        dims = tuple(find(self.v.dims, d.name, "attention") if d.name == self.summed else d for d in self.q.dims)
        return Lying(dims, self.q.split, self.q.dtype)

    @property
    def text(self) -> str:
        """The name of a scope."""
        facts = [f"over={self.over}", f"summed={self.summed}", f"causal={self.causal:d}", f"window={self.window or 0}"]
        return f"attention[{';'.join([*facts, *(f'{n}={getattr(self, n).text}' for n in 'qkv')])}]"

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def read(stack: str) -> "Attended | None":
        """From a stack of names of scopes that has one of these."""
        found = _TEXT.search(stack)
        if found is None:
            return None
        over, summed, causal, window, *operands = (part.split("=", 1)[1] for part in found[1].split(";"))
        return Attended(over, summed, causal == "1", int(window) or None, *map(Lying.read, operands))
