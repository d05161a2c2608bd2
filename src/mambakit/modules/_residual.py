"""The residual stream between blocks, whose last sum is left to the norm that reads it.

    block by block       x = x + mixer(norm(x))
    with sums left open  x, y = x + y, norm(x + y)        one pass over memory
                         y = mixer(y)

The same numbers in the same order; but a norm of a sum reads the stream once, where a sum and
then a norm read it twice. Between blocks the stream is ``x + y``; ``y = None`` says that
nothing is left to add.
"""

from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ._plain import is_plain
from .block import Block
from .norm import RMSNorm


def normalise(
    norm: Any, x: Float[Tensor, "*batch m"], y: Float[Tensor, "*batch m"] | None
) -> tuple[Float[Tensor, "*batch m"], Float[Tensor, "*batch m"]]:
    """Return the stream ``x + y``, and what the module ``norm`` makes of it."""
    if y is None:
        return x, norm(x)
    if _is_untouched(norm, RMSNorm):
        return norm.after_sum(x, y)
    x = x + y
    return x, norm(x)


def may_stay_open(block: nn.Module) -> TypeGuard[Block]:
    """Say whether a block's norm and mixer may be called in its place, and its sum left open.

    Not if somebody has hooked or compiled it or put another module in its place: then what it
    takes and returns must be the stream itself.
    """
    return _is_untouched(block, Block)


# What calling one runs, unless somebody has put something else in its place.
_FORWARD: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (Block, RMSNorm)}


def _is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether to call a module is to call its class's ``forward``, and nothing else."""
    return (
        not torch.compiler.is_compiling()  # a compiler sees each call as it is written
        and is_plain(module, kind)
        and kind.forward is _FORWARD[kind]
        and module._compiled_call_impl is None
        and not nn.modules.module._has_any_global_hook()
    )
