"""The command ``ema-nesterov average``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.cli import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of one step from 0 to 1, with decay 0.75."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach_ema_nesterov(optimizer, model, ema_decay=0.75, warmup=0, rest=0)
    (-model(torch.ones(1, 1))).sum().backward()
    optimizer.step()
    path = tmp_path / "source.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", "average", *map(str, arguments)])
    main()


@pytest.mark.parametrize(("share", "weight"), [((), 0.25), (("--share", "0.5"), 0.625)])
def test_average_is_written(
    share: tuple[str, ...],
    weight: float,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "new" / "average.pt"
    run(monkeypatch, source, target, *share)
    assert torch.load(target, weights_only=True)["model"]["weight"].item() == weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.pt",), "the following arguments are required: target"),
        (("a.pt", "b.pt", "--share", "all"), "argument --share: invalid float value: 'all'"),
        (("a.pt", "b.pt", "--shrae", "1"), "unrecognized arguments: --shrae 1"),
    ],
)
def test_wrong_options_are_named(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"ema-nesterov: {message}\nOptions: ema-nesterov average --help\n"
    )


def test_help_says_what_the_function_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    said = " ".join(capsys.readouterr().out.split())
    for part in ("a lit_model.pth of LitGPT", "File to write.", "from the last weights to their"):
        assert part in said


def test_errors_are_one_line_and_nothing_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target.pt"
    cut = tmp_path / "cut.pt"
    cut.write_bytes(source.read_bytes()[:600])
    plain = tmp_path / "plain.pt"
    torch.save({"model": {}, "optimizer": torch.optim.SGD([torch.ones(1)]).state_dict()}, plain)
    for arguments, message in (
        ((tmp_path / "nowhere", target), "nowhere does not exist"),
        ((source, cut), "target must not exist"),
        ((cut, target), "must be a whole checkpoint"),
        ((plain, target), "must be made with EMA-Nesterov"),
        ((tmp_path, target), "it may be incomplete"),
        ((source, target, "--share", "2"), "share must be in [0, 1], got 2.0"),
    ):
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, *arguments)
        said = str(end.value.code)
        assert said.startswith("ema-nesterov: ")
        assert message in said
        assert "\n" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"source.pt", "cut.pt", "plain.pt"}
