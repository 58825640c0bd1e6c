"""Which Lightning: ``lightning`` and ``pytorch_lightning`` are two packages with the same code and unrelated classes.

A Trainer accepts only a strategy that inherits from its own package's ``Strategy``. So the public class has no Lightning
base; an instance gets one when it is made, from the package that the program has imported. If the program has imported
both, the instance inherits from both until a Trainer hands it an accelerator, which tells whose it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import Any

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_OLDEST = (2, 2)


def packages_in_use() -> tuple[ModuleType, ...]:
    """The Lightning packages that this program has imported; if none, all that are installed."""
    imported = [name for name in _PACKAGES if name in sys.modules]
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name.partition(".")[0]) is not None]
    names = imported or installed
    if not names:
        raise ImportError(
            "potluck.lightning needs Lightning >= 2.2: pip install lightning (or pip install pytorch-lightning)"
        )
    return tuple(_load(name) for name in names)


def _load(name: str) -> ModuleType:
    module = importlib.import_module(name)
    importlib.import_module(f"{name}.strategies")
    version = str(
        getattr(module, "__version__", None) or importlib.import_module(name.partition(".")[0]).__version__
    )
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise ImportError(f"potluck.lightning needs {name} >= 2.2, but {version} is installed")
    return module


def package_of(lightning_object: Any) -> ModuleType:
    """The Lightning package that an accelerator, a Trainer or a module of the program belongs to."""
    for base in type(lightning_object).__mro__:
        for name in _PACKAGES:
            if base.__module__.startswith(name + "."):
                return _load(name)
    raise TypeError(
        f"{type(lightning_object).__qualname__} does not come from lightning or pytorch_lightning"
    )


@cache
def bound_class(cls: type, packages: tuple[ModuleType, ...]) -> type:
    """``cls`` with the ``Strategy`` of these packages as base classes."""
    bases = tuple(package.strategies.Strategy for package in packages)
    return type(
        cls.__name__, (cls, *bases), {"__module__": cls.__module__, "__doc__": cls.__doc__, "_unbound": cls}
    )


def submodule(package: ModuleType, name: str) -> ModuleType:
    """``package.name``, imported if need be."""
    return importlib.import_module(f"{package.__name__}.{name}")
