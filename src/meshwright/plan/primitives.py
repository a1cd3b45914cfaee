"""JAX's primitives by what they do to the elements of their operands: what work and sharding are read from."""

UNARY = frozenset({
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "conj", "cos",
    "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "imag", "integer_pow", "is_finite",
    "lgamma", "log", "log1p", "logistic", "neg", "not", "population_count", "real", "round", "rsqrt", "sign", "sin",
    "sinh", "sqrt", "square", "tan", "tanh",
})  # fmt: skip
"""One operation for each element of one operand."""

BINARY = frozenset({
    "add", "add_any", "and", "atan2", "clamp", "complex", "div", "eq", "ge", "gt", "igamma", "igammac", "le", "lt",
    "max", "min", "mul", "ne", "nextafter", "or", "pow", "random_bits", "regularized_incomplete_beta", "rem",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sub", "threefry2x32", "xor", "zeta",
})  # fmt: skip
"""One operation for each element of the result, of two operands or more of its shape."""

CASTS = frozenset(
    {"bitcast_convert_type", "convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient"}
)
"""Element by element, without work."""

REDUCTIONS = frozenset({
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "reduce_xor",
})  # fmt: skip
"""Over the dims that ``axes`` tells."""

READING = REDUCTIONS | {
    "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "reduce_window", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum", "scatter-add", "scatter_add", "select_and_scatter_add", "sort", "top_k",
}  # fmt: skip
"""One operation for each element that is read."""

ELEMENTWISE = UNARY | BINARY | CASTS
