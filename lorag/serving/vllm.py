"""The plug-in for vLLM: a request whose model is `lorag:summarise legal text` is answered with the adapter generated for it.

vLLM calls `register` in each of its processes and the resolver in the one that takes requests. Where VLLM_PLUGINS names this
plug-in, `EndpointPlugin` also checks at the start that the right base model is served, and loads the generator before the first request.
"""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorag.config import load_config
from lorag.errors import ConfigError, DescriptionError, LoragError, ServedNameError, StorageError, StoreFullError
from lorag.serving.names import PREFIX, alias, parse_name
from lorag.serving.resolver import AdapterResolver, ServingSettings

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from lorag.serving.names import Requested

__all__ = ["EndpointPlugin", "GeneratedLoraResolver", "register", "settings_from_environment"]

logger = logging.getLogger(__name__)

VARIABLE = "LORAG_SERVING"  # a generator, or a YAML file of ServingSettings
_NAME = "lorag"
_VLLM_LOGGER = "vllm.entrypoints.openai.models.serving"  # writes the names of adapters that it loads


def settings_from_environment() -> ServingSettings | None:
    """Settings that the environment names: a YAML file, or a generator's folder or hub id; None if it names none.

    Raises:
        ConfigError: If they cannot be used.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    if value.endswith((".yaml", ".yml")):
        return load_config(ServingSettings, value)
    return ServingSettings(generator=None if value == "default" else value)


class GeneratedLoraResolver:
    """Finds or makes the adapter that a model's name asks for; what vLLM calls a `LoRAResolver`.

    Args:
        settings: What is served.
    """

    def __init__(self, settings: ServingSettings) -> None:
        self.settings = settings
        self._resolver: AdapterResolver | None = None
        self._checked: set[str] = set()
        self._waiting = 0
        self._worker = ThreadPoolExecutor(1, "lorag")  # one adapter after the other, beside the event loop

    async def open(self, base_model_name: str) -> AdapterResolver:
        """Loads the generator, once, and checks that the served base model is its own."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._open, base_model_name)

    def _open(self, base_model_name: str) -> AdapterResolver:
        if self._resolver is None:
            self._resolver = AdapterResolver.from_settings(self.settings)
        if base_model_name not in self._checked:
            self._resolver.check_base(base_model_name)
            self._checked.add(base_model_name)
        return self._resolver

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Answers vLLM, which asks once for each name that it does not know.

        Args:
            base_model_name: The model that is served.
            lora_name: As the client sent it.

        Returns:
            The adapter's folder under a name of its own, or None for names that do not start with `lorag:`.

        Raises:
            HTTPException: 400 for a name that cannot be used or a description that the gate refuses, 429 if no more adapters fit or too
                many requests wait, 507 for a disk that cannot be written, 500 for what is wrong with the server.
        """
        from fastapi import HTTPException
        from vllm.lora.request import LoRARequest

        try:
            requested = parse_name(lora_name)
            if requested is None:
                return None
            resolver = self._resolver if base_model_name in self._checked else None
            folder = None if resolver is None else await asyncio.to_thread(resolver.find, requested)
            if folder is None:
                folder = await self._made(base_model_name, requested)
        except LoragError as error:
            status = _status(error)
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                logger.error("%s: %s", self._shown(lora_name), error)
            raise HTTPException(status, str(error)) from error
        return LoRARequest(self._shown(lora_name), 1, str(folder))  # vLLM numbers it itself

    async def _made(self, base_model_name: str, requested: Requested) -> Path:
        if self._waiting >= self.settings.max_waiting:
            raise StoreFullError("too many requests wait for new adapters", got=self._waiting, remedy="Ask again in a moment.")
        self._waiting += 1
        try:
            resolver = await self.open(base_model_name)
            return await asyncio.get_running_loop().run_in_executor(self._worker, resolver.make, requested)
        finally:
            self._waiting -= 1

    def _shown(self, name: str) -> str:
        return name if self.settings.log_texts else alias(name)


def _status(error: LoragError) -> HTTPStatus:
    """The status of a request that ended in an error."""
    if isinstance(error, StoreFullError):
        return HTTPStatus.TOO_MANY_REQUESTS
    if isinstance(error, StorageError):
        return HTTPStatus.INSUFFICIENT_STORAGE
    return HTTPStatus.BAD_REQUEST if isinstance(error, DescriptionError | ServedNameError) else HTTPStatus.INTERNAL_SERVER_ERROR


class _HiddenNames(logging.Filter):
    """Keeps descriptions out of vLLM's lines about adapters."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replaces names among a line's arguments."""
        if isinstance(record.args, tuple):
            record.args = tuple(alias(a) if isinstance(a, str) and a.startswith(PREFIX) and "#" not in a[:6] else a for a in record.args)
        return True


class _ToVllm(logging.Handler):
    """Lets lorag's lines stand among vLLM's, however those are written: vLLM sets up its logging after plug-ins are loaded."""

    def emit(self, record: logging.LogRecord) -> None:
        """Hands a line on."""
        logging.getLogger("vllm").handle(record)


_registered: GeneratedLoraResolver | None = None


def register() -> None:
    """Entry point in `vllm.general_plugins`: adds the resolver if LORAG_SERVING is set. Loads no generator: engines fork after it.

    Raises:
        ConfigError: If the settings cannot be used; the server does not start then.
    """
    global _registered
    settings = settings_from_environment()
    if settings is None or _registered is not None:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    ours = logging.getLogger("lorag")
    ours.setLevel(logging.INFO)
    ours.addHandler(_ToVllm())
    _registered = GeneratedLoraResolver(settings)
    LoRAResolverRegistry.register_resolver(_NAME, _registered)
    if not settings.log_texts:
        logging.getLogger(_VLLM_LOGGER).addFilter(_HiddenNames())


class EndpointPlugin:
    """Entry point in `vllm.endpoint_plugins`, loaded if VLLM_PLUGINS names it: what is to be said is said at the start."""

    name = _NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:  # noqa: ANN401 - FastAPI's
        """Adds no routes."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:  # noqa: ANN401 - vLLM's
        """Loads the generator and checks that it and the server fit each other.

        Raises:
            LoragError: If they do not; the server does not start then.
        """
        if _registered is None:
            return
        import vllm.envs as settings

        if not settings.VLLM_ALLOW_RUNTIME_LORA_UPDATING or not args.enable_lora:
            raise ConfigError(
                "adapters cannot be loaded at run time", remedy="Set VLLM_ALLOW_RUNTIME_LORA_UPDATING=true and --enable-lora."
            )
        if args.max_lora_rank < _registered.settings.max_rank:
            raise ConfigError("--max-lora-rank is too small", got=args.max_lora_rank, expected=f"max_rank, {_registered.settings.max_rank}")
        resolver = await _registered.open(engine_client.model_config.model)
        generator, usage = resolver.generator, resolver.store.usage()
        logger.info(
            "lorag: generator %s for %s, %d of at most %d adapters in %s",
            generator.revision[:12],
            generator.base.model.name,
            usage.adapters,
            resolver.store.limits.adapters,
            resolver.store.folder,
        )
