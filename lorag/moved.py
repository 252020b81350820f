"""Import paths of 0.1: those whose rooms, modules or homes have other names now still work, with a warning that names the new path.

A name that is gone itself gives an ImportError that says what took its place. tests/public_names_of_0.1.txt lists what was public.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from functools import partial
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
    "lorag.banks.streaming": "lorag.bank.shards",
    "lorag.cli.batch": "lorag.cli.generating",
    "lorag.files.plain": "lorag.files.artifacts",
    "lorag.generators.base": "lorag.methods.method",
    "lorag.generators.colleagues": "lorag.methods.students",
    "lorag.generators.expert_mixture": "lorag.methods.sg_lora",
    "lorag.generators.expert_regression": "lorag.methods.kernel",
    "lorag.generators.functional_training": "lorag.methods.functional",
    "lorag.generators.latent": "lorag.methods.vae",
    "lorag.generators.reconstruction": "lorag.methods.method",
    "lorag.generators.set_training": "lorag.methods.fusion_stages",
    "lorag.generators.sg_controls": "lorag.methods.sg_lora",
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
    "lorag.training.gate_rungs": "lorag.training.calibrate_gate",
    "lorag.training.run": "lorag.training.train",
    "lorag.web.orders": "lorag.web.requests",
    "lorag.web.workbench": "lorag.web.session",
    "lorag.weights.merging": "lorag.adapters.merging",
    "lorag.weights.shared_bases": "lorag.adapters.spans",
}
# Names that another module has now.
_HOMES = {
    "lorag.adapters.checks.Factors": "lorag.adapters.factors",
    "lorag.adapters.export.export_merged": "lorag.adapters.merged",
    "lorag.adapters.export.merge_into": "lorag.adapters.merged",
    "lorag.banks.descriptions.same_words": "lorag.tasks.descriptions",
    "lorag.evaluation.ladder.bootstrap": "lorag.evaluation.statistics",
    "lorag.evaluation.ladder.format_table": "lorag.evaluation.tables",
    "lorag.objectives.language_model.CausalLM": "lorag.base.objectives.causal_lm",
    "lorag.objectives.language_model.Seq2SeqLM": "lorag.base.objectives.seq2seq_lm",
    "lorag.training.gate_fitting.add_gate": "lorag.training.additions",
    "lorag.training.preparation.WITHOUT_EXPERT": "lorag.tasks.finding",
    "lorag.training.preparation.find_bank": "lorag.bank.bank",
    "lorag.training.preparation.find_tasks": "lorag.tasks.finding",
    "lorag.weights.weight_space.Cores": "lorag.base.row_adapters",
    "lorag.weights.weight_space.FlatFactors": "lorag.spaces.flat_factors",
    "lorag.weights.weight_space.SharedSubspace": "lorag.spaces.shared_subspace",
}
# Names that are gone, and what takes their place; with their module where another has the same name, or where it stayed.
_NAMES = {
    "Blur": "lorag.networks.readers.Augmentation",
    "ColleagueSettings": "lorag.methods.students.EnsembleSettings",
    "Describes": "lorag.generator.lora_generator.LoraGenerator",
    "ExpertStream": "lorag.bank.bank.AdapterBank.factors",
    "FitData": "lorag.methods.TrainingSet",
    "GENERATORS": "lorag.methods.METHODS",
    "Generator": "lorag.methods.Method",
    "LatentGenerator": "lorag.methods.vae.VaeMethod",
    "NetworkGenerator": "lorag.methods.method.NetworkMethod",
    "Order": "lorag.web.requests.Request",
    "Outlook": "lorag.web.requests.Preview",
    "Reading": "lorag.networks.readers.FeatureReader",
    "Rung": "lorag.evaluation.report.findings.MethodScore",
    "SgRescaled": "SgRescaled of benchmarks/sg_controls.py",
    "SgRidge": "SgRidge of benchmarks/sg_controls.py",
    "Start": "lorag.bank.new_bank.NewBank",
    "TaskLoss": "lorag.base.runner.Runner",
    "Terms": "lorag.bank.importing.ImportOptions",
    "TokenNetwork": "lorag.networks.readers.DescriptionNetwork",
    "Wanted": "lorag.generator.generate.AdapterRequest",
    "Workbench": "lorag.web.session.Session",
    "Worth": "lorag.methods.support_examples.Reduction",
    "bank_wordings": "lorag.training.calibrate_gate.task_wordings",
    "check_shard": "lorag.bank.shards.check_shards",
    "descend": "lorag.methods.support_examples.minimise",
    "gains_of": "lorag.training.calibrate.gap_closed_by",
    "generate_folders": "lorag.generator.generate.write_adapters",
    "generate_many": "lorag.generator.generate.write_adapters",
    "generator_type": "lorag.methods.method_type",
    "known_details": "lorag.bank.shards.Expert",
    "lorag.banks.entries.texts": "lorag.bank.shards.Expert",
    "lorag.batch.Made": "lorag.generator.generate.AdapterResult",
    "lorag.evaluation.folders.run_ladder": "lorag.evaluation.folders.Ladder.evaluate",
    "lorag.evaluation.ladder.BASELINES": "lorag.methods.Method.baseline",
    "lorag.evaluation.ladder.is_learned": "lorag.evaluation.ladder.learned_rows",
    "lorag.training.preparation.find_split": "lorag.tasks.suite.TaskSuite.of_split",
    "lorag.training.preparation.hold_out": "lorag.training.split.SplitRule.split",
    "lorag.web.drawings.draw_made": "lorag.web.drawings.draw_results",
    "lorag.web.orders.Made": "lorag.web.requests.Result",
    "lorag.web.serving.Doorkeeper": "lorag.web.serving.RequestFilter",
    "lorag.weights.shared_bases.cosine": "lorag.adapters.factors.Factors.cosine",
    "lorag.weights.shared_bases.reduced": "lorag.adapters.factors.Factors.svd",
    "plausible": "lorag.bank.candidates.check_size",
    "read_descriptions": "lorag.generator.generate.read_requests",
    "require_tasks": "lorag.methods.functional.require_runner",
    "score_codes": "lorag.training.calibrate.scores_in_parts",
    "share_closed": "lorag.training.calibrate.gap_closed",
    "stack_adapters": "lorag.adapters.factors.Factors.stack",
    "start_network": "lorag.methods.method.NetworkMethod.start",
    "tasks_of": "lorag.tasks.suite.TaskSuite.of_experts",
    "teach_colleagues": "lorag.methods.students.teach_ensemble",
    "told": "lorag.methods.training_loop.from_main",
    "train_on_sets": "lorag.methods.fusion_stages.FusionTraining.train_on_sets",
    "weight_space_from_tensors": "lorag.spaces.open_space",
}


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


# Modules that are where they were, without some of their names.
_STAYED = {key.rpartition(".")[0] for key in (*_HOMES, *_NAMES) if "." in key and _room(key) not in _ROOMS} - set(_MODULES)


class _Finder:
    """Asked last of all: only for names that nothing else has. A loader by what it does: importlib.abc takes long to import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        room = _room(fullname)
        if fullname not in _MODULES and room not in _ROOMS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=fullname == room)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name, room = module.__name__, _room(module.__name__)
        now = _MODULES.get(name) or _ROOMS[room] + name.removeprefix(room)
        try:
            new = importlib.import_module(now)
        except ModuleNotFoundError as error:
            if error.name != now:  # what it needs is not installed
                raise
            raise ModuleNotFoundError(f"{name} is gone; its room is {_ROOMS[room]} now", name=name) from error
        warnings.warn(f"{name} is {now} now", DeprecationWarning, stacklevel=2)
        module.__dict__.update({key: value for key, value in vars(new).items() if not key.startswith("__")})
        module.__dict__["__getattr__"] = partial(_former, name)


class _Hook:
    """Asked first, for modules that stayed: they are loaded as ever, and answer for the names that they lost."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname in _STAYED else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_answer(module: ModuleType) -> None:
                module.__dict__["__getattr__"] = partial(_former, fullname)
                load(module)

            spec.loader.exec_module = load_and_answer  # type: ignore[method-assign]
        return spec


def _former(module: str, name: str) -> object:
    """What a module answers for a name that it had: the object where it is now, or an error that says what took its place."""
    key = f"{module}.{name}"
    if key in _HOMES:
        warnings.warn(f"{key} is {_HOMES[key]}.{name} now", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(_HOMES[key]), name)
    now = _NAMES.get(key) or _NAMES.get(name)
    if now is not None:
        raise ImportError(f"{name} is gone; {now} takes its place", name=name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def follow_moves() -> None:
    """Lets imports by the paths of 0.1 find what they mean."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
        sys.meta_path.append(_Finder())
