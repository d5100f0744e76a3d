"""Read a study from its YAML file, and check it before the first run."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lightning_ema_nesterov.experiments.study.spec import (
    BASELINE,
    BaseOptimizer,
    MethodSpec,
    Study,
    find_class,
)
from lightning_ema_nesterov.optimizers.from_config import import_optimizer

__all__ = ["load_study"]

_CLASS_KEYS = {"class_path", "init_args"}
_T = TypeVar("_T")


def load_study(path: Path, *, is_quick: bool = False) -> Study:
    """Read a study.

    Args:
        path: A YAML file with the attributes of :class:`Study`.
        is_quick: Whether to replace attributes by those under ``quick``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a key, a method or an optimizer is not known, or a value out of its range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"study must be a YAML file, and {path} does not exist.")
    raw = yaml.safe_load(path.read_text())
    if is_quick:
        if not (isinstance(raw, dict) and raw.get("quick")):
            raise ValueError(f"{path} has no quick form: it lacks the key quick.")
        raw = {**raw, **raw["quick"]}
    study = _make(Study, raw, "study")
    bases = {
        name: _make_base(spec, f"base_optimizers.{name}")
        for name, spec in _mapping(study.base_optimizers, "base_optimizers").items()
    }
    methods = dict(_expand_methods(_mapping(study.methods, "methods")))
    study = dataclasses.replace(study, base_optimizers=bases, methods=methods)
    _check(study)
    return study


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{key} must be a mapping of names, got {value!r}.")
    return value


def _make(cls: type[_T], raw: Any, key: str) -> _T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a dataclass
    given = _mapping({} if raw is None else raw, key) if raw else {}
    unknown = [name for name in given if name not in fields]
    if unknown:
        raise ValueError(
            f"{key} has the unknown key {unknown[0]!r}; known are {', '.join(fields)}."
        )
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in given]
    if missing:
        raise ValueError(f"{key} lacks {', '.join(missing)}.")
    return cls(**given)


def _make_base(raw: Any, key: str) -> BaseOptimizer:
    base = _make(BaseOptimizer, raw, key)
    instead = {
        name: _make(BaseOptimizer, spec, f"{key}.instead.{name}")
        for name, spec in base.instead.items()
    }
    for name, found in {"": base, **instead}.items():
        if not found.lrs or not all(lr > 0 for lr in found.lrs):
            where = f"{key}.instead.{name}" if name else key
            raise ValueError(f"{where}.lrs must be learning rates above 0, got {found.lrs}.")
        try:
            factory = import_optimizer(found.class_path, key)
        except TypeError as error:
            raise ValueError(str(error)) from error
        _check_arguments(factory, found.init_args, key)
    return dataclasses.replace(base, instead=instead)


def _expand_methods(raw: Mapping[str, Any]) -> Iterator[tuple[str, MethodSpec]]:
    for name, spec in {BASELINE: None, **raw}.items():
        method = _make(MethodSpec, spec, f"methods.{name}")
        if (method.class_path is None) != (name == BASELINE):
            raise ValueError(f"methods.{name} must have a class_path, and {BASELINE} must not.")
        for values in itertools.product(*method.grid.values()):
            chosen = dict(zip(method.grid, values, strict=True))
            suffix = ",".join(f"{key}={value}" for key, value in chosen.items())
            init_args = {**method.init_args, **chosen}
            made = dataclasses.replace(method, init_args=init_args, grid={})
            if made.class_path is not None:
                cls = find_class(made.class_path)
                _check_arguments(cls, init_args, f"methods.{name}")
                cls(**init_args)  # says what is out of its range
            yield (f"{name}[{suffix}]" if suffix else name), made


def _check_arguments(cls: Callable[..., Any], init_args: Mapping[str, Any], key: str) -> None:
    known = inspect.signature(cls).parameters
    unknown = [name for name in init_args if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise ValueError(
            f"{key}.init_args has the unknown key {unknown[0]!r}; known are {', '.join(known)}."
        )


def _check(study: Study) -> None:
    if study.num_validations < 1 or study.num_steps % study.num_validations or study.num_steps < 1:
        raise ValueError(
            "num_steps must be a positive multiple of num_validations, got "
            f"{study.num_steps} and {study.num_validations}."
        )
    for name in ("lr_warmup", "lr_decay"):
        if not 0 <= getattr(study, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(study, name)}.")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {study.seeds}.")
    _check_names(study.base_optimizers, [m.bases for m in study.methods.values()])
    instead = [list(base.instead) for base in study.base_optimizers.values()]
    _check_names(study.methods, instead)
    specs = {"model": study.model, "data": study.data}
    for key, spec in [*specs.items(), *(("callbacks", spec) for spec in study.callbacks)]:
        if not isinstance(spec, Mapping) or not {"class_path"} <= set(spec) <= _CLASS_KEYS:
            raise ValueError(f"{key} must have class_path and init_args, got {spec!r}.")
        init_args = spec.get("init_args") or {}
        _check_arguments(find_class(spec["class_path"]), init_args, key)


def _check_names(known: Mapping[str, object], used: Sequence[Sequence[str]]) -> None:
    for name in itertools.chain.from_iterable(used):
        if name not in known:
            raise ValueError(f"{name!r} is not known; known are {', '.join(known)}.")
