"""The MLP of a layer out of a backend's single operations, dense or a mixture of experts."""

import torch

from disagg.engine.kernels.interface import DenseMlp, KernelBackend, Mlp, SparseMlp


def composed_mlp(backend: KernelBackend, x: torch.Tensor, mlp: Mlp) -> torch.Tensor:
    """Return the layer's MLP of x [T, hidden]."""
    if isinstance(mlp, DenseMlp):
        return mlp.down(backend.gate(mlp.gate_up(x), mlp.activation))
    logits = mlp.router(x).float()
    weights, chosen = choose_experts(logits, mlp)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    # Only the experts that some token chose; a GPU is waited for here.
    for number in torch.unique(chosen).tolist():
        rows, ranks = torch.nonzero(chosen == number, as_tuple=True)
        product = composed_mlp(backend, x[rows], mlp.experts[number])
        out.index_add_(0, rows, product.float() * weights[rows, ranks, None])
    if mlp.shared is not None:
        gate = torch.sigmoid(logits[:, len(mlp.experts) :])
        out += composed_mlp(backend, x, mlp.shared).float() * gate
    return out.to(x.dtype)


def choose_experts(logits: torch.Tensor, mlp: SparseMlp) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and the numbers of the experts of each row, both [T, num_per_token], the likeliest first.

    ``logits`` are the router's, float32 [T, experts and the shared expert's gate].
    """
    own = logits[:, : len(mlp.experts)]
    # Sorted, since of equal logits ``topk`` takes any.
    chosen = torch.sort(own, dim=-1, descending=True, stable=True).indices[:, : mlp.num_per_token]
    weights = torch.softmax(own, dim=-1).gather(1, chosen)
    if mlp.normalize_weights:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen
