"""Distillation of large language models with DeepSpeed: DistiLLM (arXiv 2402.03898) and its relatives.

The Python way in: `distill(config)` trains a student in this process. What is named here is imported from its room when
it is first used, so that `import toolkit` takes no time."""

import importlib
from typing import TYPE_CHECKING, Any

from toolkit import aliases as _aliases  # noqa: F401 (importing it is what it does)

if TYPE_CHECKING:
    from toolkit.divergences import Divergence, fused_linear_divergence
    from toolkit.ranks.signals import GoOnLater
    from toolkit.run.distill import Distilled, distill
    from toolkit.settings import RunConfig

__all__ = ["Distilled", "Divergence", "GoOnLater", "RunConfig", "distill", "fused_linear_divergence"]
_ROOMS = {
    "Distilled": "toolkit.run.distill",
    "Divergence": "toolkit.divergences",
    "GoOnLater": "toolkit.ranks.signals",
    "RunConfig": "toolkit.settings",
    "distill": "toolkit.run.distill",
    "fused_linear_divergence": "toolkit.divergences",
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, from its room. Raises AttributeError for any other."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    """What an editor or a notebook offers to complete."""
    return sorted([*globals(), *__all__])
