"""Parameters: tensors with a role.

The role decides where a tensor rests: ``Layout(..., params="embed:data")`` splits parameters between their uses over
axes that their names alone would not. What a parameter is used for never depends on it.
"""

from typing import Any

from ..dims import Dim, Dims, Names
from ..errors import fail_type
from ..tensor import PARAMETER, Tensor, make


def param(x: Any, dims: Dims | Dim | Names | None = None) -> Any:
    """A tensor with the parameter role.

    Args:
        x: a tensor, or an array of the shape of ``dims``.
        dims: the dims or their names, when ``x`` is an array.

    Raises:
        TypeError: ``x`` is an array and there are no dims.
    """
    if not isinstance(x, Tensor):
        if dims is None:
            raise fail_type("param: an array needs dims: mw.param(array, 'embed ff').")
        return param(Tensor(x, dims))
    if x.role == PARAMETER:
        return x
    return make(x.array, x.dims, asked="param", role=PARAMETER)
