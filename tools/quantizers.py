"""Quantize a model with one tool, in this process: run by `comparison.py`, in whatever environment the tool needs.

    python tools/quantizers.py METHOD MODEL FEEDS OUTPUT COST

METHOD is `TOOL` or `TOOL-VARIANT`, FEEDS a folder of .npz files, one for each calibration run, and COST a file for
{"seconds": ..., "peak": bytes}. Only numpy and the tool itself are imported, since qgraph need not be installed
beside it.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["QUANTIZERS"]

Feeds = dict[str, Any]


class Runs:
    """The calibration runs, read one at a time; also what onnxruntime's kin takes as a CalibrationDataReader."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("*.npz"))
        self._left = iter(self)

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Feeds]:
        for path in self._paths:
            with np.load(path) as stored:
                # Written with a prefix, since an input may be called like a parameter of `savez`.
                yield {name[1:]: array for name, array in stored.items()}

    def get_next(self) -> Feeds | None:
        """The next run's feeds; None after the last."""
        return next(self._left, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runs:
        """From the beginning; a generator cannot be copied."""
        return type(self)(self._paths[0].parent)

    def rewind(self) -> None:
        """Begin again."""
        self._left = iter(self)


def reader(base: Any, runs: Runs) -> Any:
    """`runs` as an instance of a tool's own abstract reader."""
    return type("Reader", (Runs, base), {})(runs._paths[0].parent)


def qgraph(variant: str, model: Path, runs: Runs, output: Path) -> None:
    """The default command, or with the observer or scheme that `variant` names; it times and may refuse its result.

    A number behind a scheme is the size of its blocks: `int4-32`.
    """
    import qgraph
    from qgraph.observers import OBSERVERS

    chosen: dict[str, Any] = {}
    name, _, size = variant.rpartition("-")
    if name and size.isdigit():
        variant, chosen = name, {"block_size": int(size), "force": True}
    if variant:
        chosen["observer" if variant in OBSERVERS else "scheme"] = variant
    qgraph.optimize(model, output, data=list(runs), options=qgraph.Options(**chosen))


def ort(variant: str, model: Path, runs: Runs, output: Path) -> None:
    """onnxruntime: `default`, `u8s8` (per-channel), `u8s8-tensor`, `u8s8-matmul`, `percentile`, `dynamic`.

    And weights in 4 bits in blocks of 32, 64 or 128, to nearest: `int4-32`.
    """
    if variant.partition("-")[0] == "int4":
        _ort_blocks(*variant.split("-"), model=model, runs=runs, output=output)
        return
    from onnxruntime import quantization as ortq
    from onnxruntime.quantization.shape_inference import quant_pre_process

    u8s8 = {"activation_type": ortq.QuantType.QUInt8, "weight_type": ortq.QuantType.QInt8, "per_channel": True}
    static: dict[str, dict[str, Any]] = {
        "default": {},
        "u8s8": u8s8,
        "u8s8-tensor": {**u8s8, "per_channel": False},
        "u8s8-matmul": {**u8s8, "op_types_to_quantize": ["MatMul", "Gemm"]},
        "percentile": {**u8s8, "calibrate_method": ortq.CalibrationMethod.Percentile},
    }
    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        quant_pre_process(str(model), prepared, skip_symbolic_shape=True)
        if variant == "dynamic":
            ortq.quantize_dynamic(prepared, str(output), per_channel=True, weight_type=ortq.QuantType.QInt8)
        else:
            ortq.quantize_static(prepared, str(output), reader(ortq.CalibrationDataReader, runs), **static[variant])


def _ort_blocks(algorithm: str, size: str, *, model: Path, runs: Runs, output: Path) -> None:
    """onnxruntime's tool for weights in blocks, at the accuracy level that has fast kernels."""
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization import matmul_nbits_quantizer as blocks

    configs: dict[str, Any] = {
        "int4": lambda: blocks.DefaultWeightOnlyQuantConfig(int(size), accuracy_level=4),
        "hqq": lambda: blocks.HQQWeightOnlyQuantConfig(int(size)),
        "gptq": lambda: blocks.GPTQWeightOnlyQuantConfig(
            calibration_data_reader=reader(CalibrationDataReader, runs), block_size=int(size)
        ),
    }
    made = blocks.MatMulNBitsQuantizer(
        str(model), block_size=int(size), accuracy_level=4, algo_config=configs[algorithm]()
    )
    made.process()
    made.model.save_model_to_file(str(output), use_external_data_format=False)


def hqq(variant: str, model: Path, runs: Runs, output: Path) -> None:
    """onnxruntime's HQQ, in an environment that has torch; `variant` is the size of blocks."""
    _ort_blocks("hqq", variant, model=model, runs=runs, output=output)


def gptq(variant: str, model: Path, runs: Runs, output: Path) -> None:
    """onnxruntime's GPTQ, which needs torch, too; `variant` is the size of blocks."""
    _ort_blocks("gptq", variant, model=model, runs=runs, output=output)


def nncf(variant: str, model: Path, runs: Runs, output: Path) -> None:
    """NNCF: its defaults, or `transformer` for the model type of that name."""
    import nncf
    import onnx

    model_type = {"": None, "transformer": nncf.ModelType.TRANSFORMER}[variant]
    done = nncf.quantize(onnx.load(model), nncf.Dataset(list(runs)), subset_size=len(runs), model_type=model_type)
    onnx.save(done, output)


def inc(variant: str, model: Path, runs: Runs, output: Path) -> None:
    """onnx-neural-compressor, per-channel u8s8: `static`; `smooth`, SmoothQuant before it; `...-matmul` only those."""
    from onnx_neural_compressor import data_reader, quantization
    from onnx_neural_compressor.quantization import config

    kind, _, only = variant.partition("-")
    chosen = config.StaticQuantConfig(
        calibration_data_reader=reader(data_reader.CalibrationDataReader, runs),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"] if only else None,
        # Its SmoothQuantConfig would be taken for a plain static one.
        extra_options={"SmoothQuant": {"static": False, "smooth": True}[kind]},
        calibration_sampling_size=len(runs),
    )
    quantization.quantize(str(model), str(output), chosen)


def quark(variant: str, model: Path, runs: Runs, output: Path) -> None:
    """Quark, u8s8 with equalization: per-channel for CNNs; its preset for `transformer`s, that with `smooth`ing."""
    from onnxruntime.quantization import CalibrationDataReader
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    preset = {"": "CNN", "transformer": "TRANSFORMER", "smooth": "TRANSFORMER"}[variant]
    chosen = get_default_config(f"INT8_{preset}_DEFAULT")
    # Its transformer preset fails per-channel (0.13: AttributeError, quantize_weight_per_channel).
    chosen.per_channel = preset == "CNN"
    chosen.include_sq = variant == "smooth"
    quantizer = ModelQuantizer(Config(global_quant_config=chosen))
    quantizer.quantize_model(str(model), str(output), reader(CalibrationDataReader, runs))


QUANTIZERS: dict[str, Callable[[str, Path, Runs, Path], None]] = {
    "qgraph": qgraph, "ort": ort, "hqq": hqq, "gptq": gptq, "nncf": nncf, "inc": inc, "quark": quark,
}  # fmt: skip


def main(method: str, model: str, feeds: str, output: str, cost: str) -> None:
    """Quantize `model`, and write down what it took."""
    tool, _, variant = method.partition("-")
    start = time.perf_counter()
    QUANTIZERS[tool](variant, Path(model), Runs(Path(feeds)), Path(output))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(cost).write_text(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:6])
