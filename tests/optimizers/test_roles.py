"""Which role a parameter gets, and what is said where none can be found."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from litgpt import GPT, Config
from litgpt.model import Block
from torch import nn

from lightning_ema_nesterov.optimizers import groups_by_role
from lightning_ema_nesterov.optimizers.roles import RoleGroups
from tests.optimizers.tiny import TinyLM


def names(groups: RoleGroups) -> dict[str, list[str]]:
    return {g["role"]: n for g, n in zip(groups, groups.names, strict=True)}


def config() -> Config:
    return Config(n_layer=2, n_head=2, n_embd=8, vocab_size=20, padding_multiple=4, bias=False)


def test_roles_of_a_small_language_model() -> None:
    model = TinyLM()
    groups = groups_by_role(model)
    assert names(groups) == {
        "hidden": ["up.weight", "down.weight"],
        "embedding": ["wte.weight"],
        "head": ["lm_head.weight"],
        "other": ["norm.weight", "norm.bias", "up.bias"],
    }
    params = dict(model.named_parameters())
    for group, members in zip(groups, groups.names, strict=True):
        assert all(p is params[n] for p, n in zip(group["params"], members, strict=True))


def test_roles_of_litgpts_model() -> None:
    found = names(groups_by_role(GPT(config())))
    assert found["embedding"] == ["transformer.wte.weight"]
    assert found["head"] == ["lm_head.weight"]
    assert len(found["hidden"]) == 2 * 4  # qkv, proj, fc, proj of each block
    assert all(".h." in name and name.endswith(".weight") for name in found["hidden"])
    assert all("norm" in name or "ln" in name for name in found["other"])


def test_roles_of_a_model_of_litgpts_blocks_with_other_names() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(20, 8)
            self.layers = nn.ModuleList(Block(config(), idx) for idx in range(2))
            self.to_logits = nn.Linear(8, 20)

    found = names(groups_by_role(Blocks()))
    assert found["embedding"] == ["tokens.weight"]
    assert found["head"] == ["to_logits.weight"]
    assert len(found["hidden"]) == 2 * 4


@pytest.mark.slow
def test_roles_need_torch_alone() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['litgpt'] = None\n"
        "import torch; import lightning_ema_nesterov.optimizers as o\n"
        "m = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))\n"
        "print(o.groups_by_role(m)[1]['role'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["head"]


def test_tied_embedding_is_the_head() -> None:
    model = TinyLM()
    model.lm_head.weight = model.wte.weight
    found = names(groups_by_role(model))
    assert found["head"] == ["wte.weight"]
    assert "embedding" not in found


def test_layer_of_the_vocabulary_wins_over_a_name() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(20, 8)
            self.output = nn.Linear(8, 8)
            self.unembed = nn.Linear(8, 20)

    found = names(groups_by_role(Attention()))
    assert (found["head"], found["hidden"]) == (["unembed.weight"], ["output.weight"])


def test_frozen_parameters_are_left_out() -> None:
    model = TinyLM()
    model.wte.requires_grad_(False)
    model.up.bias.requires_grad_(False)
    found = names(groups_by_role(model))
    assert "embedding" not in found
    assert found["other"] == ["norm.weight", "norm.bias"]


def test_tensors_of_three_dimensions_are_others() -> None:
    model = TinyLM()
    model.conv = nn.Conv1d(2, 2, 3)
    found = names(groups_by_role(model))
    assert "conv.weight" in found["other"]


def test_prefixes_of_wrappers_are_not_in_the_names() -> None:
    wrapped = nn.ModuleDict({"_forward_module": TinyLM()})
    assert names(groups_by_role(wrapped)) == names(groups_by_role(TinyLM()))


def test_printed_groups_list_every_parameter() -> None:
    printed = str(groups_by_role(TinyLM()))
    assert "hidden: 2 parameters, 192 elements\n  up.weight (12, 8)\n  down.weight" in printed
    assert all(name in printed for name, _ in TinyLM().named_parameters())


def test_roles_may_be_given() -> None:
    model = nn.ParameterDict({"table": nn.Parameter(torch.zeros(5, 4))})
    outer = nn.ModuleDict({"tokens": model, "logits": nn.Linear(4, 5)})
    roles = {"tokens.table": "embedding", "logits.weight": "head"}
    found = names(groups_by_role(outer, roles=roles))
    assert found == {
        "embedding": ["tokens.table"],
        "head": ["logits.weight"],
        "other": ["logits.bias"],
    }


def test_missing_embedding_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"must be an nn\.Embedding, and Sequential has none\..*role"
    ):
        groups_by_role(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9)))


def test_missing_head_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"head must be one linear layer.*has 0 such.*'role': 'head'"
    ):
        groups_by_role(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)))


def test_two_heads_are_an_error_that_names_them() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9), nn.Linear(4, 9))
    with pytest.raises(ValueError, match=r"has 2 such layers \('1', '2'\)"):
        groups_by_role(model)
    found = names(groups_by_role(model, roles={"2.weight": "head"}))
    assert (found["head"], found["hidden"]) == (["2.weight"], ["1.weight"])


def test_layer_as_wide_as_a_table_of_positions_is_no_head() -> None:
    """The head has more outputs than the vocabulary has rows, as a padded one has."""
    model = nn.ModuleDict({"wte": nn.Embedding(9, 4), "wpe": nn.Embedding(6, 4)})
    model["up"], model["lm_head"] = nn.Linear(4, 6), nn.Linear(4, 16)
    found = names(groups_by_role(model))
    assert (found["head"], found["hidden"]) == (["lm_head.weight"], ["up.weight"])


@pytest.mark.parametrize(
    ("roles", "match"),
    [({"no.weight": "head"}, "must name parameters"), ({"up.weight": "body"}, "must be one of")],
)
def test_wrong_roles_are_errors(roles: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        groups_by_role(TinyLM(), roles=roles)


def test_flat_shard_of_a_matrix_keeps_its_role() -> None:
    model = TinyLM()
    model.up.weight = nn.Parameter(torch.zeros(20))
    model.down.weight = nn.Parameter(torch.zeros(0))
    assert names(groups_by_role(model))["hidden"] == ["up.weight", "down.weight"]
