"""Proofs that need no more memory than one weight: the graph without its weights, and each product by itself."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph, weights
from qgraph.audit import Audit, Plan, compare
from qgraph.compare import decibels
from qgraph.errors import AuditError
from qgraph.report import Sensitivity
from qgraph.session import Session, SessionOptions
from qgraph.strips import Strips
from qgraph.targets import KERNEL, Form, Kernel, Target

__all__ = ["assumed", "audit_graph", "errors"]

_LARGE = 1 << 20
_ROWS = 4
_INPUT = "qgraph.part.input"
_WINDOW = 1 << 24
_LEAST = 1.0
"""dB behind which a product is not the one that it stands for: even two bits keep more than half of the power."""


def assumed(path: Path, plan: Plan, target: Target) -> Audit:
    """The plan, taken for what will be: nothing was looked at."""
    return Audit({name: operators[0] for name, operators in plan.operators.items()}, {}, {})


def audit_graph(path: Path, plan: Plan, target: Target) -> Audit:
    """Load the graph at `path` with its large constants as inputs, and compare the runtime's graph with the plan.

    Raises:
        ExecutionError: the runtime cannot load it.
    """
    model = ir.load(path)
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > _LARGE:
            value.const_value = None
            del model.graph.initializers[name]
            model.graph.inputs.append(value)
    with tempfile.TemporaryDirectory(prefix="qgraph-audit-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = dataclasses.replace(target.options(), optimized=optimized)
        Session(model, options, path.parent).close()
        return compare(ir.load(optimized), plan)


def errors(
    before: ir.Model,
    after: ir.Model,
    path: Path,
    options: SessionOptions,
    progress: Callable[[str, int, int], None],
) -> list[Sensitivity]:
    """The error of each product with quantized weights on random rows, worst first; of tables on random ids.

    Args:
        before: the model before it was quantized, its nodes of the same names.
        after: the result, its planned kernels in the meta.
        path: where the result has been written.
        options: session options.
        progress: called with (what is done, steps done, steps in all).

    Raises:
        AuditError: a product is not the one that it stands for.
        ExecutionError: one cannot be run.
    """
    floats = {node.name: node for node in before.graph if weights.is_product(node) or node.op_type == "Gather"}
    kernels: dict[str, Kernel] = {str(node.name): node.meta[KERNEL] for node in after.graph if KERNEL in node.meta}
    # A node may compute several, one beside the other.
    parts = {str(node.name): graph.planned_names(node) for node in after.graph if KERNEL in node.meta}
    written = [n for n in ir.load(path).graph if n.name in kernels and all(one in floats for one in parts[n.name])]
    found: list[Sensitivity] = []
    for number, node in enumerate(written):
        kernel = kernels[str(node.name)]
        if kernel.form is not Form.WEIGHTS or kernel.weight is None:
            continue
        progress("checking parts", number, len(written))
        twins = [floats[name] for name in parts[str(node.name)]]
        expected, result = _pair(twins, node, path.parent, options)
        signal, noise = (float(np.square(a, dtype=np.float64).sum()) for a in (expected, expected - result))
        level = decibels(signal, noise)
        if not level >= _LEAST:
            raise AuditError(f"{node.name}: as {node.op_type} it keeps {level:.1f} dB of what it computes in float.")
        saved = kernel.float_seconds - kernel.integer_seconds
        share = noise / signal if signal > 0 else 0.0
        found.append(Sensitivity(str(node.name), twins[0].op_type, kernel.scheme, share, False, saved))
    return sorted(found, key=lambda one: -one.noise)


def _pair(
    twins: list[ir.Node], node: ir.Node, folder: Path, options: SessionOptions
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(what the float nodes compute side by side, what the quantized one does)."""
    twin = twins[0]
    rng = np.random.default_rng(0)
    source: NDArray[Any]
    if twin.op_type == "Gather":
        strips = _strips(twin)
        source = rng.integers(0, strips.shape[0], _ROWS)
        expected = np.concatenate([strips.window(slice(i, i + 1)) for i in source])
    else:
        transposed = [bool(one.attributes.get_int("transB", 0)) for one in twins]
        source = rng.standard_normal((_ROWS, _strips(twin).shape[1 if transposed[0] else 0]), dtype=np.float32)
        pairs = zip(twins, transposed, strict=True)
        expected = np.concatenate([_product(source, _strips(one), turned) for one, turned in pairs], axis=1)
        # A bias may have been an Add of its own before.
        bias = node.inputs[5] if node.op_type == "MatMulNBits" and len(node.inputs) > 5 else None
        bias = bias or (twin.inputs[2] if len(twin.inputs) > 2 else None)
        if bias is not None and bias.const_value is not None:
            expected += np.asarray(bias.const_value.numpy(), np.float32).reshape(-1)
    alone = _alone(node)
    if alone.graph.inputs[0].dtype == ir.DataType.FLOAT16:
        source = source.astype(np.float16)
    with Session(alone, options, folder) as session:
        result = next(iter(session.run({_INPUT: source}).values()))
    return expected, result.reshape(expected.shape).astype(np.float32)


def _strips(node: ir.Node) -> Strips:
    """The weight of a product or table."""
    weight = node.inputs[0 if node.op_type == "Gather" else 1]
    assert weight is not None and weight.const_value is not None
    return Strips(weight.const_value)


def _product(rows: NDArray[np.float32], weight: Strips, transposed: bool) -> NDArray[np.float32]:
    """`rows` times a weight that is read in strips."""
    height, width = weight.shape
    step = max(1, _WINDOW // (4 * width))
    parts = (slice(start, min(start + step, height)) for start in range(0, height, step))
    if transposed:
        return np.concatenate([rows @ weight.window(part).T for part in parts], axis=1)
    total = np.zeros((len(rows), width), np.float32)
    for part in parts:
        total += rows[:, part] @ weight.window(part)
    return total


def _alone(node: ir.Node) -> ir.Model:
    """A model of what `node` computes from constants and one input, and of what makes it whole again."""
    nodes = _whole(node)
    inside = {id(one) for one in nodes}
    x: ir.Value | None = None
    known: dict[ir.Value, ir.Value] = {}
    made: list[ir.Node] = []
    constants: list[ir.Value] = []
    for one in nodes:
        inputs: list[ir.Value | None] = []
        for value in one.inputs:
            if value is not None and value not in known:
                maker = value.producer()
                assert maker is None or id(maker) not in inside
                known[value] = ir.Value(
                    name=value.name, type=value.type, shape=value.shape, const_value=value.const_value
                )
                if value.const_value is not None:
                    constants.append(known[value])
                else:
                    x = known[value]
            inputs.append(None if value is None else known[value])
        copy = ir.Node(one.domain, one.op_type, inputs, list(one.attributes.values()), name=one.name)
        copy.outputs[0].name = one.outputs[0].name
        known[one.outputs[0]] = copy.outputs[0]
        made.append(copy)
    assert x is not None
    table = node.op_type in ("Gather", "GatherBlockQuantized")
    x.name, x.const_value = _INPUT, None
    scales = node.inputs[2] if node.op_type == "MatMulNBits" else None
    kind = ir.DataType.FLOAT if scales is None or scales.dtype is None else scales.dtype
    x.type = ir.TensorType(ir.DataType.INT64 if table else kind)
    x.shape = ir.Shape([None] if table else [None, None])
    result = made[-1].outputs[0]
    result.type = ir.TensorType(kind)
    owner = node.graph
    imports = dict(owner.opset_imports) if owner is not None else {}
    whole = ir.Graph([x], [result], nodes=made, initializers=constants, opset_imports=imports, name="part")
    return ir.Model(whole, ir_version=10)


def _whole(node: ir.Node) -> list[ir.Node]:
    """`node` between what prepares its constants and what makes numbers of the codes that it picks."""
    before: list[ir.Node] = []
    for value in node.inputs:
        for maker in _makers(value) or ():
            if maker not in before:
                before.append(maker)
    if node.op_type != "Gather":
        return [*before, node]
    # Rows in int8: Mul(Cast(Gather(codes)), Gather(scales)).
    cast = next(iter(node.outputs[0].consumers()))
    product = next(iter(cast.outputs[0].consumers()))
    other = next(v.producer() for v in product.inputs if v is not None and v.producer() is not cast)
    assert other is not None
    return [*before, node, cast, other, product]


def _makers(value: ir.Value | None) -> list[ir.Node] | None:
    """The nodes that compute `value` from constants alone, in order; None where there is more to it."""
    if value is None or value.const_value is not None:
        return []
    maker = value.producer()
    if maker is None:
        return None
    found: list[ir.Node] = []
    for one in maker.inputs:
        before = _makers(one)
        if before is None:
            return None
        found += [node for node in before if node not in found]
    return [*found, maker]
