"""Functions of the user, which settings name as ``package.module:function``.

They are imported from the current folder and from installed packages.  A mistake in one of them is
reported as one line with the place in the user's file.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from .errors import ConfigError, WormError

__all__ = ["call_user_function", "is_user_function", "require_user_function", "source_of"]

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_MAX_LENGTH = 300


def is_user_function(name: str) -> bool:
    """Whether a name is that of a function of the user; other names have no colon, or a slash."""
    return ":" in name and "/" not in name


def source_of(name: str) -> bytes:
    """The content of the file that has an imported function's module; empty if it has none.

    Args:
        name: see ``require_user_function``.
    """
    path = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    if path is None or not Path(path).is_file():  # a namespace, or in an archive
        return b""
    return Path(path).read_bytes()


def require_user_function(
    name: str, key: str, *arguments: Any, **keywords: Any
) -> Callable[..., Any]:
    """Import a function, and check that it takes some arguments, without calling it.

    Args:
        name: ``package.module:function``; a class or a static method is a function too.
        key: the setting that names it, for messages.
        arguments, keywords: those of the call that is to follow.

    Raises:
        ConfigError: there is no such module or function, importing it fails, or it takes other
            arguments.
    """
    module_name, _, attribute = name.partition(":")
    if _FORM.fullmatch(name) is None:
        raise ConfigError(
            f"{key}: {name[:100]!r} does not name a function; write package.module:function"
        )
    found: Any = _imported(module_name, name, key)
    try:
        found = reduce(getattr, attribute.split("."), found)
    except AttributeError:
        known = [known for known, value in vars(found).items() if callable(value)]
        near = difflib.get_close_matches(attribute, known, n=1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
        where = getattr(found, "__file__", None)
        raise ConfigError(
            f"{key}: {module_name}{f' ({where})' if where else ''} has no {attribute!r}{hint}"
        ) from None
    if not callable(found):
        raise ConfigError(f"{key}: {name} is of type {type(found).__name__}; name a function")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of a function that is not written in Python
        return found  # type: ignore[no-any-return]
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        given = ", ".join([*map(_kind, arguments), *(f"{word}=..." for word in keywords)])
        raise ConfigError(
            f"{key}: {name}{signature} cannot be called with ({given}): {error}"
        ) from None
    return found  # type: ignore[no-any-return]


def call_user_function(name: str, key: str, *arguments: Any, **keywords: Any) -> Any:
    """Call a function of the user; return what it returns.

    Args:
        name, key, arguments, keywords: see ``require_user_function``.

    Raises:
        ConfigError: see ``require_user_function``; or the function raises an exception: its type,
            its message and its place.
    """
    function = require_user_function(name, key, *arguments, **keywords)
    try:
        return function(*arguments, **keywords)
    except WormError:
        raise
    except (Exception, SystemExit) as error:  # the other ranks must not wait for this one
        raise ConfigError(f"{key}: {name} raised {_described(error)}") from error


def _imported(module_name: str, name: str, key: str) -> Any:
    folder = os.getcwd()
    # Programs that are started by their path, such as a launcher's, look in their own folder.
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)
    importlib.invalidate_caches()  # the file may be newer than what Python knows of its folder
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{key}: {name}: there is no module {error.name!r}, neither in the current folder "
                f"({folder}) nor among the installed packages"
            ) from None
        raise ConfigError(f"{key}: {name}: importing it raised {_described(error)}") from error
    except SystemExit as error:
        raise ConfigError(
            f"{key}: {name}: {module_name} ends the program when it is imported; put what it runs "
            "below if __name__ == '__main__':"
        ) from error
    except WormError:
        raise
    except Exception as error:
        raise ConfigError(f"{key}: {name}: importing it raised {_described(error)}") from error


def _described(error: BaseException) -> str:
    """An exception on one line, with the innermost place that is neither Python's nor ours."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_LENGTH]
    if isinstance(error, SyntaxError):  # says the place itself
        return text
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not _is_foreign(frame.filename)]
    places = theirs or frames
    return f"{text} ({places[-1].filename}, line {places[-1].lineno})" if places else text


def _is_foreign(path: str) -> bool:
    ours, standard = os.path.dirname(__file__), os.path.dirname(os.__file__)
    installed = any(folder in path for folder in ("site-packages", "dist-packages"))
    return installed or path.startswith(("<", ours + os.sep, standard + os.sep))


def _kind(value: object) -> str:
    return type(value).__name__
