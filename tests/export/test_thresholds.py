from __future__ import annotations

from pathlib import Path

from midge.export.config import VerifyConfig
from midge.export.thresholds import missed_thresholds, ran_attention
from midge.runtime.backend import Placement
from midge.runtime.parity import Parity


def parity(cosine_min: float, cosine_mean: float, agreement: float) -> Parity:
    return Parity(cosine_min, cosine_mean, 0.1, agreement, 64)


def test_thresholds_by_precision_and_kind() -> None:
    config = VerifyConfig(Path("x"))
    assert missed_thresholds(config, "classifier", "onnx-fp32", parity(0.999995, 1, 1)) == ()
    assert len(missed_thresholds(config, "classifier", "onnx-fp32", parity(0.99998, 1, 0.99))) == 2
    assert len(missed_thresholds(config, "embedding", "onnx-fp32", parity(0.99998, 1, 0.99))) == 1
    assert missed_thresholds(config, "classifier", "coreml-fp16", parity(0.9996, 1, 0.985)) == ()
    assert len(missed_thresholds(config, "classifier", "onnx-fp16", parity(0.9994, 1, 0.97))) == 2
    assert missed_thresholds(config, "classifier", "onnx-int8-u8", parity(0.3, 0.98, 0.9)) == ()
    assert len(missed_thresholds(config, "classifier", "openvino-int8", parity(0.3, 0.9, 0.5))) == 2
    for cosine, missed in ((0.996, (0, 0)), (0.993, (1, 0)), (0.989, (1, 1))):
        found = [
            missed_thresholds(config, "embedding", "onnx-int8-s8", parity(0.3, cosine, 0.1), transformer)
            for transformer in (False, True)
        ]
        assert tuple(map(len, found)) == missed
    own = VerifyConfig(Path("x"), int8_min_cosine=0.5)
    assert missed_thresholds(own, "embedding", "onnx-int8-s8", parity(0.3, 0.6, 0.1)) == ()


def test_a_transformer_is_known_by_what_its_runtimes_ran() -> None:
    for ops in ({"Conv": 2, "Softmax": 1}, {"native_layer_norm": 1}, {"MVN": 3}, {"SkipLayerNormalization": 1}):
        assert ran_attention([Placement(0, 1, {"Conv": 1}), Placement(0, 1, ops)])
    assert not ran_attention([Placement(0, 1, {"Conv": 2, "native_batch_norm": 1, "QLinearConv": 3, "mean": 1})])
