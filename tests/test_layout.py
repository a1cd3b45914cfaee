"""Layouts: how they are written, what they split at rest, what they refuse, and how they explain themselves."""

import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import meshwright as mw
from meshwright import Dim, Layout, Mesh, Tensor
from meshwright.explain import show_bytes
from meshwright.tiles import show_ids

from .laws import Way, agree, tensor

A, B, C = mw.dims(a=8, b=8, c=16)


def refused(make: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        make()
    message = str(caught.value)
    assert "test_layout.py" in message.splitlines()[-1], message
    return message


# How it is written


@pytest.mark.parametrize(
    "rules",
    [
        "batch:(pod,data), heads:model",
        "batch:(pod,data);heads:model",
        " batch : ( pod , data )\n heads:(model) ;",
        {"batch": ("pod", "data"), "heads": "model"},
        {"batch": "(pod,data)", "heads": ["model"]},
        [("batch", ("pod", "data")), ("heads", "model")],
    ],
)
def test_every_form_is_the_same_layout(rules: Any) -> None:
    layout = Layout(rules)
    assert layout.rules == {"batch": ("pod", "data"), "heads": ("model",)}
    assert layout == Layout("batch:(pod,data), heads:model") and hash(layout) == hash(Layout(rules))
    assert layout.text == "batch:(pod,data), heads:model" and layout.names() == ("batch", "heads")


def test_rules_at_rest_are_for_dims_or_for_whichever_dim_suits() -> None:
    for params in ("embed:data", {"embed": "data"}, [("embed", ("data",))]):
        assert Layout("", params=params) == Layout("", params="embed:data")
    for params in ("(pod,data)", ("pod", "data"), ["pod", "data"]):
        assert Layout("", params=params) == Layout("", params="(pod,data)")
    assert Layout("", params="data") == Layout("", params=("data",)) != Layout("", params="embed:data")
    assert Layout("", params="data").optimizer == Layout("", params="data").params
    assert Layout("", params="data", optimizer="") != Layout("", params="data")
    assert Layout("a:x", params="b:y", optimizer="c:y, b:x").names() == ("a", "b", "c")


def test_a_layout_does_not_change() -> None:
    layout = Layout("batch:data", params="embed:data", gather="step", sums=jnp.float32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.gather = "use"  # type: ignore[misc]
    layout.rules["heads"] = ("model",)
    assert layout.rules == {"batch": ("data",)}
    assert layout.replace(gather="use", sums=None) == Layout("batch:data", params="embed:data")
    assert layout.replace(params="") == Layout("batch:data", gather="step", sums="float32")
    assert layout.replace(rules="", optimizer="data").optimizer.axes == ("data",)


names = st.sampled_from(["a", "b", "c", "d"])
axes = st.lists(st.sampled_from(["x", "y", "z"]), unique=True, max_size=3).map(tuple)
rules = st.dictionaries(names, axes, max_size=4)
at_rest = st.one_of(st.none(), rules, axes)


options = st.fixed_dictionaries(
    {
        "gather": st.sampled_from(["use", "step"]),
        "strict": st.booleans(),
        "sums": st.sampled_from([None, "float32"]),
        "overlap": st.sampled_from([None, "x", ("y", "x")]),
    }
)


@given(rules, at_rest, at_rest, options)
def test_repr_is_the_layout(rules: Any, params: Any, optimizer: Any, options: Any) -> None:
    layout = Layout(rules, params=params, optimizer=optimizer, **options)
    again = eval(repr(layout), {"Layout": Layout})
    assert again == layout and hash(again) == hash(layout) and repr(again) == repr(layout)
    assert layout.replace() == layout


def test_printing() -> None:
    layout = Layout("batch:(pod,data), heads:model, x:()", params="data", optimizer="embed:(pod,data)", sums="float32")
    assert str(layout) == (
        'Layout("batch:(pod,data), heads:model, x:()", params="data", optimizer="embed:(pod,data)", sums="float32")\n'
        "  batch      over pod x data\n"
        "  heads      over model\n"
        "  x          not split\n"
        "  params     each over data, along the dim that suits it; gathered at each use\n"
        "  optimizer  embed over pod x data\n"
        "  sums       across devices in float32"
    )
    assert str(Layout("", strict=True, gather="step")) == (
        'Layout("", gather="step", strict=True)\n'
        "  compute  nothing is split\n"
        "  params   split by their compute rules alone\n"
        "  strict   a rule whose dim is never met is an error"
    )


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: Layout("batch"), ValueError, "Layout: 'batch' is not a name and its value. Write dim:axis"),
        (
            lambda: Layout("a:x, batch=data"),
            ValueError,
            "'batch=data' in 'a:x, batch=data' is not a name and its value",
        ),
        (lambda: Layout("a:x:y"), ValueError, 'as in "batch:(pod,data), heads:model"'),
        (lambda: Layout("a:"), ValueError, "'a:' is not a name and its value"),
        (lambda: Layout("a:x, a:y"), ValueError, "the dim 'a' stands twice in 'a:x, a:y'"),
        (lambda: Layout("a:(x,x)"), ValueError, "the axis 'x' stands twice in the rule '(x,x)' of 'a:(x,x)'"),
        (lambda: Layout("a:(x,y"), ValueError, "the parentheses in 'a:(x,y' do not match"),
        (lambda: Layout("a:x)"), ValueError, "the parentheses in 'a:x)' do not match"),
        (lambda: Layout("a:x y"), ValueError, "'x y' in 'a:x y' is not the name of an axis"),
        (lambda: Layout("a b:x"), ValueError, "'a b' in 'a b:x' is not the name of a dim"),
        (lambda: Layout({"a": 3}), TypeError, "3 in {'a': 3} is an int, not an axis"),
        (lambda: Layout(["a"]), TypeError, "'a' is not a pair of a name and a value"),  # type: ignore[list-item]
        (lambda: Layout(7), TypeError, "expected a string, a dict or pairs, found an int"),  # type: ignore[arg-type]
        (lambda: Layout("a:x", parms="y"), TypeError, "there is no option 'parms'. Did you mean 'params'?"),  # type: ignore[arg-type]
        (lambda: Layout("", gather="steps"), ValueError, "gather='steps' is unknown. Did you mean 'step'?"),
        (lambda: Layout("", params="pod, data"), ValueError, 'write several axes for one dim as "(pod, data)"'),
        (lambda: Layout("", params="embed:"), ValueError, "Layout: params=: 'embed:' is not a name and its value"),
        (lambda: Layout("", optimizer="a:b c"), ValueError, "Layout: optimizer=: 'b c'"),
        (lambda: Layout("", params=3), TypeError, "found an int"),
        (lambda: Layout("", sums="int32"), ValueError, "sums='int32' is not a floating dtype"),
        (lambda: Layout("", sums="float33"), ValueError, "sums='float33' is not a floating dtype"),
        (lambda: Layout("", strict=1), TypeError, "strict=1: it must be True or False"),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_a_layout(make: Callable[[], Any], kind: type[Exception], says: str) -> None:
    assert says in refused(make, kind)


# Against a mesh


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (
            Layout("a:x, b:dta"),
            "the rule 'b:dta' names the axis 'dta', which the mesh (data=4, x=2) lacks. Did you mean 'data'?",
        ),
        (Layout("a:(x,dat)"), "the rule 'a:(x,dat)' names the axis 'dat'"),
        (Layout("a:x", params="a:dta"), "params='a:dta' names the axis 'dta'"),
        (Layout("a:x", params="(x,dta)"), "params='(x,dta)' names the axis 'dta'"),
        (Layout("a:x", optimizer="dta"), "optimizer='dta' names the axis 'dta'"),
    ],
)
def test_an_axis_that_the_mesh_lacks(layout: Layout, says: str) -> None:
    mesh = Mesh("data=4, x=2")
    assert says in refused(lambda: layout.check(mesh))
    assert says in refused(lambda: mw.spmd(lambda t: t, mesh, layout))
    Layout("a:x", params="a:data").check(mesh)


DIMS = mw.dims(layers=4, embed=8, heads=4, head_dim=6)


@pytest.mark.parametrize(
    ("rules", "params", "expected"),
    [
        ("", "data", {"embed": ("data",)}),  # the largest
        ("layers:model", "data", {"embed": ("data",)}),
        ("embed:model", "data", {"heads": ("data",)}),  # embed and heads have 4 left each: the last
        ("heads:model", "model", {}),  # already split over it
        ("heads:model", "(data,model)", {"embed": ("data",)}),
        ("", "(data,model)", {"embed": ("data", "model")}),
        ("embed:data", "(data,model)", {"head_dim": ("model",)}),
        ("", "layers:data, heads:model", {"layers": ("data",), "heads": ("model",)}),
        ("", "heads:data, embed:data", {"heads": ("data",)}),  # the first rule has it
        ("embed:model", "embed:(model,data)", {"embed": ("data",)}),
        ("", "other:data", {}),
        ("", "", {}),
    ],
)
def test_what_is_split_at_rest(rules: str, params: str, expected: dict[str, tuple[str, ...]]) -> None:
    scope = (layout := Layout(rules, params=params)).scope(Mesh("data=4, model=2"))
    found = layout.at_rest(scope, DIMS, "parameter")
    assert {d.name: axes for d, axes in zip(DIMS, found, strict=True) if axes} == expected
    assert layout.at_rest(scope, DIMS, "optimizer") == found
    assert not any(layout.at_rest(scope, DIMS, "activation"))


def test_the_leading_dim_and_dims_that_do_not_divide() -> None:
    scope = (layout := Layout("", params="data")).scope(Mesh("data=8"))
    for these, expected in [
        (mw.dims(vocab=64, embed=8), ((), ("data",))),  # the first is the last resort
        (mw.dims(vocab=64, embed=6), (("data",), ())),
        (mw.dims(embed=16), (("data",),)),
        (mw.dims(vocab=12, embed=6), ((), ())),  # none: it stays whole
    ]:
        assert layout.at_rest(scope, these, "parameter") == expected
    one = (layout := Layout("", params="data")).scope(Mesh("data=1", jax.devices()[:1]))
    assert layout.at_rest(one, DIMS, "parameter") == ((),) * 4


def test_the_optimizers_own_rules() -> None:
    layout = Layout("heads:model", params="", optimizer="embed:data")
    scope = layout.scope(Mesh("data=4, model=2"))
    assert not any(layout.at_rest(scope, DIMS, "parameter"))
    assert layout.at_rest(scope, DIMS, "optimizer") == ((), ("data",), (), ())
    message = refused(lambda: layout.at_rest(scope, DIMS, "optimiser"))
    assert "has the role 'optimiser'. Did you mean 'optimizer'?" in message


def test_a_dim_that_cannot_be_split_at_rest() -> None:
    layout = Layout("head_dim:model", params="head_dim:data")
    w = tensor(*DIMS, role="parameter")
    message = refused(lambda: mw.spmd(lambda x: x, Mesh("data=4, model=2"), layout)(w))
    assert (
        "the dim 'head_dim' of size 6, split over model in use, cannot be split at rest over 'data' (size 4)" in message
    )
    assert "6 is not a multiple of 8" in message and "tensor: (layers=4, embed=8, heads=4, head_dim=6)" in message
    assert 'layout: "head_dim:model", params="head_dim:data"' in message
    assert "Make 'head_dim' a multiple of 8 (8), or name the axes alone, params='data'" in message


def test_results_do_not_depend_on_what_is_split_at_rest() -> None:
    w, x = tensor(B, C, role="parameter"), tensor(A, B, seed=1)
    over = [
        Way("x=2,y=2", "a:x", {"params": "y"}),
        Way("x=2,y=2", "a:(x,y)", {"params": "(y,x)"}),
        Way("x=2,y=4", "a:x, c:y", {"params": "c:x, b:y", "gather": "step"}),
        Way("x=2,y=2", "b:x", {"params": {"c": ("x", "y")}}),
        Way("x=2,y=2", "a:x", {"params": "y"}, "xla"),
    ]
    agree(lambda w, x: {"y": mw.dot(x, mw.tanh(w), "b"), "w": w * 2.0}, w, x, over=over)


# Explain


def shapes(role: Any = "parameter", dtype: Any = jnp.float32, **sizes: int) -> Tensor:
    these = mw.dims(**sizes)
    return jax.eval_shape(lambda: Tensor(jnp.zeros([d.size for d in these], dtype), these, role))


TREE = {
    "tokens": shapes("activation", jnp.int32, batch=16, length=128),
    "blocks": {"wq": shapes(layers=4, embed=256, heads=8, head_dim=32), "up": shapes(layers=4, embed=256, ff=1024)},
    "norm": shapes(dtype=jnp.bfloat16, embed=256),
    "odd": shapes(k=3),
    "step": jnp.int32(3),
    "name": "not an array",
}
LAYOUT = Layout("batch:data, heads:model, ff:model", params="data")


def test_explain_counts_what_is_really_placed() -> None:
    mesh = Mesh("data=4, model=2")
    values = jax.tree.map(lambda x: x if isinstance(x, str) else jnp.zeros(x.shape, x.dtype), TREE)
    placed = mw.shard(values, mesh, LAYOUT)
    found = {held.path: held for held in LAYOUT.explain(TREE, mesh).tensors}
    assert list(found) == ["blocks.up", "blocks.wq", "norm", "odd", "step", "tokens"]
    assert found == {held.path: held for held in LAYOUT.explain(placed, mesh).tensors}
    leaves = jax.tree_util.tree_leaves_with_path(placed, is_leaf=lambda x: isinstance(x, Tensor))
    for path, x in leaves:
        if isinstance(x, str):
            continue
        array = x.raw if isinstance(x, Tensor) else x
        held = found[jax.tree_util.keystr(path, simple=True, separator=".")]
        indices = [str(s.index) for s in array.addressable_shards]
        assert held.whole_bytes == array.nbytes and held.device_bytes == array.addressable_shards[0].data.nbytes
        assert held.num_tiles == len(set(indices)) and held.num_copies == indices.count(indices[0])
        assert held.dtype == str(array.dtype) and held.shape == array.shape
    assert found["blocks.wq"].compute == ((), (), ("model",), ()) and found["blocks.wq"].rest == ((), ("data",), (), ())
    assert found["norm"].split == (("data",),) and found["odd"].num_copies == 8 and found["step"].role == "array"
    whole = LAYOUT.explain(TREE, mesh)
    assert whole.whole_bytes == sum(held.whole_bytes for held in found.values())
    assert whole.device_bytes == sum(held.device_bytes for held in found.values())


def test_tiles_name_the_devices_that_hold_them() -> None:
    w = mw.Tensor(np.zeros((8, 8, 4), np.float32), "embed heads head_dim", "parameter")
    for text, layout in [
        ("data=4, model=2", Layout("heads:model", params="data")),
        ("data=2, model=2, z=2", Layout("heads:(model,z)", params="embed:data")),
        ("data=2, model=2, z=2", Layout("heads:model, embed:z", params="head_dim:data")),
        ("data=8", Layout("")),
        ("data=8", Layout("head_dim:()", params="embed:data")),
    ]:
        mesh = Mesh(text, jax.devices()[::-1])
        tiles = layout.explain({"w": w}, mesh).tiles("w")
        drawn: dict[frozenset[int], int] = {}
        for row in tiles.owners:
            for box in row:
                for part in box:
                    drawn[frozenset(part)] = len(part)
        held: dict[str, set[int]] = {}
        for s in mw.shard(w, mesh, layout).raw.addressable_shards:
            held.setdefault(str(s.index), set()).add(s.device.id)
        assert set(drawn) == {frozenset(ids) for ids in held.values()}


def test_the_picture() -> None:
    shown = str(
        Layout("embed:data, heads:model").explain(
            {"wq": shapes(embed=8, heads=4), "b": shapes(ff=3)}, "data=4, model=2"
        )
    )
    assert shown == GOLDEN.strip("\n")


GOLDEN = """
Layout("embed:data, heads:model")
Mesh of 8 devices: cpu
  data   4  devices 0, 2, 4, 6
  model  2  devices 0, 1

tensor   role        dims                         whole   a device   copies
───────────────────────────────────────────────────────────────────────────
b        parameter   ff=3                          12 B       12 B        8
wq       parameter   embed=8/data heads=4/model   128 B       16 B        1

all 2                                             140 B       28 B
dim=size/axis: split over the axis; /axis*: at rest only. Copies: devices with the same slice.

wq: 8 tiles
↓ embed over data   → heads over model
       0:2   2:4
     ┌─────┬─────┐
 0:2 │  0  │  1  │
     ├─────┼─────┤
 2:4 │  2  │  3  │
     ├─────┼─────┤
 4:6 │  4  │  5  │
     ├─────┼─────┤
 6:8 │  6  │  7  │
     └─────┴─────┘

b: whole on each of 8 devices
  ┌─────┐
  │ 0-7 │
  └─────┘
"""


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 4, 16, 64]), min_size=1, max_size=3),
    owner=st.lists(st.integers(0, 3), min_size=3, max_size=3),
)
def test_pictures_stay_narrow(sizes: list[int], owner: list[int]) -> None:
    axes = dict(zip("xyz", sizes, strict=False))
    abstract = Mesh(jax.sharding.AbstractMesh(tuple(sizes), tuple(axes)))
    these = mw.dims(first=2**18, second=2**19, third=2**20, fourth=2**21)
    rules: dict[str, list[str]] = {}
    for axis, i in zip(axes, owner, strict=False):
        rules.setdefault(these[i].name, []).append(axis)
    found = Layout(rules).explain({"w": shapes(**{d.name: d.size for d in these})}, abstract)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 40
    tiles = found.tiles("w")
    everyone = sorted(i for row in tiles.owners for box in row for part in box for i in part)
    assert everyone == list(range(math.prod(sizes)))


def test_explain_of_a_described_machine_and_of_the_optimizer() -> None:
    mesh = Mesh("pod=2, data=32, model=8", topology="tpu:v5p:8x8x8")
    layout = Layout("batch:data, ff:model", params="embed:data", optimizer="embed:(pod,data)")
    params, state = (layout.explain(TREE["blocks"]["up"], mesh, role=role).tensors[0] for role in (None, "optimizer"))
    assert (params.num_tiles, params.num_copies, params.role) == (256, 2, "parameter")
    assert (state.num_tiles, state.num_copies, state.role) == (512, 1, "optimizer")
    assert state.whole_bytes == 512 * state.device_bytes
    assert "1 tensor cut in other ways" in str(
        layout.explain({str(i): shapes(**{f"d{i}": 8}, embed=64 * 2**i) for i in range(5)}, mesh)
    )


def test_explain_refuses_what_does_not_fit() -> None:
    message = refused(lambda: Layout("k:data").explain(TREE, "data=8"))
    assert "explain: odd: the dim 'k' of size 3 cannot be split over the axis 'data' (size 8)" in message
    assert "there is no tensor 'blocks.wk'. Did you mean 'blocks.wq'?" in refused(
        lambda: LAYOUT.explain(TREE, "data=4, model=2").tiles("blocks.wk")
    )


def test_explain_in_colour() -> None:
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, color_system="256")
    explanation = LAYOUT.explain(TREE, "data=4, model=2")
    console.print(explanation)
    text = console.export_text(clear=False)
    assert [line.rstrip() for line in text.splitlines()] == str(explanation).splitlines()
    assert "48;5;" in console.export_text(styles=True)


@pytest.mark.parametrize(
    ("num", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (15 * 2**20, "15.0 MiB"), (2**60, "1024 PiB")]
)
def test_bytes(num: int, text: str) -> None:
    assert show_bytes(num) == text


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([3], "3"),
        ([0, 1], "0,1"),
        (range(8), "0-7"),
        ([0, 2, 4, 6], "0,2,4,6"),
        (range(0, 64, 8), "0,8,…,56"),
        ([0, 1, 2, 8, 9, 10], "0-2,8-10"),
    ],
)
def test_ids(ids: Any, text: str) -> None:
    assert show_ids(ids) == text


def test_explain_says_which_rule_at_rest_splits_nothing() -> None:
    mesh = Mesh("data=2", jax.devices()[:2])
    w, x = (tensor(*mw.dims(embed=4, ff=2), role=role) for role in ("parameter", "activation"))
    found = Layout("batch:data", params="embd:data, ff:data").explain({"w": w, "x": x}, mesh)
    note = "The rule at rest for 'embd' splits nothing: no tensor of the role 'parameter' has it. Did you mean 'embed'?"
    assert found.notes == (f"{note} Known: embed, ff.",)
    assert note.split(":")[0] in str(found)
    assert Layout("batch:data", params="embed:data").explain({"w": w}, mesh).notes == ()
    assert Layout("", params="embd:data").explain({"x": x}, mesh).notes == ()
    of_state = Layout("", params="embed:data", optimizer="f:data").explain({"w": w}, mesh, role="optimizer")
    assert "for 'f' splits nothing: no tensor of the role 'optimizer'" in of_state.notes[0]


# Names that inherit


def test_a_name_lies_as_the_one_it_stands_for_unless_the_layout_speaks_of_it() -> None:
    ring = dict(Layout("length:context, heads:model").splits())
    assert ring["attention_length"] == ring["residual_length"] == ("context",) and ring["attention_heads"] == ("model",)
    moved = dict(Layout("length:context, heads:model, attention_heads:(model,context)").splits())
    assert moved["attention_length"] == () and moved["residual_length"] == ("context",)
    experts = dict(Layout("batch:(data,expert), experts:expert").splits())
    assert experts["routed_batch"] == ("data",)
    assert dict(Layout("length:context, residual_length:()").splits())["residual_length"] == ()


def test_like_gives_a_models_own_names_an_inheritance() -> None:
    layout = Layout("length:(x,y), heads:y", like={"memory": "length - heads"})
    assert dict(layout.splits())["memory"] == ("x",) and eval(repr(layout)) == layout
    assert layout != Layout("length:(x,y), heads:y") and layout.replace(gather="step").like == layout.like
    assert "like" in str(layout)
    m = Dim("memory", 4)
    where = layout.explain({"m": tensor(m)}, Mesh("x=2, y=2", jax.devices()[:4]))
    assert "memory=4/x" in str(where)


def test_the_width_of_experts_inherits_that_of_feed_forward_layers() -> None:
    """In use less the axes of the experts, and at rest; a rule for ``ff`` is of use where only experts have a width."""
    assert dict(Layout("experts:data, ff:model").splits())["expert_ff"] == ("model",)
    assert dict(Layout("experts:model, ff:model").splits())["expert_ff"] == ()
    mesh, width = mw.Mesh("data=2, model=4"), mw.dims(experts=4, embed=8, expert_ff=8)
    layout = Layout("ff:model", params="ff:data")
    assert layout.at_rest(layout.scope(mesh), width, "parameter") == ((), (), ("data",))
    held = layout.explain(mw.zeros(width).astype("float32"), mesh, "parameter")
    assert held.notes == ()
    assert layout.unused(["experts", "expert_ff"]) == [] != layout.unused(["experts"])
    apart = Layout("expert_ff:model", params="ff:data")
    assert apart.unused(["experts", "expert_ff"]) == []
    both = Layout(params="ff:data, expert_ff:model")
    assert "rule at rest for 'ff' splits nothing" in both.explain(mw.zeros(width), mesh, "parameter").notes[0]
    assert Layout("batch:data, experts:model, ff:model").for_dims({"expert_ff"}).rules == {
        "experts": ("model",), "ff": ("model",),
    }  # fmt: skip
    own = Layout("ff:model, expert_ff:data")
    assert "'ff' was not used" in own.unused(["expert_ff"])[0]


def test_inheritance_in_a_circle_is_refused() -> None:
    assert "a -> b -> a" in refused(lambda: Layout("a:x", like="a:b, b:a"))
    assert "in a circle" in refused(lambda: Layout("a:x", like="heads:attention_heads"))
    assert "is not the name of a dim" in refused(lambda: Layout("a:x", like="a:b-"))
