"""Names in annotations: ``mw.Tensor["batch length embed"]``.

An annotation says which dims a tensor has, in order. By itself it documents. It is also a class of which such tensors
are instances, so a type checker that runs, such as beartype, checks it; and jaxtyping, whose decorator or import hook
switches that on, remembers the sizes, so that within one call a name has one size in all arguments and results.

    @jaxtyped(typechecker=beartype)
    def attend(q: mw.Tensor["batch length heads"], k: mw.Tensor["batch kv_length heads"]) -> mw.Tensor["batch ..."]: ...

=============================  ==================================================================
``"batch embed"``              exactly these dims, in this order
``"batch ... embed"``          any further dims between them (``"batch ..."``: after, ``"..."``: any)
``"batch embed=512"``          with this size
``"batch length", jnp.int32``  with this dtype, or one of a kind: ``jnp.integer``, ``jnp.floating``
=============================  ==================================================================

For a static type checker such an annotation is ``mw.Tensor``: pyright leaves what stands in the brackets of a class
that has its own ``__class_getitem__`` alone. Linters that read strings in annotations as code want their rules on such
strings (F722 and F821) switched off, as with jaxtyping.
"""

import functools
import re
from typing import Any

import jax.numpy as jnp
from jaxtyping import Shaped

from .dims import show
from .errors import fail, fail_type

_TOKEN = re.compile(r"\.\.\.|(?P<name>[^\W\d]\w*)(=(?P<size>\d+))?")


class Annotation(type):
    """The class of annotations, which are classes themselves."""

    tensor: type
    text: str
    before: tuple[str, ...]
    after: tuple[str, ...] | None
    """The names behind ``...``; None without it."""
    fixed: dict[str, int]
    dtype: Any
    shape: Any
    """The sizes by name, as jaxtyping writes them."""

    def __instancecheck__(cls, x: Any) -> bool:
        return not cls.__instancecheck_str__(x)

    def __instancecheck_str__(cls, x: Any) -> str:
        """Why ``x`` is not such a tensor, or nothing if it is: what beartype puts into its errors."""
        if not isinstance(x, cls.tensor):
            return f"{type(x).__name__} is not a tensor"
        found = f"the tensor has the dims ({show(x.dims)})"
        names, after = x.names, cls.after or ()
        if len(names) < len(cls.before) + len(after) or (cls.after is None and len(names) > len(cls.before)):
            return f"{found}, not {cls!r}"
        if names[: len(cls.before)] != cls.before or names[len(names) - len(after) :] != after:
            return f"{found}, not {cls!r}"
        wrong = [d for d in x.dims if cls.fixed.get(d.name, d.size) != d.size]
        if wrong:
            return f"{found}; {wrong[0].name} must be {cls.fixed[wrong[0].name]}"
        if cls.dtype is not None and not jnp.issubdtype(x.dtype, cls.dtype):
            return f"{found} and the dtype {x.dtype}, not {cls!r}"
        if not isinstance(_Sizes(x.shape), cls.shape):
            return f"{found}; in this call one of these names has another size already"
        return ""

    def __repr__(cls) -> str:
        return cls.__name__

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise fail_type(f"{cls!r} is an annotation; make a tensor with mw.Tensor(array, {cls.text!r}).")


class _Sizes:
    """A shape, as jaxtyping looks at it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.dtype = "any"


@functools.lru_cache(maxsize=4096)
def annotation(tensor: type, item: Any) -> Annotation:
    """The class of instances of ``tensor`` with the dims that ``item`` says: a text, or several, then a dtype.

    Raises:
        ValueError: a name is no identifier or stands twice, or ``...`` does.
        TypeError: something else stands in the brackets.
    """
    listed = item if isinstance(item, tuple) else (item,)
    dtype = listed[-1] if len(listed) > 1 and isinstance(listed[-1], type | jnp.dtype) else None
    texts = listed if dtype is None else listed[:-1]
    if not all(isinstance(text, str) for text in texts):
        raise fail_type(f"Tensor[...]: expected names, such as Tensor['batch embed'], and a dtype, found {item!r}.")
    words = " ".join(texts).replace(",", " ").split()
    text = " ".join(words)
    asked = f"Tensor[{text!r}]"
    matches = [_TOKEN.fullmatch(word) for word in words]
    for word, match in zip(words, matches, strict=True):
        if match is None:
            raise fail(f"{asked}: {word!r} is neither a name, nor a name with a size (embed=512), nor '...'.")
    names = [match["name"] for match in matches if match]
    twice = [word for word, name in zip(words, names, strict=True) if names.count(name) > 1]
    if twice or not words:
        problem = f"{twice[0]!r} stands twice." if twice else "there are no dims; a scalar is a jax.Array."
        raise fail(f"{asked}: {problem}")
    at = names.index(None) if None in names else len(names)
    held = {
        "__module__": "builtins",  # a union of annotations then shows as they do
        "tensor": tensor,
        "text": text,
        "before": tuple(names[:at]),
        "after": tuple(names[at + 1 :]) if at < len(names) else None,
        "fixed": {match["name"]: int(match["size"]) for match in matches if match and match["size"]},
        "dtype": dtype,
        "shape": Shaped[_Sizes, " ".join(name or "..." for name in names)],
    }
    also = f", {getattr(dtype, '__name__', dtype)}" if dtype is not None else ""
    return Annotation(f'Tensor["{text}"{also}]', (), held)
