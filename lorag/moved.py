"""Import paths of 0.1 whose rooms and modules have other names now: they still work, with a warning that names the new path.

A name that is gone itself gives an ImportError that says what took its place.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["follow_moves"]

_ROOMS = {
    "lorag.banks": "lorag.bank",
    "lorag.base_models": "lorag.base",
    "lorag.batch": "lorag.generator.generate",
    "lorag.cards": "lorag.cli.info",
    "lorag.conditions": "lorag.text",
    "lorag.fusion": "lorag.training.fuse",
    "lorag.gate": "lorag.generator",
    "lorag.generation": "lorag.generator.generate",
    "lorag.generator_files": "lorag.generator.files",
    "lorag.generators": "lorag.methods",
    "lorag.models": "lorag.networks",
    "lorag.objectives": "lorag.base.objectives",
    "lorag.optimisation": "lorag.methods",
    "lorag.publishing": "lorag.adapters",
    "lorag.quickstart": "lorag.cli.quickstart",
    "lorag.report": "lorag.evaluation.report",
    "lorag.row_adapters": "lorag.base.row_adapters",
    "lorag.sandbox": "lorag.worlds.sandbox",
    "lorag.weights": "lorag.spaces",
}
# Modules that did not keep their name in the room that is theirs now.
_MODULES = {
    "lorag.adapters.folder": "lorag.adapters.reading",
    "lorag.banks.admission": "lorag.bank.candidates",
    "lorag.banks.descriptions": "lorag.bank.index",
    "lorag.banks.entries": "lorag.bank.bank",
    "lorag.banks.start": "lorag.bank.new_bank",
    "lorag.files.plain": "lorag.files.artifacts",
    "lorag.generators.base": "lorag.methods.method",
    "lorag.generators.expert_mixture": "lorag.methods.sg_lora",
    "lorag.generators.expert_regression": "lorag.methods.kernel",
    "lorag.generators.functional_training": "lorag.methods.functional",
    "lorag.generators.latent": "lorag.methods.vae",
    "lorag.generators.reconstruction": "lorag.methods.method",
    "lorag.generators.set_training": "lorag.methods.fusion_stages",
    "lorag.models.code_networks": "lorag.networks.readers",
    "lorag.models.conv_cvae": "lorag.networks.conv_vae",
    "lorag.models.cvae": "lorag.networks.vae",
    "lorag.models.expert_attention": "lorag.networks.experts",
    "lorag.models.expert_kernel": "lorag.networks.experts",
    "lorag.models.fused_latents": "lorag.networks.vae",
    "lorag.models.fvae": "lorag.networks.vae",
    "lorag.models.hypernet": "lorag.networks.modules",
    "lorag.models.module_decoder": "lorag.networks.modules",
    "lorag.optimisation.data_parallel": "lorag.methods.training_loop",
    "lorag.optimisation.experts": "lorag.bank.experts",
    "lorag.optimisation.metrics": "lorag.files.metrics",
    "lorag.optimisation.refinement": "lorag.generator.refine",
    "lorag.publishing.licences": "lorag.adapters.provenance",
    "lorag.publishing.model_card": "lorag.adapters.publishing",
    "lorag.publishing.push": "lorag.adapters.publishing",
    "lorag.report.writing": "lorag.evaluation.report.page",
    "lorag.training.gains": "lorag.training.calibrate",
    "lorag.training.gate_fitting": "lorag.training.calibrate_gate",
    "lorag.training.run": "lorag.training.train",
    "lorag.web.orders": "lorag.web.requests",
    "lorag.web.workbench": "lorag.web.session",
    "lorag.weights.merging": "lorag.adapters.merging",
    "lorag.weights.shared_bases": "lorag.adapters.spans",
}
_NAMES = {
    "ColleagueSettings": "lorag.methods.house.EnsembleSettings",
    "FitData": "lorag.methods.TrainingSet",
    "GENERATORS": "lorag.methods.METHODS",
    "Generator": "lorag.methods.Method",
    "NetworkGenerator": "lorag.methods.method.NetworkMethod",
    "Order": "lorag.web.requests.Request",
    "Start": "lorag.bank.new_bank.NewBank",
    "TaskLoss": "lorag.base.runner.Runner",
    "Terms": "lorag.bank.importing.ImportOptions",
    "Workbench": "lorag.web.session.Session",
    "Worth": "lorag.methods.support_examples.Reduction",
    "descend": "lorag.methods.support_examples.minimise",
    "gains_of": "lorag.training.calibrate.gap_closed_by",
    "generate_folders": "lorag.generator.generate.write_adapters",
    "generator_type": "lorag.methods.method_type",
    "read_descriptions": "lorag.generator.generate.read_requests",
    "share_closed": "lorag.training.calibrate.gap_closed",
    "stack_adapters": "lorag.adapters.factors.Factors.stack",
    "told": "lorag.methods.training_loop.from_main",
    "weight_space_from_tensors": "lorag.spaces.open_space",
}


class _Finder:
    """Asked last of all: only for names that nothing else has. A loader by what it does: importlib.abc takes long to import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        room = ".".join(fullname.split(".")[:2])
        if fullname not in _MODULES and room not in _ROOMS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=fullname == room)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name, room = module.__name__, ".".join(module.__name__.split(".")[:2])
        now = _MODULES.get(name) or _ROOMS[room] + name.removeprefix(room)
        try:
            new = importlib.import_module(now)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} is gone; its room is {_ROOMS[room]} now", name=name) from error
        warnings.warn(f"{name} is {now} now", DeprecationWarning, stacklevel=2)
        module.__dict__.update({key: value for key, value in vars(new).items() if not key.startswith("__")})
        module.__dict__["__getattr__"] = _say_where


def _say_where(name: str) -> object:
    """What an old module answers for a name that is gone: where to look, or that it does not have it."""
    if name in _NAMES:
        raise ImportError(f"{name} is gone; {_NAMES[name]} takes its place", name=name)
    raise AttributeError(name)


def follow_moves() -> None:
    """Lets imports by the paths of 0.1 find what they mean."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
