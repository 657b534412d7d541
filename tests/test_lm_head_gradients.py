"""Rows in place of a matrix: the same gradients, added in another order, and what optimizers see is a matrix."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from oprd.models.lm_head import embedding_gradient_by_rows
from tiny import FAMILIES, tiny_model

IDS = torch.tensor([[5, 3, 5, 1], [0, 5, 2, 2]])


def backward(model, *, head: bool):
    output = model(input_ids=IDS, output_hidden_states=True)
    loss = output.hidden_states[-1].square().sum()
    if head:
        loss = loss + output.logits.logsumexp(-1).sum()
    loss.backward()


@pytest.mark.parametrize("updates", [[True], [False], [False, True], [True, False], [False, False, False]])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"] if "gemma2" in FAMILIES else ["llama"])
def test_gradients_are_the_same(family, tied, updates):
    """With and without the head's gradient, alone and added to that of earlier micro-batches."""
    plain = tiny_model(family, tie_word_embeddings=tied)
    spared = copy.deepcopy(plain)
    for head in updates:
        backward(plain, head=head)
        with embedding_gradient_by_rows(spared):
            backward(spared, head=head)
        for (name, one), other in zip(plain.named_parameters(), spared.parameters(), strict=True):
            if one.grad is None:
                assert other.grad is None, name
            else:
                assert not other.grad.is_sparse, name
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-6 * float(one.grad.abs().max()))


def test_the_embedding_passes_rows_back():
    """So that the matrix is not made: what arrives at the weight holds as many rows as the batch has tokens."""
    model = tiny_model(tie_word_embeddings=False)
    weight, arrived = model.get_input_embeddings().weight, []
    weight.register_hook(lambda gradient: arrived.append(gradient))
    with embedding_gradient_by_rows(model):
        backward(model, head=True)
    assert arrived[0].is_sparse
    assert arrived[0]._nnz() == (model.config.pad_token_id != IDS).sum()  # padding has no gradient
    assert not weight.grad.is_sparse


def test_outside_and_in_copies_it_is_off():
    model = tiny_model(tie_word_embeddings=False)
    weight, arrived = model.get_input_embeddings().weight, []
    weight.register_hook(lambda gradient: arrived.append(gradient.is_sparse))
    for on in (True, False, True):
        with embedding_gradient_by_rows(model) if on else nullcontext():
            backward(model, head=True)
    assert arrived == [True, False, True]
    assert len(weight._post_accumulate_grad_hooks) == 1
    twin = copy.deepcopy(model)
    twin.zero_grad()
    with embedding_gradient_by_rows(twin):
        backward(twin, head=True)
    assert not twin.get_input_embeddings().weight.grad.is_sparse


def test_a_frozen_embedding_is_left_alone():
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    with embedding_gradient_by_rows(model):
        assert not model.get_input_embeddings().sparse
