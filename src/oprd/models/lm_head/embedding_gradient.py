"""The embedding's gradient as the few rows that a batch has, not as a second matrix of the vocabulary's size.

PyTorch makes a whole `[V, D]` matrix of zeros, adds the batch's rows into it and then adds the matrix to the gradient that is
there: the LM head's, where head and embedding are one weight, or that of the micro-batches before. With rows alone that matrix
(544 MB in float32 at |V| = 151,936 and width 896), and the time to fill and to add it, are saved. Sums differ by their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from oprd.models.architecture import causal_lm


@contextmanager
def embedding_gradient_by_rows(model: nn.Module) -> Iterator[None]:
    """Forward passes in here let the input embedding pass rows back; what ends up in `weight.grad` is dense as ever.

    For a model that no wrapper reduces gradients of: DDP and FSDP want them dense as they arrive. Embeddings that are not trained,
    and those of another class than torch's, are left as they are.

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
    """Where nothing dense was there to add the rows to; optimizers and gradient clipping want a matrix."""
    if weight.grad is not None and weight.grad.is_sparse:
        weight.grad = weight.grad.to_dense()
