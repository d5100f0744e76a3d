"""The examples of the README and of the pages run, and what they name is there."""

from __future__ import annotations

import inspect
import re
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.optimizers.from_config import build_optimizer, import_optimizer
from tests.litgpt.language import Language

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of a page, also those inside of tabs and lists."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^\1```$", path.read_text(), re.DOTALL | re.MULTILINE
    )
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


# Packages that no extra has, whose dependencies contradict LitGPT's.
NEEDS = {"other_trainers.md": "accelerate"}

WITH_PYTHON = [path for path in PAGES if blocks(path, "python")]
WITH_YAML = [path for path in PAGES if blocks(path, "yaml")]


def test_there_are_examples() -> None:
    assert len(WITH_PYTHON) >= 5
    assert len(WITH_YAML) >= 2


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after the other, in one namespace."""
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name], reason=f"{NEEDS[page.name]} is not installed")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for idx, code in enumerate(blocks(page, "python")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, f"{name(page)}, example {idx}", "exec"), namespace)
    if page.name == "README.md":
        assert namespace["trainer"].global_step == 100  # type: ignore[attr-defined]
        assert list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("page", WITH_YAML, ids=name)
def test_yaml_examples_name_what_there_is(page: Path) -> None:
    for code in blocks(page, "yaml"):
        config = yaml.safe_load(code)
        if "trainer" in config:
            [entry] = config["trainer"]["callbacks"]
            assert entry["class_path"] == "lightning_ema_nesterov.EMANesterov"
            EMANesterov(**entry["init_args"])
        if "optimizer" in config:
            spec = config["optimizer"]
            if spec["class_path"] == "lightning_ema_nesterov.litgpt.low_rank":
                # Imported here: where other trainers are tested there is no LitGPT.
                low_rank = import_module("lightning_ema_nesterov.litgpt").low_rank
                inspect.signature(low_rank).bind(None, **spec["init_args"])
                spec = spec["init_args"]["trained_by"]  # for a model that is as wide as its rank
            if spec["class_path"] == "lightning_ema_nesterov.litgpt.ema_nesterov":
                spec["init_args"]["total_steps"] = 100  # LitGPT tells it
            optimizer = build_optimizer(spec, Language().parameters(), key="optimizer")
            base = spec["init_args"].get("base") or spec["init_args"]["optimizer"]
            base = base["init_args"].get("optimizer", base)  # below a reset of the momentum
            assert type(optimizer) is import_optimizer(base["class_path"], "")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_linked_files_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    links += re.findall(r"\{(?:image|literalinclude)\} (\S+)", text)
    for link in links:
        assert "://" in link or (page.parent / link).exists(), link
