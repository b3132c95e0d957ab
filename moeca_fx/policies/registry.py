"""Methods by name, and their YAML files: ``{policy: moeca, interval: 6}``.

Every module of `moeca_fx.policies.methods` is imported when names are first asked for; each defines one `Method`.
"""

import importlib
import os
import pkgutil
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from moeca_fx.errors import ConfigError, require
from moeca_fx.files import write_whole
from moeca_fx.policies import methods
from moeca_fx.policies.policy import Method, Policy

NAME_KEY = "policy"


@lru_cache(maxsize=1)
def _builtin() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(methods.__path__):
        loaded = importlib.import_module(f"{methods.__name__}.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == loaded.__name__:
                found[value.method] = value
    return dict(sorted(found.items()))


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(_builtin())


def method_class(name: object) -> type[Method]:
    """The class behind a name.

    Raises:
        ConfigError: there is no such method; the message lists the nearest names.
    """
    if isinstance(name, str) and name in _builtin():
        return _builtin()[name]
    near = get_close_matches(str(name).lower(), names(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known policies: {', '.join(names())}"
    raise ConfigError(f"no policy is called {name!r}; {hint}")


def build(name: str, /, **values: Any) -> Method:
    """The method `name` with some fields set.

    Raises:
        ConfigError: unknown name or field, a missing field, or a value of a wrong type or range.
    """
    kind = method_class(name)
    known = {field.name: field for field in fields(kind)}
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError(
            f"policy {name!r} has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(known) or 'none'}"
        )
    missing = [key for key in required_fields(name) if key not in values]
    if missing:
        raise ConfigError(
            f"policy {name!r}: expected the field {', '.join(missing)}; give it a value, in a YAML file if only a name "
            "can be given"
        )
    # YAML has lists where fields are tuples.
    return kind(**{key: _tuples(value) for key, value in values.items()})


def required_fields(name: str) -> tuple[str, ...]:
    """Fields of the method `name` that have no default.

    Raises:
        ConfigError: there is no such method.
    """
    found = fields(method_class(name))
    return tuple(each.name for each in found if each.default is MISSING and each.default_factory is MISSING)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def load(path: str | os.PathLike[str]) -> Method:
    """Read a policy file.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or names an unknown policy, field or value.
        MissingExtraError: PyYAML is not installed.
    """
    require("yaml", "cli")
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"policy file {path}: cannot be read: {error}; expected a YAML file") from error
    if not isinstance(content, dict) or NAME_KEY not in content:
        raise ConfigError(
            f"policy file {path}: expected a mapping with the key {NAME_KEY!r}, found {type(content).__name__}; "
            f"write for example 'policy: moeca'"
        )
    values = {str(key): value for key, value in content.items() if key != NAME_KEY}
    try:
        return build(content[NAME_KEY], **values)
    except ConfigError as error:
        raise ConfigError(f"policy file {path}: {error}") from error


def save(method: Method, path: str | os.PathLike[str], comment: str = "") -> None:
    """Write a policy file, whole or not at all.

    Args:
        comment: lines that stand at the top of the file.

    Raises:
        MissingExtraError: PyYAML is not installed.
        MoecaError: the file system refused.
    """
    require("yaml", "cli")
    import yaml

    path = Path(path)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    content = {NAME_KEY: method.method} | cast("dict[str, Any]", _lists(method.as_dict()))
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    write_whole(path, lambda temporary: temporary.write_text(head + text, encoding="utf-8"))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value


def as_method(policy: object) -> Method | Policy:
    """What `transform` takes as a policy: a method, a policy made of parts, a method's name, or a YAML file's path.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(policy, Method | Policy):
        return policy
    if isinstance(policy, str) and policy in _builtin():
        return build(policy)
    if isinstance(policy, os.PathLike) or (isinstance(policy, str) and policy.endswith((".yaml", ".yml"))):
        return load(policy)
    if isinstance(policy, str):
        method_class(policy)
    raise ConfigError(
        f"policy: expected moeca_fx.MoECa(...) or another method, a method's name, or the path of a YAML file, found "
        f"{type(policy).__name__}; pass one"
    )
