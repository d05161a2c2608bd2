"""Whether a module is what its class says, so that its parts may be used in its place."""

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether a module is of this very class, and nobody hooked it or gave it a forward."""
    return type(module) is kind and not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )
