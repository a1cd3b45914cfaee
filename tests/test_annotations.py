"""mw.Tensor["batch embed"]: what fits such an annotation, under beartype and jaxtyping and without them."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import Float, Int, TypeCheckError, jaxtyped

import meshwright as mw

from .laws import Way, tensor

X = tensor(*mw.dims(batch=2, length=3, embed=4))


@pytest.mark.parametrize(
    "text", ["batch length embed", "batch, length, embed", "batch ... embed", "...", "batch ...", "... embed",
             "batch length embed ...", "batch length=3 embed", " batch  length embed=4 "],
)  # fmt: skip
def test_fits(text: str) -> None:
    assert isinstance(X, mw.Tensor[text])


@pytest.mark.parametrize(
    "text", ["batch length", "length batch embed", "batch length embed heads", "batch ... length", "embed ...",
             "batch length embed=5", "batch length kv_length", "batch length embed ... embed_out"],
)  # fmt: skip
def test_does_not_fit(text: str) -> None:
    assert not isinstance(X, mw.Tensor[text])


def test_dtypes() -> None:
    ids = tensor(mw.Dim("batch", 2), dtype=jnp.int32)
    assert isinstance(ids, mw.Tensor["batch", jnp.int32])
    assert isinstance(ids, mw.Tensor["batch", jnp.integer])
    assert isinstance(ids, mw.Tensor["batch", jnp.dtype("int32")])
    assert not isinstance(ids, mw.Tensor["batch", jnp.int8])
    assert not isinstance(ids, mw.Tensor["batch", jnp.floating])
    assert isinstance(X.astype(jnp.bfloat16), mw.Tensor["batch", "length", "embed", jnp.floating])
    assert isinstance(mw.random.split(mw.random.key(0), mw.Dim("n", 2)), mw.Tensor["n", jax.dtypes.prng_key])
    floating: Any = Float[mw.Tensor["batch ..."], "2 3 4"]
    integer: Any = Int[mw.Tensor["batch ..."], "..."]
    assert isinstance(X, floating) and not isinstance(X, integer)


def test_only_tensors_fit() -> None:
    for other in (None, 1.0, jnp.ones(2), X.array):
        assert not isinstance(other, mw.Tensor["..."])
    assert isinstance(None, mw.Tensor["batch"] | None)


def test_it_reads_as_it_was_written_and_is_made_once() -> None:
    assert repr(mw.Tensor["batch embed=512 ..."]) == 'Tensor["batch embed=512 ..."]'
    assert repr(mw.Tensor["batch", jnp.int32]) == 'Tensor["batch", int32]'
    assert repr(mw.Tensor["batch"] | None) == 'Tensor["batch"] | None'
    assert repr(mw.Tensor[" batch,  embed"]) == 'Tensor["batch embed"]'
    assert mw.Tensor["batch"] is mw.Tensor["batch"]


# Under beartype: names


@beartype
def _summed(x: mw.Tensor["batch embed"]) -> mw.Tensor["batch"]:
    return x.sum("embed")


@beartype
def _with_default(x: mw.Tensor["embed=4 ..."], bias: mw.Tensor["embed"] | None = None) -> Any:
    return x if bias is None else x + bias


def _refused(program: Any) -> str:
    with pytest.raises(BeartypeCallHintParamViolation) as caught:
        program()
    return str(caught.value)


def test_beartype_checks_names() -> None:
    assert _summed(X.sum("length")).names == ("batch",)
    message = _refused(lambda: _summed(X))
    assert "parameter x=" in message and 'violates type hint Tensor["batch embed"]' in message
    assert 'the tensor has the dims (batch=2, length=3, embed=4), not Tensor["batch embed"]' in message
    assert "ArrayImpl is not a tensor" in _refused(lambda: _summed(X.array))
    _with_default(X.reorder("embed", ...))
    _with_default(X.reorder("embed", ...), X.sum("batch length"))
    message = _refused(lambda: _with_default(X.sum("batch").rename(embed="e", length="embed").reorder("embed", "e")))
    assert "the tensor has the dims (embed=3, e=4); embed must be 4" in message


def test_dtype_in_the_message() -> None:
    @beartype
    def take(ids: mw.Tensor["batch", jnp.integer]) -> None: ...

    message = _refused(lambda: take(X.sum("length embed")))
    assert 'the tensor has the dims (batch=2) and the dtype float32, not Tensor["batch", integer]' in message


# Under jaxtyping: one size for one name in a call


@jaxtyped(typechecker=beartype)
def _scores(
    q: mw.Tensor["batch length embed"], k: mw.Tensor["batch kv_length ..."]
) -> mw.Tensor["batch ... kv_length"]:
    return mw.dot(q, k, "embed")


def test_jaxtyping_checks_that_one_name_has_one_size_in_a_call() -> None:
    keys = X.rename(length="kv_length")
    assert _scores(X, keys).names == ("batch", "length", "kv_length")
    longer = tensor(*mw.dims(batch=2, length=7, embed=4)).rename(length="kv_length")
    assert _scores(X, longer).shape == (2, 3, 7)
    other_batch = tensor(*mw.dims(batch=5, kv_length=3, embed=4))
    with pytest.raises(TypeCheckError) as caught:
        _scores(X, other_batch)
    message = str(caught.value)
    assert "typechecking parameter 'k'" in message and 'Expected type: Tensor["batch kv_length ..."]' in message
    assert "Tensor(batch=5, kv_length=3, embed=4; float32)" in message and "batch=2" in message
    with pytest.raises(TypeCheckError, match=r"batch length embed"):
        _scores(keys, keys)


def test_a_wrong_result_is_refused() -> None:
    @jaxtyped(typechecker=beartype)
    def wrong(x: mw.Tensor["batch ..."]) -> mw.Tensor["batch"]:
        return x.rename(batch="b").sum("length embed")

    with pytest.raises(TypeCheckError, match="return value") as caught:
        wrong(X)
    assert "Tensor(b=2; float32)" in str(caught.value)


def test_modules_jit_grad_and_regions() -> None:
    class Scale(eqx.Module):
        weight: mw.Tensor["embed"]

        @jaxtyped(typechecker=beartype)
        def __call__(self, x: mw.Tensor["batch ... embed"]) -> mw.Tensor["batch ... embed"]:
            return x * self.weight

    checked = jaxtyped(Scale, typechecker=beartype)
    model = checked(tensor(mw.Dim("embed", 4)))
    assert jax.tree.map(lambda a: None, model) is not None
    region = Way("x=2", "batch:x").region(lambda model, x: model(x).sum())
    grad = jax.jit(jax.grad(region))(model, X)
    assert isinstance(grad.weight, mw.Tensor["embed=4"])
    with pytest.raises(TypeCheckError):
        checked(tensor(mw.Dim("ff", 4)))


# What is no annotation


@pytest.mark.parametrize(
    ("item", "error", "words"),
    [
        ("", ValueError, "there are no dims; a scalar is a jax.Array"),
        ("batch batch", ValueError, "'batch' stands twice"),
        ("... batch ...", ValueError, "'...' stands twice"),
        ("batch heads*2", ValueError, "'heads*2' is neither a name, nor a name with a size (embed=512), nor '...'"),
        ("2 embed", ValueError, "'2' is neither a name"),
        ("embed=-1", ValueError, "'embed=-1' is neither a name"),
        (512, TypeError, "expected names, such as Tensor['batch embed'], and a dtype, found 512"),
        (("batch", 3), TypeError, "found ('batch', 3)"),
    ],
)
def test_errors(item: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        mw.Tensor[item]
    assert words in str(caught.value) and "test_annotations.py" in str(caught.value)


def test_an_annotation_makes_no_tensors() -> None:
    with pytest.raises(TypeError, match=r"is an annotation; make a tensor with mw.Tensor\(array, 'batch embed'\)"):
        mw.Tensor["batch embed"](jnp.ones((2, 3)))  # type: ignore[call-arg]


def test_without_a_type_checker_it_documents(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        from __future__ import annotations
        import inspect, sys
        import jax.numpy as jnp
        import meshwright as mw
        def f(x: mw.Tensor["batch embed"]) -> mw.Tensor["batch"]: return x
        assert f(1) == 1 and "beartype" not in sys.modules
        print(inspect.signature(f, eval_str=True))
    """)
    (tmp_path / "program.py").write_text(program)
    result = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == '(x: Tensor["batch embed"]) -> Tensor["batch"]'


def test_the_import_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = textwrap.dedent("""
        import meshwright as mw
        def f(x: mw.Tensor["batch embed"]) -> mw.Tensor["batch"]:
            return x.sum("embed")
    """)
    (tmp_path / "hooked_by_the_test.py").write_text(module)
    program = textwrap.dedent("""
        import jaxtyping, jax.numpy as jnp, meshwright as mw
        with jaxtyping.install_import_hook("hooked_by_the_test", "beartype.beartype"):
            from hooked_by_the_test import f
        print(f(mw.Tensor(jnp.ones((2, 3)), "batch embed")).names)
        try:
            f(mw.Tensor(jnp.ones((2, 3)), "embed batch"))
        except jaxtyping.TypeCheckError as error:
            print(str(error).splitlines()[1:3])
    """)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "('batch',)" in result.stdout and "Tensor(embed=2, batch=3; float32)" in result.stdout
