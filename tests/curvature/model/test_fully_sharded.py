"""What is read of torch's own objects under ``fully_shard``: of which versions it may be, and a refusal of others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from curvature.model import fully_sharded
from curvature.model.fully_sharded import FullyShard


def model_of(**state: Any) -> nn.Module:
    """A module as ``fully_shard`` marks it, with a state of this form."""
    made = type("State", (), state)()

    class Sharded(nn.Linear):
        def _get_fsdp_state(self) -> Any:
            return made

    return Sharded(2, 2)


def group_without(name: str = "") -> Any:
    parameter = SimpleNamespace(**dict.fromkeys({*fully_sharded._OF_PARAMETER} - {name}))
    entries = dict.fromkeys({*fully_sharded._OF_GROUP} - {name})
    return SimpleNamespace(**{**entries, **({} if name == "fsdp_params" else {"fsdp_params": [parameter]})})


def test_older_and_newer_versions_of_torch_are_read_alike() -> None:
    group = group_without()
    assert FullyShard(model_of(_fsdp_param_group=group)).groups == [group]
    assert FullyShard(model_of(_fsdp_param_groups=[group])).groups == [group]
    assert FullyShard(model_of(_fsdp_param_group=None)).groups == []  # all of its layers have groups of their own


@pytest.mark.parametrize("name", ["fsdp_params", "post_backward", "unsharded_accumulated_grad"])
def test_a_version_with_other_objects_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"not served by torch 2.*have no {name}; it is by torch 2.13"):
        FullyShard(model_of(_fsdp_param_group=group_without(name)))
    with pytest.raises(NotImplementedError, match="have no _fsdp_param_group"):
        FullyShard(model_of())
