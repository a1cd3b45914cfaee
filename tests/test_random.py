"""mw.random and dropout: law 4. Everything is compared bit for bit with ``jax.random`` on one device."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p

import meshwright as mw
from meshwright import Tensor, collectives
from meshwright.ops.stream import flat_indices, implementation, slice_start
from meshwright.tensor import make

from .laws import ABC, Way, agree, tensor, ways

A, B, D, C = mw.dims(a=8, b=24, d=3, c=20)
DIMS = (A, B, D, C)
SHAPE = (8, 24, 3, 20)
KEY = mw.random.key(7)
LAYERS = mw.Dim("layers", 8)
BOTH = [Way("x=2,y=4", "a:x, b:y"), Way("x=2,y=2", "b:x, c:y", partitioner="xla")]

Sampler = Callable[[Any, Any], Any]
"""A function of a key and of dims (for ours) or sizes (for JAX's)."""


def _samplers() -> dict[str, tuple[Sampler, Sampler]]:
    """For each case, ours and JAX's."""
    cases: dict[str, tuple[Sampler, Sampler]] = {}

    def both(name: str, *args: Any, **kwargs: Any) -> None:
        ours, jaxs = getattr(mw.random, name), getattr(jax.random, name)
        words = [str(getattr(a, "__name__", a)) for a in (*args, *kwargs.values())]
        cases[" ".join([name, *words])] = (
            lambda k, dims: ours(k, dims, *args, **kwargs),
            lambda k, shape: jaxs(k, shape, *args, **kwargs),
        )

    for name in ("bits", "normal", "uniform", "gumbel", "exponential", "laplace", "logistic", "cauchy", "rademacher"):
        both(name)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        both("uniform", dtype)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.complex64):
        both("normal", dtype)
    for dtype in (jnp.uint8, jnp.uint16, jnp.uint32):
        both("bits", dtype)
    both("uniform", jnp.float32, -3.0, 5.0)
    both("gumbel", mode="high")
    both("gumbel", mode="highest")
    both("rademacher", jnp.int8)
    both("randint", 0, 256, jnp.uint8)
    both("randint", -5, 7, jnp.int16)
    both("randint", -5, 1_000_000)
    cases["bernoulli"] = (
        lambda k, dims: mw.random.bernoulli(k, dims, 0.3),
        lambda k, shape: jax.random.bernoulli(k, 0.3, shape),
    )
    cases["bernoulli high"] = (
        lambda k, dims: mw.random.bernoulli(k, dims, 0.3, mode="high"),
        lambda k, shape: jax.random.bernoulli(k, 0.3, shape, "high"),
    )
    cases["truncated_normal"] = (
        lambda k, dims: mw.random.truncated_normal(k, dims, -1.0, 3.0),
        lambda k, shape: jax.random.truncated_normal(k, -1.0, 3.0, shape),
    )
    cases["normal of mean and std"] = (
        lambda k, dims: mw.random.normal(k, dims, jnp.bfloat16, mean=2, std=0.5),
        lambda k, shape: jax.random.normal(k, shape, jnp.bfloat16) * 0.5 + 2,
    )
    return cases


SAMPLERS = _samplers()


FEW = ("normal", "normal bfloat16", "gumbel high", "randint 0 256 uint8", "bernoulli")
"""On every layout. The rest draw their bits in the same ways and run on two."""


def _ours(key: Any, names: Iterable[str] = SAMPLERS) -> dict[str, Any]:
    """A key for each: two draws from one key share what they compute, and XLA then rounds some of it otherwise."""
    keys = {name: mw.random.fold_in(key, i) for i, name in enumerate(SAMPLERS)}
    return {name: SAMPLERS[name][0](keys[name], DIMS) for name in names}


@functools.cache
def _jaxs() -> dict[str, Any]:
    draws = enumerate(SAMPLERS.items())
    return jax.jit(lambda key: {n: theirs(jax.random.fold_in(key, i), SHAPE) for i, (n, (_, theirs)) in draws})(KEY)


def _as_bytes(x: Any) -> np.ndarray:
    x = x.array if isinstance(x, Tensor) else x
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x)[..., None].view(np.uint8)


def _check_bits(found: Mapping[str, Any], expected: Mapping[str, Any], what: object) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        array = x.array if isinstance(x, Tensor) else x
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape), f"{what}: {name}"
        np.testing.assert_array_equal(_as_bytes(x), _as_bytes(expected[name]), err_msg=f"{what}: {name}")


# Distributions


@pytest.mark.parametrize("way", ways(*ABC, partitioners=("names",)), ids=str)
def test_bits_are_those_of_jax_on_every_layout(way: Way) -> None:
    found = jax.jit(way.region(functools.partial(_ours, names=FEW)))(KEY)
    _check_bits(found, {name: _jaxs()[name] for name in FEW}, way)


@pytest.mark.parametrize("way", BOTH, ids=str)
def test_every_function_draws_what_jax_draws(way: Way) -> None:
    _check_bits(jax.jit(way.region(_ours))(KEY), _jaxs(), way)


def test_without_a_region_eagerly() -> None:
    x = mw.random.normal(KEY, DIMS)
    assert x.dims == DIMS
    np.testing.assert_array_equal(x.array, jax.random.normal(KEY, SHAPE))


def test_every_dtype_of_the_brief_is_among_the_cases() -> None:
    found = {str(x.dtype) for x in _jaxs().values()}
    assert {"float32", "bfloat16", "float16", "int32", "uint8", "bool"} <= found


def test_raw_keys_and_no_dims_and_one_dim() -> None:
    def program(raw: Any, key: Any) -> dict[str, Any]:
        return {
            "raw": mw.random.normal(raw, DIMS),
            "scalar": mw.random.normal(key, ()),
            "one dim": mw.random.uniform(key, A),
            "numpy": mw.random.bits(np.array([1, 2], np.uint32), [A, B]),
            "unsplit": mw.random.normal(key, C),
            "empty": mw.random.normal(key, (A, mw.Dim("none", 0))),
        }

    raw = jax.random.PRNGKey(3)
    expected = {
        "raw": jax.random.normal(raw, SHAPE),
        "scalar": jax.random.normal(KEY, ()),
        "one dim": jax.random.uniform(KEY, (8,)),
        "numpy": jax.random.bits(jnp.array([1, 2], jnp.uint32), (8, 24)),
        "unsplit": jax.random.normal(KEY, (20,)),
        "empty": jax.random.normal(KEY, (8, 0)),
    }
    for way in BOTH[:1]:
        _check_bits(jax.jit(way.region(program))(raw, KEY), expected, way)


def _parameters(program_dims: tuple[mw.Dim, ...]) -> dict[str, Callable[..., Any]]:
    r = mw.random
    return {
        "uniform": lambda low, high, p: r.uniform(KEY, program_dims, minval=low, maxval=high),
        "normal": lambda low, high, p: r.normal(KEY, program_dims, mean=low, std=high),
        "std of a scalar": lambda low, high, p: r.normal(KEY, program_dims, std=high.sum()),
        "truncated": lambda low, high, p: r.truncated_normal(KEY, program_dims, low, 8.0),
        "bernoulli": lambda low, high, p: r.bernoulli(KEY, program_dims, p),
        "randint": lambda low, high, p: r.randint(KEY, program_dims, (low * 10).astype(jnp.int32), 100),
    }


SMALL = mw.dims(a=8, b=8, c=8)
LOW = tensor(SMALL[1])
HIGH = tensor(SMALL[2], SMALL[0], seed=1, role="parameter") + 10
P = Tensor(jnp.linspace(0.1, 0.9, 8), "c")


def test_parameters_broadcast_by_name_with_gradients() -> None:
    cases = _parameters(SMALL)
    high = Tensor(HIGH.array, HIGH.dims, "parameter")
    at_rest = Way("x=2,y=2", "b:x, c:y", {"params": "a:x"})
    agree(cases, LOW, high, P, over=[Way("x=2,y=2,z=2", "a:x, b:y, c:z"), at_rest])


def test_parameters_are_jaxs_parameters() -> None:
    found = {name: f(LOW, HIGH, P) for name, f in _parameters(SMALL).items()}
    low, high = LOW.array[None, :, None], HIGH.array.T[:, None, :]
    shape = (8, 8, 8)
    expected = {
        "uniform": jax.random.uniform(KEY, shape, minval=low, maxval=high),
        "normal": jax.random.normal(KEY, shape) * high + low,
        "std of a scalar": jax.random.normal(KEY, shape) * HIGH.array.sum(),
        "truncated": jax.random.truncated_normal(KEY, low, 8.0, shape),
        "bernoulli": jax.random.bernoulli(KEY, P.array[None, None, :], shape),
        "randint": jax.random.randint(KEY, shape, (low * 10).astype(jnp.int32), 100),
    }
    _check_bits(found, expected, "no region")


# What a device computes and communicates

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


def test_nothing_is_communicated_and_each_device_makes_its_slice() -> None:
    way = Way("x=2,y=4", "a:x, b:y")
    program = jax.jit(way.region(functools.partial(_ours, names=FEW))).lower(KEY).compile().as_text() or ""
    assert not [name for name in COLLECTIVES if f" {name}" in program]
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"[a-z0-9]+\[([0-9,]+)\]", program)}
    assert (4, 6, 3, 20) in shapes
    assert max(int(np.prod(shape)) for shape in shapes) == 2 * 4 * 6 * 3 * 20, "2: of mode high, which draws in pairs"


def test_types_vary_over_the_axes_that_split_the_dims() -> None:
    found = []

    def program(key: Any) -> Any:
        for these in ((A, C), (B, A), (C,), (D, B)):
            x = mw.random.normal(key, these)
            found.append((x.names, collectives.varies_over(x.raw)))
            found.append((x.names, collectives.varies_over(mw.random.bernoulli(key, these, 0.5).raw)))
        found.append(("layers", collectives.varies_over(mw.random.split(key, LAYERS).raw)))
        found.append(("order", collectives.varies_over(mw.random.permutation(key, A).raw)))
        return key

    jax.eval_shape(Way("x=2,y=4", "a:x, b:y, layers:y").region(program), KEY)
    x, y = frozenset("x"), frozenset("y")
    by_names = {("a", "c"): x, ("b", "a"): x | y, ("c",): frozenset(), ("d", "b"): y, "layers": y, "order": x}
    assert len(found) == 10
    for names, axes in found:
        assert axes == by_names[names], names


def _threefry_bits(key: Any, indices: list[int]) -> np.ndarray:
    """32 random bits for each flat index, which are Python integers: as JAX's threefry hashes them."""
    k1, k2 = np.asarray(jax.random.key_data(key))
    high, low = (jnp.array([i >> shift & 0xFFFFFFFF for i in indices], jnp.uint32) for shift in (32, 0))
    one, two = threefry2x32_p.bind(jnp.uint32(k1), jnp.uint32(k2), high, low)
    return np.asarray(one ^ two)


HUGE = [
    ((2**33, 3, 2**20 + 1), (2**33 - 3, 1, 2**20 - 2), (2, 2, 3)),
    ((5, 2**31, 7), (3, 2**31 - 2, 5), (2, 2, 2)),
    ((2**16, 2**16), (2**16 - 2, 2**16 - 3), (2, 3)),
    ((2**16, 2**16 + 1), (2**16 - 2, 2**16 - 3), (2, 3)),
]
"""Sizes of wholes, the place where a slice begins, and the slice's sizes."""


@pytest.mark.parametrize(("sizes", "place", "shape"), HUGE)
def test_slices_of_more_than_2_to_the_32_elements(
    sizes: tuple[int, ...], place: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    def index(at: tuple[int, ...]) -> int:
        flat = 0
        for size, first, i in zip(sizes, place, at, strict=True):
            flat = flat * size + first + i
        return flat

    expected = [index(at) for at in np.ndindex(shape)]
    start = index((0,) * len(shape))
    words = jnp.uint32(start >> 32), jnp.uint32(start & 0xFFFFFFFF)
    high, low = flat_indices(words, shape, sizes)
    assert [int(h) << 32 | int(w) for h, w in zip(high.ravel(), low.ravel(), strict=True)] == expected
    data = jnp.concatenate([jax.random.key_data(KEY), jnp.stack(words)])
    bits = jax.random.bits(jax.random.wrap_key_data(data, impl=implementation(sizes)), shape)
    np.testing.assert_array_equal(bits.ravel(), _threefry_bits(KEY, expected))


def test_where_the_slices_of_a_huge_tensor_begin() -> None:
    huge, ranks = mw.dims(a=2**33, c=2**20, b=12), mw.dims(x_rank=2, y_rank=4)

    def starts(_: Any) -> Any:
        words = slice_start(huge, "test")
        assert words is not None
        return [make(word.reshape(1, 1), ranks) for word in words]

    found = Way("x=2,y=4", "a:x, b:y, x_rank:x, y_rank:y").region(starts)(jnp.int32(0))
    expected = [[x * 2**32 * 2**20 * 12 + y * 3 for y in range(4)] for x in range(2)]
    for found_word, shift in zip(found, (32, 0), strict=True):
        np.testing.assert_array_equal(found_word.array, [[i >> shift & 0xFFFFFFFF for i in row] for row in expected])


def test_a_huge_tensor_can_be_described() -> None:
    draw = Way("x=8", "a:x").region(lambda key: mw.random.bits(key, mw.Dim("a", 2**34), jnp.uint8))
    assert jax.eval_shape(draw, KEY).shape == (2**34,)
    too_long = Way("x=2", "a:x").region(lambda key: mw.random.bits(key, mw.Dim("a", 2**34), jnp.uint8))
    with pytest.raises(ValueError, match="more than 4294967296 elements along one dim"):
        jax.eval_shape(too_long, KEY)


def test_64_bits() -> None:
    with jax.enable_x64(True):
        expected = {
            "bits": jax.random.bits(KEY, (8, 24), jnp.uint64),
            "normal": jax.random.normal(KEY, (8, 24)),
            "randint": jax.random.randint(KEY, (8, 24), 0, 2**40),
        }

        def program(key: Any) -> dict[str, Any]:
            return {
                "bits": mw.random.bits(key, (A, B), jnp.uint64),
                "normal": mw.random.normal(key, (A, B)),
                "randint": mw.random.randint(key, (A, B), 0, 2**40),
            }

        assert expected["normal"].dtype == jnp.float64
        _check_bits(jax.jit(BOTH[0].region(program))(KEY), expected, "x64")


# Keys


def test_keys_by_name() -> None:
    def program(key: Any, numbers: Tensor) -> dict[str, Any]:
        one, _ = mw.random.split(key)
        return {
            "one": mw.random.normal(one, (A, B)),
            "third": mw.random.normal(mw.random.split(key, 3)[2], (A, B)),
            "layers": mw.random.split(key, LAYERS),
            "grid": mw.random.split(key, (A, C, B)),
            "folded": mw.random.normal(mw.random.fold_in(key, 5), (A, B)),
            "each": mw.random.fold_in(key, numbers),
            "raw": mw.random.split(jax.random.key_data(key), LAYERS),
        }

    expected = {
        "one": jax.random.normal(jax.random.split(KEY)[0], (8, 24)),
        "third": jax.random.normal(jax.random.split(KEY, 3)[2], (8, 24)),
        "layers": jax.random.split(KEY, 8),
        "grid": jax.random.split(KEY, (8, 20, 24)),
        "folded": jax.random.normal(jax.random.fold_in(KEY, 5), (8, 24)),
        "each": jax.vmap(functools.partial(jax.random.fold_in, KEY))(jnp.arange(8)),
        "raw": jax.random.split(KEY, 8),
    }
    numbers = Tensor(jnp.arange(8), "a")
    _check_bits(program(KEY, numbers), expected, "no region")
    for way in [BOTH[1], Way("x=2,y=4", "layers:x, a:y, b:x"), Way("x=2,y=2", "layers:(y,x), b:x")]:
        _check_bits(jax.jit(way.region(program))(KEY, numbers), expected, way)


def _scanned(key: Any, x: Tensor) -> Any:
    def layer(x: Tensor, key: Any) -> Any:
        noise = mw.random.normal(key, x.dims)
        return mw.dropout(x, 0.25, key) + noise, noise.sum("b")

    return mw.scan(layer, x, mw.random.split(key, LAYERS), over="layers", remat=True)


def test_a_scan_over_keys() -> None:
    small = tensor(A, B)
    over = [Way("x=2,y=2", "b:x, a:y", partitioner="xla"), Way("x=2,y=2", "layers:x, a:y"), Way("x=4", "b:x")]
    agree(lambda x: _scanned(KEY, x), small, over=over)
    x = small.array
    for key in jax.random.split(KEY, 8):
        kept = jax.random.bernoulli(key, 0.75, (8, 24))
        x = jnp.where(kept, x / 0.75, 0) + jax.random.normal(key, (8, 24))
    np.testing.assert_allclose(_scanned(KEY, small)[0].array, x, rtol=1e-5)


def test_a_tensor_of_keys_as_argument_and_vmap() -> None:
    keys = mw.random.split(KEY, LAYERS)

    def program(keys: Tensor) -> dict[str, Any]:
        return {
            "mw.vmap": mw.vmap(lambda key: mw.random.normal(key, (A, B)), "layers")(keys),
            "jax.vmap": jax.vmap(lambda key: mw.random.uniform(key, (A, B)).sum())(jax.random.split(KEY, 3)),
        }

    expected = jax.vmap(lambda key: jax.random.normal(key, (8, 24)))(keys.array)
    sums = [jax.random.uniform(key, (8, 24)).sum() for key in jax.random.split(KEY, 3)]
    for way in [*ways(("x=2,y=2", "layers:x, b:y")), Way("x=2,y=4", "a:x, b:y")]:
        found = jax.jit(way.region(program))(keys)
        assert found["mw.vmap"].names == ("layers", "a", "b")
        np.testing.assert_array_equal(found["mw.vmap"].array, expected)
        np.testing.assert_allclose(found["jax.vmap"], jnp.stack(sums), rtol=1e-6)


# Choices


LOGITS = tensor(mw.Dim("a", 8), mw.Dim("b", 8), mw.Dim("c", 16))


def test_categorical() -> None:
    n = mw.Dim("draws", 5)

    def program(logits: Tensor) -> dict[str, Any]:
        return {
            "a": mw.random.categorical(KEY, logits, "a"),
            "b": mw.random.categorical(KEY, logits, "b"),
            "c": mw.random.categorical(KEY, logits, "c", mode="high"),
            "draws": mw.random.categorical(KEY, logits, "c", dims=n),
            "half": mw.random.categorical(KEY, logits.astype(jnp.bfloat16), "c"),
        }

    logits = LOGITS.array
    expected = {
        "a": jax.random.categorical(KEY, logits, 0),
        "b": jax.random.categorical(KEY, logits, 1),
        "c": jax.random.categorical(KEY, logits, 2, mode="high"),
        "draws": jax.random.categorical(KEY, logits, 2, (5, 8, 8)),
        "half": jax.random.categorical(KEY, logits.astype(jnp.bfloat16), 2),
    }
    _check_bits(jax.jit(program)(LOGITS), expected, "no region")
    for way in [*ways(ABC[6], ABC[10], partitioners=("names",)), BOTH[1]]:
        _check_bits(jax.jit(way.region(program))(LOGITS), expected, way)


def test_permutation() -> None:
    cases: dict[str, Callable[[Tensor], Any]] = {
        "a": lambda x: mw.random.permutation(KEY, x, "a"),
        "b": lambda x: mw.random.permutation(KEY, x, "b"),
        "c": lambda x: mw.random.permutation(KEY, x, "c"),
        "order": lambda x: mw.random.permutation(KEY, mw.Dim("b", 24)),
        "one dim": lambda x: mw.random.permutation(KEY, x.sum("a c")),
    }
    for i, name in enumerate("abc"):
        found = cases[name](LOGITS)
        np.testing.assert_array_equal(found.array, jax.random.permutation(KEY, LOGITS.array, i))
        assert found.dims == LOGITS.dims
    np.testing.assert_array_equal(cases["order"](LOGITS).array, jax.random.permutation(KEY, 24))
    agree(cases, LOGITS, over=[*ways(ABC[4], ABC[6], ABC[8], ABC[10], partitioners=("names",)), BOTH[1]])


# Dropout


X = tensor(mw.Dim("a", 8), mw.Dim("b", 24), mw.Dim("c", 12)) + 10
"""No value is zero, so what is dropped can be seen."""


def test_dropout_is_inverted_and_its_mask_jaxs() -> None:
    kept = jax.random.bernoulli(KEY, 0.7, (8, 24, 12))
    found = mw.dropout(X, 0.3, KEY)
    np.testing.assert_array_equal(found.array, jnp.where(kept, X.array / 0.7, 0))
    shared = mw.dropout(X, 0.3, KEY, over="a c").array
    kept = jax.random.bernoulli(KEY, 0.7, (8, 12))[:, None, :]
    np.testing.assert_array_equal(shared, jnp.where(kept, X.array / 0.7, 0))
    assert mw.dropout(X, 0.3, None) is X and mw.dropout(X, 0, KEY) is X
    np.testing.assert_array_equal(mw.dropout(X, 0.3, KEY, over=()).array, X.array / 0.7)


def _dropouts(key: Any, rate: Any, x: Tensor) -> dict[str, Any]:
    dropped = {
        "each": mw.dropout(x, 0.3, key),
        "shared": mw.dropout(x, 0.3, key, over=("b", "a")),
        "row": mw.dropout(x, 0.5, key, over="c"),
        "traced rate": mw.dropout(x, rate, key),
        "remat": mw.remat(lambda x: mw.dropout(x * x, 0.3, key))(x),
    }
    half = {"half": mw.dropout(x.astype(jnp.bfloat16), rate, key)}
    return dropped | {f"mask {name}": y == 0 for name, y in (dropped | half).items()}


def test_dropout_masks_are_the_same_on_every_layout() -> None:
    rate = jnp.float32(0.3)
    program = functools.partial(_dropouts, KEY, rate)
    masks = {name: y.array for name, y in program(X).items() if name.startswith("mask")}
    assert 0.25 < float(masks["mask each"].mean()) < 0.35
    for way in ways(*ABC[5::2], partitioners=("names",)):
        found = jax.jit(way.region(lambda x: {n: y for n, y in program(x).items() if n in masks}))(X)
        _check_bits(found, masks, way)
    agree(program, X, over=[Way("x=2,y=2,z=2", "c:(x,z), a:y"), BOTH[1]])


def test_dropout_of_a_pending_sum_and_of_a_parameter() -> None:
    w = tensor(mw.Dim("c", 12), mw.Dim("e", 6), seed=2, role="parameter")
    cases = {
        "pending": lambda x, w: mw.dropout(mw.dot(x, w, "c"), 0.5, KEY),
        "parameter": lambda x, w: mw.dropout(w, 0.5, KEY),
    }
    over = [Way("x=2,y=2", "c:x, a:y"), Way("x=2,y=2", "a:x, e:y", {"params": "c:x"})]
    agree(cases, X, w, over=over)


def test_dropout_communicates_nothing() -> None:
    way = Way("x=2,y=4", "a:x, b:y")
    total = jax.grad(lambda x: way.region(lambda x: mw.dropout(x, 0.3, KEY))(x).array.sum())
    for f in (way.region(lambda x: mw.dropout(x, 0.3, KEY)), total):
        program = jax.jit(f).lower(X).compile().as_text() or ""
        assert not [name for name in COLLECTIVES if f" {name}" in program]


# Errors


def _message(program: Callable[[], Any], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        program()
    assert "test_random.py" in str(caught.value)
    return str(caught.value)


def test_keys_that_cannot_be_sliced() -> None:
    rbg = mw.random.key(0, impl="rbg")

    def program(key: Any) -> Any:
        return mw.random.normal(key, (A, B))

    split, whole = Way("x=2", "a:x"), Way("x=2", "c:x")
    message = _message(lambda: split.region(program)(rbg))
    assert "normal: with a key of 'rbg' a device cannot make its slice of (a=8, b=24)" in message
    assert "mw.random.key(seed, impl='threefry2x32')" in message
    drawn, _ = whole.region(lambda key: (program(key), mw.zeros((C,))))(rbg)
    np.testing.assert_array_equal(drawn.array, jax.random.normal(rbg, (8, 24)))
    assert "'rbg'" in _message(lambda: Way("x=2", "a:x").region(lambda k: mw.random.split(k, A))(rbg))
    with jax.threefry_partitionable(False):
        assert "jax_threefry_partitionable switched off" in _message(lambda: split.region(program)(KEY))


def test_what_is_not_a_key() -> None:
    for wrong in (0, None, jnp.float32(1), jnp.zeros(2, jnp.int32)):
        message = _message(lambda: mw.random.normal(wrong, A), TypeError)  # noqa: B023
        assert "normal: expected a random key, found" in message and "mw.random.key(seed)" in message
    message = _message(lambda: mw.random.normal(jax.random.split(KEY, 3), A), TypeError)
    assert "found an array of keys of shape (3,)" in message
    message = _message(lambda: mw.random.uniform(mw.random.split(KEY, LAYERS), A), TypeError)
    assert "uniform: expected one key, found a tensor of keys (layers=8)" in message


def test_wrong_arguments() -> None:
    message = _message(lambda: mw.random.uniform(KEY, (A, B), minval=LOW))
    assert "uniform: minval: the dim 'b' has size 24 in one operand and 8 in another" in message
    message = _message(lambda: mw.random.uniform(KEY, A, minval=LOW))
    assert "uniform: minval has dims (b=8) that the result (a=8) lacks" in message
    message = _message(lambda: mw.random.bernoulli(KEY, A, jnp.ones(8)), TypeError)
    assert "bernoulli: p: expected a tensor or a scalar, found an array of shape (8,)" in message
    assert "write mw.Dim(name, size)" in _message(lambda: mw.random.normal(KEY, "a"), TypeError)  # type: ignore[arg-type]
    message = _message(lambda: Way("x=4", "a:x").region(lambda k: mw.random.normal(k, mw.Dim("a", 6)))(KEY))
    assert "normal: the dim 'a' of size 6 cannot be split over the axis 'x' (size 4)" in message
    message = _message(lambda: mw.random.categorical(KEY, Tensor(jnp.arange(8), "a"), "a"), TypeError)
    assert "categorical: logits are floating, found int32 (a=8)" in message
    message = _message(lambda: mw.random.categorical(KEY, LOGITS, "vocab"))
    assert "categorical: there is no dim 'vocab' in (a=8, b=8, c=16). Known: a, b, c." in message
    assert "to shuffle along: over='a'" in _message(lambda: mw.random.permutation(KEY, LOGITS))


def test_wrong_dropout() -> None:
    assert "the rate is 1; it must be at least 0 and below 1" in _message(lambda: mw.dropout(X, 1, KEY))
    assert "there is no dim 'lenght' in (a=8, b=24, c=12)" in _message(lambda: mw.dropout(X, 0.5, KEY, over="lenght"))
    assert "dropout: expected a tensor" in _message(lambda: mw.dropout(jnp.ones(3), 0.5, KEY), TypeError)
