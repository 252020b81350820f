"""One LoRA adapter: validated, read from and written to PEFT's format, loaded into a base model.

PEFT loads adapters with missing, extra, misnamed or non-finite tensors with at most a warning. Here each of these is
an error, on reading and on writing, and shapes are judged from the file's header before a tensor is allocated.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorag import __version__
from lorag.adapters.checks import CONFIG, PROVENANCE, WEIGHTS, check_config
from lorag.adapters.factors import Factors, check_alpha
from lorag.adapters.formats import Base, peft_folder
from lorag.adapters.portability import Facts, check_portability
from lorag.adapters.publishing import CARD, adapter_card, own_card, push_files, require_public, write_card
from lorag.adapters.reading import AdapterParts, own_layout, read_facts, read_folder, weight_digest
from lorag.adapters.tensor_names import KEY, WHOLE
from lorag.base.base_model import BaseModel, is_trusted, kind_of
from lorag.base.kinds import kind_named
from lorag.base.layout import LoraLayout, ModuleShape
from lorag.base.renaming import fused_experts, renamed_modules
from lorag.errors import AdapterError, BaseModelError, LayoutError
from lorag.files.artifacts import replace_together, write_json
from lorag.files.tensors import save_tensors

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn

__all__ = ["LoraAdapter"]


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter: what it changes, by how much, and where it comes from.

    Attributes:
        layout: The modules that it changes.
        factors: ΔW = B·A of each module of the layout.
        base_model: Name or path of its base model.
        task_type: PEFT's task type, such as CAUSAL_LM, or None.
        info: What is known of its origin; written to lorag.json.
        revision: Revision of the base model on the hub, where one is stated.
        copies: Digest of the base model's own weight of each module of which the adapter's file repeats it.
    """

    layout: LoraLayout
    factors: Factors
    base_model: str | None = None
    task_type: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    copies: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout.check_factors(self.factors.tensors)
        self.factors.check_rank()

    @property
    def rank(self) -> int:
        """Rank r, the same for every module."""
        return self.factors.rank

    @property
    def alpha(self) -> float:
        """PEFT's lora_alpha, as files state it; one for the whole adapter."""
        return self.factors.alpha

    @property
    def base_revision(self) -> str | None:
        """The base model's revision on the hub, as the adapter's config or lorag.json states it."""
        stated = self.info.get("base_model")
        stated_revision = stated.get("revision") if isinstance(stated, Mapping) else None
        return self.revision or (stated_revision if isinstance(stated_revision, str) else None)

    def stated_base(self, name: str | None = None, kind: str | None = None) -> BaseModel:
        """The base model that the adapter states: its name, revision and kind.

        Args:
            name: Another name, whose main revision is taken.
            kind: A kind of base models, instead of what task type and the base model's config say.

        Raises:
            BaseModelError: If neither names one, or its config cannot be read.
        """
        named, revision = (self.base_model, self.base_revision) if name is None else (name, None)
        if named is None:
            raise BaseModelError("the adapter names no base model", remedy="Give it: --base-model, or apply_to(model).")
        stated = self.info.get("base_model")
        known = kind_named(stated.get("kind")) if isinstance(stated, Mapping) else None
        chosen = kind or (known.name if known is not None else kind_of(named, revision, self.task_type))
        return BaseModel(named, chosen, revision, is_trusted(named))

    def delta(self, module: str) -> Tensor:
        """ΔW (o, i) of one module, in fp32."""
        return self.factors.delta(module)

    def norms(self) -> dict[str, float]:
        """‖ΔW‖_F of each module."""
        return self.factors.norms()

    def scaled(self, strength: float) -> LoraAdapter:
        """The adapter with ΔW multiplied by `strength`."""
        if not (math.isfinite(strength) and 0 <= strength <= 100):
            raise AdapterError("strength cannot be used", got=strength, expected="a number from 0 to 100")
        return replace(self, factors=self.factors.scaled(strength))

    # --- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a PEFT adapter folder in the portable profile: one r, one lora_alpha, no bias, sorted keys.

        Beside it lie lorag.json, which says how it came about, and README.md, a model card made from that. A README.md
        that somebody wrote stays.

        Returns:
            The folder.

        Raises:
            AdapterError: If a value is not finite, or absurdly large.
            StorageError: If writing fails; an adapter that was there before is then intact.
        """
        folder = Path(folder)
        config = self._config(base_model_name_or_path=self.base_model, revision=self.base_revision).to_dict()
        config["target_modules"] = sorted(self.layout.target_modules)
        config["peft_type"] = "LORA"

        def write(staging: Path) -> None:
            save_tensors(staging / WEIGHTS, self.state_dict(), {"format": "pt"})
            write_json(staging / PROVENANCE, {"kind": "adapter", "lorag": __version__, **self.info})
            write_json(staging / CONFIG, config)
            if own_card(folder) is None:
                write_card(staging, self._card(config))

        replace_together(folder, write, CONFIG)  # PEFT reads no folder without its config
        return folder

    def _config(self, **more: Any) -> LoraConfig:  # noqa: ANN401 - PEFT's own settings
        """PEFT's config of the adapter; its values are looked at, since they are about to leave."""
        from peft import LoraConfig

        self.factors.check_values()
        alpha = check_alpha(self.alpha, "lora_alpha")
        return LoraConfig(
            r=self.rank,
            lora_alpha=alpha if alpha % 1 else int(alpha),  # type: ignore[arg-type]  # PEFT takes floats too
            target_modules=list(self.layout.target_modules),
            fan_in_fan_out=self.layout.fan_in_fan_out,
            task_type=self.task_type,
            inference_mode=True,
            **more,
        )

    def _card(self, config: Mapping[str, Any]) -> str:
        facts = Facts(config, {key: (str(tensor.dtype), tuple(tensor.shape)) for key, tensor in self.state_dict().items()})
        fits = [f"{verdict.target}: {verdict.line()}" for verdict in check_portability(facts)]
        targets = self.layout.target_modules
        return adapter_card(self.info, base_model=self.base_model, rank=self.rank, alpha=self.alpha, modules=targets, fits=fits)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors under the names that PEFT writes."""
        return {
            KEY.format(module=name, factor=factor): tensor
            for name, pair in self.factors.tensors.items()
            for factor, tensor in zip("AB", pair, strict=True)
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        layout: LoraLayout | None = None,
        *,
        allow_missing: bool = False,
        ignore_extra: bool = False,
        repair: bool = False,
        revision: str | None = None,
        base: BaseModel | None = None,
    ) -> LoraAdapter:
        """Reads an adapter, from a folder, a file or the hub, and folds its scalings into one rank and one lora_alpha.

        Args:
            path: Folder with adapter_config.json and adapter_model.safetensors, a hub id such as user/name, or an adapter in
                another format (`lorag.adapters.formats`).
            layout: The layout of the base model that it must fit. Without one, the modules are those of its own tensors;
                whether a base model has just these is then checked by `apply_to`.
            allow_missing: Whether modules of the layout without tensors count as unchanged.
            ignore_extra: Whether factors of modules outside of the layout are left out.
            repair: Whether tensors that have the names of a wrapped model, as `.default.` and `_orig_mod.`, get the right ones.
            revision: Revision of the adapter on the hub.
            base: Its base model, for formats that do not say enough of it.

        Raises:
            AdapterError: If anything about it differs from plain LoRA on this layout; see `lorag.adapters.reading`.
            ArtifactError: If there is no such folder or repository, or a file is not what it should be.
            BaseModelError: If its format asks for the base model, and it is not given.
        """
        folder = peft_folder(path, Base(base, () if layout is None else layout.modules), revision)
        if layout is None:
            facts = read_facts(folder, values=False)
            check_config(facts.config, folder / CONFIG)
            layout = own_layout(facts.config, facts.spec, folder, repair=repair)
        return cls.from_parts(read_folder(folder, layout, allow_missing=allow_missing, ignore_extra=ignore_extra, repair=repair), layout)

    @classmethod
    def from_parts(cls, parts: AdapterParts, layout: LoraLayout) -> LoraAdapter:
        """The adapter of what was read from a folder."""
        base, task, revision = (parts.config.get(key) for key in ("base_model_name_or_path", "task_type", "revision"))
        at = revision if isinstance(revision, str) and revision not in ("", "main") else None
        return cls(layout, parts.factors, base, task, parts.info, at, parts.copies)

    def push_to_hub(self, repository: str, *, base_model: str | None = None, private: bool = True, readme: str | None = None) -> str:
        """Publishes the adapter, as `save_pretrained` writes it, and returns the commit's address.

        Args:
            repository: Hub id user/name; made if there is none.
            base_model: The base model's hub id, where the adapter names a local folder.
            private: Whether a new repository is private.
            readme: A model card of one's own; by default lorag makes one.

        Raises:
            BaseModelError: If the base model is named by a folder of this machine.
            StorageError: If the upload fails.
        """
        named = self.base_model if base_model is None else base_model
        if named is not None:
            require_public(named, "Give base_model=HUB_ID, or --base-model, under which others find it.")
        with tempfile.TemporaryDirectory(prefix="lorag-") as staging:
            folder = replace(self, base_model=named).save_pretrained(Path(staging))
            card = (folder / CARD).read_text(encoding="utf-8")
            names = (CONFIG, WEIGHTS, PROVENANCE)
            return push_files(folder, names, card, repository, kind="adapter", private=private, readme=readme)

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
            AdapterError: If a value is not finite, or absurdly large.
            BaseModelError: If the model has other modules or sizes than the adapter.
        """
        from peft import PeftModel, get_peft_model, set_peft_model_state_dict

        if model is None:
            model = self.stated_base().load()
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        fitted = self.fitted(bare)  # before PEFT wraps anything: a refused model stays as it was
        config = fitted._config()
        if isinstance(model, PeftModel):
            if name in model.peft_config:
                model.delete_adapter(name)
            model.add_adapter(name, config)
            wrapped = model
        else:
            wrapped = get_peft_model(model, config, adapter_name=name)
        try:
            result: Any = set_peft_model_state_dict(wrapped, fitted.state_dict(), adapter_name=name)
        except RuntimeError as error:
            raise BaseModelError("the adapter's shapes do not fit the base model", got=str(error).splitlines()[-1][:160]) from error
        lost = [key for key in result.missing_keys if key.endswith((f".lora_A.{name}.weight", f".lora_B.{name}.weight"))] + list(
            result.unexpected_keys
        )
        if lost:
            raise BaseModelError("the adapter could not be placed whole", got=f"{len(lost)} tensors such as {lost[0]}")
        wrapped.set_adapter(name, inference_mode=True)
        return wrapped.eval()

    def fitted(self, bare: nn.Module) -> LoraAdapter:
        """The adapter under a base model's own names of its modules, checked against that model.

        Raises:
            BaseModelError: If the model has other modules or sizes than the adapter, or other weights than its file repeats.
        """
        modules = {name for name, _ in bare.named_modules()}
        strange = [name for name in self.layout.names if name not in modules]
        new = renamed_modules(bare, strange)
        lost = next((name for name in strange if name not in new), None)
        fused = None if lost is None else fused_experts(bare, lost)
        if fused is not None:
            raise fused_error(str(lost), fused, type(bare).__name__)
        adapter = self.renamed(new) if new else self
        of_base = adapter.check_base(bare)
        return replace(adapter, layout=replace(adapter.layout, fan_in_fan_out=of_base.fan_in_fan_out))

    def renamed(self, new: Mapping[str, str]) -> LoraAdapter:
        """The adapter with other paths for some modules."""
        modules = tuple(ModuleShape(new.get(m.name, m.name), m.in_features, m.out_features) for m in self.layout.modules)
        layout = LoraLayout(tuple(sorted(m.name for m in modules)), modules, self.layout.fan_in_fan_out)
        tensors = {new.get(name, name): pair for name, pair in self.factors.tensors.items()}
        copies = {new.get(name, name): digest for name, digest in self.copies.items()}
        return replace(self, layout=layout, factors=Factors(tensors, self.factors.scaling), copies=copies)

    def check_base(self, bare: nn.Module) -> LoraLayout:
        """The layout that the adapter's targets name in a base model.

        Raises:
            BaseModelError: Unless it has just the modules of the adapter's layout.
        """
        what, expected = f"{type(bare).__name__} is not the adapter's base model", self.base_model or "the model that it was made for"
        try:
            present = LoraLayout.from_model(bare, self.layout.target_modules)
        except LayoutError as error:
            raise BaseModelError(what, got=str(error)[:160], expected=expected) from error
        strange = set(present.modules) ^ set(self.layout.modules)
        if strange:
            first = min(strange, key=lambda shape: shape.name)
            verb = "has" if first in present.modules else "lacks"
            got = f"a model that {verb} {first.name} ({first.out_features} x {first.in_features})"
            raise BaseModelError(what, got=got, expected=expected)
        for name, digest in self.copies.items():
            weight: Any = bare.get_submodule(name).weight
            now = digest if weight.is_meta else weight_digest(weight, digest.partition(":")[0])
            if now != digest:
                raise BaseModelError(
                    f"the adapter's file holds a weight of {name} that is not the base model's",
                    got=now,
                    expected=digest,
                    remedy=f"It was trained, or its vocabulary resized, beside the LoRA. {WHOLE}",
                )
        return present


def fused_error(module: str, fused: str, model: str) -> BaseModelError:
    """Says that an adapter changes experts of a mixture one by one, which a base model holds in one weight."""
    return BaseModelError(
        f"{model} holds the experts of {fused} fused in one weight",
        got=f"factors of {module[:120]}, one of them",
        expected="LoRA of linear layers",
        remedy="PEFT converts it: PeftModel.from_pretrained(base, ADAPTER), and merge_and_unload().save_pretrained(DIR) for a whole model.",
    )
