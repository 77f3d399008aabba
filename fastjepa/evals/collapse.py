"""Numbers that show a collapse of features: their standard deviation, RankMe and LiDAR."""

import math

import torch
from torch import Tensor

RANK_ROWS = 2048
RANK_EPSILON, LIDAR_DELTA = 1e-7, 1e-4  # added to RankMe's and LiDAR's shares; to LiDAR's within-class covariance


def feature_std(features: Tensor) -> float:
    """Return the mean over channels of the standard deviation over tokens (T, D); 0 when all tokens have the same features."""
    return float(features.float().std(dim=0, unbiased=False).mean())


def effective_rank(features: Tensor) -> float:
    """Return the exp of the entropy of the normalised singular values of features (T, D), from 1 to min(T, D).

    This is RankMe (Garrido et al., 2023): p_k = s_k / sum(s) + 1e-7, features not centred. When there are more than 2048
    tokens, 2048 evenly spaced ones are used. 0 for all-zero features, NaN for features that are not finite.
    """
    rows = features.detach()
    if len(rows) > RANK_ROWS:
        rows = rows[torch.arange(RANK_ROWS, device=rows.device) * len(rows) // RANK_ROWS]
    rows = rows.double()
    # The smaller Gram matrix has the squares of the singular values: exact enough in float64, and several times faster.
    gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    if not bool(gram.isfinite().all()):
        return math.nan
    return _entropy_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())


def lidar(features: Tensor, delta: float = LIDAR_DELTA) -> float:
    """Return the exp of the entropy of the LDA eigenvalues of q views of n images, (n, q, D), from 1 to min(n - 1, D).

    This is LiDAR (Thilak et al., 2024): images are the classes of a linear discriminant analysis, views their members. With
    S_b = mean of (m_i - m)(m_i - m)^T over images and S_w = mean of (x - m_i)(x - m_i)^T over views, plus delta * I, it
    is RankMe's entropy over the eigenvalues of S_w^-1/2 S_b S_w^-1/2. Directions in which the views of one image differ
    as much as images do count little. 0 when all images have the same features, NaN for features that are not finite.
    """
    x = features.detach().double()
    if not bool(x.isfinite().all()):
        return math.nan
    centres = x.mean(dim=1)  # (n, D)
    inside = (x - centres[:, None]).flatten(0, 1)
    between = (centres - centres.mean(dim=0)) / math.sqrt(len(x))
    within = inside.T @ inside / len(inside) + delta * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    # B S_w^-1 B^T has the eigenvalues wanted, those that are not zero, in n x n instead of D x D.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)  # (D, n)
    return _entropy_rank(torch.linalg.eigvalsh(whitened.T @ whitened).clamp_min(0))


def _entropy_rank(values: Tensor) -> float:
    total = values.sum()
    if float(total) == 0:
        return 0.0
    p = values / total + RANK_EPSILON
    return float((-(p * p.log()).sum()).exp())
