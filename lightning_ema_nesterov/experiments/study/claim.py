"""Whose folder it is: a study may grow in its own, and another study may not enter it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lightning_ema_nesterov.experiments.study.spec import Run, Study

__all__ = ["CONFIG", "claim", "deciding", "read_config"]

CONFIG = "study.json"

_PARTS = (
    "base_optimizers",
    "methods",
    "seeds",
    "confirming_seeds",
    "confirming_margin",
    "has_gained_baseline",
    "has_checkpoints",
)
"""What a study may have more of later; everything else is the same for all of its runs."""

_BEFORE = {f.name: f.default for f in fields(Study) if f.default is not MISSING}
_BEFORE |= {f.name: f.default_factory() for f in fields(Study) if f.default_factory is not MISSING}
"""What a key meant before there was one: folders of former versions lack it."""


def claim(study: Study, out_dir: Path, finished: Iterable[Run] = ()) -> None:
    """Write what a study trains into its folder, unless runs there are of another study.

    More seeds, learning rates, methods and base optimizers are the same study. What no finished
    run depends on can change, so that a run that failed does not stand in the way.

    Args:
        study: The study.
        out_dir: Its folder; made if there is none.
        finished: Runs that are finished there.

    Raises:
        ValueError: If the folder holds runs of a study with another model, data, steps or schedule,
            with another definition of the same method or optimizer, or with seeds that choose in
            the one and confirm in the other.
    """
    config = json.loads(json.dumps(study.as_dict()))
    known = read_config(out_dir)
    finished = list(finished)
    if known is not None and finished:
        different = list(dict.fromkeys(_differences(known, config, finished)))
        if different:
            raise ValueError(
                f"{out_dir} holds another study: {', '.join(different)} differ. Seeds, learning "
                "rates and methods can be added; for anything else give another out_dir, or the "
                "changed method another name. Nothing was changed."
            )
        config = _joined(known, config)
    out_dir.mkdir(parents=True, exist_ok=True)
    unfinished = out_dir / f"{CONFIG}.tmp"
    unfinished.write_text(json.dumps(config, indent=1))
    unfinished.replace(out_dir / CONFIG)


def read_config(out_dir: Path) -> dict[str, Any] | None:
    """Return what was written about the study in a folder; ``None`` if there is none."""
    path = out_dir / CONFIG
    if not path.exists():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    return config


def deciding(study: Study, run: Run) -> str:
    """Return all that decides the result of a run but its learning rate and seed, as text."""
    config = json.loads(json.dumps(study.as_dict()))
    common = {key: value for key, value in config.items() if key not in _PARTS}
    own = _definitions(config, run.base, run.method)
    return json.dumps({**common, **own}, sort_keys=True)


def _differences(
    known: Mapping[str, Any], config: Mapping[str, Any], finished: Iterable[Run]
) -> Iterator[str]:
    before_all = {**_BEFORE, **known}
    yield from (k for k in config if k not in _PARTS and config[k] != before_all.get(k))
    for base, method in dict.fromkeys((run.base, run.method) for run in finished):
        before, now = (_definitions(c, base, method) for c in (known, config))
        yield from (key for key in now if key in before and now[key] != before[key])


def _definitions(config: Mapping[str, Any], base: str, method: str) -> dict[str, Any]:
    """Return what decides the results of a method on a base optimizer, by its key in the YAML."""
    found = {}
    if base in config["base_optimizers"]:
        optimizer = config["base_optimizers"][base]
        optimizer = optimizer["instead"].get(method, optimizer)
        optimizer = {"callbacks": [], **optimizer}
        deciding = {k: optimizer[k] for k in ("class_path", "init_args", "lr_decay", "callbacks")}
        found[f"base_optimizers.{base}"] = deciding
    if method in config["methods"]:
        spec = {"lr_decay": None, "lookahead_step_size_by_role": {}, **config["methods"][method]}
        deciding = {k: spec[k] for k in ("class_path", "init_args", "lr_decay")}
        by_role = spec["lookahead_step_size_by_role"]
        found[f"methods.{method}"] = {**deciding, "by_role": by_role}
    return found


def _joined(known: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the folder holds or will hold; what was there first comes first."""
    bases = {**known["base_optimizers"], **config["base_optimizers"]}
    for name in known["base_optimizers"].keys() & config["base_optimizers"].keys():
        before, now = (c["base_optimizers"][name] for c in (known, config))
        bases[name] = {
            **now,
            "lrs": list(dict.fromkeys([*before["lrs"], *now["lrs"]])),
            "instead": {**before["instead"], **now["instead"]},
        }
    seeds, confirming = (
        list(dict.fromkeys([*known.get(key, []), *config[key]]))
        for key in ("seeds", "confirming_seeds")
    )
    both = sorted(set(seeds) & set(confirming))
    if both:
        raise ValueError(
            f"Seeds that choose learning rates must not confirm them, and the seeds {both} do one "
            "in this folder and the other in the YAML: give another out_dir."
        )
    return {
        **config,
        "base_optimizers": bases,
        "methods": {**known["methods"], **config["methods"]},
        "seeds": seeds,
        "confirming_seeds": confirming,
    }
