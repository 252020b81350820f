"""One LoRA adapter: validated, read from and written to PEFT's format, loaded into a base model.

PEFT loads adapters with missing, extra, misnamed or non-finite tensors with at most a warning. Here each of these is
an error, on reading and on writing, and shapes are judged from the file's header before a tensor is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag import __version__
from lorag.adapter_checks import CONFIG, KEY, MAX_RANK, PROVENANCE, WEIGHTS, Factors, check_alpha, check_config, check_spec, fold
from lorag.artifacts import read_json, write_json
from lorag.errors import AdapterError, BaseModelError, LayoutError
from lorag.layout import LoraLayout
from lorag.tensor_files import load_tensors, read_header, save_tensors

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

__all__ = ["Factors", "LoraAdapter"]


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter with ΔW = (alpha / rank) · B · A for each module.

    Attributes:
        layout: The modules that it changes.
        factors: A (r, i) and B (o, r) for each module of the layout.
        alpha: PEFT's lora_alpha; one for the whole adapter.
        base_model: Name or path of its base model.
        task_type: PEFT's task type, such as CAUSAL_LM, or None.
        info: What is known of its origin; written to lorag.json.
    """

    layout: LoraLayout
    factors: Factors
    alpha: float
    base_model: str | None = None
    task_type: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout.check_factors(self.factors)
        ranks = {rows.shape[0] for rows, _ in self.factors.values()}
        if len(ranks) != 1 or not 1 <= next(iter(ranks)) <= MAX_RANK:
            raise AdapterError("an adapter must have one rank", got=sorted(ranks), expected=f"one rank from 1 to {MAX_RANK}")
        check_alpha(self.alpha, "lora_alpha")
        for name, pair in self.factors.items():
            for factor, tensor in zip("AB", pair, strict=True):
                if not torch.isfinite(tensor).all():
                    raise AdapterError(
                        f"factor {factor} of {name} holds NaN or infinite values",
                        remedy="Train or export the adapter again; it would poison the base model.",
                    )

    @property
    def rank(self) -> int:
        """Rank r, the same for every module."""
        return next(iter(self.factors.values()))[0].shape[0]

    @property
    def scaling(self) -> float:
        """The factor alpha / r."""
        return self.alpha / self.rank

    def delta(self, module: str) -> Tensor:
        """ΔW (o, i) of one module, in fp32."""
        rows, columns = self.factors[module]
        return self.scaling * columns.float() @ rows.float()

    def norms(self) -> dict[str, float]:
        """‖ΔW‖_F of each module, computed from the factors' Gram matrices."""
        found = {}
        for name, (rows, columns) in self.factors.items():
            rows, columns = rows.double(), columns.double()
            square = ((columns.T @ columns) * (rows @ rows.T)).sum().clamp_min(0)
            found[name] = abs(self.scaling) * math.sqrt(square.item())
        return found

    def scaled(self, strength: float) -> LoraAdapter:
        """The adapter with ΔW multiplied by `strength`."""
        if not (math.isfinite(strength) and 0 <= strength <= 100):
            raise AdapterError("strength cannot be used", got=strength, expected="a number from 0 to 100")
        factors = {name: (rows, columns * strength) for name, (rows, columns) in self.factors.items()}
        return LoraAdapter(self.layout, factors, self.alpha, self.base_model, self.task_type, self.info)

    # --- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a PEFT adapter folder in the portable profile: one r, one lora_alpha, no bias, sorted keys.

        Returns:
            The folder.

        Raises:
            StorageError: If writing fails; an adapter that was there before is then intact or incomplete, never mixed.
        """
        from peft import LoraConfig

        folder = Path(folder)
        target = list(self.layout.target_modules)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha if self.alpha % 1 else int(self.alpha),  # type: ignore[arg-type]  # PEFT takes floats too
            target_modules=target,
            fan_in_fan_out=self.layout.fan_in_fan_out,
            base_model_name_or_path=self.base_model,
            task_type=self.task_type,
            inference_mode=True,
        ).to_dict()
        config["target_modules"] = sorted(target)
        config["peft_type"] = "LORA"
        save_tensors(folder / WEIGHTS, self.state_dict(), {"format": "pt"})
        write_json(folder / PROVENANCE, {"kind": "adapter", "lorag": __version__, **self.info})
        write_json(folder / CONFIG, config)  # last: PEFT reads no folder without it
        return folder

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors under the names that PEFT writes."""
        return {
            KEY.format(module=name, factor=factor): tensor
            for name, pair in self.factors.items()
            for factor, tensor in zip("AB", pair, strict=True)
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, layout: LoraLayout, *, allow_missing: bool = False) -> LoraAdapter:
        """Reads a PEFT adapter folder and folds its scalings into one rank and one lora_alpha.

        Args:
            folder: Holds adapter_config.json and adapter_model.safetensors.
            layout: The layout of the base model that it must fit.
            allow_missing: Whether modules of the layout without tensors count as unchanged.

        Raises:
            AdapterError: If anything about it differs from plain LoRA on this layout.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise AdapterError(f"{folder} is no PEFT adapter", got=f"no {CONFIG}", remedy="Give the folder that PEFT wrote.")
        config = read_json(folder / CONFIG)
        scalings = check_config(config, layout, folder)
        if not (folder / WEIGHTS).is_file():
            raise AdapterError(f"{folder} has no {WEIGHTS}", remedy="Save it with PEFT as safetensors; other weight files are never read.")
        spec, _ = read_header(folder / WEIGHTS)
        found = check_spec(spec, layout, scalings, folder, allow_missing)
        tensors = load_tensors(folder / WEIGHTS)
        pairs = {name: (tensors[a], tensors[b]) for name, (a, b) in found.items()}
        info = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
        folded, alpha = fold(pairs, scalings, layout)
        return cls(layout, folded, alpha, config.get("base_model_name_or_path"), config.get("task_type"), info)

    # --- use -----------------------------------------------------------------------------------------------------

    def apply_to(self, model: nn.Module | None = None, *, name: str = "default") -> PeftModel:
        """Loads the adapter into a base model and makes it active.

        Args:
            model: The base model, or a PeftModel, to which the adapter is added (or whose adapter of that name is
                replaced). Without one, the base model that the adapter names is loaded.
            name: The adapter's name inside the PeftModel.

        Returns:
            The PeftModel, in evaluation mode.

        Raises:
            BaseModelError: If the model has other modules or sizes than the adapter.
        """
        from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

        if model is None:
            from lorag.base_model import BaseModel

            if self.base_model is None:
                raise BaseModelError("the adapter names no base model", remedy="Pass the model to apply_to.")
            kind = "causal_lm" if self.task_type == "CAUSAL_LM" else "seq2seq_lm" if self.task_type == "SEQ_2_SEQ_LM" else "encoder"
            model = BaseModel(self.base_model, kind).load()
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha if self.alpha % 1 else int(self.alpha),  # type: ignore[arg-type]  # PEFT takes floats too
            target_modules=list(self.layout.target_modules),
            fan_in_fan_out=self.layout.fan_in_fan_out,
            task_type=self.task_type,
            inference_mode=True,
        )
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        self._check_base(bare)  # before PEFT wraps anything: a refused model stays as it was
        if isinstance(model, PeftModel):
            if name in model.peft_config:
                model.delete_adapter(name)
            model.add_adapter(name, config)
            wrapped = model
        else:
            wrapped = get_peft_model(model, config, adapter_name=name)
        try:
            result: Any = set_peft_model_state_dict(wrapped, self.state_dict(), adapter_name=name)
        except RuntimeError as error:
            raise BaseModelError("the adapter's shapes do not fit the base model", got=str(error).splitlines()[-1][:160]) from error
        lost = [key for key in result.missing_keys if ".lora_" in key and f".{name}." in key] + list(result.unexpected_keys)
        if lost:
            raise BaseModelError("the adapter could not be placed whole", got=f"{len(lost)} tensors such as {lost[0]}")
        wrapped.set_adapter(name, inference_mode=True)
        return wrapped.eval()

    def _check_base(self, bare: nn.Module) -> None:
        """Raises BaseModelError unless the adapter's targets name just the modules of its layout in a base model."""
        what, expected = f"{type(bare).__name__} is not the adapter's base model", self.base_model or "the model that it was made for"
        try:
            found = LoraLayout.from_model(bare, self.layout.target_modules)
        except LayoutError as error:
            raise BaseModelError(what, got=str(error)[:160], expected=expected) from error
        strange = set(found.modules) ^ set(self.layout.modules)
        if strange:
            first = min(strange, key=lambda shape: shape.name)
            own = "has" if first in found.modules else "lacks"
            got = f"a model that {own} {first.name} ({first.out_features} x {first.in_features})"
            raise BaseModelError(what, got=got, expected=expected)
