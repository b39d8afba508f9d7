"""Names under which modules were imported before they moved: code written for them goes on working."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: former name of a module -> where its contents are now
MOVED = {
    "toolkit.config": "toolkit.settings",
    "toolkit.data.config": "toolkit.settings",
    "toolkit.recipe": "toolkit.run.recipe",
    "toolkit.stages": "toolkit.run.stages",
}


class Aliases(MetaPathFinder, Loader):
    """Finds a module of `MOVED` under its former name, as the very module that it is now."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for any other module."""
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module of the former name with everything that is in the one that took its place."""
        module = ModuleType(spec.name)
        module.__dict__.update(vars(importlib.import_module(MOVED[spec.name])))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


sys.meta_path.insert(0, Aliases())  # first: a search through folders has nothing to find
