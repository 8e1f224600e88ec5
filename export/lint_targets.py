"""The runtimes that ``midge lint`` knows: what each reads, and where that is written (no onnx).

What the tables say of ONNX Runtime 1.32, OpenVINO 2026.4 and TensorRT-RTX 1.7 was tried with them, operator by
operator. TensorRT 8, 10 and 11 cannot be tried without a GPU: theirs is NVIDIA's documentation.
"""

from __future__ import annotations

from dataclasses import dataclass

OPERATORS_MD = "ONNX-TensorRT, docs/operators.md"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEVER_IN_TENSORRT = _names(
    """Bernoulli BitShift Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear MatMulInteger
    MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement
    OptionalHasElement QLinearConv QLinearMatMul SequenceAt SequenceConstruct SequenceEmpty SequenceErase
    SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringNormalizer
    TfIdfVectorizer Unique"""
)
_NOT_IN_TENSORRT_10 = _NEVER_IN_TENSORRT | _names(
    """AffineGrid BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im ImageDecoder RegexFullMatch
    StringConcat StringSplit"""
)
_OPENVINO_MICROSOFT = _names(
    """Attention BiasAdd BiasGelu BifurcationDetector DequantizeLinear DynamicQuantizeLSTM DynamicQuantizeMatMul
    EmbedLayerNormalization FastGelu FusedConv FusedGemm FusedMatMul GatherBlockQuantized GatherND Gelu GroupNorm
    GroupQueryAttention MatMulIntegerToFloat MatMulNBits MultiHeadAttention Pad QLinearAdd QLinearAveragePool
    QLinearConcat QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere
    QuantizeLinear QuickGelu Range RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization Trilu"""
)


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        label: its name for a person.
        tried: whether what is said of it was tried with it; else it is from documents alone.
        max_opset: the latest opset whose operators it is documented to read; None where that does not end.
        last_opset: the latest opset that a file may be of; None where it does not look.
        max_ir_version: the latest IR version that it reads; None where it does not look.
        unsupported: operators of ONNX that it does not read.
        later_releases: operator -> the release that first reads it, where not the first of its series does.
        domains: other domain -> the operators of it that it reads; None for all that it has.
        source: where that is written.
    """

    label: str
    tried: bool
    source: str
    max_opset: int | None = None
    last_opset: int | None = None
    max_ir_version: int | None = None
    unsupported: frozenset[str] = frozenset()
    later_releases: tuple[tuple[str, str], ...] = ()
    domains: tuple[tuple[str, frozenset[str] | None], ...] = ()


TARGETS = {
    "onnxruntime": Target(
        label="ONNX Runtime",
        tried=True,
        source="the kernels and the loader of ONNX Runtime 1.32",
        last_opset=27,
        max_ir_version=14,
        domains=(("com.microsoft", None), ("ai.onnx.ml", None)),
    ),
    "openvino": Target(
        label="OpenVINO",
        tried=True,
        source="the conversion rules of OpenVINO 2026.4",
        unsupported=_names(
            """Bernoulli ConcatFromSequence DeformConv Det ImageDecoder MaxUnpool MelWeightMatrix Optional
            OptionalGetElement OptionalHasElement RegexFullMatch SequenceConstruct SequenceErase SequenceInsert
            SequenceLength SequenceMap SplitToSequence StringConcat StringNormalizer StringSplit TensorScatter
            TfIdfVectorizer"""
        ),
        domains=(("com.microsoft", _OPENVINO_MICROSOFT),),
    ),
    "tensorrt8": Target(
        label="TensorRT 8",
        tried=False,
        source=f"{OPERATORS_MD}, releases 8.5 and 8.6",
        max_opset=17,
        later_releases=(("LayerNormalization", "8.6"), ("IsInf", "8.6")),
        unsupported=_NEVER_IN_TENSORRT
        | frozenset({"BlackmanWindow", "HammingWindow", "HannWindow", "Hardmax", "STFT"}),
    ),
    "tensorrt10": Target(
        label="TensorRT 10",
        tried=False,
        source=f"{OPERATORS_MD}, releases 10.0 (opset 9 to 20) and 10.15 (to 24)",
        max_opset=20,
        unsupported=_NOT_IN_TENSORRT_10,
    ),
    "tensorrt11": Target(
        label="TensorRT 11",
        tried=False,
        source="NVIDIA TensorRT documentation 11, ONNX Opset Guide",
        max_opset=25,
        unsupported=_NOT_IN_TENSORRT_10,
    ),
    "tensorrt-rtx": Target(
        label="TensorRT-RTX",
        tried=True,
        source="the parser of TensorRT-RTX 1.7",
        unsupported=_NOT_IN_TENSORRT_10 | frozenset({"BitCast", "CumProd", "DeformConv", "SwiGLU"}),
    ),
    "coreml": Target(label="Core ML", tried=False, source="coremltools 9, Unified Conversion API"),
}
TENSORRT = ("tensorrt8", "tensorrt10", "tensorrt11", "tensorrt-rtx")

# Operators of which coremltools 9 converts the torch operator that makes them.
COREML_CONVERTS = _names(
    """Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax MatMul Max MaxPool Min Mish Mod Mul Neg Not Or PRelu Pad Pow QuantizeLinear Range
    Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Resize Round ScatterElements
    ScatterND Selu Shape Sigmoid Sign Sin Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum
    Tan Tanh Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor"""
)
