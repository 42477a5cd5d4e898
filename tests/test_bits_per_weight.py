"""--bits-per-weight, end to end: the file keeps the size, and the bits go where they are needed."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import qgraph
from qgraph.cli import main
from qgraph.errors import OptionError

SETTINGS = {"bench_seconds": 0.0, "block_size": 32}


@pytest.fixture
def layers(model_kit):
    """Three products in a row; heavy tails in the second make it lose most at few bits."""
    second = model_kit.normal(128, 128) / 12
    second[:, ::7] *= np.exp(2 * model_kit.normal(128, 19))
    return model_kit.text(
        "g (float[n, 128] x) => (float[n, 16] y) { a = MatMul (x, A) r = Relu (a) b = MatMul (r, B) s = Relu (b) "
        "y = MatMul (s, C) }",
        A=model_kit.normal(128, 128) / 12,
        B=second.astype(np.float32),
        C=model_kit.normal(128, 16) / 12,
    )


def bits_of(model):
    """Stored bits of all products per weight, from the file's own constants."""
    stored = weights = 0
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            stored += sum(v.const_value.nbytes for v in node.inputs[1:4] if v is not None) * 8
            weights += node.attributes.get_int("K") * node.attributes.get_int("N")
    return stored / weights


def data(model_kit, count=16):
    return [{"x": model_kit.normal(4, 128, seed=i)} for i in range(count)]


@pytest.mark.parametrize("bits", [4.0, 6.2, 7.0])
def test_the_size_is_kept_and_used(layers, model_kit, bits):
    result = qgraph.optimize(layers, data=data(model_kit), bits_per_weight=bits, **SETTINGS)
    assert [n.op_type for n in result.model.graph].count("MatMulNBits") == 3
    assert bits_of(result.model) <= bits + 1e-6
    kinds = {n.attributes.get_int("bits") for n in result.model.graph if n.op_type == "MatMulNBits"}
    assert len(kinds) > 1, "a mixture comes nearer to the size than one kind"


def test_no_other_mixture_of_the_size_is_much_better(layers, model_kit):
    samples = data(model_kit)
    found = qgraph.optimize(layers, data=samples, bits_per_weight=4.6, **SETTINGS)
    chosen = found.report.fidelity.worst.sqnr
    best = -np.inf
    names = [node.name for node in found.report.nodes if node.scheme]
    for schemes in itertools.product(["int2", "int4", "int8-weights"], repeat=3):
        one = qgraph.optimize(
            layers,
            data=samples,
            bits_per_weight=20.0,
            choices=dict(zip(names, schemes, strict=True)),
            **SETTINGS,
        )
        if bits_of(one.model) <= 4.6:
            best = max(best, one.report.fidelity.worst.sqnr)
    assert chosen > best - 3, (chosen, best)


def test_more_bits_lose_less(layers, model_kit):
    samples = data(model_kit)
    sqnr = [
        qgraph.optimize(layers, data=samples, bits_per_weight=bits, **SETTINGS).report.fidelity.worst.sqnr
        for bits in (3.4, 5.2, 9.1)
    ]
    assert sqnr == sorted(sqnr)
    assert sqnr[-1] > sqnr[0] + 10


def test_without_data_too(layers):
    result = qgraph.optimize(layers, bits_per_weight=4.5, **SETTINGS)
    assert bits_of(result.model) <= 4.5


def test_what_cannot_be_is_said(layers, tmp_path):
    with pytest.raises(OptionError, match="fewest bits"):
        qgraph.optimize(layers, bits_per_weight=1.0, **SETTINGS)
    with pytest.raises(OptionError, match="chooses the schemes itself"):
        qgraph.optimize(layers, bits_per_weight=4.0, scheme="int4", **SETTINGS)
    with pytest.raises(OptionError, match="positive"):
        qgraph.optimize(layers, bits_per_weight=-1.0, **SETTINGS)
    ir.save(layers, tmp_path / "m.onnx")
    told = CliRunner().invoke(
        main, ["optimize", str(tmp_path / "m.onnx"), str(tmp_path / "o.onnx"), "--bits-per-weight", "1"]
    )
    assert told.exit_code == 1 and "fewest bits" in told.output and not (tmp_path / "o.onnx").exists()
