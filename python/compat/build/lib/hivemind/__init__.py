"""The import name ``hivemind``, provided by potluck: ``hivemind.x.y`` is the module ``potluck.x.y`` itself."""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import potluck

_PREFIX = __name__ + "."


class _Alias(MetaPathFinder, Loader):
    """Answers imports below ``hivemind`` with potluck's modules, so that classes are the same under both names."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        real = "potluck." + fullname[len(_PREFIX) :]
        try:
            found = importlib.util.find_spec(real)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ModuleNotFoundError(
                f"potluck has no {real!r}, which {fullname!r} stands for; "
                "the README's section on migration says what to use instead",
                name=fullname,
            )
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what stands in sys.modules afterwards, so both names are one module.
        sys.modules[module.__name__] = importlib.import_module("potluck." + module.__name__[len(_PREFIX) :])


sys.meta_path.insert(0, _Alias())


def __getattr__(name: str) -> Any:
    try:
        return getattr(potluck, name)
    except AttributeError:
        raise AttributeError(f"module 'hivemind' (provided by potluck) has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return dir(potluck)
