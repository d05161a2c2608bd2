"""Whether a module is what its class says, so that its parts may be used in its place."""

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether a module is of this very class, and nobody hooked it."""
    hooks = (
        module._forward_pre_hooks, module._forward_hooks,
        module._backward_pre_hooks, module._backward_hooks,
    )  # fmt: skip
    return type(module) is kind and not any(hooks)
