"""Tiny base models of six architectures, random adapters and a word-level tokenizer: everything offline, on the CPU."""

import dataclasses
import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Beside another busy process a second thread makes torch slower, also in processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis
import pytest
import torch
import transformers
from hub_standin import standin  # noqa: F401 - a fixture
from torch import Tensor, nn

from lorag.adapters.adapter import LoraAdapter
from lorag.adapters.factors import Factors
from lorag.base.layout import LoraLayout

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
transformers.logging.set_verbosity_error()

# A busy machine is not a failure, and a run repeats: the same examples each time, and no folder of past ones.
hypothesis.settings.register_profile("lorag", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lorag")

ARCHITECTURES = ("llama", "qwen2", "gpt2", "t5", "bert", "clip")
PAD, BOS, EOS = 0, 1, 2
WORDS = "the a red green blue cat dog bird sat ran flew on under over mat log sky and then good bad early late home".split()
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
SIZE = len(VOCABULARY)
_COMMON = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def pytest_configure(config: pytest.Config) -> None:
    """Hides what transformers says of its own modelling code, whoever calls it."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest tensor that an operation leaves off the meta device, in bytes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


@dataclass(frozen=True)
class Tiny:
    """A kind of base model: how to build it (`layers`, weights from a seed), what to target, and what it reads."""

    name: str
    make: Callable[[int], nn.Module]
    targets: tuple[str, ...]
    inputs: Callable[[int, torch.Generator], dict[str, Tensor]]
    task_type: str | None

    def build(self, *, layers: int = 2, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make(layers)
            # Default initialisation is so small that a wrong ΔW would hide below a tolerance.
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.2)
        return model.requires_grad_(False).eval()

    def layout(self, model: nn.Module | None = None) -> LoraLayout:
        return LoraLayout.from_model(self.build() if model is None else model, self.targets)


def _ids(rows: int, rng: torch.Generator, length: int = 7) -> Tensor:
    return torch.randint(4, SIZE, (rows, length), generator=rng)


def _text(rows: int, rng: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(rows, rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _text_pair(rows: int, rng: torch.Generator) -> dict[str, Tensor]:
    return {**_text(rows, rng), "decoder_input_ids": _ids(rows, rng, 5)}


def _text_image(rows: int, rng: torch.Generator) -> dict[str, Tensor]:
    text = _text(rows, rng)
    text["input_ids"][:, -1] = EOS
    return {**text, "pixel_values": torch.randn(rows, 3, 16, 16, generator=rng)}


def _ends(**more: object) -> dict[str, object]:
    return {"vocab_size": SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **more}


def _llama(layers: int) -> nn.Module:
    config = transformers.LlamaConfig(**_ends(), **_COMMON, num_hidden_layers=layers, max_position_embeddings=128)
    return transformers.LlamaForCausalLM(config)


def _qwen2(layers: int) -> nn.Module:
    config = transformers.Qwen2Config(**_ends(), **_COMMON, num_hidden_layers=layers, num_key_value_heads=2, max_position_embeddings=128)
    return transformers.Qwen2ForCausalLM(config)


def _gpt2(layers: int) -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_ends(), n_embd=32, n_layer=layers, n_head=4, n_positions=128))


def _t5(layers: int) -> nn.Module:
    ends = _ends(decoder_start_token_id=PAD)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**ends, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4)
    )


def _bert(layers: int) -> nn.Module:
    config = transformers.BertConfig(vocab_size=SIZE, pad_token_id=PAD, **_COMMON, num_hidden_layers=layers, max_position_embeddings=128)
    return transformers.BertModel(config)


def _clip(layers: int) -> nn.Module:
    tower = {**_COMMON, "num_hidden_layers": layers}
    config = transformers.CLIPConfig(
        text_config={**_ends(), **tower, "max_position_embeddings": 32},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


_TINY = {
    tiny.name: tiny
    for tiny in (
        Tiny("llama", _llama, ("q_proj", "v_proj", "down_proj"), _text, "CAUSAL_LM"),
        Tiny("qwen2", _qwen2, ("q_proj", "v_proj"), _text, "CAUSAL_LM"),
        Tiny("gpt2", _gpt2, ("c_attn", "c_fc"), _text, "CAUSAL_LM"),
        Tiny("t5", _t5, ("q", "v", "wo"), _text_pair, "SEQ_2_SEQ_LM"),
        Tiny("bert", _bert, ("query", "value"), _text, "FEATURE_EXTRACTION"),
        Tiny("clip", _clip, ("q_proj", "v_proj"), _text_image, None),
    )
}


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What a user of the model reads: logits, hidden states, or CLIP's embeddings; in fp32."""
    result = model(**inputs)
    if hasattr(result, "image_embeds"):
        return torch.cat([result.text_embeds, result.image_embeds], 1).float()
    return (result.logits if hasattr(result, "logits") else result.last_hidden_state).float()


def gauge(adapter: LoraAdapter, seed: int) -> LoraAdapter:
    """The same ΔW in another gauge: B·G and G⁻¹·A, with a random well-conditioned G for each module."""
    rng = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (rows, columns) in adapter.factors.items():
        r = adapter.rank
        turn = torch.linalg.qr(torch.randn(r, r, generator=rng, dtype=torch.float64))[0]
        g = turn * (0.3 + 3 * torch.rand(r, generator=rng, dtype=torch.float64))
        factors[name] = (torch.linalg.solve(g, rows.double()).float(), (columns.double() @ g).float())
    return dataclasses.replace(adapter, factors=Factors(factors))


def stack_adapters(adapters, device="cpu"):
    """What RowAdapters runs: A (n, r, i) and B (n, o, r) of each module."""
    return Factors.stack([adapter.factors for adapter in adapters], device)


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, Tiny]:
    """Factories of the six architectures by name; `tiny_models["llama"].build()` gives a fresh frozen model."""
    return _TINY


@pytest.fixture(scope="session", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each architecture in turn."""
    return _TINY[request.param]


@pytest.fixture(scope="session")
def llama_layout(tiny_models: dict[str, Tiny]) -> LoraLayout:
    """Layout of the tiny Llama: q, v and down projections of two layers."""
    return tiny_models["llama"].layout()


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., LoraAdapter]:
    """Makes an adapter of a layout from a seed, with ΔW of about the size of the tiny models' weights."""

    def make(layout: LoraLayout, rank: int = 4, alpha: float = 8.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoraAdapter:
        rng = torch.Generator().manual_seed(seed)
        factors = {
            m.name: (
                (torch.randn(rank, m.in_features, generator=rng) * 0.3).to(dtype),
                (torch.randn(m.out_features, rank, generator=rng) * 0.3).to(dtype),
            )
            for m in layout.modules
        }
        return LoraAdapter(layout, Factors.with_alpha(factors, alpha), "tiny-base", None, {"seed": seed})

    return make


@pytest.fixture
def lorag(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, stdout, stderr."""
    from lorag.cli import main as cli

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word; pad, begin and end tokens as the tiny models number them."""
    return word_tokenizer()


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Makes that tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
