"""What attention needs in temporary memory on each of four devices that share the length, at four lengths.

    python benchmarks/context.py

The gradient of causal attention (one sequence, 4 heads of 64, float32) is compiled for four virtual CPU devices, round
a ring and with heads split instead; nothing runs. Beside it the scores of one head's whole square, which neither holds.
"""

from typing import Any

import jax

import meshwright as mw

LENGTHS = (8192, 16384, 32768, 65536)
WAYS = {"ring": "length:context", "heads split": "length:context, attention_heads:context"}
HEADS, HEAD_DIM = 4, 64


def _loss(q: mw.Tensor, k: mw.Tensor, v: mw.Tensor) -> Any:
    q, k, v = (x.rename(length="attention_length", heads="attention_heads") for x in (q, k, v))
    out = mw.attention(q, k, v, over="attention_length", causal=True)
    return mw.sum(out.rename(attention_length="length", attention_heads="heads") ** 2)


def temporary_bytes(mesh: mw.Mesh, layout: str, length: int) -> int:
    """Of a device, by XLA's ``memory_analysis``."""
    dims = mw.dims(batch=1, length=length, heads=HEADS, head_dim=HEAD_DIM)
    x = mw.shard(jax.eval_shape(lambda: mw.zeros(dims)), mesh, mw.Layout(layout))
    gradient = jax.jit(jax.grad(mw.spmd(_loss, mesh, mw.Layout(layout)), (0, 1, 2)))
    analysis: Any = gradient.lower(x, x, x).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = mw.Mesh("context=4")
    print(f"| length | {' | '.join(WAYS)} | the scores of one head |\n| --- | --- | --- | --- |")
    for length in LENGTHS:
        found = [f"{temporary_bytes(mesh, layout, length) / 2**20:.0f} MiB" for layout in WAYS.values()]
        print(f"| {length} | {' | '.join(found)} | {length**2 * 4 / 2**20:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
