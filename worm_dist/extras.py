"""Extras: packages that only some users need, and that come with ``worm_dist[EXTRA]``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from .errors import ConfigError

__all__ = ["EXTRAS", "require_extras"]

EXTRAS: Mapping[str, Mapping[str, str]] = {
    "train": {"jinja2": "jinja2", "matplotlib": "matplotlib", "tensorboard": "tensorboard"},
    "digits": {"sklearn": "scikit-learn"},
    "kneedle": {"kneed": "kneed"},
    "onnx": {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"},
}
"""Of each extra, the modules, each with the name under which it is installed."""


def require_extras(needed: Mapping[str, str]) -> None:
    """Find the packages of some extras, without importing them.

    Args:
        needed: by extra, what needs it: a command, an option, or a setting and its value.

    Raises:
        ConfigError: packages are missing; one line for each extra, with the command that installs
            it.
    """
    lines = []
    for extra, user in needed.items():
        missing = [name for module, name in EXTRAS[extra].items() if not _is_installed(module)]
        if missing:
            lines.append(
                f"{user}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
                f'installed; run: pip install "worm_dist[{extra}]"'
            )
    if lines:
        raise ConfigError("\n".join(lines))


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None
