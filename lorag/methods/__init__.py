"""Methods: one file per family, one registry."""

from __future__ import annotations

from lorag.errors import ConfigError
from lorag.methods.aligned import Aligned
from lorag.methods.attention import Attention
from lorag.methods.baselines import Mean, Multitask, Nearest, RandomExpert, SgMixture, TopK
from lorag.methods.house import House
from lorag.methods.hypernet import Hypernet
from lorag.methods.icm_fusion import IcmFusion
from lorag.methods.icm_lora import IcmLora
from lorag.methods.kernel import Kernel
from lorag.methods.method import Method
from lorag.methods.regression import Mlp, Ridge
from lorag.methods.sg_lora import SgLora
from lorag.methods.training_set import TrainingSet

__all__ = ["METHODS", "Method", "TrainingSet", "method_type"]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(RandomExpert, Mean, Multitask, Nearest, TopK, Ridge, SgMixture),
        *(Mlp, Kernel, Attention, IcmLora, SgLora, Hypernet, IcmFusion, House, Aligned),
    )
}


def method_type(name: str) -> type[Method]:
    """The class of a method's name.

    Raises:
        ConfigError: If none is registered under it.
    """
    if name not in METHODS:
        raise ConfigError("method is unknown", got=repr(name), expected=", ".join(METHODS))
    return METHODS[name]
