"""Products in rings: the same results, the same bytes, and nothing left that waits.

``overlap=`` may change when a slice is sent, never what comes out: law 1 over layouts whose products are gathered
before and scattered after. What goes round is counted by hand against the gathers and scatters that it replaces.
"""

import collections
import functools
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw

from .laws import Way, agree, assert_same, outcome, tensor
from .stablehlo import communicated, counted

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import handwritten_overlap

BATCH, LENGTH, EMBED, FF = mw.dims(batch=4, residual_length=16, embed=8, ff=24)
HEADS, GROUP, HEAD_DIM = mw.dims(heads=8, group=2, head_dim=4)
SEQUENCE = "residual_length:model, ff:model"


def _everywhere(split: str) -> list[Way]:
    """Rings of two to eight devices, along one axis and two, ``split`` being the dim of the weights that is split."""
    rules, one, two = f"residual_length:model, {split}:model", {"overlap": "model"}, {"overlap": "(model,pod)"}
    return [
        Way("model=2", rules, one),
        Way("model=4", rules, one),
        Way("model=8", rules, one),
        Way("model=4", rules, one, "xla"),
        Way("data=2,model=4", f"batch:data, {rules}", {"params": "embed:data", **one}),
        Way("data=2,model=4", f"batch:data, {rules}", {"params": "data", "gather": "step", **one}),
        Way("model=2,data=2", f"batch:data, {rules}", {"optimizer": "data", **one}),
        Way("context=2,model=2", f"length:context, residual_length:(context,model), {split}:model", one),
        Way("pod=2,model=4", rules.replace(":model", ":(pod,model)"), two),
        Way("pod=2,model=2", rules.replace(":model", ":(model,pod)"), two),
    ]


def _weights(*dims: mw.Dim, seed: int) -> mw.Tensor:
    return tensor(*dims, seed=seed, role="parameter")


def _mlp(x: Any, gate: Any, up: Any, down: Any) -> Any:
    h = mw.sin(x).rename(residual_length="length")
    wide = mw.silu(mw.dot(h, gate, "embed")) * mw.dot(h, up, "embed")
    return x + mw.dot(wide, down, "ff").rename(length="residual_length")


WEIGHTS = _weights(EMBED, FF, seed=1), _weights(EMBED, FF, seed=2), _weights(FF, EMBED, seed=3)
MLP = tensor(BATCH, LENGTH, EMBED), *WEIGHTS


def _attention(x: Any, q: Any, k: Any, v: Any, out: Any) -> Any:
    h = x.rename(residual_length="length")
    queries, keys, values = (mw.dot(h, w, "embed") for w in (q, k, v))
    scores = mw.einsum(queries, keys.rename(length="kv_length"), out=("batch", "heads", "group", "length", "kv_length"))
    mixed = mw.einsum(mw.softmax(scores, "kv_length"), values.rename(length="kv_length"), out=queries.names)
    return mw.dot(mixed, out, ("heads", "group", "head_dim")).rename(length="residual_length")


ATTENTION = (
    tensor(BATCH, LENGTH, EMBED),
    _weights(EMBED, HEADS, GROUP, HEAD_DIM, seed=1),
    _weights(EMBED, HEADS, HEAD_DIM, seed=2),
    _weights(EMBED, HEADS, HEAD_DIM, seed=3),
    _weights(HEADS, GROUP, HEAD_DIM, EMBED, seed=4),
)


# Results


def test_a_feed_forward_layer_in_rings() -> None:
    agree(_mlp, *MLP, over=_everywhere("ff"))


def test_attention_in_rings() -> None:
    agree(_attention, *ATTENTION, over=_everywhere("heads"))


A, B, C = mw.dims(a=8, b=16, c=24)


def _weight_first(x: Any, w: Any) -> Any:
    """The operands the other way round, and the dim that is cut first, last, or amid dims that are merged."""
    h = x.rename(a="rows")
    wide = mw.einsum(w, h, out=("c", "rows", "batch"))
    back = mw.einsum(w, wide, out=("b", "batch", "rows"))
    return wide, back.rename(rows="a")


def _both(x: Any, w: Any) -> Any:
    """One product with a gather before it and a scatter after it, over two axes."""
    return mw.dot(x.rename(a="rows"), w, "b").rename(rows="again")


def _some_by_themselves(x: Any, w: Any) -> Any:
    """What is gathered and not a free dim of the product stays a gather; a pending sum that is used stays a sum."""
    h = x.rename(a="rows")
    square = mw.einsum(h, h * 2.0, out=("b",))
    wide = mw.dot(h, w, "b")
    back = mw.dot(wide, w, "c")
    return square, back * 2.0, back.rename(rows="a"), back.rename(rows="a") + x.reorder("batch", "a", "b")


def test_whichever_operand_is_cut_and_wherever_its_dim_stands() -> None:
    x, w = tensor(A, mw.Dim("batch", 2), B), _weights(C, B, seed=1)
    over = [Way("x=4", "a:x, c:x", {"overlap": "x"}), Way("x=2,y=2", "a:x, c:x", {"overlap": "x", "params": "b:y"})]
    agree({"first": _weight_first, "some": _some_by_themselves}, x, w, over=over)


def test_a_gather_and_a_scatter_of_one_product() -> None:
    x, w = tensor(A, B), _weights(B, C, seed=1)
    over = [Way("x=2,y=2", "a:x, c:x, b:y, again:y", {"overlap": axes}) for axes in ("(x,y)", "x", "y")]
    agree(_both, x, w, over=over)
    assert counted(over[0].region(_both), x, w) == {"collective_permute": 2}


def _rematerialised(save: str, *given: Any) -> Any:
    return mw.remat(_mlp, save)(*given)


def _each_in_a_scan(x: Any, *weights: Any) -> Any:
    return mw.fold(lambda x, ws: _mlp(x, *ws), x, weights, over="layers")


def _mapped(x: Any, *weights: Any) -> Any:
    return mw.vmap(lambda x: _mlp(x, *weights), "batch")(x)


def _differentiated_inside(x: Any, *weights: Any) -> Any:
    return jax.grad(lambda x: mw.sum(mw.sin(_mlp(x, *weights))))(x)


def _used_outside_its_loop(x: Any, gate: Any, *_: Any) -> Any:
    """Gathered where it was made, once, for every turn of a loop."""
    h = x.rename(residual_length="length")
    return mw.fold(lambda total, w: total + mw.dot(h, gate * w, "embed"), mw.dot(h, gate, "embed"), gate, over="embed")


SOME = [_everywhere("ff")[i] for i in (1, 4, 5)]


def test_rings_inside_other_transformations() -> None:
    programs = {save: functools.partial(_rematerialised, save) for save in ("nothing", "dots", "everything")}
    agree({**programs, "vmap": _mapped, "grad": _differentiated_inside}, *MLP, over=SOME)
    agree(_mapped, *MLP, over=[Way("data=2,model=2", f"batch:data, {SEQUENCE}", {"overlap": "model"})])


def test_a_gradient_of_a_gradient() -> None:
    """Forward over reverse, and reverse over reverse, as without rings."""
    x, tangent = MLP[0], tensor(*MLP[0].dims, seed=9)

    def products(region: Any) -> Any:
        loss = region(lambda x, *weights: mw.sum(mw.sin(_mlp(x, *weights))))
        gradient = jax.grad(lambda x: loss(x, *WEIGHTS))
        along = jax.jit(lambda x: jax.jvp(gradient, (x,), (tangent,))[1])
        twice = jax.jit(jax.grad(lambda x: mw.sum(gradient(x) * tangent)))
        return along(x), twice(x)

    way = _everywhere("ff")[4]
    assert_same(products(way.region), products(lambda f: f), str(way))


def test_rings_in_a_scan_over_layers() -> None:
    layers = mw.Dim("layers", 3)
    weights = [_weights(layers, *w.dims, seed=i) * 0.3 for i, w in enumerate(WEIGHTS)]
    agree(_each_in_a_scan, MLP[0], *weights, over=SOME)


def test_microbatches_in_rings() -> None:
    way = Way("data=2,model=2", f"batch:data, {SEQUENCE}", {"overlap": "model", "microbatches": 2})
    agree(lambda *given: mw.mean(_mlp(*given) ** 2), *MLP, over=[way])


def test_bfloat16_summed_in_float32() -> None:
    """As without rings: to the rounding of bfloat16, in sums of few addends."""
    inputs = [x.astype("bfloat16") for x in MLP]

    def program(*given: Any) -> Any:
        return _mlp(*given).astype("float32")

    expected = outcome(program, inputs, None)
    for sums in (None, "float32"):
        options = {"overlap": "model", "params": "data", "sums": sums}
        way = Way("data=2,model=4", f"batch:data, {SEQUENCE}", options)
        assert_same(outcome(program, inputs, way), expected, str(way), relative=0.05)
    rows = [r for r in mw.plan(way.region(_mlp), *inputs).collectives if r.kind == "permute"]
    dtypes = {(r.origin.operation, r.dtype) for r in rows}
    assert dtypes == {("dot", "bfloat16"), ("rename", "float32")}, "slices as they are, sums wide"


def test_products_of_integers_are_as_they_were() -> None:
    x, w = tensor(A, B, dtype=jnp.int32), tensor(B, C, dtype=jnp.int32)
    way = Way("x=8", "a:x, c:x", {"overlap": "x"})
    with pytest.warns(UserWarning, match="overlap= over the axis 'x' was not used"):
        agree(lambda x, w: mw.dot(x.rename(a="rows"), w, "b"), x, w, over=[way], grads=False)


# What goes round


def _step(program: Any, way: Way, num: int) -> Any:
    def loss(*given: Any) -> Any:
        return mw.sum(program(*given) ** 2)

    return jax.jit(jax.value_and_grad(way.region(loss), argnums=tuple(range(num))))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    ("program", "inputs", "split"), [(_mlp, MLP, "ff"), (_attention, ATTENTION, "heads")], ids=["mlp", "attention"]
)
def test_slices_that_go_round_are_as_many_bytes_as_the_gathers_and_scatters(
    program: Any, inputs: Any, split: str, size: int
) -> None:
    """A gather and a scatter in each direction: one for all the products that share an input."""
    rules = f"residual_length:model, {split}:model"
    plain, ring = (Way(f"model={size}", rules, options) for options in ({}, {"overlap": "model"}))
    step = communicated(_step(program, plain, len(inputs)), *inputs)
    kinds = collections.Counter(kind for kind, _ in step)
    assert kinds == {"all_gather": 2, "reduce_scatter": 2, "all_reduce": 1}

    activation = BATCH.size * LENGTH.size * EMBED.size
    rings = communicated(_step(program, ring, len(inputs)), *inputs)
    assert [(kind, num) for kind, num in rings if kind != "all_reduce"] == (
        [("collective_permute", activation // size)] * (4 * (size - 1))
    ), "each of four moves (n - 1) / n of the whole"
    assert [num for kind, num in rings if kind == "all_reduce"] == [1], "the loss"


@pytest.mark.parametrize("partly", [{}, {"params": "embed:data"}, {"params": "data", "gather": "step"}], ids=str)
def test_the_compiled_step_has_rings_alone(partly: dict[str, str]) -> None:
    way = Way("data=2,model=4", f"batch:data, {SEQUENCE}", {"overlap": "model", **partly})
    text = str(_step(_mlp, way, len(MLP)).lower(*MLP).compile().as_text())
    found = re.findall(r"= \(?(\w+\[[\d,]*\])\S* (all-[a-z]+|reduce-scatter|collective-permute)(?:-start)?\(", text)
    kinds = collections.Counter(kind for _, kind in found)
    assert kinds["collective-permute"] == 4 * 3
    whole, slice_ = (BATCH.size // 2 * n * EMBED.size for n in (LENGTH.size, LENGTH.size // 4))
    for shape, kind in found:
        size = int(np.prod([int(n) for n in re.findall(r"\d+", shape.partition("[")[2])], initial=1))
        if kind == "collective-permute":
            assert size == slice_, shape
        else:
            assert size != whole and size != slice_, f"{kind} of {shape}: of weights and of the loss alone"


@pytest.mark.parametrize("save", [None, "nothing", "dots"])
def test_rings_multiply_and_keep_as_much(save: str | None) -> None:
    """The product that a ring stands for is dropped; weights are gathered as often as without; no activation is kept
    twice."""
    layers = mw.Dim("layers", 2)
    weights = [_weights(layers, *w.dims, seed=i) for i, w in enumerate(WEIGHTS)]

    def program(x: Any, *weights: Any) -> Any:
        return mw.fold(lambda x, ws: _mlp(x, *ws), x, weights, over="layers", remat=save)

    plain, rings = (
        mw.plan(
            _step(program, Way("data=2,model=4", f"batch:data, {SEQUENCE}", {"params": "embed:data", **options}), 4),
            MLP[0],
            *weights,
        )
        for options in ({}, {"overlap": "model"})
    )
    tokens = layers.size * BATCH.size * LENGTH.size // 8
    again = {None: 0, "nothing": 2, "dots": 0}[save]
    assert plain.flops.matmul == rings.flops.matmul == 2 * tokens * EMBED.size * FF.size * (3 * 3 + again)
    of_weights = [[r for r in p.collectives if r.axes == ("data",)] for p in (plain, rings)]
    assert len(of_weights[0]) == len(of_weights[1])
    kept = [sum(saved.num_bytes for saved in p.memory.saved) for p in (plain, rings)]
    assert kept[1] <= kept[0]


def test_slices_go_round_beside_products() -> None:
    """On chips whose products take long enough, the plan has the ring cost next to nothing."""
    mesh = mw.Mesh("data=2, model=4", topology="tpu:v5p:2x2x2")
    batch, length, embed, ff = mw.dims(batch=8, residual_length=4096, embed=4096, ff=16384)
    given = jax.eval_shape(
        lambda: (
            mw.zeros((batch, length, embed), dtype="bfloat16"),
            *(mw.param(mw.zeros(d, dtype="bfloat16")) for d in ((embed, ff), (embed, ff), (ff, embed))),
        )
    )
    exposed, hidden = {}, {}
    for overlap in (None, "model"):
        layout = mw.Layout("batch:data, residual_length:model, ff:model", overlap=overlap)
        times = mw.plan(mw.spmd(_mlp, mesh, layout), *given).time(mesh)
        exposed[overlap] = sum(axis.exposed_seconds for axis in times.axes)
        hidden[overlap] = sum(axis.seconds - axis.exposed_seconds for axis in times.axes)
    assert exposed["model"] < exposed[None] / 2
    assert hidden["model"] > hidden[None]


# Beside an expert's


def loss(x: Any, up: Any, down: Any) -> Any:
    """The layer of ``benchmarks/handwritten_overlap.py``."""
    wide = mw.silu(mw.dot(x.rename(residual_length="length"), up, "embed"))
    return mw.mean((x + mw.dot(wide, down, "ff").rename(length="residual_length")) ** 2)


@pytest.mark.parametrize(("mesh", "data"), [("model=2", None), ("model=8", None), ("data=2,model=4", "data")])
def test_the_layer_written_by_hand_agrees(mesh: str, data: str | None) -> None:
    way = Way(mesh, SEQUENCE + (f", batch:{data}" if data else ""), {"overlap": "model"})
    given = MLP[0], WEIGHTS[0], WEIGHTS[2]
    found = jax.jit(jax.value_and_grad(way.region(loss), (0, 1, 2)))(*given)
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    devices = np.array(jax.devices()[: math.prod(sizes.values())]).reshape(list(sizes.values()))
    by_hand = handwritten_overlap.mapped_loss(jax.sharding.Mesh(devices, tuple(sizes)), "model", data)
    expected = jax.jit(jax.value_and_grad(by_hand, (0, 1, 2)))(*(x.array for x in given))
    assert_same(jax.tree.leaves(found), jax.tree.leaves(expected), str(way))


# What is refused


def test_an_axis_that_the_mesh_lacks() -> None:
    with pytest.raises(ValueError, match=r"overlap='modle' names the axis 'modle'.*lacks.*'model'"):
        mw.spmd(_mlp, mw.Mesh("model=2", jax.devices()[:2]), mw.Layout(SEQUENCE, overlap="modle"))


def test_printing() -> None:
    layout = mw.Layout("ff:model", overlap=("model", "pod"))
    assert str(layout).splitlines() == [
        'Layout("ff:model", overlap="(model,pod)")',
        "  ff       over model",
        "  params   split by their compute rules alone",
        "  overlap  gathers and scatters over model x pod go on beside the products that they serve",
    ]
    assert layout.replace(overlap=None) == mw.Layout("ff:model") != layout


def test_several_axes_without_parentheses() -> None:
    with pytest.raises(ValueError, match=r"overlap=: 'model,pod' is not the name of an axis.*\"\(model,pod\)\""):
        mw.Layout(SEQUENCE, overlap="model,pod")


def test_an_axis_over_which_nothing_overlaps() -> None:
    way = Way("model=2", "ff:model", {"overlap": "model"})
    with pytest.warns(UserWarning, match="overlap= over the axis 'model' was not used.*residual_length:model"):
        jax.eval_shape(way.region(_mlp), *MLP)
    strict = Way("model=2", "ff:model", {"overlap": "model", "strict": True})
    with pytest.raises(ValueError, match="overlap= over the axis 'model' was not used"):
        jax.eval_shape(strict.region(_mlp), *MLP)
    stages = Way("pipe=2,model=2", f"layers:pipe, {SEQUENCE}", {"overlap": "model", "microbatches": 2})
    weights = [_weights(mw.Dim("layers", 2), *w.dims, seed=i) for i, w in enumerate(WEIGHTS)]

    def staged(*given: Any) -> Any:
        return mw.mean(_each_in_a_scan(*given) ** 2)

    with pytest.warns(UserWarning, match="between the stages of a pipeline nothing goes in a ring"):
        found = outcome(staged, [MLP[0], *weights], stages)
    assert_same(found, outcome(staged, [MLP[0], *weights], None), str(stages))
    alone = Way("model=1", SEQUENCE, {"overlap": "model", "strict": True})
    jax.eval_shape(alone.region(_mlp), *MLP)
