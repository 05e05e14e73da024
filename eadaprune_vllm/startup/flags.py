"""The command line: ``--plugin NAME`` and, generated from ``ServerOptions``, one ``--eadaprune-*`` flag per option."""

import argparse
import json
import re
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from eadaprune_vllm.core.options import KEY, allowed, overlay
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError, StartupError
from eadaprune_vllm.startup.naming import NAME, name_plugins, named_plugins

# Defaults in the help text, where they are not those of the schema.
_DEFAULTS = {"energy": "the target's", "load_aware": "off"}
_NULL = " or null"  # JSON has it, a flag is left out instead


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to ``parser``. A flag that is not given sets no attribute."""
    group = parser.add_argument_group("EAdaPrune", "Per-image visual token budgets.")
    group.add_argument(
        "--plugin",
        metavar="NAME",
        action="append",
        default=argparse.SUPPRESS,
        help="Name of a vLLM plugin to load, in addition to those that vLLM loads anyway. May be repeated.",
    )
    for name, field in ServerOptions.model_fields.items():
        default = _DEFAULTS.get(name, "no limit" if field.default is None else field.default)
        values = allowed(name, ServerOptions).removesuffix(_NULL).capitalize()
        text = f"{field.description} {values}. (default: {default})"
        group.add_argument(
            _flag(name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **_kind(field.annotation)
        )


def apply_flags(args: argparse.Namespace) -> None:
    """Load the named plugins, and move the options to ``mm_processor_kwargs``, which vLLM passes to every front end.

    Raises:
        StartupError: for an unknown plugin, for options without this plugin, or naming the flag whose value is not
            allowed.
    """
    if names := getattr(args, "plugin", None):
        name_plugins(names)
    values = {name: getattr(args, f"{KEY}_{name}", None) for name in ServerOptions.model_fields}
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return
    if NAME not in (named_plugins() or ()):
        raise StartupError(f"{_flag(next(iter(given)))} does nothing without --plugin {NAME}")
    try:
        overlay(ServerOptions(), given, KEY)
    except InvalidOptionsError as error:
        raise StartupError(in_flags(str(error), given)) from None
    kwargs = args.mm_processor_kwargs or {}
    options = kwargs.get(KEY, {})
    if isinstance(options, dict):  # anything else is rejected later, by ``operator_options``
        args.mm_processor_kwargs = kwargs | {KEY: options | given}


def in_flags(message: str, names: Iterable[str]) -> str:
    """An error message about options, with the flags instead of these options."""
    option = re.compile(rf"({KEY}[.])?\b({'|'.join(names)})\b([.=]?)")
    signs = {".": ": ", "=": " ", "": ""}  # of an option inside a JSON value, of a value
    return option.sub(lambda found: _flag(found[2]) + signs[found[3]], message.removeprefix(f"{KEY}: ")).replace(
        _NULL, ""
    )


def _flag(name: str) -> str:
    return f"--{KEY}-{name.replace('_', '-')}"


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object of options, such as '{{\"energy\": 0.9}}'")
    return value


def _kind(annotation: Any) -> dict[str, Any]:
    """argparse's keyword arguments for an option of this type."""
    if get_origin(annotation) is UnionType:
        (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if issubclass(get_origin(annotation) or annotation, BaseModel):
        return {"type": _json_object, "metavar": "JSON", "nargs": "?", "const": {}}
    if get_origin(annotation) is dict:
        return {"type": _json_object, "metavar": "JSON"}
    return {"type": annotation, "metavar": annotation.__name__.upper()}
