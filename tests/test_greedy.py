"""Greedy texts of decoders with a cache: an optimized one writes those of the original; how that is counted."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(scope="module")
def tools():
    """The scripts decoder, generate and with_cache as modules, under these names."""
    found = {}
    sys.path.insert(0, str(TOOLS))
    for name in ("decoder", "generate", "with_cache"):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    sys.path.remove(str(TOOLS))
    for name in found:
        del sys.modules[name]


# -- how it is counted --------------------------------------------------------------------------------------------

TEXTS = st.integers(1, 4).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=1, max_size=4)
)


@given(TEXTS)
def test_equal_texts_agree_to_the_end(tools, texts):
    found = tools["generate"].Agreement.of(texts, texts, texts)
    assert found.free == found.forced == 1.0 and set(found.first) == {None}


@given(TEXTS, st.data())
def test_what_follows_a_difference_does_not_count(tools, texts, data):
    """Of its own text; where it reads the original's, each token counts by itself."""
    other = [list(text) for text in texts]
    at = data.draw(st.integers(0, len(texts[0]) - 1))
    other[0][at] += 4
    found = tools["generate"].Agreement.of(texts, other, other)
    size = len(texts) * len(texts[0])
    assert found.first == (at, *[None] * (len(texts) - 1))
    assert found.free == pytest.approx((size - len(texts[0]) + at) / size)
    assert found.forced == pytest.approx((size - 1) / size)


# -- on the runtime -----------------------------------------------------------------------------------------------


WORDS = 24


@pytest.fixture(scope="module")
def written(tools, tmp_path_factory):
    """Files of decoders: in both styles such that have learned which word follows which, and one that knows nothing."""
    shape = tools["decoder"].Decoder(2, 64, 4, 2, 160, WORDS, positions=64)
    folder, paths = tmp_path_factory.mktemp("greedy"), {}
    rng = np.random.default_rng(0)
    words, after = 3 * rng.standard_normal((WORDS, 64), np.float32), rng.permutation(WORDS)
    for name, style in (("plain", "plain"), ("fused", "fused"), ("vague", "plain")):
        model = tools["decoder"].build(shape, style, seed=5)
        if name != "vague":
            for key, array in (("model.embed_tokens.weight", words), ("lm_head.weight", words[after].T.copy())):
                model.graph.initializers[key].const_value = ir.Tensor(array, name=key)
        paths[name] = folder / f"{name}.onnx"
        ir.save(model, paths[name])
    return paths, [rng.integers(0, WORDS, (1, 6)) for _ in range(6)]


@pytest.mark.usefixtures("model_free_cpu")
@pytest.mark.parametrize(
    ("style", "options"),
    [("plain", {}), ("fused", {}), ("fused", {"kv_cache": "int8"})],
    ids=["plain", "fused", "fused, codes in the cache"],
)
def test_int8_weights_write_the_same_text(tools, written, tmp_path, style, options):
    """Token by token through the cache, each reading what it wrote."""
    paths, prompts = written
    data = [{"input_ids": prompt} for prompt in prompts] * 2
    out = tmp_path / "out.onnx"
    report = qgraph.optimize(
        paths[style], out, scheme="int8-weights", block_size=32, data=data, bench_seconds=0, force=True, **options
    ).report
    assert report.quantized
    generate = tools["generate"]
    found = generate.agreement(generate.Generator(paths[style]), generate.Generator(out), prompts, 12)
    assert found.free == found.forced == 1.0, found
    texts = generate.texts(generate.Generator(paths[style]), prompts, 12)
    assert len({tuple(text) for text in texts}) > 3 and len(set(texts[0])) > 2, "it says more than one thing"


@pytest.mark.usefixtures("model_free_cpu")
def test_two_bits_write_another_text(tools, written, tmp_path):
    """What the count above would not overlook."""
    paths, prompts = written
    out = tmp_path / "out.onnx"
    qgraph.optimize(paths["vague"], out, scheme="int2", block_size=32, bench_seconds=0, force=True)
    generate = tools["generate"]
    found = generate.agreement(generate.Generator(paths["vague"]), generate.Generator(out), prompts, 12)
    assert found.free < 1.0 and found.forced < 1.0 and any(at is not None for at in found.first)


# -- a trained model gets a cache -------------------------------------------------------------------------------------

LAYER = """
    p{i} = Mul ({x}, {x})
    m{i} = ReduceMean <keepdims = 1> (p{i}, last)
    e{i} = Add (m{i}, epsilon)
    s{i} = Sqrt (e{i})
    d{i} = Div ({x}, s{i})
    n{i} = Mul (d{i}, {gain})
"""
HEADS = """
    {h}0 = MatMul (n0, {weight})
    {h}1 = Reshape ({h}0, heads)
    {h}2 = Transpose <perm = [0, 2, 1, 3]> ({h}1)
"""
ROTATED = """
    {h}low, {h}high = Split <axis = 3, num_outputs = 2> ({h}2)
    {h}minus = Neg ({h}high)
    {h}turned = Concat <axis = 3> ({h}minus, {h}low)
    {h}a = Mul ({h}2, cosine)
    {h}b = Mul ({h}turned, sine)
    {h}3 = Add ({h}a, {h}b)
"""
LENGTH = 12


def trained(kit, tools, width=32, hidden=24, vocabulary=20):
    """A model as train_language_model.py has them, in small: one layer, no cache, a fixed length; and its sizes."""
    head = 2
    size = width // head
    angles = np.tile(np.outer(np.arange(LENGTH), 10000.0 ** (-np.arange(0, size, 2) / size)), 2)
    text = (
        f"g (int64[b, {LENGTH}] input_ids) => (float[b, {LENGTH}, {vocabulary}] logits) {{"
        " x = Gather (table, input_ids)"
        + LAYER.format(i=0, x="x", gain="gain0")
        + "".join(HEADS.format(h=h, weight=h.upper()) for h in "qkv")
        + "".join(ROTATED.format(h=h) for h in "qk")
        + """
    kt = Transpose <perm = [0, 1, 3, 2]> (k3)
    score = MatMul (q3, kt)
    scaled = Mul (score, scale)
    masked = Add (scaled, mask)
    share = Softmax (masked)
    mixed = MatMul (share, v2)
    back = Transpose <perm = [0, 2, 1, 3]> (mixed)
    flat = Reshape (back, whole)
    o = MatMul (flat, O)
    y = Add (x, o)"""
        + LAYER.format(i=1, x="y", gain="gain1")
        + """
    g = MatMul (n1, G)
    u = MatMul (n1, U)
    sg = Sigmoid (g)
    silu = Mul (g, sg)
    both = Mul (silu, u)
    w = MatMul (both, D)
    z = Add (y, w)"""
        + LAYER.format(i=2, x="z", gain="gain2")
        + " logits = MatMul (n2, H) }"
    )
    mask = np.triu(np.full((LENGTH, LENGTH), -1e9, np.float32), 1)
    sizes = {
        **dict.fromkeys("QKVO", (width, width)),
        **dict.fromkeys("GU", (width, hidden)),
        "D": (hidden, width),
        "H": (width, vocabulary),
        "table": (vocabulary, width),
    }
    drawn = {name: kit.normal(*shape, seed=i, scale=shape[0] ** -0.5) for i, (name, shape) in enumerate(sizes.items())}
    gains = {f"gain{i}": 1 + 0.1 * kit.normal(width, seed=20 + i) for i in range(3)}
    model = kit.text(
        text, cosine=np.cos(angles).astype(np.float32), sine=np.sin(angles).astype(np.float32), mask=mask,
        last=np.array([-1]), epsilon=np.float32(1e-5), scale=np.float32(size**-0.5), heads=np.array([0, 0, head, size]),
        whole=np.array([0, 0, width]), **drawn, **gains,
    )  # fmt: skip
    new = {"gain0": "layers.0.attention_norm.gain", "gain1": "layers.0.hidden_norm.gain", "gain2": "norm.gain",
           "table": "embedding.weight"}  # fmt: skip
    for old, name in new.items():
        value = model.graph.initializers.pop(old)
        value.name = value.const_value.name = name
        model.graph.register_initializer(value)
    shape = tools["decoder"].Decoder(1, width, head, head, hidden, vocabulary, epsilon=1e-5, positions=LENGTH)
    return model, shape


@pytest.mark.parametrize("style", ["plain", "fused"])
def test_a_cache_changes_no_number(tools, model_kit, tmp_path, style):
    """The whole text at once, or token by token, as the model without a cache has it."""
    model, shape = trained(model_kit, tools)
    ir.save(model, tmp_path / "model.onnx")
    made = tools["with_cache"].converted(model, style, shape)
    ir.save(made, tmp_path / "decoder.onnx")
    tokens = np.random.default_rng(0).integers(0, 20, (3, LENGTH))
    difference = tools["with_cache"].difference
    assert difference(tmp_path / "model.onnx", tmp_path / "decoder.onnx", tokens) < 1e-5
    # Other weights are seen.
    value = made.graph.initializers["model.layers.0.self_attn.k_proj.weight"]
    value.const_value = ir.Tensor(value.const_value.numpy() * 1.1, name=value.name)
    ir.save(made, tmp_path / "other.onnx")
    assert difference(tmp_path / "model.onnx", tmp_path / "other.onnx", tokens) > 1e-3


def test_other_models_are_refused(tools, model_kit):
    model, _ = trained(model_kit, tools)
    with pytest.raises(click.ClickException, match="8 products with weights, and 29 are known"):
        tools["with_cache"].converted(model)
    model, shape = trained(model_kit, tools, hidden=28)
    with pytest.raises(click.ClickException, match=r"gate_proj\.weight has another shape"):
        tools["with_cache"].converted(model, "plain", dataclasses.replace(shape, hidden=24))
