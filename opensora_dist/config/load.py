"""From a YAML file and ``key=value`` overrides to a validated config, with every problem reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from opensora_dist.config.base import Section
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import read_utf8
from opensora_dist.core.registry import nearest

S = TypeVar("S", bound=Section)
Raw = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One broken rule.

    Args:
        fields: Dotted names of the fields the rule is about.
        message: Field, value, rule and way out, in one sentence.
        here: It is about this machine (a path, a package, a key), and may be no problem of another.
    """

    fields: tuple[str, ...]
    message: str
    here: bool = False


class _WrongKey(Exception):
    """A key that a config can't have; the message says where and why."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``off`` and ``no`` are words, ``1e-4`` is a number (PyYAML's YAML 1.1 says the opposite).

    Keys must be text, and each be given once, where PyYAML would silently keep the last.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Checks the keys as they are written, before merges (``<<``) mix in those of other mappings."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                what = f"{key.value} is a key, but" if isinstance(key, yaml.ScalarNode) else "a list or mapping is a key, but"
                raise _WrongKey(
                    f"line {line}: {what} keys are names of sections and fields, as text; write section: {{key: value}}"
                )
            if key.value in lines:
                raise _WrongKey(
                    f"line {line}: the key {key.value!r} was given in line {lines[key.value]} already; keep one of them"
                )
            lines[key.value] = line
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, source: str) -> Any:
    """YAML text to plain values.

    Raises:
        ConfigError: The text is not YAML, or has a key twice or one that is not text; the line is named.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(
            f"not valid YAML: {' '.join(str(error).split())}; check indentation and quotes", source=source
        ) from error
    except _WrongKey as error:
        raise ConfigError(str(error), source=source) from error
    except ValueError as error:  # of a scalar that looks like a date and is none
        raise ConfigError(f"not valid YAML: {error}; put text in quotes", source=source) from error


def dump_yaml(config: Section) -> str:
    """The config as YAML that ``load_config`` reads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def load_config(
    schema: type[S],
    path: Path | None,
    *,
    overrides: Sequence[str] = (),
    rules: Callable[[S], list[Problem]] = lambda _: [],
) -> S:
    """Reads, merges, validates.

    Args:
        schema: The config's model.
        path: YAML file, which may name one parent by ``extends:``; None starts from the defaults.
        overrides: ``section.key=value`` strings; values are YAML.
        rules: Cross-field rules. They run even where single fields are wrong, on the defaults of those fields, and problems that
            involve a wrong field are left out, so that one run reports everything that can be known.
    Raises:
        ConfigError: Lists every problem.
    """
    source = str(path) if path else "the command line"
    raw = _read_with_parent(Path(path), schema=schema, seen=()) if path else {}
    problems = []
    for text in overrides:
        problem = _apply_override(raw, text, schema=schema)
        if problem:
            problems.append(problem)
    config, wrong = _validate(schema, raw)
    problems += [p.message for p in wrong]
    bad_fields = {f for p in wrong for f in p.fields}
    problems += [p.message for p in rules(config) if not any(_touches(f, b) for f in p.fields for b in bad_fields)]
    if problems:
        raise ConfigError(problems, source=source)
    return config


def _touches(field: str, other: str) -> bool:
    return field == other or field.startswith(other + ".") or other.startswith(field + ".")


def _read_with_parent(path: Path, *, schema: type[Section], seen: tuple[Path, ...]) -> Raw:
    if not path.is_file():
        raise ConfigError(f"config {str(path)!r} does not exist; recipes to start from are in configs/", source=None)
    if path.resolve() in seen:
        raise ConfigError(f"extends: {path} extends itself through {' -> '.join(map(str, seen))}; break the circle")
    raw = parse_yaml(read_utf8(path), source=str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; a config is a mapping of sections", source=str(path))
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise ConfigError(f"extends={parent!r} must be one path, relative to the file that names it", source=str(path))
    base = _read_with_parent(path.parent / parent, schema=schema, seen=(*seen, path.resolve()))
    return _merge(base, raw, schema=schema)


def _variants(annotation: Any) -> list[type[Section]]:
    """The section models a field may hold: one, several for a union chosen by ``name``, none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [v for arg in get_args(annotation) for v in _variants(arg)]


def _merge(base: Raw, top: Raw, *, schema: type[Section] | None) -> Raw:
    """``top`` over ``base``, mappings merged key by key. Choosing another variant of a union drops the old variant's keys."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            field = schema.model_fields.get(key) if schema else None
            variants = _variants(field.annotation) if field else []
            if len(variants) > 1 and value.get("name", old.get("name")) != old.get("name"):
                merged[key] = value
            else:
                merged[key] = _merge(old, value, schema=variants[0] if variants else None)
        else:
            merged[key] = value
    return merged


def _apply_override(raw: Raw, text: str, *, schema: type[Section]) -> str | None:
    name, equals, value = text.partition("=")
    parts = name.split(".")
    if not equals or not all(parts):
        return f"override {text!r} is not of the form section.key=value; write e.g. run.steps=100"
    tree: Any = parse_yaml(value, source=f"override {text!r}")
    for part in reversed(parts):
        tree = {part: tree}
    merged = _merge(raw, tree, schema=schema)
    raw.clear()
    raw.update(merged)
    return None


def _validate(schema: type[S], raw: Raw) -> tuple[S, list[Problem]]:
    """Validates; where fields are wrong, says so and puts their defaults in their place, so that more can be checked."""
    problems: list[Problem] = []
    raw = _copy(raw)
    for key, field in schema.model_fields.items():
        # A union section that names no variant means the default one, so that one key of it can be overridden alone.
        if len(_variants(field.annotation)) > 1 and isinstance(raw.get(key), dict) and isinstance(field.default, Section):
            raw[key].setdefault("name", field.default.model_dump()["name"])
    while True:
        try:
            return schema.model_validate(raw), problems
        except ValidationError as error:
            details = error.errors(include_url=False)
            paths = [_path_in(raw, detail) for detail in details]
            for path, detail in zip(paths, details, strict=True):
                problems.append(Problem(fields=(".".join(path),), message=_explain(schema, path, detail)))
            # Keys of a union's variant that isn't known can't be checked. Two entries of one list are one key.
            keys = [
                path[:-1] if detail["type"] == "union_tag_invalid" else path for path, detail in zip(paths, details, strict=True)
            ]
            for names in dict.fromkeys(map(tuple, keys)):
                _drop(raw, list(names))


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def _path_in(raw: Raw, detail: ErrorDetails) -> list[str]:
    """pydantic's location as keys of ``raw``: without union tags, and cut at the first list."""
    path: list[str] = []
    here: Any = raw
    for part in detail["loc"]:
        if isinstance(here, dict) and part in here:
            path.append(str(part))
            here = here[part]
        elif not isinstance(here, dict):
            break
    return [*path, "name"] if detail["type"] == "union_tag_invalid" else path


def _drop(raw: Raw, path: list[str]) -> None:
    here: Any = raw
    for part in path[:-1]:
        here = here.get(part, {})
    assert path[-1] in here or not here, f"no progress at {path}"
    here.pop(path[-1], None)


def _fields_at(schema: type[Section], path: list[str], raw_name: str | None) -> list[str]:
    """Names of the fields of the section that ``path`` lies in."""
    models: list[type[Section]] = [schema]
    for part in path[:-1]:
        models = [v for m in models if part in m.model_fields for v in _variants(m.model_fields[part].annotation)]
    chosen = [m for m in models if raw_name and "name" in m.model_fields and m.model_fields["name"].default == raw_name] or models
    return sorted({name for m in chosen for name in m.model_fields})


def _explain(schema: type[Section], path: list[str], detail: ErrorDetails) -> str:
    name, value, kind = ".".join(path), detail["input"], detail["type"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        tags = [str(p) for p in detail["loc"] if p not in path]
        known = _fields_at(schema, path, tags[0] if tags else None)
        return f"{name}={value!r}: unknown key{nearest(path[-1], known)} (known here: {', '.join(known)})"
    if kind == "literal_error":
        expected = context["expected"]
        return f"{name}={value!r}: must be one of {expected}{nearest(str(value), re.findall(r'[a-z0-9_]+', expected))}"
    if kind == "union_tag_invalid":
        tags_text = context["expected_tags"]
        return (
            f"{name}={context['tag']!r}: must be one of {tags_text}{nearest(context['tag'], re.findall(r'[a-z_]+', tags_text))}"
        )
    if kind == "missing" and isinstance(detail["loc"][-1], int):
        return (
            f"{name}: entry {detail['loc'][-1] + 1} is missing from {value!r}; write all of them, e.g. as the default in `--help`"
        )
    if kind == "missing":
        return f"{name}.{detail['loc'][-1]} is not set; every `{name}` needs one"
    hint = {
        "greater_than": "raise it above {gt}",
        "greater_than_equal": "use {ge} or more",
        "less_than": "use less than {lt}",
        "less_than_equal": "use {le} or less",
        "int_parsing": "write a whole number",
        "int_from_float": "write a whole number",
        "int_type": "write a whole number",
        "float_parsing": "write a number",
        "float_type": "write a number",
        "bool_parsing": "write true or false",
        "bool_type": "write true or false",
        "string_type": "write text, in quotes where YAML reads something else",
        "string_too_short": "write at least {min_length} character(s)",
        "tuple_type": "write a list, e.g. [1, 2, 2]",
        "model_type": "write a mapping of keys",
        "model_attributes_type": "write a mapping of keys",
    }.get(kind, "see `--help` for what it takes")
    return f"{name}={value!r}: {detail['msg'][:1].lower() + detail['msg'][1:]}; {hint.format(**context)}"


def expand(path: str) -> Path:
    """A path from a config: ``~`` and environment variables expanded."""
    return Path(os.path.expandvars(path)).expanduser()
