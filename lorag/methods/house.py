"""The house method: read the description, start from a regression over experts, then learn from the base model's own loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from lorag.base.layout import ModulePlace
from lorag.base.runner import Runner
from lorag.errors import ConfigError, GeneratorError
from lorag.methods.base import NetworkGenerator, ReaderSettings, Settings
from lorag.methods.colleagues import ColleagueSettings, teach_colleagues
from lorag.methods.expert_regression import ExpertRegression, KernelSettings, can_regress, regress_codes
from lorag.methods.functional import FunctionalSettings, require_runner, train_functionally
from lorag.methods.reconstruction import reconstruct, start_network
from lorag.methods.training_loop import TrainingLoop
from lorag.methods.training_set import TrainingSet
from lorag.networks.code_networks import Blur, TokenNetwork, linear_head
from lorag.networks.expert_attention import ExpertAttention
from lorag.networks.expert_kernel import KernelHead
from lorag.networks.module_decoder import ModuleDecoder
from lorag.text.conditioning import Condition
from lorag.text.embedding import Embedding

__all__ = ["House", "HouseSettings", "number_places"]

_SOURCES = ("description", "experts", "both")
_DECODERS = ("auto", "flat", "shared")
_LONG = 2**16  # elements of a code beyond which "auto" shares one decoder: 64 modules of k = 32
_MOST_BLOCKS, _MOST_NUMBERS, _MOST_COLLEAGUES = 64, 8, 32
_MOST_KNOWN = 1024  # experts that a kernel's head keeps: it has a code's length of numbers for each
_GROUP = 32  # features that make a group of the kernel's, if so many divide `hidden`
_COLLEAGUES = "reading.colleagues."  # where they stand among the tensors


@dataclass
class HouseSettings(ReaderSettings):
    """Size and training, beside those of the reader.

    Attributes:
        source: What codes are made of: "description" (a network that reads it), "experts" (attention over the bank's, for
            banks of some dozen), or "both" added up.
        width: Of the transformer that reads the description.
        hidden: Of the layer before the code.
        decoder: From that layer to the code: "flat" is one linear map, "shared" one network for all modules, told where each
            stands, whose size grows neither with depth nor with width; "auto" shares for codes of more than 65,536 elements.
        decoder_width: Of the shared network; below the length k² of a module's part it is a bottleneck.
        decoder_blocks: Residual blocks of the shared network.
        view: Dimensions in which attention compares descriptions.
        temperature: Of the attention over experts, at the start.
        offset: Whether attention also learns an offset, the same for all descriptions.
        kernel_steps: Steps of learning a kernel between descriptions: the network starts from a regression over the experts.
        steps: Steps of reconstruction, from which it starts where no kernel is learned: if `kernel_steps` is 0, codes come from
            the description by a shared decoder, or experts are too few. Attention over experts needs neither.
        learning_rate: Peak rate of reconstruction.
        batch: Descriptions in a step of reconstruction.
        functional: Steps through the frozen base model.
        colleagues: Readers beside the one that took those steps, which learn from it; for codes made of the description alone.
    """

    source: str = "description"
    width: int = 192
    hidden: int = 192
    decoder: str = "auto"
    decoder_width: int = 1024
    decoder_blocks: int = 1
    view: int = 32
    temperature: float = 0.2
    offset: bool = True
    kernel_steps: int = 800
    steps: int = 300
    learning_rate: float = 1e-3
    batch: int = 64
    functional: FunctionalSettings = field(default_factory=lambda: FunctionalSettings(steps=900, tasks=64, examples=2))
    colleagues: ColleagueSettings = field(default_factory=ColleagueSettings)


class _Sum(nn.Module):
    """A network on the description, attention over experts, or both; in training it sees descriptions blurred."""

    def __init__(self, reading: TokenNetwork | None, attention: ExpertAttention | None, blur: Blur) -> None:
        super().__init__()
        self.reading, self.attention, self.blur = reading, attention, blur

    def forward(self, pooled: Tensor, tokens: Tensor, mask: Tensor, hidden: Tensor | None = None) -> Tensor:
        pooled, tokens, mask = self.blur(pooled, tokens, mask)
        parts = [] if self.reading is None else [self.reading(pooled, tokens, mask)]
        parts += [] if self.attention is None else [self.attention(pooled, hidden)]
        return torch.stack(parts).sum(0)


class House(NetworkGenerator):
    """Ours. Its parts come from measurements in docs/results.md: shared-subspace codes, token conditions, a kernel, functional loss."""

    name = "house"
    settings_type = HouseSettings
    settings: HouseSettings

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        if self.settings.source not in _SOURCES:
            raise ConfigError("settings.source is unknown", got=repr(self.settings.source), expected=", ".join(_SOURCES))
        if self.settings.decoder not in _DECODERS:
            raise ConfigError("settings.decoder is unknown", got=repr(self.settings.decoder), expected=", ".join(_DECODERS))
        if not 0 <= self.settings.decoder_blocks <= _MOST_BLOCKS or self.settings.decoder_width < 1:
            got = f"{self.settings.decoder_blocks} blocks of width {self.settings.decoder_width}"
            raise ConfigError(
                "settings.decoder_blocks or decoder_width cannot be used", got=got, expected=f"0 to {_MOST_BLOCKS}, at least 1"
            )
        if not 0 <= self.settings.colleagues.count <= _MOST_COLLEAGUES:
            got = str(self.settings.colleagues.count)
            raise ConfigError("settings.colleagues.count cannot be used", got=got, expected=f"0 to {_MOST_COLLEAGUES}")

    def build(self, embedding: int, code: int) -> nn.Module:
        """The untrained network."""
        s = self.settings
        reading = attention = None
        if s.source != "experts":
            sizes = {"width": s.width, "queries": s.queries, "layers": s.layers, "heads": s.heads, "hidden": s.hidden}
            reading = TokenNetwork(embedding, self._head(code), colleagues=self.colleagues, **sizes, dropout=s.dropout)
        if s.source != "description":
            keys, codes = torch.empty(self.experts, embedding), torch.empty(self.experts, code)
            attention = ExpertAttention(
                keys, codes, torch.empty(code), self.modules, width=s.view, temperature=s.temperature, offset=s.offset
            )
        return _Sum(reading, attention, Blur(s.word_dropout, s.noise))

    def _head(self, code: int) -> nn.Module:
        """The untrained last part, from features to codes (b, c)."""
        s = self.settings
        if self.known:
            return KernelHead(self.known, s.hidden, self._groups, code)
        if self.kinds is None or self.depths is None:
            return linear_head(s.hidden, code)
        return ModuleDecoder(s.hidden, self.kinds, self.depths, code // len(self.kinds), width=s.decoder_width, blocks=s.decoder_blocks)

    @property
    def _groups(self) -> int:
        """Groups into which the kernel's features fall."""
        return self.settings.hidden // math.gcd(self.settings.hidden, _GROUP)

    experts: int = 0
    colleagues: int = 0
    known: int = 0  # experts of a regression that the network started from
    modules: list[int]
    kinds: Tensor | None = None  # of a shared decoder: number of each module's kind (m,)
    depths: Tensor | None = None  # and the numbers of its path (m, d)

    @property
    def learns_from_tasks(self) -> bool:
        """Whether there are functional steps."""
        return self.settings.functional.steps > 0

    def fit(self, data: TrainingSet, loop: TrainingLoop, runner: Runner | None = None) -> None:
        """A regression or reconstruction, functional training, then the colleagues' lessons; each stops early on held-out training tasks.

        While attention learns, a task sees no expert of its group, and none that is held out. At use all experts count.
        """
        if not self.learns_from_tasks or self.settings.source != "description":
            data.require_experts(self.name)
        if self.learns_from_tasks:
            require_runner(self.name, data, runner)  # before time is spent on reconstruction
        self.experts, self.modules = len(data.codes), list(data.space.parts)
        if self.network is None and self._shares_decoder(data):
            self.kinds, self.depths = number_places(data.space.layout.places)
        learned = self._learn_kernel(data, loop)
        network = start_network(self, data, loop)
        if isinstance(network, _Sum) and network.attention is not None:
            network.attention.hold(data.conditioner.centroids, data.codes, data.space.zero)
        if learned is not None and isinstance(network, _Sum) and network.reading is not None:
            _take_over(network.reading, *learned)
        elif self.settings.source == "description":
            reconstruct(self, data, loop, self.settings.steps, self.settings.learning_rate, self.settings.batch)

        def predict(rows: Sequence[int], embeddings: Sequence[Embedding]) -> Tensor:
            return self.predict(embeddings, data.masked(rows, validation=True))

        train_functionally(self.name, network, predict, data, loop, self.settings.functional, runner)
        network.eval()  # without functional steps nobody else ends the training mode, which blurs descriptions
        if isinstance(network, _Sum) and network.reading is not None and network.attention is None:
            teach_colleagues(self.name, network.reading, network.blur, data, loop, self.settings.colleagues)

    def generate(self, condition: Condition, rng: torch.Generator, count: int = 1) -> Tensor:
        """One code, repeated. Attention passes over experts that the condition masks, as where a known task plays an unseen one."""
        with torch.inference_mode():
            code = self.predict([condition.embedding], condition.masked[None] if condition.masked.any() else None)
        return code.cpu().expand(count, -1).clone()

    def _learn_kernel(self, data: TrainingSet, loop: TrainingLoop) -> tuple[ExpertRegression, Tensor] | None:
        """The regression over the training experts from which the network starts, with their mean (c,); None if it does not."""
        s = self.settings
        if s.source != "description" or s.kernel_steps == 0 or self.kinds is not None or self.network is not None:
            return None
        if not can_regress(data):
            return None
        kernel = KernelSettings(
            **{field.name: getattr(s, field.name) for field in fields(ReaderSettings)},
            width=s.width,
            features=s.hidden,
            groups=self._groups,
            experts=_MOST_KNOWN,
            steps=s.kernel_steps,
            learning_rate=s.learning_rate,
        )
        learned = regress_codes(self.name, kernel, data, loop, held=False)
        self.known = len(learned[0].indices)
        return learned

    def _shares_decoder(self, data: TrainingSet) -> bool:
        """Whether the code is made by one decoder for all modules.

        Raises:
            GeneratorError: If that is asked for, and modules' parts differ in length or nobody says where modules stand.
        """
        asked = self.settings.decoder
        if asked == "flat" or self.settings.source == "experts":
            return False
        parts, places = data.space.parts, data.space.layout.places
        possible = len(set(parts)) == 1 and len(places) == len(parts)
        if asked == "shared" and not possible:
            raise GeneratorError(
                "modules cannot share a decoder",
                got=f"parts of {min(parts)} to {max(parts)} elements, {len(places)} places",
                expected="parts of one length, as in space=shared_subspace",
            )
        return possible and (asked == "shared" or data.space.size > _LONG)

    def tensors(self) -> dict[str, Tensor]:
        """The network, where modules stand if they share a decoder, and the lengths of their parts if experts are attended to."""
        found = super().tensors()
        if self.kinds is not None and self.depths is not None:
            found |= {"kinds": self.kinds.cpu(), "depths": self.depths.cpu()}
        if self.settings.source == "description":
            return found
        return found | {"modules": torch.tensor(self.modules)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Builds the network and loads it."""
        if "modules" in tensors:
            self.modules, self.experts = tensors["modules"].tolist(), len(tensors.get("attention.codes", ()))
        # What is stored decides, and not the setting: generators from before there was a shared decoder have none.
        self.kinds, self.depths = tensors.get("kinds"), tensors.get("depths")
        self.known = len(tensors.get("reading.head.known", ()))
        self.colleagues = len({name.split(".")[2] for name in tensors if name.startswith(_COLLEAGUES)})
        if self.colleagues > _MOST_COLLEAGUES:
            raise GeneratorError("too many readers", got=self.colleagues, expected=f"at most {_MOST_COLLEAGUES} beside the first")
        if self.kinds is not None or self.depths is not None:
            _check_places(self.kinds, self.depths)
        super().restore({name: value for name, value in tensors.items() if name not in ("modules", "kinds", "depths")})


def _take_over(reading: TokenNetwork, regression: ExpertRegression, mean: Tensor) -> None:
    """Makes an untrained network with a kernel head predict what a regression does."""
    kernel, head = regression.kernel, reading.head
    if kernel.reader.reader is None or not isinstance(head, KernelHead):
        raise GeneratorError("a network of another form cannot start from a regression", got=type(head).__name__)
    reading.reader.load_state_dict(kernel.reader.reader.state_dict())
    reading.hidden.load_state_dict(kernel.reader.hidden.state_dict())
    head.similarity.load_state_dict(kernel.similarity.state_dict())
    with torch.no_grad():
        head.known.copy_(regression.features)
        head.shares.copy_(regression.shares())
        head.bias.copy_(mean)


def number_places(places: Sequence[ModulePlace]) -> tuple[Tensor, Tensor]:
    """Number of each module's kind (m,), and the numbers of its path (m, d), filled up with zeros."""
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(place.kind for place in places))}
    longest = max(1, *(len(place.depth) for place in places))
    depths = [[*place.depth, *[0] * (longest - len(place.depth))] for place in places]
    return torch.tensor([kinds[place.kind] for place in places]), torch.tensor(depths)


def _check_places(kinds: Tensor | None, depths: Tensor | None) -> None:
    """Raises GeneratorError unless these are numbers of kinds (m,) and of paths (m, d)."""
    if (
        kinds is None
        or depths is None
        or kinds.dtype != torch.int64
        or depths.dtype != torch.int64
        or kinds.dim() != 1
        or depths.dim() != 2
        or not 0 < depths.shape[1] <= _MOST_NUMBERS
        or not 0 < len(kinds) == len(depths)
        or not 0 <= int(kinds.min()) <= int(kinds.max()) < len(kinds)
    ):
        raise GeneratorError("stored places of modules do not fit house", expected="kinds (m,) and depths (m, d), whole numbers")
