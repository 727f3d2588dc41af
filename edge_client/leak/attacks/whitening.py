"""Directions in which values are spread alike."""

import torch
from torch import Tensor

__all__ = ["whitening"]


def whitening(values: Tensor, shrinkage: float) -> Tensor:
    """
    Values (n, d) around zero -> W (d, d): the columns of values W are uncorrelated, and of the same size.

    Args:
        shrinkage: what is added to every channel's variance, as a share of their mean: n is not many times d.
    """
    # In float64: where channels repeat each other only what is added is left of the smallest variances, so small beside the
    # largest that the inverse in float32 is not positive definite any more.
    values = values.double()
    covariance = values.T @ values / len(values)
    added = shrinkage * covariance.diagonal().mean().clamp(min=1e-12)
    covariance += added * torch.eye(len(covariance), dtype=torch.float64)
    directions: Tensor = torch.linalg.cholesky(torch.linalg.inv(covariance)).float()
    return directions
