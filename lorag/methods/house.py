"""The house method: read the description, start from a regression over experts, then learn from the base model's own loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lorag.errors import ConfigError, GeneratorError
from lorag.methods.functional import FunctionalSettings, require_runner, train_functionally
from lorag.methods.kernel import ExpertRegression, KernelSettings, can_regress, regress_codes
from lorag.methods.method import NetworkMethod, ReaderSettings, Settings, reconstruct, whole
from lorag.methods.students import EnsembleSettings, PairSettings, teach_ensemble, teach_pairs
from lorag.networks.experts import KernelHead
from lorag.networks.modules import ModuleDecoder
from lorag.networks.readers import Augmentation, DescriptionNetwork, FeatureReader, PairReader, linear_head

if TYPE_CHECKING:
    from lorag.base.layout import ModulePlace
    from lorag.base.runner import Runner
    from lorag.methods.training_loop import TrainingLoop
    from lorag.methods.training_set import TrainingSet
    from lorag.text.conditioning import Condition

__all__ = ["House", "HouseSettings", "number_places"]

_DECODERS = ("auto", "flat", "shared")
_LONG = 2**16  # elements of a code beyond which "auto" shares one decoder: 64 modules of k = 32
_MOST_BLOCKS, _MOST_NUMBERS, _MOST_MEMBERS = 64, 8, 32
_GROUP = 32  # features that make a group of the kernel's, if so many divide `hidden`
# Settings of the kernel that have other names here.
_KERNEL = {"features": "hidden", "batch": "kernel_batch", "asked": "kernel_asked", "steps": "kernel_steps"}


@dataclass
class HouseSettings(ReaderSettings):
    """Size and training, beside those of the reader.

    Attributes:
        width: Of the transformer that reads the description.
        hidden: Of the layer before the code.
        decoder: From that layer to the code: "flat" is one linear map, "shared" one network for all modules that is given the place of
            each, whose size grows neither with depth nor with width; "auto" shares for codes of more than 65,536 elements.
        decoder_width: Of the shared network; below the length k² of a module's part it is a bottleneck.
        decoder_blocks: Residual blocks of the shared network.
        experts: Most experts that a kernel's head keeps: it has a code's length of numbers for each.
        kernel_steps: Steps of learning a kernel between descriptions: the network starts from a regression over the experts.
        kernel_batch: Most experts in one of these steps.
        kernel_asked: Share of these that are predicted from the others; 0 predicts each from all others.
        steps: Steps of reconstruction, from which it starts where no kernel is learned: if `kernel_steps` is 0, codes come from
            a shared decoder, or experts are too few. Without any expert it starts from no change.
        learning_rate: Peak rate of the kernel's steps and of reconstruction.
        batch: Descriptions in a step of reconstruction.
        functional: Steps through the frozen base model.
        ensemble: Readers beside the one that took those steps, which learn from it.
        pairs: A reader of a few examples, which learns from all of them; without steps it is left out.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "colleagues": "ensemble",
        **dict.fromkeys(("source", "view", "temperature", "offset"), "method=attention"),
    }

    width: int = 192
    hidden: int = 192
    decoder: str = "auto"
    decoder_width: int = 1024
    decoder_blocks: int = 1
    experts: int = 1024
    kernel_steps: int = 800
    kernel_batch: int = 512
    kernel_asked: float = 0.25
    steps: int = 300
    learning_rate: float = 1e-3
    batch: int = 64
    functional: FunctionalSettings = field(default_factory=lambda: FunctionalSettings(steps=900, tasks=64, examples=2))
    ensemble: EnsembleSettings = field(default_factory=EnsembleSettings)
    pairs: PairSettings = field(default_factory=PairSettings)


class House(NetworkMethod):
    """Ours. What each part adds is in docs/results-history.md: shared-subspace codes, token conditions, a kernel, functional loss."""

    name = "house"
    settings_type = HouseSettings
    learns_pairs = True
    settings: HouseSettings
    network: DescriptionNetwork | None = None

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        s = self.settings
        if s.decoder not in _DECODERS:
            raise ConfigError("settings.decoder is unknown", got=repr(s.decoder), expected=", ".join(_DECODERS))
        if not 0 <= s.decoder_blocks <= _MOST_BLOCKS or s.decoder_width < 1:
            raise ConfigError(
                "settings.decoder_blocks or settings.decoder_width cannot be used",
                got=f"{s.decoder_blocks} blocks of width {s.decoder_width}",
                expected=f"0 to {_MOST_BLOCKS}, at least 1",
            )
        if not 0 <= s.ensemble.count < _MOST_MEMBERS:
            raise ConfigError("settings.ensemble.count cannot be used", got=str(s.ensemble.count), expected=f"0 to {_MOST_MEMBERS - 1}")
        self._kernel_settings().check(lambda name: f"settings.{_KERNEL.get(name, name)}")

    @property
    def learns_from_tasks(self) -> bool:
        """Whether there are functional steps."""
        return self.settings.functional.steps > 0 or self.settings.pairs.steps > 0

    @property
    def reads_pairs(self) -> bool:
        """Whether there is a reader of them."""
        return self.network is not None and self.network.pairs is not None

    # --- the network ---------------------------------------------------------------------------------------------

    def build(self, shape: Mapping[str, Any]) -> DescriptionNetwork:
        """The untrained network.

        Args:
            shape: Lengths of `embedding` and `code`, number of `members`; `kinds` (m,) and `depths` (m, d) of a shared decoder's modules,
                or the number of `experts` in a kernel's head, or neither; `pair`, the length of a pair's vector, if pairs are read.
        """
        s, members = self.settings, whole(shape, "members", _MOST_MEMBERS)
        head = self._head(whole(shape, "code"), shape)
        embedding = whole(shape, "embedding")
        pairs = self._pair_reader(whole(shape, "pair")) if "pair" in shape else None
        return DescriptionNetwork(head, [self._reader(embedding) for _ in range(members)], Augmentation(s.word_dropout, s.noise), pairs)

    def _pair_reader(self, vector: int) -> PairReader:
        return PairReader(vector, self._reader(vector), self.settings.noise)

    def _reader(self, embedding: int) -> FeatureReader:
        s = self.settings
        return FeatureReader(
            embedding, width=s.width, queries=s.queries, layers=s.layers, heads=s.heads, features=s.hidden, dropout=s.dropout
        )

    def _head(self, code: int, shape: Mapping[str, Any]) -> nn.Module:
        """The untrained last part, from features to codes (b, c)."""
        s = self.settings
        if "experts" in shape:
            return KernelHead(whole(shape, "experts"), s.hidden, self._groups, code)
        if "kinds" in shape:
            kinds, depths = _stored_places(shape["kinds"], shape["depths"])
            return ModuleDecoder(s.hidden, kinds, depths, code // len(kinds), width=s.decoder_width, blocks=s.decoder_blocks)
        return linear_head(s.hidden, code)

    @property
    def _groups(self) -> int:
        """Groups into which the kernel's features fall."""
        return self.settings.hidden // math.gcd(self.settings.hidden, _GROUP)

    # --- fit -----------------------------------------------------------------------------------------------------

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """A regression or reconstruction, functional training, then more readers; each stage stops early on held-out tasks."""
        s = self.settings
        if self.learns_from_tasks:
            require_runner(self.name, data, runner)  # before time is spent on reconstruction
        if not s.functional.steps:
            data.require_experts(self.name)
        shape: dict[str, Any] = {"embedding": data.embedding_size, "code": data.space.size, "members": 1}
        regression = None
        if self.network is None and self.shares_decoder(data):
            kinds, depths = number_places(data.space.layout.places)
            shape |= {"kinds": kinds.tolist(), "depths": depths.tolist()}
        elif self.network is None and s.kernel_steps and can_regress(data):
            regression, mean = regress_codes(self.name, self._kernel_settings(), data, loop, held=False)
            shape["experts"] = len(regression.indices)
        network = self.start(shape, loop)
        if not isinstance(network, DescriptionNetwork):
            raise AssertionError(f"house is around a {type(network).__name__}")
        if regression is None:
            reconstruct(self, data, loop, s.steps, s.learning_rate, s.batch)
        else:
            _take_over(network, regression, mean)
        train_functionally(self.name, network, lambda _, embeddings: self.predict(embeddings), data, loop, s.functional, runner)
        network.eval()  # without functional steps nobody else ends the training mode, which adds noise
        teach_ensemble(self.name, network, lambda: self._reader(data.embedding_size), data, loop, s.ensemble)
        self.shape["members"] = len(network.readers)
        if s.pairs.steps:
            self.learn_pairs(data, loop, runner, s.pairs.steps)

    def learn_pairs(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None, steps: int) -> None:
        """Learns to read examples from what the network reads in descriptions, as `settings.pairs` says but for the number of steps."""
        if self.network is None:
            raise self.unfitted()
        settings = replace(self.settings.pairs, steps=steps)
        self.shape["pair"] = teach_pairs(self.name, self.network, self._pair_reader, data, loop, settings, runner)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """One code, repeated; of pairs where the condition has some and they are read, else of the description."""
        if condition.pairs is None or self.network is None or self.network.pairs is None:
            return super().generate(condition, rng, count)
        with torch.inference_mode():
            return self.network.head(self.network.pairs([condition.pairs])).cpu().expand(count, -1).clone()

    def _kernel_settings(self) -> KernelSettings:
        names = [field.name for field in fields(KernelSettings) if field.name != "groups"]
        return KernelSettings(**{name: getattr(self.settings, _KERNEL.get(name, name)) for name in names}, groups=self._groups)

    def shares_decoder(self, data: TrainingSet) -> bool:
        """Whether the code is made by one decoder for all modules.

        Raises:
            GeneratorError: If that is asked for, and modules' parts differ in length or nobody says where modules stand.
        """
        asked, parts, places = self.settings.decoder, data.space.parts, data.space.layout.places
        possible = len(set(parts)) == 1 and len(places) == len(parts)
        if asked == "shared" and not possible:
            raise GeneratorError(
                "modules cannot share a decoder",
                got=f"parts of {min(parts)} to {max(parts)} elements, {len(places)} places",
                expected="parts of one length, as in space=shared_subspace",
            )
        return possible and (asked == "shared" or asked == "auto" and data.space.size > _LONG)


def _take_over(network: DescriptionNetwork, regression: ExpertRegression, mean: Tensor) -> None:
    """Makes an untrained network with a kernel head predict what a regression, and a mean code (c,), do."""
    kernel, head, reader = regression.kernel, network.head, network.readers[0]
    if kernel.reader.reader is None or not isinstance(head, KernelHead) or not isinstance(reader, FeatureReader):
        raise GeneratorError("a network of another form cannot start from a regression", got=type(head).__name__)
    reader.reader.load_state_dict(kernel.reader.reader.state_dict())
    reader.hidden.load_state_dict(kernel.reader.hidden.state_dict())
    head.similarity.load_state_dict(kernel.similarity.state_dict())
    with torch.no_grad():
        head.experts.copy_(regression.features)
        head.weights.copy_(regression.shares())
        head.bias.copy_(mean)


def number_places(places: Sequence[ModulePlace]) -> tuple[Tensor, Tensor]:
    """Number of each module's kind (m,), and the numbers of its path (m, d), filled up with zeros."""
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(place.kind for place in places))}
    longest = max(1, *(len(place.depth) for place in places))
    depths = [[*place.depth, *[0] * (longest - len(place.depth))] for place in places]
    return torch.tensor([kinds[place.kind] for place in places]), torch.tensor(depths)


def _stored_places(kinds: Any, depths: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - JSON is any value
    """Kinds (m,) and depths (m, d) of a stored shape.

    Raises:
        ValueError: Unless they are whole numbers that fit together.
    """
    one, other = (torch.tensor(value, device="cpu") for value in (kinds, depths))
    if (
        one.dtype != torch.int64
        or other.dtype != torch.int64
        or one.dim() != 1
        or other.dim() != 2
        or not 0 < other.shape[1] <= _MOST_NUMBERS
        or not 0 < len(one) == len(other)
        or not 0 <= int(one.min()) <= int(one.max()) < len(one)
    ):
        raise ValueError("places of modules are not kinds (m,) and depths (m, d) in whole numbers")
    return one, other
