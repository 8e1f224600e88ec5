"""How far a variant may stray from the reference, by its precision and the kind of network."""

from __future__ import annotations

from collections.abc import Iterable

from ..runtime.backend import Placement
from ..runtime.parity import Parity
from .config import VerifyConfig

# Smallest mean cosine in INT8: of a classifier's logits, and of features by whether the network is a transformer.
INT8_MIN_COSINE = {"classifier": 0.95}
FEATURES_MIN_COSINE = {False: 0.995, True: 0.99}


def ran_attention(placements: Iterable[Placement]) -> bool:
    """Whether one of the runtimes ran attention or the normalization that goes with it, by its own names."""
    operators = {op.lower().replace("_", "") for placement in placements for op in placement.ops}
    return any(part in op for op in operators for part in ("softmax", "layernorm", "attention", "mvn"))


def missed_thresholds(
    config: VerifyConfig, kind: str, variant: str, parity: Parity, transformer: bool = False
) -> tuple[str, ...]:
    """The thresholds that a variant misses.

    The cosine is the smallest of all images in FP32 and FP16, where each must be right, and the mean in INT8. The
    agreement counts for classifiers: features have no top-1.
    """
    missed = []
    precision = {"int8", "fp16"}.intersection(variant.split("-"))
    if "int8" in precision:
        min_agreement, min_cosine = config.int8_min_agreement, config.int8_min_cosine
        if min_cosine is None:
            min_cosine = INT8_MIN_COSINE.get(kind, FEATURES_MIN_COSINE[transformer])
        if parity.cosine_mean < min_cosine:
            missed.append(f"mean cosine {parity.cosine_mean:.4f} is below {min_cosine:g}")
    else:
        min_agreement, min_cosine = config.min_agreement, config.min_cosine
        if "fp16" in precision:
            min_agreement, min_cosine = config.fp16_min_agreement, config.fp16_min_cosine
        if parity.cosine_min < min_cosine:
            missed.append(f"smallest cosine {parity.cosine_min:.6f} is below {min_cosine:g}")
    if kind == "classifier" and parity.top1_agreement < min_agreement:
        missed.append(f"top-1 agreement {parity.top1_agreement:.4f} is below {min_agreement:g}")
    return tuple(missed)
