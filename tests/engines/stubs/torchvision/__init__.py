"""Stands in for torchvision, whose published builds want another torch; engines import it and the tests never call it.

Every name is an empty class with any attribute, every submodule such a module.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Anything(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def _empty(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})


class _Submodules(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith("torchvision.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _empty  # type: ignore[method-assign]


sys.meta_path.append(_Submodules())
__version__ = "0"
__getattr__ = _empty
