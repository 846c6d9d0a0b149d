"""Classes and functions of the user's own, named by a dotted path, and what goes wrong in them as one line."""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NewType

from qtrain.utils.suggestions import did_you_mean

BuilderPath = NewType("BuilderPath", str)
"""The type of an argument that names code to run. A config may only give what the allow-list of targets admits, or what
the command line names itself: :mod:`qtrain.config.targets` looks for arguments of this type."""


PACKAGE = str(Path(__file__).resolve().parent.parent)
"""Where qtrain lies, whose own lines say nothing about an error in code of the user's."""

SEE_MORE = "; HYDRA_FULL_ERROR=1 shows where"
"""End of a message about an error whose traceback the user may want."""


def import_builder(path: BuilderPath) -> Any:
    """What the dotted ``path`` names, a class or function; the current folder is searched too.

    Raises ``ValueError`` with a line that says what was tried.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{path!r} must be a dotted path: the module, then the class or function in it")
    try:
        module = _imported(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):  # another one, which it imports
            raise ValueError(f"cannot import {module_name}: {explained(error)}{SEE_MORE}") from error
        raise ValueError(
            f"cannot import {module_name}: there is no module {error.name!r} in {os.getcwd()} or in the installed "
            "packages; PYTHONPATH=FOLDER adds a folder"
        ) from error
    except Exception as error:
        raise ValueError(f"cannot import {module_name}: {explained(error)}{SEE_MORE}") from error
    found = getattr(module, name, None)
    if found is None:
        public = [own for own in vars(module) if not own.startswith("_")]
        file = getattr(module, "__file__", None)
        raise ValueError(
            f"{module_name} has no {name!r}{did_you_mean(name, public)}" + (f" (it is {file})" if file else "")
        )
    if not callable(found):
        raise ValueError(f"{path} must be a class or function, got a value of type {type(found).__name__}")
    return found


def parameters_of(target: Any) -> dict[str, inspect.Parameter]:
    """The parameters of ``target`` that can be given by name; ``**kwargs`` is none of them.

    There are none where the signature cannot be found out, as for some built-in functions.
    """
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: own for name, own in _signature(target).items() if own.kind in by_name}


def takes_any(target: Any) -> bool:
    """Whether ``target`` takes arguments of any name, or may do so for all that is known."""
    parameters = _signature(target, unknown={"any": inspect.Parameter("any", inspect.Parameter.VAR_KEYWORD)})
    return any(own.kind is inspect.Parameter.VAR_KEYWORD for own in parameters.values())


def call_builder(path: BuilderPath, arguments: Mapping[str, object]) -> Any:
    """What ``path`` returns for ``arguments``. Raises ``ValueError`` where one lacks, and for any error inside."""
    make = import_builder(path)
    required = [name for name, own in parameters_of(make).items() if own.default is own.empty]
    if lacking := [name for name in required if name not in arguments]:
        raise ValueError(f"{path} needs {', '.join(lacking)}; add to its options {lacking[0]}=VALUE")
    try:
        return make(**arguments)
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"{path}({given}) failed: {explained(error)}{SEE_MORE}") from error


def explained(error: BaseException) -> str:
    """``TypeError: ... (net.py, line 12)``: an error with the last line of the user's own that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = ("<frozen", PACKAGE, *(path for path in sys.path if path.endswith("-packages")))
    own = [frame for frame in frames if not frame.filename.startswith(foreign)]
    place = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError):
        place = ""  # its text has the place
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message}{place}"


def _signature(
    target: Any, unknown: Mapping[str, inspect.Parameter] = MappingProxyType({})
) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return unknown


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = os.getcwd()
        if error.name != name.split(".")[0] or sys.flags.safe_path or here in sys.path or "" in sys.path:
            raise
        sys.path.append(here)  # where ``python -m`` searches, and a console script does not
        importlib.invalidate_caches()
        return importlib.import_module(name)
