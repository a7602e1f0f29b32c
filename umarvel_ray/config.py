"""YAML → typed settings: strict keys, `a.b=value` overrides, paths relative to the config's folder.

A setting is named in errors by its dotted key, and by file and line where the file gives it. Nothing here
imports more than pydantic and PyYAML, so `umarvel --help` and `umarvel check` answer at once.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo

from umarvel_ray.errors import ConfigError


class Config(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class _FromCommandLine(str):
    """A value typed by the user: its relative paths start at the current folder, not at the config's."""


def _resolve_path(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str | os.PathLike):
        return value
    text = os.fspath(value)
    if not text or "://" in text or os.path.isabs(text):
        return text
    base = (info.context or {}).get("base")
    if base is None or isinstance(value, _FromCommandLine):
        base = os.getcwd()
    return os.path.normpath(os.path.join(base, text))


PathSetting = Annotated[str, BeforeValidator(_resolve_path)]
"""A path or URI; a relative path starts at the folder of the config file that names it."""

ConfigT = TypeVar("ConfigT", bound=Config)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def load_config(path: str | os.PathLike, schema: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """Read one YAML file into `schema`.

    Args:
        path: The YAML file.
        schema: The settings it must hold.
        overrides: `key.path=value` strings, read as YAML values; a list item is named by its index.

    Raises:
        ConfigError: The file cannot be read, or a key is unknown, missing or of the wrong kind.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: the config cannot be read ({error.strerror}). Give the path of a YAML file."
        ) from None
    try:
        values = yaml.safe_load(text)
        lines = _key_lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: not valid YAML ({getattr(error, 'problem', error)}). Mend the line."
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a config is a mapping of settings, this file holds {type(values).__name__}."
        )
    values = _expand_variables(values, where=str(path))
    for override in overrides:
        _apply_override(values, override)
    return build_config(values, schema, base=path.resolve().parent, where=str(path), lines=lines)


def build_config(
    values: dict[str, Any],
    schema: type[ConfigT],
    *,
    base: Path | None = None,
    where: str = "settings",
    lines: dict[str, int] | None = None,
) -> ConfigT:
    """Validate `values` as `schema`; faults become one ConfigError line: the first key, and how many."""
    try:
        return schema.model_validate(values, context={"base": str(base) if base else None})
    except ValidationError as error:
        raise ConfigError(_one_line(error, schema, where, lines or {})) from None


def _one_line(error: ValidationError, schema: type[Config], where: str, lines: dict[str, int]) -> str:
    faults = error.errors(include_url=False)
    first = faults[0]
    key = ".".join(str(part) for part in first["loc"])
    line = next((lines[k] for k in _prefixes(key) if k in lines), None)
    place = f"{where}:{line}" if line else where
    more = f" ({len(faults)} faults in all)" if len(faults) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(schema, first["loc"][:-1])
        hint = f" Known keys there: {', '.join(known)}." if known else ""
        return f"{place}: unknown setting {key!r}{more}. Remove it or correct its name.{hint}"
    if first["type"] == "missing":
        return f"{place}: setting {key!r} is missing{more}. Add it."
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    given = f", given {value!r}" if isinstance(value, str | int | float | bool) or value is None else ""
    return f"{place}: setting {key!r}: {message}{given}{more}." if key else f"{place}: {message}{more}"


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _known_keys(schema: Any, loc: Sequence[int | str]) -> list[str]:
    """Field names at `loc`, where the schema's annotations lead there; empty where they do not."""
    for part in loc:
        if (
            not (isinstance(schema, type) and issubclass(schema, BaseModel))
            or part not in schema.model_fields
        ):
            return []
        schema = schema.model_fields[str(part)].annotation
    return list(schema.model_fields) if isinstance(schema, type) and issubclass(schema, BaseModel) else []


def _key_lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            lines[key] = key_node.start_mark.line + 1
            lines |= _key_lines(value_node, f"{key}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = item.start_mark.line + 1
            lines |= _key_lines(item, f"{prefix}{index}.")
    return lines


def _expand_variables(value: Any, *, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand_variables(item, where=where) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_variables(item, where=where) for item in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(
                f"{where}: ${{{name}}} is not set in the environment. Export {name} or write the value."
            )
        return os.environ[name]

    return _VARIABLE.sub(look_up, value)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        value = _FromCommandLine(value)
    target: Any = values
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise ConfigError(
                    f"override {override!r}: {part!r} is not an index into a list of {len(target)}."
                )
            index: Any = int(part)
        elif isinstance(target, dict):
            index = part
            if not last and target.get(part) is None:
                target[part] = {}
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])!r} is a value, not a group.")
        if last:
            target[index] = value
        else:
            target = target[index]
