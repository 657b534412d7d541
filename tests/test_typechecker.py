"""The test run refuses what contradicts an annotation, whether or not the function has shapes in its annotations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from oprd.models import architecture
from oprd.objectives.representation import representation_error
from oprd.objectives.terms import PackedPositions
from oprd.types import Rollouts


def test_a_wrong_argument_is_refused_where_there_are_no_shapes():
    with pytest.raises(Exception, match=r"num_layers.*violates type hint"):
        architecture.num_layers("a model")


def test_a_wrong_result_is_refused_where_there_are_no_shapes(monkeypatch):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size="32"))
    monkeypatch.setattr(architecture, "causal_lm", lambda model: SimpleNamespace(config=config))
    with pytest.raises(Exception, match=r"hidden_size.*violates type hint"):
        architecture.hidden_size(torch.nn.Identity())


def test_shapes_that_disagree_are_refused():
    with pytest.raises(Exception, match="Type-check error"):
        representation_error(torch.ones(2, 3), torch.ones(2, 4))


def test_a_field_of_a_wrong_type_is_refused():
    with pytest.raises(Exception, match=r"Rollouts\.__init__.*violates type hint"):
        Rollouts(1, [[1]], ["stop"], [""], [0])


def test_fields_whose_shapes_disagree_are_refused():
    with pytest.raises(Exception, match="Type-check error"):
        PackedPositions(torch.zeros(4, dtype=torch.long), torch.ones(5))
