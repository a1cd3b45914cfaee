"""The reader of compiled programs, on text as XLA writes it; the expected rows are counted by hand."""

import jax
import pytest

import meshwright as mw
from meshwright.plan.groups import axes_of_groups, axes_of_pairs
from meshwright.plan.hlo import compiled_collectives, compiled_cycles

from .laws import Way, tensor

SIZES = {"x": 2, "y": 4}

TPU = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,128]) -> f32[16,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.7 = f32[64,128]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice = f32[16,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.7, %zero, %zero), dynamic_slice_sizes={16,128}
}

%async_computation (q: bf16[8,128]) -> bf16[16,128] {
  %q = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%q), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%asks (c: (s32[], bf16[8,128])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body (d: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %d = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %slice.1 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%d), index=1
  %start = ((bf16[8,128]{1,0}), bf16[16,128]{1,0}, u32[]{:S(2)}) async-start(%slice.1), calls=%async_computation
  %done = bf16[16,128]{1,0:T(8,128)(2,1)} async-done(%start), calls=%async_computation
  ROOT %next = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%turn.1, %slice.1)
}

%taken (e: f32[4]) -> f32[4] {
  %e = f32[4]{0} parameter(0)
  ROOT %permuted = f32[4]{0} collective-permute(%e), source_target_pairs={{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}
}

%left (f: f32[4]) -> f32[4] {
  ROOT %f = f32[4]{0} parameter(0)
}

ENTRY %main (g: f32[64,128], h: (s32[], bf16[8,128]), k: f32[4]) -> f32[4] {
  %g = f32[64,128]{1,0:T(8,128)} parameter(0)
  %h = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(1)
  %k = f32[4]{0} parameter(2)
  %fused = f32[16,128]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %stated = (s32[], bf16[8,128]) while(%h), condition=%asks, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %compared = (s32[], bf16[8,128]) while(%h), condition=%asks, body=%body
  %both = (f32[64,128]{1,0}, f32[4]{0}) all-reduce-start(%g, %k), replica_groups={}, to_apply=%add
  %waited = (f32[64,128]{1,0}, f32[4]{0}) all-reduce-done(%both)
  %alone = f32[4]{0} all-reduce(%k), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %named = f32[4]{0} all-reduce(%k), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add
  %part = f32[4]{0} all-reduce(%k), replica_groups=mesh['a'=8] {'a':(2)2}, to_apply=%add
  %odd = f32[4]{0} all-reduce(%k), replica_groups={{0,3},{1,2},{4,7},{5,6}}, to_apply=%add
  ROOT %either = f32[4]{0} conditional(%which, %k, %k), branch_computations={%taken, %left}
}
"""


def test_a_program_as_tpus_write_it() -> None:
    rows = [
        (r.kind, r.axes, r.group_size, r.dtype, r.payload_bytes, r.times, r.sure)
        for r in compiled_collectives(TPU, SIZES)
    ]
    assert rows == [
        ("reduce_scatter", ("y",), 4, "f32", 64 * 128 * 4, 1, True),
        ("all_gather", ("x",), 2, "bf16", 16 * 128 * 2, 5, True),
        ("all_gather", ("x",), 2, "bf16", 16 * 128 * 2, 6, True),
        ("all_reduce", ("x", "y"), 8, "f32", 64 * 128 * 4, 1, True),
        ("all_reduce", ("x", "y"), 8, "f32", 16, 1, True),
        ("all_reduce", ("x",), 2, "f32", 16, 1, True),
        ("all_reduce", (), 2, "f32", 16, 1, True),
        ("all_reduce", (), 2, "f32", 16, 1, True),
        ("permute", ("y",), 4, "f32", 16, 1, False),
    ]


def test_a_loop_whose_length_depends_on_values_counts_once() -> None:
    text = TPU.replace("%limit = s32[]{:T(128)} constant(6)", "%limit = s32[]{:T(128)} get-tuple-element(%c), index=0")
    gathers = [r for r in compiled_collectives(text, SIZES) if r.kind == "all_gather"]
    assert [(r.times, r.sure) for r in gathers] == [(5, True), (1, False)]


STEPS = """\
HloModule jit_step, is_scheduled=true

%starting (a: bf16[8,128]) -> (bf16[8,128], u32[]) {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[16,128]{1,0} all-gather(%a), replica_groups=[4,2]<=[2,4]T(1,0), frontend_attributes={chain_id="0"}
  ROOT %started = (bf16[8,128]{1,0}, u32[]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%carrying (b: bf16[8,128], c: bf16[4]) -> (bf16[16,128], bf16[4]) {
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %c = bf16[4]{0} parameter(1)
  %gather.2 = bf16[16,128]{1,0} all-gather(%b), replica_groups=[4,2]<=[2,4]T(1,0), frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[16,128]{1,0}, bf16[4]{0}) tuple(%gather.2, %c)
}

%asks (d: (s32[], bf16[8,128], bf16[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %d = (s32[]{:T(128)}, bf16[8,128]{1,0}, bf16[4]{0}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%d), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body (e: (s32[], bf16[8,128], bf16[4])) -> (s32[], bf16[8,128], bf16[4]) {
  %e = (s32[]{:T(128)}, bf16[8,128]{1,0}, bf16[4]{0}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%e), index=1
  %y = bf16[4]{0} get-tuple-element(%e), index=2
  %start = (bf16[8,128]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%starting
  %on = (bf16[16,128]{1,0}, bf16[4]{0}) fusion(%x, %y), calls=%carrying, backend_config={"estimated_cycles":"100"}
  %token = token[] after-all()
  %send.1 = (bf16[4]{0}, token[]) send(%y, %token), frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}
  ROOT %next = (s32[]{:T(128)}, bf16[8,128]{1,0}, bf16[4]{0}) tuple(%turn.1, %x, %y)
}

ENTRY %main (f: bf16[8,128], g: bf16[4]) -> bf16[8,128] {
  %f = bf16[8,128]{1,0} parameter(0)
  %g = bf16[4]{0} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %begin = (s32[]{:T(128)}, bf16[8,128]{1,0}, bf16[4]{0}) tuple(%first, %f, %g)
  %peeled = bf16[8,128]{1,0} fusion(%f), calls=%left, backend_config={"window_config":{"estimated_cycles":"7"}}
  %loop = (s32[], bf16[8,128], bf16[4]) while(%begin), condition=%asks, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}

%left (h: bf16[8,128]) -> bf16[8,128] {
  ROOT %h = bf16[8,128]{1,0} parameter(0)
}
"""


def test_a_collective_in_steps_counts_once_and_a_peeled_loop_its_turns() -> None:
    rows = [
        (r.kind, r.axes, r.group_size, r.payload_bytes, r.times)
        for r in compiled_collectives(STEPS, {"pod": 3, **SIZES}, {"pod": 3})
    ]
    assert rows == [("all_gather", ("x",), 2, 16 * 128 * 2, 5), ("all_gather", ("pod",), 3, 3 * 4 * 2, 5)]


def test_cycles_are_those_of_fusions_and_loops() -> None:
    assert compiled_cycles(STEPS) == (7 + 5 * 100, True)
    unstated = STEPS.replace("%limit = s32[]{:T(128)} constant(6)", "%limit = s32[]{:T(128)} parameter(1)")
    assert compiled_cycles(unstated) == (7 + 100, False)
    assert compiled_cycles(TPU) == (None, True)


def test_groups_of_devices_are_axes() -> None:
    sizes = tuple(SIZES.items())
    assert axes_of_groups(((0, 4), (1, 5), (2, 6), (3, 7)), sizes) == (("x",), 2)
    assert axes_of_groups(((0, 1, 2, 3), (4, 5, 6, 7)), sizes) == (("y",), 4)
    assert axes_of_groups(((0, 2), (1, 3), (4, 6), (5, 7)), sizes) == ((), 2), "a half of an axis"
    assert axes_of_pairs([(0, 4), (4, 0)], sizes) == (("x",), 2)
    assert axes_of_pairs([(3, 4)], sizes) == (("x", "y"), 8)
    assert axes_of_pairs([], sizes) == ((), 1)


def test_what_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="found no ENTRY computation"):
        compiled_collectives("HloModule empty", SIZES)
    text = TPU.replace("replica_groups={{0,3},{1,2},{4,7},{5,6}}", "replica_groups=somehow")
    with pytest.raises(ValueError, match="all-reduce 'odd' states its groups of devices in a form that is not known"):
        compiled_collectives(text, SIZES)


def test_a_program_that_this_machine_compiles() -> None:
    """Seven turns of a product that is summed, each turn's branch with a sum of its own."""

    def program(x: mw.Tensor, w: mw.Tensor) -> jax.Array:
        def turn(c: mw.Tensor, _: None) -> tuple[mw.Tensor, None]:
            c = mw.dot(c, w, "b").rename(c="b")
            return jax.lax.cond(mw.sum(c) > 0, lambda c: mw.tanh(c) * mw.max(c), lambda c: c, c), None

        return mw.sum(jax.lax.scan(turn, x, None, length=7)[0])

    x, w = tensor(*mw.dims(a=8, b=16)), tensor(*mw.dims(b=16, c=16), seed=1)
    run = jax.jit(Way("x=2,y=4", "a:x, c:y").region(program))
    found = compiled_collectives(str(run.lower(x, w).compile().as_text()), SIZES)
    rows = sorted((r.kind, r.axes, r.payload_bytes, r.times, r.sure) for r in found)
    assert rows == [
        ("all_gather", ("y",), 4 * 16 * 4, 7, True),
        ("all_reduce", ("x",), 4, 1, True),
        ("all_reduce", ("x",), 4, 7, False),
        ("all_reduce", ("x", "y"), 4, 7, True),
    ]
