"""Mamba state-space models on PyTorch, in which the state is a value."""

# Nothing is imported here: an interruption of the command would show where. Type checkers know
# the name wherever it comes from.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from . import ops
    from .models import MambaConfig, MambaLM
    from .modules import Mamba

    __version__: str

__all__ = ["Mamba", "MambaConfig", "MambaLM", "__version__", "ops"]

_HOME = {"Mamba": ".modules", "MambaConfig": ".models", "MambaLM": ".models", "ops": ".ops"}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for.

    PyTorch takes seconds to import, and ``mambakit --help`` should not wait for it.
    """
    if name == "__version__":
        from importlib.metadata import version

        return version("mambakit")
    if name not in _HOME:
        raise AttributeError(f"module 'mambakit' has no attribute {name!r}")
    from importlib import import_module

    home = import_module(_HOME[name], __name__)
    return home if name == "ops" else getattr(home, name)
