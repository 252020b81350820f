"""A learned kernel: how much two descriptions ask for the same weights, and the regression over experts that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorag.networks.cvae import ConditionReader

__all__ = ["ExpertKernel", "GroupKernel", "KernelHead"]

_LEAST = 1e-3  # of the noise, so that a system of experts with equal descriptions can be solved


class GroupKernel(nn.Module):
    """A Gaussian kernel κ on each group of features, and the groups' products in pairs.

    k(a, b) = Σ_g w_g κ_g(a, b) + Σ_{g<h} w_gh κ_g(a, b) κ_h(a, b) with positive w: a group may come to stand for one part of what
    is asked, and pairs for how two parts go together (additive kernels: Duvenaud et al., arXiv 1112.4394).

    Args:
        groups: Number g of groups, a divisor of the number of features.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.alone = nn.Parameter(torch.zeros(groups))
        self.together = nn.Parameter(torch.full((groups, groups), -2.0))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Kernel (m, n) of features (m, f) and (n, f), in fp32 whatever they are in: a system may be solved with it."""
        with torch.autocast(one.device.type, enabled=False):
            a, b = (each.float().view(len(each), self.groups, -1).transpose(0, 1) for each in (one, other))
            apart = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None] - 2 * a @ b.transpose(1, 2)
            near = (-apart / a.shape[-1]).exp()
            pairs = torch.einsum("gmn,gh,hmn->mn", near, self.together.exp().triu(1), near)
            return torch.einsum("g,gmn->mn", self.alone.exp(), near) + pairs


class ExpertKernel(nn.Module):
    """A kernel on what is read in descriptions (kernels on features that are learned: Wilson et al., arXiv 1511.02222).

    Args:
        reader: From a description's vectors to features (b, f).
        embedding: Length e of these vectors.
        groups: Of features.
    """

    def __init__(self, reader: ConditionReader, embedding: int, groups: int) -> None:
        super().__init__()
        self.reader, self.embedding = reader, embedding
        self.similarity = GroupKernel(groups)
        self.noise = nn.Parameter(torch.zeros(()))

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Features (b, f) of pooled (b, e) and tokens (b, t, e) with their mask (b, t)."""
        return self.reader(pooled, tokens, mask, None)

    def system(self, known: Tensor) -> Tensor:
        """Kernel matrix of known features (n, f) with its noise on the diagonal (n, n), in fp64."""
        noise = (self.noise.exp() + _LEAST).double()
        return self.similarity(known, known).double() + noise * torch.eye(len(known), device=known.device, dtype=torch.float64)

    def weights(self, asked: Tensor, known: Tensor) -> Tensor:
        """How much each known expert counts (m, n) for features (m, f): the mean of a Gaussian process is `weights @ values`."""
        factor = torch.linalg.cholesky(self.system(known))
        return torch.cholesky_solve(self.similarity(known, asked).double(), factor).T.float()


class KernelHead(nn.Module):
    """From features to codes by similarity to known experts: a solved regression whose parts go on learning.

    Args:
        experts: Number l of experts.
        features: Number f of features.
        groups: Of features.
        code: Length c of codes.
    """

    def __init__(self, experts: int, features: int, groups: int, code: int) -> None:
        super().__init__()
        self.similarity = GroupKernel(groups)
        self.known = nn.Parameter(torch.zeros(experts, features))
        self.shares = nn.Parameter(torch.zeros(experts, code))
        self.bias = nn.Parameter(torch.zeros(code))

    def similarities(self, features: Tensor) -> Tensor:
        """Of features (b, f) to the known experts (b, l)."""
        return self.similarity(features, self.known)

    def forward(self, features: Tensor) -> Tensor:
        """Codes (b, c) of features (b, f)."""
        return self.similarities(features) @ self.shares + self.bias
