"""Gradients of the vocabulary-sized parameters: LM head and input embedding.

Each is a `[V, D]` matrix (544 MB in float32 at |V| = 151,936 and width 896). The code here avoids second copies of it.

Letters: N tokens, n tokens of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oprd.models.architecture import causal_lm
from oprd.models.lm_head.head import LMHead
from oprd.models.lm_head.matmul import add_weight_gradient, to_hidden


class HeadGradients:
    """Gradients of hidden states, weight and bias, summed chunk by chunk. None for those that are not wanted.

    Args:
        head: the LM head, already `rounded`.
        hidden_ND: hidden states.
        wanted: whether the gradient of states, weight and bias is wanted.
        dtype: dtype of the sums of weight and bias.
    """

    def __init__(
        self, head: LMHead, hidden_ND: Float[Tensor, "N D"], wanted: Sequence[bool], dtype: torch.dtype
    ) -> None:
        states, weight, bias = wanted
        self.hidden_ND = torch.empty_like(hidden_ND) if states else None
        self.weight_VD = torch.zeros_like(head.weight, dtype=dtype) if weight else None
        self.bias_V = torch.zeros_like(head.bias, dtype=dtype) if bias and head.bias is not None else None
        self._head, self._states_ND = head, hidden_ND

    def add(self, tokens: slice, logits_grad_nV: Float[Tensor, "n V"]) -> None:
        """Add the gradient of W h of one chunk of tokens."""
        head = self._head
        if self.hidden_ND is not None:
            weight_VD = head.weight[: head.rows]
            self.hidden_ND[tokens] = to_hidden(logits_grad_nV, weight_VD, head.product_dtype is not None)
        if self.weight_VD is not None:
            total_VD = self.weight_VD[: head.rows]
            add_weight_gradient(total_VD, logits_grad_nV, self._states_ND[tokens], head.product_dtype)
        if self.bias_V is not None:
            self.bias_V[: head.rows].add_(logits_grad_nV.sum(0))


def deliver_gradients(
    parameters: Sequence[Tensor | None], gradients: Sequence[Tensor | None], in_place: bool
) -> list[Tensor | None]:
    """What a backward returns for its parameters: the gradients in the parameters' dtypes.

    With `in_place`, the gradients are added to `.grad` here and None is returned for each parameter.

    Raises:
        RuntimeError: `in_place` and a parameter that is not a leaf.
    """
    pairs = list(zip(parameters, gradients, strict=True))
    if not in_place:
        return [None if p is None or g is None else g.to(p.dtype) for p, g in pairs]
    for parameter, gradient in pairs:
        if parameter is None or gradient is None:
            continue
        if not parameter.is_leaf:
            raise RuntimeError("LMHead: in_place is for parameters; this weight is computed from other tensors")
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter.dtype)
        else:
            parameter.grad.add_(gradient)
    return [None] * len(pairs)


@contextmanager
def embedding_gradient_by_rows(model: nn.Module) -> Iterator[None]:
    """Let forward passes in this context give the input embedding a sparse gradient: the rows of the batch's tokens.

    PyTorch otherwise fills a `[V, D]` matrix with zeros, adds the batch's rows to it, and adds the matrix to `.grad`, which already
    exists if head and embedding share their weight or an earlier micro-batch was read. The sum is the same up to the order of
    additions. `weight.grad` itself always is dense.

    Do not use this with DDP or FSDP: they reduce dense gradients. Frozen embeddings and classes other than `nn.Embedding` are left
    unchanged.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
    """
    embedding = causal_lm(model).get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or not embedding.weight.requires_grad:
        yield
        return
    if not hasattr(embedding.weight, "_oprd_densified"):
        embedding.weight._oprd_densified = embedding.weight.register_post_accumulate_grad_hook(_densify)  # type: ignore
    before, embedding.sparse = embedding.sparse, True
    try:
        yield
    finally:
        embedding.sparse = before


def _densify(weight: Tensor) -> None:
    """Make a sparse `.grad` dense. It is sparse if no dense gradient existed before; optimizers and clipping need a matrix."""
    if weight.grad is not None and weight.grad.is_sparse:
        weight.grad = weight.grad.to_dense()
