"""Import on first use: the names of a package, and work that waits for the package of somebody else.

torch takes seconds to import and transformers more. A package whose names are lazy costs neither until a name is used,
so the command line answers at once and Ctrl-C works while torch is imported.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import Any


def lazy_names(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return __getattr__ and __dir__ of `package`; `homes`: {public name: module of the package that defines it}."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})


def after_import(module: str, action: Callable[[], object]) -> None:
    """Run `action` as soon as `module` has been imported: now, or at the end of its import."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _After(module, action))


class _After(importlib.abc.MetaPathFinder):
    """Finds one module as the finders behind it do, and adds an action to the end of its import."""

    def __init__(self, module: str, action: Callable[[], object]):
        self._module, self._action, self._is_looking = module, action, False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self._module or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_looking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_act(module: Any) -> None:
            run(module)
            if self in sys.meta_path:  # an import that failed may be tried again
                sys.meta_path.remove(self)
            self._action()

        spec.loader.exec_module = run_and_act
        return spec
