"""What a pipeline keeps in memory under each schedule, from the compiler's own analysis for virtual CPU devices.

    python benchmarks/pipeline_memory.py

Temporaries of one device, in MiB.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import meshwright as mw
from meshwright.models import Decoder, DecoderConfig
from meshwright.nn import cross_entropy

MIB = 2**20


def temporaries(fn: Callable[..., Any], *args: Any) -> float:
    """MiB of temporaries on a device."""
    compiled: Any = jax.jit(fn).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB


def decoder_loss(model: Decoder, ids: mw.Tensor) -> jax.Array:
    return mw.mean(cross_entropy(model(ids), ids, over="vocab"))


def pipeline() -> None:
    """4 stages and 16 microbatches of 4 sequences of 256 tokens; 8 layers, 128 wide, each rematerialised."""
    config = DecoderConfig(vocab=256, embed=128, layers=8, heads=4, head_dim=32, ff=512, remat="nothing")
    model = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    ids = mw.Tensor(jnp.zeros((64, 256), jnp.int32), "batch length")
    print("\n| 4 stages, 16 microbatches | inputs of stages kept | temporaries |\n| --- | --- | --- |")
    for schedule, runs, kept in [("gpipe", 1, 16), ("1f1b", 1, 3), ("1f1b", 2, 10)]:
        layout = mw.Layout("layers:pipe", microbatches=16, schedule=schedule, virtual_stages=runs)
        inside = mw.spmd(decoder_loss, mw.Mesh("pipe=4", jax.devices()[:4]), layout)
        found = temporaries(jax.value_and_grad(inside), model, ids)
        name = schedule + (f", virtual_stages={runs}" if runs > 1 else "")
        print(f"| {name} | {kept} of 0.5 MiB | {found:.1f} MiB |", flush=True)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    pipeline()


if __name__ == "__main__":
    main()
