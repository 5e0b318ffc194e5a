"""
A YAML file plus command-line overrides, into a flat dataclass.

Every configuration of this package is one dataclass whose help text is the `Args:` section of its docstring. Here its
fields become YAML keys and command-line options, and whatever is unknown or of the wrong type is refused; ranges are
the business of the dataclass's own `__post_init__`.
"""

import argparse
import dataclasses
import difflib
import enum
import inspect
import re
import types
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hf_mlopt.errors import ConfigurationError, InputError


Config = TypeVar("Config")

_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
_YAML_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2: PyYAML follows 1.1, where `2:4` is the integer 124 and `1e-4` a string."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes a string that either version of YAML would read as a number."""


_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(_FLOAT, _YAML_FLOAT, list("-+0123456789."))


def load_config(cls: type[Config], file: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """
    Builds a configuration from a YAML file and then from overrides, which win field by field.

    Args:
        cls (`type`): The dataclass to build.
        file (`str` or `Path`, *optional*): YAML file with one mapping of field names to values.
        overrides (`dict`, *optional*): Field names to values, for instance from [`arguments_given`].

    Returns:
        An instance of `cls`.

    Raises:
        ConfigurationError: If a key is unknown or a value has the wrong type.
        InputError: If the file is missing or not a YAML mapping, a required field is absent, or `cls` itself objects.
    """
    kinds = _field_kinds(cls)
    values = {}
    for origin, given in ((f" (in {file})", _read_yaml(file) if file else {}), ("", overrides or {})):
        for name, value in given.items():
            if name not in kinds:
                raise ConfigurationError(name, value, _unknown_field(name, kinds) + origin)
            try:
                values[name] = _coerce(value, kinds[name])
            except TypeError:
                raise ConfigurationError(name, value, f"must be {_describe(kinds[name])}{origin}") from None
    missing = [field.name for field in dataclasses.fields(cls) if _is_required(field) and field.name not in values]
    if missing:
        raise InputError(f"{cls.__name__} needs a value for {', '.join(missing)}")
    try:
        return cls(**values)
    except InputError:
        raise
    except ValueError as error:  # a foreign dataclass such as `TrainingArguments` raises plain ValueErrors
        raise InputError(f"{cls.__name__}: {error}") from error


def add_arguments(parser: argparse.ArgumentParser, cls: type, exclude: tuple[str, ...] = ()) -> None:
    """
    Adds one option per field of a dataclass; an option that is not typed leaves no trace in the namespace.

    The text `null` stands for `None` where the field allows it.

    Args:
        parser (`argparse.ArgumentParser`): The parser, or an argument group of it.
        cls (`type`): The dataclass.
        exclude (`tuple[str]`, *optional*, defaults to `()`): Fields that get no option.
    """
    kinds, help_texts = _field_kinds(cls), _argument_help(cls)
    for field in dataclasses.fields(cls):
        if field.name not in kinds or field.name in exclude:
            continue
        text = help_texts.get(field.name, "")
        if field.default is not dataclasses.MISSING and field.default is not None:
            text += f" (default: {_plain(field.default)})"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            default=argparse.SUPPRESS,
            help=text.strip().replace("%", "%%"),
            **_option(kinds[field.name]),
        )


def arguments_given(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Returns the fields of `cls` that the user typed, by name."""
    return {name: getattr(namespace, name) for name in _field_kinds(cls) if hasattr(namespace, name)}


def to_dict(config) -> dict[str, Any]:
    """Returns the fields as plain values that YAML and JSON can hold."""
    return {name: _plain(getattr(config, name)) for name in _field_kinds(type(config))}


def save_yaml(config, path: str | Path) -> None:
    """Writes a configuration so that [`load_config`] builds an equal one from it."""
    text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _read_yaml(file: str | Path) -> dict:
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config={str(file)!r}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"config={str(file)!r}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise InputError(f"config={str(file)!r}: must hold a mapping of field names to values")
    return content or {}


def _field_kinds(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _is_required(field: dataclasses.Field) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown_field(name: object, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(str(name).replace("-", "_"), known, n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"unknown field{hint} Known fields: {', '.join(sorted(known))}"


def _alternatives(kind) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _coerce(value, kind):
    """Returns `value` as `kind`, or raises `TypeError`; only what loses nothing is converted."""
    for alternative in _alternatives(kind):
        origin, arguments = get_origin(alternative) or alternative, get_args(alternative)
        if origin is Any or (origin is type(None) and value is None):
            return value
        if origin is Literal:
            if any(value == choice and type(value) is type(choice) for choice in arguments):
                return value
        elif origin is list and isinstance(value, (list, tuple)):
            return [_coerce(item, arguments[0]) if arguments else item for item in value]
        elif origin is dict and isinstance(value, dict):
            return {key: _coerce(item, arguments[1]) if arguments else item for key, item in value.items()}
        elif not isinstance(origin, type):
            continue
        elif isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
            return value
        elif origin is float and type(value) is int:
            return float(value)
        elif issubclass(origin, Path) and isinstance(value, str):
            return origin(value)
        elif issubclass(origin, enum.Enum) and value in [member.value for member in origin]:
            return origin(value)
    raise TypeError


def _describe(kind) -> str:
    words = {type(None): "null", bool: "true or false", Any: "anything"}
    parts = []
    for alternative in _alternatives(kind):
        if get_origin(alternative) is Literal:
            parts.append("one of " + ", ".join(map(repr, get_args(alternative))))
        elif isinstance(alternative, type) and issubclass(alternative, enum.Enum):
            parts.append("one of " + ", ".join(repr(member.value) for member in alternative))
        else:
            is_plain = isinstance(alternative, type) and not get_args(alternative)
            parts.append(words.get(alternative, alternative.__name__ if is_plain else str(alternative)))
    return " or ".join(parts)


def _option(kind) -> dict[str, Any]:
    """The part of `add_argument`'s keywords that follows from an annotation."""
    alternatives = [alternative for alternative in _alternatives(kind) if alternative is not type(None)]
    only = alternatives[0] if len(alternatives) == 1 else None
    if only is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(only) is list or only is list:
        items = get_args(only) or (str,)
        return {"nargs": "*", "type": partial(_parse, kind=items[0]), "metavar": "VALUE"}
    if get_origin(only) is Literal:
        return {"type": partial(_parse, kind=kind), "metavar": "{" + ",".join(map(str, get_args(only))) + "}"}
    names = ["JSON" if get_origin(a) is dict or a is dict else getattr(a, "__name__", str(a)) for a in alternatives]
    return {"type": partial(_parse, kind=kind), "metavar": "|".join(names).upper()}


def _parse(text: str, kind):
    """Reads one command-line word the way YAML would, or as the bare string where that does not fit."""
    candidates = [text]
    try:
        value = yaml.load(text, _Loader)
        if value is not None or text == "null":  # `~` and `#1` are words here, not nulls
            candidates.insert(0, value)
    except yaml.YAMLError:
        pass
    for candidate in candidates:
        try:
            return _coerce(candidate, kind)
        except TypeError:
            continue
    raise argparse.ArgumentTypeError(f"invalid value {text!r}: must be {_describe(kind)}")


def _argument_help(cls: type) -> dict[str, str]:
    """Help per field from the `Args:` sections of a class and its bases, in the Hugging Face form."""
    texts = {}
    for base in reversed(cls.__mro__):
        section = re.search(
            r"^(?:Args|Parameters):\n(.*?)(?=^\S|\Z)", inspect.cleandoc(base.__doc__ or ""), re.M | re.S
        )
        name = None
        for line in section.group(1).splitlines() if section else ():
            entry = re.match(r" {4}(\w+)(?: \(.*?\))?:(?: +|$)(.*)", line)
            if entry:
                name = entry.group(1)
                texts[name] = entry.group(2)
            elif name:
                texts[name] = f"{texts[name]} {line.strip()}".strip()
    return texts


def _plain(value):
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
