"""Parts of a constant are constants; what would make the model larger stays."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qgraph.passes import FuseTranspose, NarrowWeights, ToFloat, UnpackWeights

from qgraph import registry

HEAD = "g (float[n, 8] x) => (float[n, m] y, float[n, k] z)"


@pytest.mark.parametrize(
    "body, shapes",
    [
        ("p, q = Split <axis = 1, num_outputs = 2> (W) y = MatMul (x, p) z = MatMul (x, q)", [(8, 6), (8, 6)]),
        ("p, q = Split <axis = -1, num_outputs = 2> (O) y = MatMul (x, p) z = MatMul (x, q)", [(8, 4), (8, 3)]),
        ("p, q = Split <axis = 1> (W, L) y = MatMul (x, p) z = MatMul (x, q)", [(8, 4), (8, 8)]),
        ("p = Slice (W, S, E, A) q = Slice (W, E, M, A) y = MatMul (x, p) z = MatMul (x, q)", [(8, 4), (8, 8)]),
        ("p = Slice (W, S, M, A, T) q = Slice (W, O1, M, A, T) y = MatMul (x, p) z = MatMul (x, q)", [(8, 6)] * 2),
        ("p = Gather (V, I) q = Gather (V, N) y = MatMul (x, p) z = MatMul (x, q)", [(8, 5), (8, 5)]),
        (
            "v = Transpose (H) p, q = Split <axis = 1, num_outputs = 2> (v) y = MatMul (x, p) z = MatMul (x, q)",
            [(8, 6), (8, 6)],
        ),
        (
            "s, t = Split <num_outputs = 2> (H) p = Transpose (s) q = Transpose (t) y = MatMul (x, p) z = MatMul (x,q)",
            [(8, 6), (8, 6)],
        ),
    ],
)
def test_parts_are_constants(model_kit, body, shapes):
    """By all ways in which exporters take a weight apart, and with the numbers that the runtime reads."""
    numbers = {"L": [4, 8], "S": [0], "E": [4], "M": [1 << 62], "A": [-1], "T": [2], "O1": [1]}
    arrays = {
        "W": model_kit.normal(8, 12),
        "O": model_kit.normal(8, 7),
        "V": model_kit.normal(2, 8, 5),
        "H": model_kit.normal(12, 8),
        "I": np.array(0),
        "N": np.array(-1),
        **{name: np.array(one) for name, one in numbers.items()},
    }
    used = {name: array for name, array in arrays.items() if any(name in part for part in body.split())}
    model = model_kit.text(f"{HEAD} {{ {body} }}", **used)
    before = model.clone()
    assert UnpackWeights()(model).modified
    assert model_kit.ops(model) == ["MatMul", "MatMul"]
    assert [tuple(node.inputs[1].const_value.shape) for node in model.graph] == shapes
    assert not UnpackWeights()(model).modified
    model_kit.same(before, model)


def test_a_shape_is_one_too(model_kit):
    """Where it is known: by itself, or since shapes were inferred."""
    model = model_kit.text(
        """g (float[n, 8] x) => (float[n, 6] y) <float[2, 8, 6] v>
        {
            v = Reshape (W, S) p = Gather (v, I) q = Gather (v, N)
            a = MatMul (x, p) b = MatMul (x, q) y = Add (a, b)
        }""",
        W=model_kit.normal(16, 6),
        S=np.array([2, 8, 6]),
        I=np.array(0),
        N=np.array(1),
    )
    before = model.clone()
    assert UnpackWeights()(model).modified
    assert model_kit.ops(model) == ["MatMul", "MatMul", "Add"]
    model_kit.same(before, model)


@pytest.mark.parametrize(
    "body",
    [
        "p, q = Split <axis = 1, num_outputs = 2> (W) y = MatMul (x, p) a = MatMul (x, q) z = MatMul (x, W)",
        "p = Slice (W, S, E, A) q = Slice (W, S, M, A) y = MatMul (x, p) z = MatMul (x, q)",
        "p = Gather (W, I) y = MatMul (x, p) z = MatMul (x, p)",
        "p = Slice (W, k, E, A) y = MatMul (x, p) z = MatMul (x, p)",
        "p = Slice (W, E, S, A, T) y = MatMul (x, p) z = MatMul (x, p)",
        "y, z = Split <axis = 1, num_outputs = 2> (W)",
    ],
)
def test_what_stays(model_kit, body):
    """A weight with another reader, parts that overlap, rows by a list, from an input on, backwards; outputs."""
    model = model_kit.text(
        f"g (float[n, 8] x, int64[1] k) => (float[n, m] y, float[n, j] z) {{ {body} }}",
        W=model_kit.normal(8, 12),
        S=np.array([0]),
        E=np.array([4]),
        M=np.array([12]),
        A=np.array([1]),
        T=np.array([-1]),
        I=np.array([[1, 2], [3, 4]]),
    )
    assert not UnpackWeights()(model).modified


def test_nothing_is_copied_before_it_is_read(model_kit, monkeypatch):
    """Models of many gigabytes are mapped; so are their parts."""
    model = model_kit.text(
        f"{HEAD} {{ p, q = Split <axis = 1, num_outputs = 2> (W) y = MatMul (x, p) z = MatMul (x, q) }}",
        W=model_kit.normal(8, 12),
    )
    read = []
    kind = type(model.graph.initializers["W"].const_value)
    numpy = kind.numpy
    monkeypatch.setattr(kind, "numpy", lambda tensor: read.append(tensor.name) or numpy(tensor))
    UnpackWeights()(model)
    assert "W" not in read
    assert model.graph[0].inputs[1].const_value.numpy().shape == (8, 6)
    assert "W" in read


def test_a_caller_may_choose_the_parts(model_kit):
    """A shape with a default is an input: what it says may change."""
    model = model_kit.text(
        "g (float[2, 4] x, int64[2] s) => (float[2, m] y) <float[4, 6] r> { r = Reshape (W, s) y = MatMul (x, r) }",
        W=model_kit.normal(24),
        s=np.array([4, 6]),
    )
    assert not UnpackWeights()(model).modified


def test_weights_in_16_bits_are_stored_so(model_kit, tmp_path):
    """Each part is a view of what is stored, as the whole was."""
    weight = model_kit.normal(128, 64).astype(np.float16)
    model = model_kit.text(
        """g (float16[2, 128] x) => (float16[2, 32] y, float16[2, 32] z)
        { p, q = Split <axis = 1, num_outputs = 2> (W) y = MatMul (x, p) z = MatMul (x, q) }""",
        W=weight,
    )
    before = model.clone()
    for one in (ToFloat(False, registry.target("x86-vnni")), UnpackWeights(), NarrowWeights()):
        one(model)
    ir.save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 1.2 * weight.nbytes
    model_kit.same(before, model, tolerance=1e-2)


def test_strings_and_outputs_stay(model_kit):
    words = ir.tensor(np.array([[b"a", b"b"]], object))
    model = model_kit.text("g (float[2] x) => (string[2] y) { y = Reshape (W, s) }", s=np.array([2]))
    model.graph.register_initializer(ir.Value(name="W", const_value=words, type=ir.TensorType(ir.DataType.STRING)))
    assert not UnpackWeights()(model).modified


def test_a_constant_with_many_readers_is_judged_once(model_kit, monkeypatch):
    lines = " ".join(f"p{k} = Slice (W, S, E) y{k} = MatMul (x, p{k})" for k in range(50))
    outputs = ", ".join(f"float[2, 6] y{k}" for k in range(50))
    model = model_kit.text(
        f"g (float[2, 4] x) => ({outputs}, float[8, 6] z) {{ {lines} z = Relu (W) }}",
        W=model_kit.normal(8, 6),
        S=np.array([0]),
        E=np.array([4]),
    )
    judged = []
    real = UnpackWeights._unpack
    monkeypatch.setattr(UnpackWeights, "_unpack", staticmethod(lambda *given: judged.append(given) or real(*given)))
    assert not UnpackWeights()(model).modified
    assert len(judged) == 1


def test_layers_that_share_a_weight_share_its_parts(model_kit):
    """As two layers of one torch module do; taken together the parts would be larger than the weight."""
    model = model_kit.text(
        """g (float[n, 8] x) => (float[n, 8] y)
        {
            p, q = Split <axis = 1, num_outputs = 2> (W) r = Slice (W, S, E, A) a = MatMul (x, p) b = MatMul (a, q)
            y = MatMul (b, r)
        }""",
        W=model_kit.normal(8, 16),
        S=np.array([0]),
        E=np.array([8]),
        A=np.array([1]),
    )
    before = model.clone()
    assert UnpackWeights()(model).modified
    first, second, third = (node.inputs[1] for node in model.graph)
    assert first is third and first is not second
    model_kit.same(before, model)


def test_a_turned_weight_that_nothing_else_reads_is_plain(model_kit):
    """So that it has integer kernels, which read no weight transposed; a table that is looked up, too, is shared."""
    own = model_kit.text(
        "g (float[n, 8] x) => (float[n, 20] y) { t = Transpose (T) y = MatMul (x, t) }", T=model_kit.normal(20, 8)
    )
    tied = model_kit.text(
        """g (float[n, 8] x, int64[m] i) => (float[n, 20] y, float[m, 8] z)
        { t = Transpose (T) y = MatMul (x, t) z = Gather (T, i) }""",
        T=model_kit.normal(20, 8),
    )
    for model in (own, tied):
        UnpackWeights()(model)
        FuseTranspose(registry.target("x86-vnni"))(model)
    assert model_kit.ops(own) == ["MatMul"]
    assert sorted(model_kit.ops(tied)) == ["FusedMatMul", "Gather"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_slice_is_what_the_specification_says(data):
    """Any start, end and step that goes forward, from either end and beyond it."""
    from qgraph.passes.unpack_weights import _slice

    size = data.draw(st.integers(1, 6))
    start, end = data.draw(st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
    step = data.draw(st.integers(1, 4))
    constants = [
        ir.Value(name=name, const_value=ir.tensor(np.array([number], np.int64)))
        for name, number in (("s", start), ("e", end), ("a", 1), ("t", step))
    ]
    source = ir.Value(name="W")
    node = ir.Node("", "Slice", [source, *constants])
    graph = ir.Graph([source], node.outputs, nodes=[node], initializers=constants)
    array = np.arange(3 * size).reshape(3, size)
    part = _slice(graph[0], array.shape)
    low, high = (min(max(one + size if one < 0 else one, 0), size) for one in (start, end))
    expected = array[:, list(range(low, high, step))]
    assert part.read(array).tolist() == expected.tolist() and part.shape == expected.shape
