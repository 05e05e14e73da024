"""How functions of vLLM are wrapped, and how overridden methods are checked against vLLM's signatures."""

import functools
import inspect
import logging
from collections.abc import Callable
from inspect import Parameter
from types import ModuleType
from typing import Any

from eadaprune_vllm.compat import SUPPORTED, find, version
from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.errors import StartupError

logger = logging.getLogger("vllm." + __name__)
_MARK = "_eadaprune_wrapped"
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
wrapped_paths: list[str] = []  # functions of vLLM that are wrapped in this process


def wrap(path: str, optional: str | None = None) -> Callable[[Callable[..., Any]], bool]:
    """Decorator: replace a function of vLLM by the decorated one, which gets the original as its first argument.

    A function is wrapped once only. The decorated name becomes a bool: whether the function is wrapped now.

    Args:
        path: of vLLM's function, as for ``compat.find``.
        optional: for a wrapper that the server can do without: what is lost. A warning then replaces the error.

    Raises:
        StartupError: if this vLLM has no such function, or one with another signature.
    """

    def decorate(wrapper: Callable[..., Any]) -> bool:
        try:
            owner, name = find(path)
        except (ImportError, AttributeError):
            return _does_not_fit(path, optional)
        static = inspect.getattr_static(owner, name)
        original = getattr(static, "__func__", static)
        if hasattr(original, _MARK):
            return True
        if not fits(functools.partial(wrapper, original), original):
            return _does_not_fit(path, optional)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        setattr(wrapped, _MARK, True)
        kind = type(static) if isinstance(static, staticmethod | classmethod) else None
        setattr(owner, name, kind(wrapped) if kind else wrapped)
        wrapped_paths.append(path)
        return True

    return decorate


def check_overrides(module: ModuleType) -> None:
    """Check the classes that a module defines: every ``@override`` must override a method of vLLM's.

    Raises:
        StartupError: if this vLLM has no such method, or one with another signature.
    """
    classes = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
    for cls in classes:
        vllms = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
        for base in cls.__mro__:
            for name, method in vars(base).items() if base not in vllms else ():
                if getattr(method, "__override__", False) and not name.startswith(KEY):
                    original = next((vars(other)[name] for other in vllms if name in vars(other)), None)
                    if not (original and fits(method, original)):
                        _does_not_fit(f"{vllms[0].__module__}:{vllms[0].__name__}.{name}", None)


def fits(function: Callable[..., Any], original: Callable[..., Any]) -> bool:
    """Whether a function can be called as another one is, with the same meaning of each argument.

    Positional parameters must have the same names in the same order (``self`` aside). Keyword-only parameters must be
    keyword-only in the original. All others must be covered by ``*args`` or ``**kwargs``.
    """
    ours, theirs = ([*inspect.signature(f).parameters.values()] for f in (function, original))
    named, all_named = ([p.name for p in ps if p.kind in _POSITIONAL] for ps in (ours, theirs))
    only, all_only = ({p.name for p in ps if p.kind is Parameter.KEYWORD_ONLY} for ps in (ours, theirs))
    if all_named[:1] in (["self"], ["cls"]):
        named[:1] = all_named[:1]
    rest = len(all_named) > len(named) or all_only - only
    variadic = any(p.kind in _VARIADIC for p in ours)
    return named == all_named[: len(named)] and only <= all_only and (variadic or not rest)


def _does_not_fit(path: str, optional: str | None) -> bool:
    what = f"vLLM {version()} has no {path} with the signature it has in {SUPPORTED}"
    if optional is None:
        raise StartupError(f"{what}, and pruning depends on it")
    logger.warning("eadaprune: %s; %s", what, optional)
    return False
