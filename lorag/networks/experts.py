"""Which experts count for a description: a learned kernel with the regression that follows from it, and attention over experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from lorag.networks.readers import ConditionReader

__all__ = ["ExpertAttention", "ExpertKernel", "GroupKernel", "KernelHead"]

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

    def system(self, experts: Tensor) -> Tensor:
        """Kernel matrix of experts' features (n, f) with its noise on the diagonal (n, n), in fp64."""
        noise = (self.noise.exp() + _LEAST).double()
        return self.similarity(experts, experts).double() + noise * torch.eye(len(experts), device=experts.device, dtype=torch.float64)

    def weights(self, features: Tensor, experts: Tensor) -> Tensor:
        """How much each expert of features (n, f) counts (m, n) for (m, f): the mean of a Gaussian process is `weights @ values`."""
        factor = torch.linalg.cholesky(self.system(experts))
        return torch.cholesky_solve(self.similarity(experts, features).double(), factor).T.float()

    def residuals(self, experts: Tensor, values: Tensor, together: Tensor) -> Tensor:
        """By how much values (n, p) of experts (n, f) differ from what is predicted without them (n, p), in closed form.

        With A the inverse of the system and y the values, experts E differ by A[E, E]⁻¹ (A y)[E].

        Args:
            experts: Features of the experts.
            values: Their values.
            together: Which experts (n, n) are left out with each: equal within a group, itself among them.
        """
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.system(experts)))
        solved = inverse @ values.double()
        if bool((together.sum(1) == 1).all()):
            return (solved / inverse.diagonal()[:, None]).float()
        return torch.linalg.solve(inverse * together, solved).float()  # one block for each group


class KernelHead(nn.Module):
    """From features to codes by similarity to experts: a solved regression whose parts go on learning.

    Args:
        experts: Number l of experts.
        features: Number f of features.
        groups: Of features.
        code: Length c of codes.
    """

    def __init__(self, experts: int, features: int, groups: int, code: int) -> None:
        super().__init__()
        self.similarity = GroupKernel(groups)
        self.experts = nn.Parameter(torch.zeros(experts, features))
        self.weights = nn.Parameter(torch.zeros(experts, code))
        self.bias = nn.Parameter(torch.zeros(code))

    def similarities(self, features: Tensor) -> Tensor:
        """Of features (b, f) to the experts (b, l)."""
        return self.similarity(features, self.experts)

    def forward(self, features: Tensor) -> Tensor:
        """Codes (b, c) of features (b, f)."""
        return self.similarities(features) @ self.weights + self.bias


class ExpertAttention(nn.Module):
    """A weighted mean of the experts' ΔW, with one learned factor per module, and a learned offset for all descriptions alike.

    A few thousand parameters: on a bank of some dozen experts anything larger memorises the experts.

    Args:
        keys: Pooled descriptions of the experts (n, e).
        codes: Codes of the experts (n, c).
        zero: Code of the adapter that changes nothing (c,).
        modules: Length of each module's part of a code.
        width: Dimensions of the learned view.
        temperature: Of the softmax over experts, at the start.
        offset: Whether the offset is learned.
    """

    keys: Tensor
    codes: Tensor
    zero: Tensor
    _OFFSET_GAIN = 30.0  # an offset of unit-variance values has to move faster than the weights of the view

    def __init__(
        self, keys: Tensor, codes: Tensor, zero: Tensor, modules: list[int], *, width: int, temperature: float, offset: bool
    ) -> None:
        super().__init__()
        for name, value in (("keys", keys), ("codes", codes), ("zero", zero)):
            self.register_buffer(name, value)
        self.modules_of_code = modules
        self.view = nn.Linear(keys.shape[1], width, bias=False)
        nn.init.normal_(self.view.weight, std=width**-0.5)  # until `hold` turns it
        self.log_scale = nn.Parameter(torch.tensor(1.0 / temperature).log())
        self.strength = nn.Parameter(torch.zeros(len(modules)))
        self.offset = nn.Parameter(torch.zeros(codes.shape[1])) if offset else None

    def hold(self, keys: Tensor, codes: Tensor, zero: Tensor) -> None:
        """Takes over a bank's experts, and turns the untrained view to the directions in which their descriptions lie.

        Training then starts from plain similarity. A random view of few dimensions does not keep cosines: its error, the root of one
        in `width`, is as large as what tells one expert from another.

        Args:
            keys: Pooled descriptions of the experts (n, e).
            codes: Their codes (n, c).
            zero: Code of the adapter that changes nothing (c,).
        """
        device = self.view.weight.device
        self.keys, self.codes, self.zero = keys.to(device), codes.to(device), zero.to(device)
        # The products of all values (e, e) have the right singular vectors, whatever the number of experts.
        directions = torch.linalg.eigh(keys.double().T @ keys.double()).eigenvectors.flip(1).T[: len(self.view.weight)]
        with torch.no_grad():
            self.view.weight.zero_()
            self.view.weight[: len(directions)] = directions.to(self.view.weight)

    def weights(self, pooled: Tensor, masked: Tensor | None = None) -> Tensor:
        """Weights (b, n) of the experts for pooled descriptions (b, e); experts where `masked` (b, n) is true get none."""
        query, key = F.normalize(self.view(pooled), dim=-1), F.normalize(self.view(self.keys), dim=-1)
        scores = query @ key.T * self.log_scale.exp()
        if masked is not None:
            scores = scores.masked_fill(masked, float("-inf"))
        return scores.softmax(-1)

    def forward(self, pooled: Tensor, masked: Tensor | None = None) -> Tensor:
        """Codes (b, c) for pooled descriptions (b, e)."""
        change = self.weights(pooled, masked) @ (self.codes - self.zero)
        factors = torch.cat([s.expand(size) for s, size in zip(self.strength.exp(), self.modules_of_code, strict=True)])
        mixed = self.zero + factors * change
        return mixed if self.offset is None else mixed + self._OFFSET_GAIN * self.offset
