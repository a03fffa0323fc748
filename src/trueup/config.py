"""Configuration files: TOML and `--set a.b=v` over a preset, into the knobs of knobs.py.

Unknown keys fail with the nearest known name; nothing is read from the environment. Loads no torch.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from trueup.errors import ConfigError, nearest
from trueup.knobs import Config
from trueup.presets import PRESETS

FREE = ("task.settings.",)
"""Tables whose keys are somebody else's."""


def _section_of(annotation: object) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, UnionType):
        return next((s for a in get_args(annotation) if (s := _section_of(a))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return every key in dotted form, in order of declaration."""
    keys = []
    for name, info in model.model_fields.items():
        section = _section_of(info.annotation)
        keys += known_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.") or {f"{prefix}{name}": value}
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _refuse_unknown(flat: Mapping[str, Any], where: str) -> None:
    known = known_keys()
    sections = {k.rsplit(".", 1)[0] for k in known}
    for key in flat:
        if key.startswith(FREE):
            continue
        if key not in known and not (key in sections and flat[key] == {}):
            last = {k.rsplit(".", 1)[-1]: k for k in known}
            hint = nearest(key, known) or nearest(key.rsplit(".", 1)[-1], last)
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")


def _parse_value(text: str) -> Any:
    """Read a `--set` value as TOML would (numbers, booleans, quoted strings, arrays); anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def build_config(values: Mapping[str, Any], *, sets: Sequence[str] = (), where: str = "config") -> Config:
    """Validate nested values plus `a.b=v` assignments, over those of the preset that they name.

    Raises ConfigError naming the key and what is wrong.
    """
    merged: dict[str, Any] = {}
    for key, value in _flatten(values).items():
        _refuse_unknown({key: value}, where)
        if value != {}:
            _assign(merged, key, value)
    for item in sets:
        key, sign, text = item.partition("=")
        if not sign:
            raise ConfigError(f"--set {item!r}: expected name=value")
        _refuse_unknown({key.strip(): text}, "--set")
        _assign(merged, key.strip(), _parse_value(text.strip()))
    preset = PRESETS.get(str(merged.get("preset")), {})
    own = _flatten(merged)
    for key, value in _flatten(preset).items():
        if key not in own:
            _assign(merged, key, value)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {key}: {first['msg']} (got {str(first.get('input'))[:60]!r})") from None


def load_config(path: Path | None, *, sets: Sequence[str] = ()) -> Config:
    """Read a TOML file (None: defaults only) and apply `--set`s. Raises ConfigError."""
    if path is None:
        return build_config({}, sets=sets)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return build_config(values, sets=sets, where=str(path))


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dumped configuration without what is unset, so that it can be built again."""
    return {k: without_none(v) if isinstance(v, Mapping) else v for k, v in values.items() if v is not None}


def dump_config(config: Config) -> str:
    """Return the resolved configuration as JSON, which keeps what is unset (null)."""
    return json.dumps(config.model_dump(mode="json"), indent=2)
