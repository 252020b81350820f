"""Generators: one file a method, one registry."""

from __future__ import annotations

from lorag.errors import ConfigError
from lorag.methods.aligned import Aligned
from lorag.methods.base import Generator
from lorag.methods.baselines import Mean, Multitask, Nearest, RandomExpert, SgMixture, TopK
from lorag.methods.house import House
from lorag.methods.hypernet import Hypernet
from lorag.methods.icm_fusion import IcmFusion
from lorag.methods.icm_lora import IcmLora
from lorag.methods.kernel import Kernel
from lorag.methods.regression import Mlp, Ridge
from lorag.methods.sg_controls import SgRescaled, SgRidge
from lorag.methods.sg_lora import SgLora
from lorag.methods.training_set import TrainingSet

__all__ = ["GENERATORS", "Generator", "TrainingSet", "generator_type"]

GENERATORS: dict[str, type[Generator]] = {
    method.name: method
    for method in (
        *(RandomExpert, Mean, Multitask, Nearest, TopK, SgMixture, SgRescaled, Ridge, SgRidge),
        *(Mlp, Kernel, IcmLora, SgLora, Hypernet, IcmFusion, House, Aligned),
    )
}


def generator_type(name: str) -> type[Generator]:
    """The generator class of a name.

    Raises:
        ConfigError: If none is registered under it.
    """
    if name not in GENERATORS:
        raise ConfigError("method is unknown", got=repr(name), expected=", ".join(GENERATORS))
    return GENERATORS[name]
