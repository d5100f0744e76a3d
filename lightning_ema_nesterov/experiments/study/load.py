"""Read a study from its YAML file, and check it before the first run."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, get_loader

from lightning_ema_nesterov.experiments.study.check import check_study
from lightning_ema_nesterov.experiments.study.spec import (
    BASELINE,
    BaseOptimizer,
    ClassSpec,
    MethodSpec,
    Study,
)

__all__ = ["load_study"]

_T = TypeVar("_T")


def load_study(path: Path, *, is_quick: bool = False) -> Study:
    """Read a study.

    Args:
        path: A YAML file with the attributes of :class:`Study`.
        is_quick: Whether to replace attributes by those under ``quick``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, if a key, a method or an optimizer is not known, or if a
            value is of another type or out of its range; the message is one line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"study must be a YAML file, and {path} {what}.")
    content = _read_yaml(path)
    if content is None:
        raise ValueError(f"{path} is empty.")
    raw = _mapping(content, "study")
    if is_quick:
        if not raw.get("quick"):
            raise ValueError(f"{path} has no quick form: it lacks the key quick.")
        raw = {**raw, **_mapping(raw["quick"], "quick")}
    _check_keys(Study, raw, "study")
    study = _make(
        Study,
        raw,
        "study",
        model=_make(ClassSpec, raw["model"], "model"),
        data=_make(ClassSpec, raw["data"], "data"),
        callbacks=_make_callbacks(raw, "callbacks"),
        base_optimizers=_make_bases(raw["base_optimizers"], "base_optimizers"),
        methods=dict(_expand_methods(_mapping(raw["methods"], "methods"))),
    )
    check_study(study)
    return study


def _read_yaml(path: Path) -> Any:
    try:
        # This one reads 1e-3 as a number, as YAML 1.2 does; PyYAML alone reads text.
        return get_loader("yaml")(path.read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "one place"
        raise ValueError(f"{path} is not YAML in {where}: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{key} must be a mapping of names, got {value!r}.")
    return value


def _make(cls: type[_T], raw: Any, key: str, **made: Any) -> _T:
    """Make a dataclass.

    Args:
        cls: The dataclass.
        raw: What the YAML has for it.
        key: Where in the YAML it stands.
        made: Attributes that are made already.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{key} must have {_names(cls)}, got {raw!r}.")
    _check_keys(cls, raw, key)
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # it is
    # `init_args:` with nothing behind it is null, and means nothing.
    given = {
        name: int(value) if types[name] == "int" and _is_whole(value) else value
        for name, value in raw.items()
        if name not in made and (value is not None or "None" in types[name])
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=set(made))
    try:
        parsed = parser.parse_object(copy.deepcopy(given))  # it changes what it gets
    except ArgumentError as error:
        named = re.search(r'Parser key "(\w+)', str(error))
        if named is None:  # a required key that is null
            named = re.search(r'Key "(\w+)', str(error))
        name = named[1] if named else ""
        value = f", got {raw.get(name)!r}" if named else f": {' '.join(str(error).split())}"
        where = name if cls is Study else f"{key}.{name}"
        raise ValueError(
            f"{where} must be {_in_words(types.get(name, 'valid'))}{value}."
        ) from error
    # Where anything is allowed jsonargparse reads "5" as a number; the YAML says what is text.
    return cls(
        **{n: given.get(n, v) if "Any" in types[n] else v for n, v in vars(parsed).items()}, **made
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, float) and value.is_integer()


def _in_words(annotation: str) -> str:
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "float | None": "a number or null",
        "str": "text",
        "str | None": "text",
        "list[int]": "a list of whole numbers",
        "list[float]": "a list of numbers",
        "list[str]": "a list of names",
        "dict[str, list[Any]]": "lists of values by name",
    }
    return words.get(annotation, "a mapping of names" if annotation[:4] == "dict" else annotation)


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _check_keys(cls: type, raw: Mapping[str, Any], key: str) -> None:
    fields = dataclasses.fields(cls)
    known = [f.name for f in fields]
    unknown = [name for name in raw if name not in known]
    if unknown:
        raise ValueError(f"{key} has the unknown key {unknown[0]!r}; known are {', '.join(known)}.")
    no_value = dataclasses.MISSING
    required = [f.name for f in fields if f.default is no_value and f.default_factory is no_value]
    missing = [name for name in required if name not in raw]
    if missing:
        raise ValueError(f"{key} lacks {', '.join(missing)}.")


def _make_callbacks(raw: Mapping[str, Any], key: str) -> list[ClassSpec]:
    callbacks = raw.get("callbacks") or []
    if not isinstance(callbacks, list):
        raise ValueError(f"{key} must be a list, got {callbacks!r}.")
    return [_make(ClassSpec, spec, key) for spec in callbacks]


def _make_bases(raw: Any, key: str) -> dict[str, BaseOptimizer]:
    found = {}
    for name, spec in _mapping(raw, key).items():
        _check_is_folder_name(name, key)
        where = f"{key}.{name}"
        has = spec if isinstance(spec, Mapping) else {}
        others = _make_bases(has["instead"], f"{where}.instead") if has.get("instead") else {}
        callbacks = _make_callbacks(has, f"{where}.callbacks")
        found[name] = _make(BaseOptimizer, spec, where, instead=others, callbacks=callbacks)
    return found


def _expand_methods(raw: Mapping[str, Any]) -> Iterator[tuple[str, MethodSpec]]:
    for name, spec in {BASELINE: None, **raw}.items():
        method = _make(MethodSpec, {} if spec is None else spec, f"methods.{name}")
        if name == BASELINE and method.class_path is not None:
            raise ValueError(f"methods.{name} is the baseline, and must have no class_path.")
        if name != BASELINE and method.class_path is None:
            raise ValueError(f"methods.{name} must have a class_path.")
        for key, choices in method.grid.items():
            if not choices:
                raise ValueError(f"methods.{name}.grid.{key} must have values, and has none.")
            if any(choice in choices[:idx] for idx, choice in enumerate(choices)):
                raise ValueError(
                    f"methods.{name}.grid.{key} must have different values, got {choices}."
                )
        for values in itertools.product(*method.grid.values()):
            chosen = dict(zip(method.grid, values, strict=True))
            suffix = ",".join(f"{key}={value}" for key, value in chosen.items())
            _check_is_folder_name(f"{name}[{suffix}]" if suffix else name, "methods")
            made = dataclasses.replace(method, init_args={**method.init_args, **chosen}, grid={})
            yield (f"{name}[{suffix}]" if suffix else name), made


def _check_is_folder_name(name: object, key: str) -> None:
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{key} must have names that can be those of folders, got {name!r}.")
