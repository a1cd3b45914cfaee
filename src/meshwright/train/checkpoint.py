"""Checkpoints: a run's state on disk, by Orbax.

A checkpoint holds no layout. Every parameter is one array under its path and name, whatever devices had its slices, so
it is restored onto any mesh and layout, each device reading its own slices. Beside the arrays stand the recipe, the
tokenizer and the dims of each parameter, as JSON.

    DIR/400/model        the parameters
    DIR/400/optimizer    the optimizer's state
    DIR/400/run          JSON: recipe, tokenizer, dims
"""

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from ..dims import show
from ..errors import fail
from ..explain import path_text
from ..models import Decoder
from ..tensor import Tensor, is_tensor
from .recipe import Recipe
from .step import State
from .tokenizer import Tokenizer

KEPT = 2
"""How many checkpoints of a run are kept: the last ones."""


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints in a folder.

    Args:
        folder: where they are; made when it is first saved to.

    Raises:
        ValueError: (when read) there is no checkpoint in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._manager.close()

    @property
    def last(self) -> int:
        """The number of steps done in the newest checkpoint."""
        step = self._manager.latest_step()
        if step is None:
            raise fail(f"There is no checkpoint in {str(self.folder)!r}. `mw train --save DIR` makes them.")
        return step

    def save(self, done: int, state: State, recipe: Recipe, tokenizer: Tokenizer) -> None:
        """Save the state after ``done`` steps; a checkpoint of the same step is written anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run = {"recipe": recipe.to_json(), "tokenizer": tokenizer.to_text(), "dims": dims_by_path(state.model)}
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(by_path(state.model)),
            optimizer=ocp.args.StandardSave(by_path(state.optimizer)),
            run=ocp.args.JsonSave(run),
        )
        self._manager.save(done, args=items)

    def run(self) -> tuple[Recipe, Tokenizer]:
        """The recipe and the tokenizer of the newest checkpoint."""
        run = self._restore(run=ocp.args.JsonRestore())["run"]
        return Recipe.from_json(run["recipe"]), Tokenizer.from_text(run["tokenizer"])

    def state(self, shapes: State) -> State:
        """The newest state, on the devices and in the slices that ``shapes`` (from ``jax.eval_shape``) has."""
        found = self._restore(
            model=ocp.args.StandardRestore(by_path(shapes.model)),
            optimizer=ocp.args.StandardRestore(by_path(shapes.optimizer)),
        )
        return State(like(shapes.model, found["model"]), like(shapes.optimizer, found["optimizer"]))

    def model(self, shapes: Decoder) -> Decoder:
        """The newest model alone, on the devices and in the slices that ``shapes`` has."""
        return like(shapes, self._restore(model=ocp.args.StandardRestore(by_path(shapes)))["model"])

    def _restore(self, **items: Any) -> Any:
        return self._manager.restore(self.last, args=ocp.args.Composite(**items))


def by_path(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their place in it: ``blocks.mlp.up.weight``."""
    return {path_text(path).removesuffix(".array"): x for path, x in jax.tree.leaves_with_path(tree)}


def like(tree: Any, arrays: dict[str, Any]) -> Any:
    """``tree`` with the arrays of these places."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree.unflatten(structure, [arrays[path_text(path).removesuffix(".array")] for path, _ in paths])


def dims_by_path(tree: Any) -> dict[str, str]:
    """The dims of a tree's tensors by their place in it."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_tensor)
    return {path_text(path): show(x.dims) for path, x in paths if isinstance(x, Tensor)}
