"""Elementwise operations: operands broadcast by name, and nothing is communicated.

One operand's dims must contain the others'; the result has its dims in its order. An outer product is never made by
accident: two vectors of different names do not multiply, they are an error that says how to ask for it.

``lift`` carries names over any positional elementwise function; the table at the end is that lift applied.

What tensors promise passes through where that is sound: tensors that lie at rest in the same way are worked on there,
linear functions work on addends whose sum is still to be taken, and a function of copies gives copies. What is made of
parameters alone is a parameter.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy import special

from ..dims import Dims, show, union
from ..errors import fail, fail_type
from ..scope import vmapped_axes
from ..tensor import ACTIVATION, Role, Tensor, make, operator
from .kin import applied
from .lowering import align, check_operand, copied, operand_list, run, wanted


def lift(function: Callable[..., Any], name: str | None = None, linear: bool = False) -> Callable[..., Any]:
    """Names carried over a positional elementwise function of one or more arrays.

    Args:
        function: elementwise and broadcasting, such as ``jnp.exp`` or ``jnp.maximum``. Keyword arguments are static and
            handed through.
        name: what errors call it; the function's own name when None.
        linear: whether f(a + b) = f(a) + f(b) for each way its tensors can be added up: then it works on addends
            whose sum across devices is still to be taken.

    Returns:
        A function of tensors and scalars; of scalars alone it is ``function``.
    """
    asked = name or getattr(function, "__name__", "lift")

    @functools.wraps(function)
    def lifted(*operands: Any, **static: Any) -> Any:
        for x in operands:
            check_operand(x, asked)
        whole = functools.partial(function, **static) if static else function
        return _elementwise(asked, whole, operands, linear)

    lifted.__doc__ = f"``{getattr(function, '__name__', asked)}`` on tensors: operands broadcast by name."
    lifted.__name__ = lifted.__qualname__ = asked
    return lifted


def _elementwise(asked: str, function: Callable[..., Any], operands: Sequence[Any], linear: bool) -> Any:
    operands = _at_one_home(operands)
    tensors = [x for x in operands if isinstance(x, Tensor)]
    if not tensors:
        return function(*operands)
    role = tensors[0].role if all(x.role == tensors[0].role for x in tensors) else ACTIVATION
    on_sums = linear and len(tensors) == len(operands)
    if tensors[0].scope is not None and _held_alike(tensors, on_sums):
        return _on_held(asked, function, operands, tensors, role)
    out = tensors[0].dims if len(tensors) == 1 else _containing(tensors, asked)

    def on_arrays(*arrays: Any) -> Any:
        named = iter(zip(arrays, tensors, strict=True))
        aligned = []
        for x in operands:
            if isinstance(x, Tensor):
                array, tensor = next(named)
                aligned.append(align(array, tensor.dims, out))
            else:
                aligned.append(x)
        return applied(function, aligned)

    want = wanted(asked, out)
    copies = copied(tensors, want)
    result = run(on_arrays, tensors, want.union(copies))
    return make(result, out, asked=asked, role=role, copies=copies)


def _at_one_home(operands: Sequence[Any]) -> Sequence[Any]:
    """Where parameters at rest meet some that were gathered once a step from the same rest, these as they rest too:
    what comes of them lies as its operands do."""
    tensors = [x for x in operands if isinstance(x, Tensor)]
    homes = {x.home if x.copies else x.rest for x in tensors}
    if None in homes or len(homes) != 1 or not any(x.copies for x in tensors) or all(x.copies for x in tensors):
        return operands
    return [
        make(x.at_home(), x.dims, role=x.role, rest=x.home) if isinstance(x, Tensor) and x.copies else x
        for x in operands
    ]


def _held_alike(tensors: Sequence[Tensor], on_sums: bool) -> bool:
    """Whether the function can work on what the devices hold: all operands promise the same, and for sums still to be
    taken the function is linear in all of them together."""
    first = tensors[0]
    if not (first.rest or first.pending or first.copies) or (first.pending and not on_sums):
        return False
    if first.pending and _promotes_integers(tensors):
        return False
    if vmapped_axes():  # what the other operands hold may differ along the axes over which this one rests
        return False
    same_dims = first.rest is None or all(x.dims == first.dims for x in tensors)
    return same_dims and all(
        (x.rest, x.pending, x.copies) == (first.rest, first.pending, first.copies) for x in tensors
    )


def _promotes_integers(tensors: Sequence[Tensor]) -> bool:
    """Whether addends would become wider before their sum, which wraps round in the narrower dtype."""
    mixed = any(x.dtype != tensors[0].dtype for x in tensors)
    return mixed and not all(jnp.issubdtype(x.dtype, jnp.inexact) for x in tensors)


def _on_held(
    asked: str, function: Callable[..., Any], operands: Sequence[Any], tensors: Sequence[Tensor], role: Role
) -> Any:
    first, out = tensors[0], _containing(tensors, asked)

    def on_arrays(*arrays: Any) -> Any:
        given = iter(arrays)
        return applied(function, [align(next(given), x.dims, out) if isinstance(x, Tensor) else x for x in operands])

    t = make(
        on_arrays(*(x.held for x in tensors)), out, asked=asked, role=role, rest=first.rest, partial=first.pending,
        copies=first.copies, home=first.home if all(x.home == first.home for x in tensors) else None,
    )  # fmt: skip
    if len(tensors) == 1:
        t.share_sum(first, on_arrays)
    return t


def _containing(tensors: Sequence[Tensor], asked: str) -> Dims:
    """The dims of the operand that contains all the others'."""
    all_dims = [x.dims for x in tensors]
    every = union(all_dims, asked)
    for these in all_dims:
        if len(these) == len(every):
            return these
    raise fail(_OUTER.format(asked=asked, operands=operand_list(tensors), every=show(every)))


_OUTER = """{asked}: no operand's dims contain the other's, so the result would be an outer product.
  operands: {operands}
  Elementwise operations do not grow a tensor by accident. If ({every}) is what you want, ask for it:
    mw.einsum(x, y, out=(...))      a product
    x.broadcast(dim)                repeats x along a dim that it lacks
  If one of the names is misspelt, rename it: x.rename(old="new")."""


def _scaled(function: Callable[..., Any], asked: str, both: bool) -> Callable[..., Any]:
    """A product or quotient: linear in one tensor when the other operand is a scalar."""
    plain, linear = lift(function, asked), lift(function, asked, linear=True)

    def scaled(x: Any, y: Any) -> Any:
        x_named, y_named = isinstance(x, Tensor), isinstance(y, Tensor)
        if x_named and not y_named:
            check_operand(y, asked)
            return lift(lambda a: function(a, y), asked, linear=True)(x) if _scales(x, y, not both) else plain(x, y)
        if both and y_named and not x_named:
            check_operand(x, asked)
            return lift(lambda a: function(x, a), asked, linear=True)(y) if _scales(y, x, False) else plain(x, y)
        return plain(x, y)

    scaled.__name__ = scaled.__qualname__ = asked
    scaled.__doc__ = linear.__doc__
    return scaled


def _scales(x: Tensor, by: Any, divides: bool) -> bool:
    """Whether addends can be scaled before their sum. Integers cannot: a sum that wraps round is no longer linear. Nor
    can they by a number that makes infinities of them, which add up to NaN; of a traced one that is not known."""
    if not x.pending or not jnp.issubdtype(x.dtype, jnp.inexact):
        return False
    if isinstance(by, Tracer):
        return True
    number = np.asarray(by)
    try:
        with np.errstate(over="ignore"):
            number = number if np.iscomplexobj(number) else number.astype(x.dtype)
    except OverflowError:  # a Python integer beyond all floats
        return False
    return bool(np.isfinite(number)) and not (divides and number == 0)


add = operator("add")(lift(jnp.add, linear=True))
subtract = operator("subtract")(lift(jnp.subtract, linear=True))
negative = operator("negative")(lift(jnp.negative, linear=True))
positive = operator("positive")(lift(jnp.positive, linear=True))
multiply = operator("multiply")(_scaled(jnp.multiply, "multiply", both=True))
divide = true_divide = operator("divide")(_scaled(jnp.divide, "divide", both=False))


@operator("astype")
def astype(x: Any, dtype: Any) -> Any:
    """The same values in another dtype. A parameter at rest stays at rest, so that its gather moves the new dtype."""
    check_operand(x, "astype")
    if not isinstance(x, Tensor):
        return jnp.asarray(x).astype(dtype)
    as_it_is = x.dtype == jnp.dtype(dtype) and not getattr(x.raw, "weak_type", False)
    return x if as_it_is else lift(lambda a: a.astype(dtype), "astype")(x)


def clip(x: Any, least: Any = None, greatest: Any = None) -> Any:
    """``x`` kept between ``least`` and ``greatest``, each a tensor, a scalar or None."""
    if least is None and greatest is None:
        raise fail_type("clip: give a least or a greatest value, or both.")
    if least is not None:
        x = maximum(x, least)
    return x if greatest is None else minimum(x, greatest)


def where(condition: Any, x: Any, y: Any) -> Any:
    """``x`` where ``condition`` holds and ``y`` elsewhere; all three broadcast by name."""
    return _where(condition, x, y)


_where = lift(jnp.where)


def stop_gradient(x: Any) -> Any:
    """The same values; no gradient flows through."""
    return _stop_gradient(x)


_stop_gradient = lift(jax.lax.stop_gradient, "stop_gradient")


# Functions of one tensor
abs = operator("abs")(lift(jnp.abs, "abs"))
absolute = lift(jnp.absolute, "absolute")
acos = lift(jnp.acos, "acos")
acosh = lift(jnp.acosh, "acosh")
angle = lift(jnp.angle, "angle")
arccos = lift(jnp.arccos, "arccos")
arccosh = lift(jnp.arccosh, "arccosh")
arcsin = lift(jnp.arcsin, "arcsin")
arcsinh = lift(jnp.arcsinh, "arcsinh")
arctan = lift(jnp.arctan, "arctan")
arctanh = lift(jnp.arctanh, "arctanh")
asin = lift(jnp.asin, "asin")
asinh = lift(jnp.asinh, "asinh")
atan = lift(jnp.atan, "atan")
atanh = lift(jnp.atanh, "atanh")
bitwise_count = lift(jnp.bitwise_count, "bitwise_count")
bitwise_invert = lift(jnp.bitwise_invert, "bitwise_invert")
bitwise_not = lift(jnp.bitwise_not, "bitwise_not")
cbrt = lift(jnp.cbrt, "cbrt")
ceil = lift(jnp.ceil, "ceil")
conj = lift(jnp.conj, "conj")
conjugate = lift(jnp.conjugate, "conjugate")
cos = lift(jnp.cos, "cos")
cosh = lift(jnp.cosh, "cosh")
deg2rad = lift(jnp.deg2rad, "deg2rad")
degrees = lift(jnp.degrees, "degrees")
exp = lift(jnp.exp, "exp")
exp2 = lift(jnp.exp2, "exp2")
expm1 = lift(jnp.expm1, "expm1")
fabs = lift(jnp.fabs, "fabs")
floor = lift(jnp.floor, "floor")
i0 = lift(jnp.i0, "i0")
imag = lift(jnp.imag, "imag")
invert = operator("invert")(lift(jnp.invert, "invert"))
isfinite = lift(jnp.isfinite, "isfinite")
isinf = lift(jnp.isinf, "isinf")
isnan = lift(jnp.isnan, "isnan")
isneginf = lift(jnp.isneginf, "isneginf")
isposinf = lift(jnp.isposinf, "isposinf")
log = lift(jnp.log, "log")
log10 = lift(jnp.log10, "log10")
log1p = lift(jnp.log1p, "log1p")
log2 = lift(jnp.log2, "log2")
logical_not = lift(jnp.logical_not, "logical_not")
nan_to_num = lift(jnp.nan_to_num, "nan_to_num")
rad2deg = lift(jnp.rad2deg, "rad2deg")
radians = lift(jnp.radians, "radians")
real = lift(jnp.real, "real")
reciprocal = lift(jnp.reciprocal, "reciprocal")
rint = lift(jnp.rint, "rint")
round = lift(jnp.round, "round")
sign = lift(jnp.sign, "sign")
signbit = lift(jnp.signbit, "signbit")
sin = lift(jnp.sin, "sin")
sinc = lift(jnp.sinc, "sinc")
sinh = lift(jnp.sinh, "sinh")
sqrt = lift(jnp.sqrt, "sqrt")
square = lift(jnp.square, "square")
tan = lift(jnp.tan, "tan")
tanh = lift(jnp.tanh, "tanh")
trunc = lift(jnp.trunc, "trunc")

# Functions of two tensors or a tensor and a scalar
arctan2 = lift(jnp.arctan2, "arctan2")
atan2 = lift(jnp.atan2, "atan2")
bitwise_and = operator("bitwise_and")(lift(jnp.bitwise_and, "bitwise_and"))
bitwise_or = operator("bitwise_or")(lift(jnp.bitwise_or, "bitwise_or"))
bitwise_xor = operator("bitwise_xor")(lift(jnp.bitwise_xor, "bitwise_xor"))
bitwise_left_shift = lift(jnp.bitwise_left_shift, "bitwise_left_shift")
bitwise_right_shift = lift(jnp.bitwise_right_shift, "bitwise_right_shift")
copysign = lift(jnp.copysign, "copysign")
equal = operator("equal")(lift(jnp.equal, "equal"))
float_power = lift(jnp.float_power, "float_power")
floor_divide = operator("floor_divide")(lift(jnp.floor_divide, "floor_divide"))
fmax = lift(jnp.fmax, "fmax")
fmin = lift(jnp.fmin, "fmin")
fmod = lift(jnp.fmod, "fmod")
gcd = lift(jnp.gcd, "gcd")
greater = operator("greater")(lift(jnp.greater, "greater"))
greater_equal = operator("greater_equal")(lift(jnp.greater_equal, "greater_equal"))
heaviside = lift(jnp.heaviside, "heaviside")
hypot = lift(jnp.hypot, "hypot")
lcm = lift(jnp.lcm, "lcm")
ldexp = lift(jnp.ldexp, "ldexp")
left_shift = operator("left_shift")(lift(jnp.left_shift, "left_shift"))
less = operator("less")(lift(jnp.less, "less"))
less_equal = operator("less_equal")(lift(jnp.less_equal, "less_equal"))
logaddexp = lift(jnp.logaddexp, "logaddexp")
logaddexp2 = lift(jnp.logaddexp2, "logaddexp2")
logical_and = lift(jnp.logical_and, "logical_and")
logical_or = lift(jnp.logical_or, "logical_or")
logical_xor = lift(jnp.logical_xor, "logical_xor")
maximum = lift(jnp.maximum, "maximum")
minimum = lift(jnp.minimum, "minimum")
mod = operator("mod")(lift(jnp.mod, "mod"))
nextafter = lift(jnp.nextafter, "nextafter")
not_equal = operator("not_equal")(lift(jnp.not_equal, "not_equal"))
pow = operator("pow")(lift(jnp.pow, "pow"))
power = lift(jnp.power, "power")
remainder = lift(jnp.remainder, "remainder")
right_shift = operator("right_shift")(lift(jnp.right_shift, "right_shift"))
isclose = lift(jnp.isclose, "isclose")

# Activations, as jax.nn has them
celu = lift(jax.nn.celu, "celu")
elu = lift(jax.nn.elu, "elu")
gelu = lift(jax.nn.gelu, "gelu")
hard_sigmoid = lift(jax.nn.hard_sigmoid, "hard_sigmoid")
hard_silu = lift(jax.nn.hard_silu, "hard_silu")
hard_swish = lift(jax.nn.hard_swish, "hard_swish")
hard_tanh = lift(jax.nn.hard_tanh, "hard_tanh")
leaky_relu = lift(jax.nn.leaky_relu, "leaky_relu")
log_sigmoid = lift(jax.nn.log_sigmoid, "log_sigmoid")
mish = lift(jax.nn.mish, "mish")
relu = lift(jax.nn.relu, "relu")
relu6 = lift(jax.nn.relu6, "relu6")
selu = lift(jax.nn.selu, "selu")
sigmoid = lift(jax.nn.sigmoid, "sigmoid")
silu = lift(jax.nn.silu, "silu")
soft_sign = lift(jax.nn.soft_sign, "soft_sign")
softplus = lift(jax.nn.softplus, "softplus")
sparse_plus = lift(jax.nn.sparse_plus, "sparse_plus")
sparse_sigmoid = lift(jax.nn.sparse_sigmoid, "sparse_sigmoid")
squareplus = lift(jax.nn.squareplus, "squareplus")
swish = lift(jax.nn.swish, "swish")
identity = lift(jax.nn.identity, "identity")

# Special functions, as jax.scipy.special has them
digamma = lift(special.digamma, "digamma")
erf = lift(special.erf, "erf")
erfinv = lift(special.erfinv, "erfinv")
erfc = lift(special.erfc, "erfc")
expit = lift(special.expit, "expit")
gammaln = lift(special.gammaln, "gammaln")
logit = lift(special.logit, "logit")
xlog1py = lift(special.xlog1py, "xlog1py")
xlogy = lift(special.xlogy, "xlogy")
rsqrt = lift(jax.lax.rsqrt, "rsqrt")
