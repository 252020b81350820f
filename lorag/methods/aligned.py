"""Our method for banks that are small or missing: low-rank factors from the description, learned from the base model's loss alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorag.errors import ConfigError, GeneratorError
from lorag.methods.contrast import ContrastSettings, DistillationSettings, distil_reader, train_reader
from lorag.methods.functional import FunctionalSettings, require_runner, train_functionally
from lorag.methods.keeping import KeptTasks, Predict
from lorag.methods.memory import Remembered
from lorag.methods.method import Method, NetworkMethod, ReaderSettings, collate, whole
from lorag.methods.probing import ProbeSettings, train_probes
from lorag.methods.smoothing import SmoothingSettings, answer_sets, go_on_smoothing, smooth_features
from lorag.networks.factor_network import FactorNetwork
from lorag.spaces.activation_bases import ActivationBases

if TYPE_CHECKING:
    from lorag.base.runner import Runner
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.text.embedding import Embedding

__all__ = ["Aligned"]

_TYPICAL = 512  # descriptions from which the probes' centre is taken


@dataclass
class AlignedSettings(ReaderSettings):
    """Size and training, beside those of the reader.

    Attributes:
        width: Of the transformer that reads the description.
        features: Between reading and factors.
        probes: Rows of each module that are linear in the description's vector and begin along the texts that mean the same.
        directions: Leading input directions that the other rows use.
        memory: Directions of a description's vector by which known tasks are recalled; 0 leaves the memory out.
        probing: How the probes learn which texts a description is about; then they stay as they are.
        contrast: How the reader learns to tell tasks apart by their wordings; then it stays as it is.
        distillation: How the reader of a network that goes on from another run learns the wordings at hand.
        functional: Steps through the frozen base model.
        smoothing: How features are drawn towards those of tasks with the same answers, after that.
    """

    width: int = 192
    features: int = 256
    probes: int = 1
    directions: int = 64
    memory: int = 96
    probing: ProbeSettings = field(default_factory=ProbeSettings)
    contrast: ContrastSettings = field(default_factory=ContrastSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    functional: FunctionalSettings = field(
        default_factory=lambda: FunctionalSettings(steps=1000, learning_rate=2e-3, tasks=16, examples=6, focus=0.0, validate_every=100)
    )
    smoothing: SmoothingSettings = field(default_factory=SmoothingSettings)


class Aligned(NetworkMethod):
    """Reads a description, and writes factors in bases of the base model's own activations.

    A text embedder and a base model both place texts by what they mean. A linear map between the two places is fitted on plain
    texts (`spaces.activation_bases.alignment`). Through it, a description of texts that no training task was about already
    points at those texts, at every module, before anything was trained: these are the probes. What is done with what they find is
    learned through the base model, from examples of many tasks.
    """

    name = "aligned"
    settings_type = AlignedSettings
    settings: AlignedSettings
    network: FactorNetwork | None

    def build(self, shape: Mapping[str, Any]) -> FactorNetwork:
        """The untrained network.

        Args:
            shape: Lengths of `embedding` and `code`; the number of each module's input basis, `entry`; `rank`, `inputs` and `outputs`;
                `smoothed`, the number of tasks in each set of answers among which features are smoothed, and `remembered`, the names
                of known tasks, where there are any.
        """
        s = self.settings
        embedding, code, rank, inputs, outputs = (whole(shape, name) for name in ("embedding", "code", "rank", "inputs", "outputs"))
        entry = tuple(whole({"entry": number}, "entry", len(shape["entry"])) for number in shape["entry"])
        smoothed = [whole({"smoothed": number}, "smoothed") for number in shape.get("smoothed", ())]
        if not 0 < s.probes < rank:
            raise ConfigError("settings.probes cannot be used", got=s.probes, expected=f"1 to {rank - 1}, below the rank")
        if len(entry) * rank * (inputs + outputs) != code:
            raise ValueError(f"modules, rank and directions do not make up a code of {code}")
        return FactorNetwork(
            embedding,
            entry,
            inputs=inputs,
            outputs=outputs,
            rank=rank,
            probes=s.probes,
            directions=s.directions,
            features=s.features,
            width=s.width,
            queries=s.queries,
            layers=s.layers,
            heads=s.heads,
            dropout=s.dropout,
            word_dropout=s.word_dropout,
            noise=s.noise,
            smoothed=smoothed,
            remembered=len(shape.get("remembered", ())),
            memory=s.memory,
        )

    @property
    def learns_from_tasks(self) -> bool:
        """Always: there is nothing else that it learns from."""
        return True

    def go_on_from(self, other: Method) -> None:
        """Takes over a trained network, whose probes and reader stay as they are.

        Raises:
            GeneratorError: If that is none of this method.
            ConfigError: If the settings describe a network of another size.
        """
        if not isinstance(other, Aligned) or other.network is None:
            raise GeneratorError(
                f"{self.name} cannot go on from another method", got=other.name, expected=self.name, remedy="Leave out start."
            )
        with torch.device("meta"):
            sizes = {name: value.shape for name, value in self.build(other.shape).state_dict().items()}
        if sizes != {name: value.shape for name, value in other.network.state_dict().items()}:
            raise ConfigError(
                "settings describe a network of another size than that of start", remedy="Leave out all but settings.functional."
            )
        self.network, self.shape = other.network.float().requires_grad_(True), dict(other.shape)

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """Begins from the alignment; trains probes, reader, then the rest through the base model, each stopped early on held-out tasks.

        Last, features are smoothed where that lowers the loss on held-out tasks.
        """
        runner, kept = require_runner(self.name, data, runner), None
        if self.network is None:
            network = self._begun(data, loop)
        else:
            network = self.network.to(loop.accelerator.device)
            if self.settings.distillation.steps:
                alike = {i for some in answer_sets(data, self.settings.smoothing.least) for i in some}
                kept = self._kept(network, data, loop, alike)
                distil_reader(self.name, network, data, loop, self.settings.distillation, alike)
        network.probes.requires_grad_(False)  # steps through the base model would undo part of what they have learned
        network.reading.requires_grad_(False)
        predict, remembered = self._as_if_unseen(network, data, loop)
        if remembered:
            self.shape["remembered"] = remembered
        train_functionally(self.name, network, predict, data, loop, self.settings.functional, runner, kept)
        network.eval()  # without functional steps nobody else ends the training mode, which masks words and adds noise
        self.shape["smoothed"] = list(smooth_features(network, data, runner, loop, self.settings.smoothing))

    def _kept(self, network: FactorNetwork, data: TrainingSet, loop: TrainingLoop, tasks: Iterable[int]) -> KeptTasks | None:
        """Those of some tasks that a network remembers, with what it says of them now; None if there are none, or no others."""
        remembered = set(self.shape.get("remembered", ()))
        known = [i for i in sorted(tasks) if remembered & {data.tasks[i].name, data.tasks[i].variant_of}]
        weight = self.settings.distillation.kept
        if not weight or not 0 < len(known) < len(data.training):
            return None
        before = copy.deepcopy(network).requires_grad_(False).eval()
        return KeptTasks.of(data, known, self._as_if_unseen(before, data, loop)[0], weight)

    def _as_if_unseen(self, network: FactorNetwork, data: TrainingSet, loop: TrainingLoop) -> tuple[Predict, list[str]]:
        """What predicts codes of tasks, each from the others alone where the network smooths or remembers; and which it remembers."""
        centres = go_on_smoothing(network, data, self.settings.smoothing) if network.smoothing.counts else None
        names, places, keys = list[str](), None, None
        if self.settings.memory:
            before = (self.shape.get("remembered", ()), network.memory)
            network.memory, known = Remembered.begin(data, self.settings.features, self.settings.memory, before)
            names, places, keys = known.names, known.places, known.keys
        network.to(loop.accelerator.device)

        def predict(tasks: Sequence[int], embeddings: Sequence[Embedding]) -> Tensor:
            device = network.row_start.device
            more = (None if one is None else one[list(tasks)].to(device) for one in (centres, places, keys))
            return network(*collate(embeddings, device), *more)

        return predict, names

    def _begun(self, data: TrainingSet, loop: TrainingLoop) -> FactorNetwork:
        """A network along the alignment, whose probes and reader have learned from stored activations and from wordings."""
        space = data.space
        if not isinstance(space, ActivationBases) or data.alignment is None or space.read is None:
            raise GeneratorError(f"{self.name} needs bases of activations", remedy="Train it with space=activation_bases and tasks=SUITE.")
        inputs, outputs = space.shape
        self.shape = {"embedding": data.embedding_size, "code": space.size, "entry": list(space.entry), "rank": space.rank}
        self.shape |= {"inputs": inputs, "outputs": outputs}
        with loop.seeded():
            network = self.build(self.shape)
        step = max(1, len(data.training) // _TYPICAL)
        _, tokens, mask = collate([data.embeddings[i][0] for i in list(data.training)[::step]])
        network.probes.align(data.alignment, tokens, mask)
        self.network = network = network.to(loop.accelerator.device)
        train_probes(self.name, network.probes, data, space.read, loop, self.settings.probing)
        network.probes.requires_grad_(False)
        train_reader(self.name, network, data, loop, self.settings.contrast)
        return network
