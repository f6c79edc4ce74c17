"""Folds batch norms in inference mode into the convolutions ahead of them."""

import torch
from torch import Tensor


def fold_norm(tensors: list[Tensor | None], eps: float | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that equals one and its norm in eval mode.

    ``tensors`` are its weight and bias, and the norm's weight, bias, mean and variance; ``eps`` is the norm's, None
    where there is none. Gradients flow through.
    """
    weight, bias, gamma, beta, mean, var = tensors
    assert weight is not None
    if eps is None:
        return weight, bias
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + eps)
    scale = scale if gamma is None else scale * gamma
    shift = -mean if bias is None else bias - mean
    shift = shift * scale if beta is None else torch.addcmul(beta, shift, scale)
    return weight * scale.to(weight.dtype).view(-1, 1, 1, 1), shift.to(weight.dtype)
