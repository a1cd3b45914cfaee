"""Handwritten digits, classified under any layout.

The network is written for one device; the layout is one argument, and changes no result:

    python examples/digits.py
    python examples/digits.py --devices 4 --mesh data=4 --layout batch:data
    python examples/digits.py --devices 4 --mesh data=2,model=2 --layout "batch:data, hidden:model"
    python examples/digits.py --devices 4 --mesh x=2,y=2 --layout "rows:x, cols:y"
    python examples/digits.py --devices 8 --mesh data=8 --layout batch:data --params data

The data are the 1797 images of 8 x 8 pixels in scikit-learn (``pip install scikit-learn``); every fifth is for testing.
"""

import time
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from sklearn.datasets import load_digits

import meshwright as mw
from meshwright.nn import Linear, cross_entropy

BATCH, EPOCHS = 64, 20
ROWS, COLS, HIDDEN, HIDDEN_OUT, CLASSES = mw.dims(rows=8, cols=8, hidden=128, hidden_out=128, classes=10)


class Network(eqx.Module):
    """Two hidden layers on the whole image."""

    first: Linear
    second: Linear
    last: Linear

    def __init__(self, key: jax.Array) -> None:
        first, second, last = jax.random.split(key, 3)
        self.first = Linear((ROWS, COLS), HIDDEN, key=first, bias=True)
        self.second = Linear(HIDDEN, HIDDEN_OUT, key=second, bias=True)
        self.last = Linear(HIDDEN_OUT, CLASSES, key=last, bias=True)

    def __call__(self, images: mw.Tensor) -> mw.Tensor:
        """Images (batch, rows, cols) to logits (batch, classes)."""
        return self.last(mw.relu(self.second(mw.relu(self.first(images)))))


def loss(network: Network, images: mw.Tensor, digits: mw.Tensor) -> jax.Array:
    return mw.mean(cross_entropy(network(images), digits, over="classes"))


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Classify handwritten digits."""

    layout: str = "batch:data"
    """Which dims are split: batch, rows, cols, hidden, hidden_out or classes."""
    params: str = ""
    """How parameters are split at rest: an axis, or "hidden:data"."""
    mesh: str = "data=1"
    """Axes and their sizes."""
    devices: int = 1
    """Virtual CPU devices to make where there is no accelerator."""


def main(options: Digits) -> None:
    jax.config.update("jax_num_cpu_devices", options.devices)
    mesh = mw.Mesh(options.mesh)
    layout = mw.Layout(options.layout, params=options.params, strict=True)

    images, digits = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    testing = np.arange(len(images)) % 5 == 0
    test_images = mw.Tensor(images[testing], "batch rows cols")
    images, digits, test_digits = images[~testing], digits[~testing].astype(np.int32), digits[testing]

    network = mw.shard(Network(jax.random.key(0)), mesh, layout)
    optimizer = optax.adam(1e-3)
    state = mw.shard(optimizer.init(network), mesh, layout, role="optimizer")
    value_and_grad = jax.value_and_grad(mw.spmd(loss, mesh, layout))

    @jax.jit
    def step(network: Any, state: Any, images: mw.Tensor, digits: mw.Tensor) -> tuple[Any, Any, jax.Array]:
        value, gradient = value_and_grad(network, images, digits)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(network, updates), state, value

    value, began = jnp.inf, time.monotonic()
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(images))
        for chosen in np.split(order[: len(order) // BATCH * BATCH], len(order) // BATCH):
            batch = mw.Tensor(images[chosen], "batch rows cols"), mw.Tensor(digits[chosen], "batch")
            network, state, value = step(network, state, *batch)
    seconds = time.monotonic() - began

    guesses = mw.argmax(mw.unshard(network)(test_images), "classes")
    accuracy = float(jnp.mean(guesses.array == test_digits))
    print(f"loss {float(value):.4f}, test accuracy {accuracy:.1%} on {len(test_digits)} images, {seconds:.1f} seconds")


if __name__ == "__main__":
    main(tyro.cli(Digits))
