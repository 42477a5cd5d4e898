"""The passes: each an `onnx_ir.passes.PassBase`, usable alone on any `onnx_ir.Model`. One idea per file."""

from qgraph.passes.annotate import Annotate
from qgraph.passes.bias_form import BiasForm
from qgraph.passes.block_bias import BlockBias
from qgraph.passes.bound_masks import BoundMasks
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.calibrate_weights import CalibrateWeights
from qgraph.passes.cancel_swaps import CancelSwaps
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.center import Center
from qgraph.passes.clip_codes import ClipCodes
from qgraph.passes.correct_bias import CorrectBias
from qgraph.passes.divide_products import DivideProducts
from qgraph.passes.drop_casts import DropCasts
from qgraph.passes.drop_factors import DropFactors
from qgraph.passes.equalize import Equalize
from qgraph.passes.find_ternary import FindTernary
from qgraph.passes.fit_ranges import FitRanges
from qgraph.passes.fix_shapes import FixShapes
from qgraph.passes.fold_shapes import FoldShapes
from qgraph.passes.fold_weights import FoldWeights
from qgraph.passes.fuse_attention import FuseAttention
from qgraph.passes.fuse_layers import FuseLayers
from qgraph.passes.fuse_rotary import FuseRotary
from qgraph.passes.fuse_transpose import FuseTranspose
from qgraph.passes.group_heads import GroupHeads
from qgraph.passes.infer_types import InferTypes
from qgraph.passes.insert_blocks import InsertBlocks
from qgraph.passes.insert_dynamic import InsertDynamic
from qgraph.passes.insert_dynamic_lstm import InsertDynamicLSTM
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.insert_rows import InsertRows
from qgraph.passes.insert_stored import InsertStored
from qgraph.passes.join_bias import JoinBias
from qgraph.passes.join_products import JoinProducts
from qgraph.passes.lift_heads import LiftHeads
from qgraph.passes.mask_rows import MaskRows
from qgraph.passes.mean_sums import MeanSums
from qgraph.passes.measure_shapes import MeasureShapes
from qgraph.passes.nan_guard import NanGuard
from qgraph.passes.narrow_weights import NarrowWeights
from qgraph.passes.pack_ternary import PackTernary
from qgraph.passes.plain_einsum import PlainEinsum
from qgraph.passes.plain_heads import PlainHeads
from qgraph.passes.plain_reciprocal import PlainReciprocal
from qgraph.passes.plain_transpose import PlainTranspose
from qgraph.passes.portable import Portable
from qgraph.passes.quantize_cache import QuantizeCache
from qgraph.passes.raise_level import RaiseLevel
from qgraph.passes.recognize import Recognize
from qgraph.passes.recognize_norm import RecognizeNorm
from qgraph.passes.residual_norm import ResidualNorm
from qgraph.passes.round_blocks import RoundBlocks
from qgraph.passes.round_weights import RoundWeights
from qgraph.passes.set_aside import SetAside
from qgraph.passes.shrink_weights import ShrinkWeights
from qgraph.passes.smooth import Smooth
from qgraph.passes.split_experts import SplitExperts
from qgraph.passes.store_blocks import StoreBlocks
from qgraph.passes.survey import Survey
from qgraph.passes.survey_cache import SurveyCache
from qgraph.passes.tie_head import TieHead
from qgraph.passes.to_float import ToFloat
from qgraph.passes.to_half import ToHalf
from qgraph.passes.unpack_weights import UnpackWeights

__all__ = [
    "Annotate",
    "BiasForm",
    "BlockBias",
    "BoundMasks",
    "Calibrate",
    "CalibrateWeights",
    "CancelSwaps",
    "Canonicalize",
    "Center",
    "ClipCodes",
    "CorrectBias",
    "DivideProducts",
    "DropCasts",
    "DropFactors",
    "Equalize",
    "FindTernary",
    "FitRanges",
    "FixShapes",
    "FoldShapes",
    "FoldWeights",
    "FuseAttention",
    "FuseLayers",
    "FuseRotary",
    "FuseTranspose",
    "GroupHeads",
    "InferTypes",
    "InsertBlocks",
    "InsertDynamic",
    "InsertDynamicLSTM",
    "InsertObservers",
    "InsertQDQ",
    "InsertRows",
    "InsertStored",
    "JoinBias",
    "JoinProducts",
    "LiftHeads",
    "MaskRows",
    "MeanSums",
    "MeasureShapes",
    "NanGuard",
    "NarrowWeights",
    "PackTernary",
    "PlainEinsum",
    "PlainHeads",
    "PlainReciprocal",
    "PlainTranspose",
    "Portable",
    "QuantizeCache",
    "RaiseLevel",
    "Recognize",
    "RecognizeNorm",
    "ResidualNorm",
    "RoundBlocks",
    "RoundWeights",
    "SetAside",
    "ShrinkWeights",
    "Smooth",
    "SplitExperts",
    "StoreBlocks",
    "Survey",
    "SurveyCache",
    "TieHead",
    "ToFloat",
    "ToHalf",
    "UnpackWeights",
]
