"""Run one frozen base model with a different adapter for each row of the batch; gradients reach the factors.

This is the engine of expert training, functional training and evaluation. A forward hook on each adapted module adds
the row's own ΔW x to the output, so one reading of the base weights serves all adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorag.errors import BaseModelError, LayoutError

if TYPE_CHECKING:
    from lorag.base.layout import LoraLayout

__all__ = ["Cores", "RowAdapters", "Stacked"]

Stacked = Mapping[str, tuple[Tensor, Tensor]]  # module -> A (n, r, i), B (n, o, r), scaling folded into B


@dataclass(frozen=True)
class Cores:
    """ΔW of n adapters in shared bases: module -> U_in (i, k), M (n, k, k), U_out (o, k), with ΔW = U_out M U_inᵀ."""

    bases_in: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    bases_out: Mapping[str, Tensor]


class RowAdapters:
    """Adapts the modules of a layout in a base model, row by row, inside `with rows.use(...)`.

    Rows are assigned in equal runs: with n adapters and b rows, the first b/n rows belong to the first adapter. This
    keeps every product a batched matrix product without gathering factors.

    Args:
        model: The frozen base model.
        layout: The modules to adapt.
    """

    def __init__(self, model: nn.Module, layout: LoraLayout) -> None:
        self.model: Any = model  # what a transformers model has beyond nn.Module, such as its device, is used too
        self.layout = layout
        modules = dict(model.named_modules())
        missing = [name for name in layout.names if name not in modules]
        if missing:
            raise BaseModelError(f"{type(model).__name__} does not fit the layout", got=f"no module {missing[0]}")
        self._modules = {name: modules[name] for name in layout.names}

    @contextmanager
    def use(self, adapters: Stacked | Cores) -> Iterator[Any]:
        """Runs the model with these adapters until the block ends, and yields the model.

        Args:
            adapters: Stacked factors (A (n, r, i), B (n, o, r)), or cores (n, k, k) in shared bases.

        Raises:
            LayoutError: If a module is not of the layout, or a batch has a number of rows that n does not divide.
        """
        values = adapters.values if isinstance(adapters, Cores) else adapters
        strange = set(values) - set(self._modules)
        if strange:
            raise LayoutError("adapters change a module that the layout lacks", got=min(strange))
        hooks = []
        try:
            for name, module in self._modules.items():
                if name in values:
                    hooks.append(module.register_forward_hook(_hook(adapters, name)))
            yield self.model
        finally:
            for hook in hooks:
                hook.remove()


def _grouped(x: Tensor, n: int, name: str) -> Tensor:
    """Activations (b, ..., i) as (n, b/n · ..., i)."""
    if x.shape[0] % n:
        raise LayoutError(f"{x.shape[0]} rows at {name} cannot be shared out evenly among {n} adapters")
    return x.reshape(n, -1, x.shape[-1])


def _hook(adapters: Stacked | Cores, name: str):  # noqa: ANN202 - a torch hook
    if isinstance(adapters, Cores):
        u_in, core, u_out = adapters.bases_in[name], adapters.values[name], adapters.bases_out[name]

        def add_core(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            low = _grouped(inputs[0].to(u_in.dtype) @ u_in, core.shape[0], name)
            delta = torch.bmm(low, core.transpose(1, 2)).reshape(*output.shape[:-1], -1) @ u_out.T
            return output + delta.to(output.dtype)

        return add_core
    rows, columns = adapters[name]

    def add_factors(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = torch.bmm(_grouped(inputs[0].to(rows.dtype), rows.shape[0], name), rows.transpose(1, 2))
        if output.dtype == low.dtype:
            return torch.baddbmm(_grouped(output, rows.shape[0], name), low, columns.transpose(1, 2)).view_as(output)
        return output + torch.bmm(low, columns.transpose(1, 2)).view_as(output).to(output.dtype)

    return add_factors
