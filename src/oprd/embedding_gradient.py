"""The embedding's gradient as the few rows that a batch has, not as a second matrix of the vocabulary's size.

PyTorch makes a whole `[V, D]` matrix of zeros, adds the batch's rows into it and then adds the matrix to the gradient that is
there: the LM head's, where head and embedding are one weight, or that of the micro-batches before. With rows alone that matrix
(544 MB in float32 at |V| = 151,936 and width 896), and the time to fill and to add it, are saved. Sums differ by their order.
"""

from __future__ import annotations

from torch import Tensor, nn

from oprd.models import causal_lm


def spare_embedding_gradient(model: nn.Module, *, on: bool = True) -> bool:
    """Let the input embedding of a causal LM pass back rows; what ends up in `weight.grad` is dense as ever.

    For a model that no wrapper reduces gradients of: DDP and FSDP want them dense as they arrive.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        on: False: back to PyTorch's own way.

    Returns:
        Whether it is on: not for embeddings that are not trained, nor for those of another class than torch's.
    """
    embedding = causal_lm(model).get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or not embedding.weight.requires_grad:
        return False
    embedding.sparse = on
    if on and not getattr(embedding, "_densified", False):
        embedding._densified = True  # type: ignore[assignment]
        embedding.weight.register_post_accumulate_grad_hook(_densify)
    return on


def _densify(weight: Tensor) -> None:
    """Where nothing dense was there to add the rows to; optimizers and gradient clipping want a matrix."""
    if weight.grad is not None and weight.grad.is_sparse:
        weight.grad = weight.grad.to_dense()
