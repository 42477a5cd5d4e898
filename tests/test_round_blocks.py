"""RoundBlocks: weights in blocks whose products err less than with the nearest codes, on the runtime."""

import time

import numpy as np
import pytest
from qgraph.passes import pipelines
from qgraph.passes.insert_blocks import InsertBlocks
from qgraph.passes.insert_rows import InsertRows
from qgraph.passes.round_blocks import RoundBlocks

from qgraph.blocks import BLOCKS
from qgraph.data import Dataset, inputs_of, load
from qgraph.errors import DataError
from qgraph.pipeline import Context

WRITE = (InsertBlocks(), InsertRows())
CHAIN = """
g (float[n, 5, 64] x) => (float[n, 5, 64] y) {
    a = MatMul (x, A)
    b = Relu (a)
    c = MatMul (b, B)
    d = Add (c, x)
    e = MatMul (d, C)
    f = Relu (e)
    h = MatMul (f, D)
    y = Add (h, d)
}
"""


def related(count, seed=0):
    """Feeds whose channels go together."""
    rng = np.random.default_rng(seed)
    mixer = np.eye(64) + 0.7 * np.random.default_rng(99).standard_normal((64, 64)) / 4
    return [{"x": (rng.standard_normal((8, 5, 64)) @ mixer).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def chain(model_kit):
    weights = {name: model_kit.normal(64, 64, seed=ord(name), scale=0.15) for name in "ABCD"}
    return model_kit.text(CHAIN, **weights)


def planned(kit, model, feeds, scheme="int4", block=32):
    """Annotated; the data."""
    target = kit.free().in_blocks(block)
    data = load(feeds, inputs_of(model))
    pipelines.plan(Context(target, target.scheme(scheme), data))(model)
    return data


def quantized(kit, model, learn=True, scheme="int4", **options):
    model = model.clone()
    data = planned(kit, model, related(40), scheme)
    if learn:
        RoundBlocks(data, WRITE, **options)(model)
    for one in WRITE:
        one(model)
    assert kit.ops(model).count("MatMulNBits") == 4
    return model


@pytest.mark.parametrize(("scheme", "gain"), [("int4", 3.0), ("int2", 3.0)])
def test_each_step_takes_error_out_of_the_output(model_kit, chain, scheme, gain):
    """On other data than the codes were found on."""
    held = related(8, seed=1)
    found = [
        model_kit.sqnr(chain, quantized(model_kit, chain, scheme=scheme, **options), held)
        for options in ({"learn": False}, {"sweeps": 0, "correct": False}, {"correct": False}, {})
    ]
    assert found[1] > found[0] + 1.0
    assert found[2] > found[1]
    assert found[3] > found[2]
    assert found[3] > found[0] + gain


def test_gemm_with_transposed_weights_and_a_bias(model_kit):
    text = "g (float[n, 64] x) => (float[n, 48] y) { y = Gemm <transB = 1> (x, W, b) }"
    model = model_kit.text(text, W=model_kit.normal(48, 64), b=model_kit.normal(48))
    feeds = [{"x": feed["x"].reshape(-1, 64)} for feed in related(10)]
    found = []
    for learn in (False, True):
        copy = model.clone()
        data = planned(model_kit, copy, feeds)
        if learn:
            RoundBlocks(data, WRITE)(copy)
        for one in WRITE:
            one(copy)
        found.append(model_kit.sqnr(model, copy, feeds))
    assert found[1] > found[0] + 1.5


def test_what_was_found_is_used_again_without_a_run(model_kit, chain):
    store = {}
    first, second = chain.clone(), chain.clone()
    seen = []
    data = planned(model_kit, first, related(4))
    RoundBlocks(data, WRITE, store=store, progress=lambda *a: seen.append(a))(first)
    assert [done for _, done, _ in seen] == [0, 1, 2, 3]
    assert seen[-1][2] == 4
    assert "left" in seen[-1][0]
    planned(model_kit, second, related(4))

    def fail():
        raise DataError("read again")
        yield

    RoundBlocks(Dataset(fail, "nothing", inputs_of(second)), WRITE, store=store)(second)
    for one, other in zip(first.graph, second.graph, strict=True):
        assert one.meta.get(BLOCKS) is other.meta.get(BLOCKS)
    assert sum(BLOCKS in node.meta for node in second.graph) == 4


def test_the_same_data_gives_the_same_codes(model_kit, chain):
    found = []
    for _ in range(2):
        copy = chain.clone()
        RoundBlocks(planned(model_kit, copy, related(4)), WRITE)(copy)
        found.append([node.meta[BLOCKS].codes for node in copy.graph if BLOCKS in node.meta])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_a_weight_read_behind_two_values_has_one_set_of_codes(model_kit):
    text = "g (float[n, 5, 64] x) => (float[n, 5, 64] y) { a = MatMul (x, A) b = Relu (a) y = MatMul (b, A) }"
    model = model_kit.text(text, A=model_kit.normal(64, 64, scale=0.2))
    data = planned(model_kit, model, related(4))
    rounding = RoundBlocks(data, WRITE)
    rounding(model)
    first, last = (node for node in model.graph if node.op_type == "MatMul")
    assert first.meta[BLOCKS] is last.meta[BLOCKS]
    for one in WRITE:
        one(model)
    assert len([name for name in model.graph.initializers if name.endswith("_blocks")]) == 1


def test_a_moment_beyond_the_budget_is_a_reason(model_kit, chain):
    data = planned(model_kit, chain, related(2))
    rounding = RoundBlocks(data, WRITE, budget=8 * 64 * 64 - 1)
    rounding(chain)
    assert len(rounding.refused) == 4
    assert all("memory" in reason for reason in rounding.refused.values())
    assert not any(BLOCKS in node.meta for node in chain.graph)


def test_weights_alone_are_learned_by_default(model_kit, chain):
    """The pipeline does it when there is data, and folds scales that only help."""
    target = model_kit.free().in_blocks(32)
    data = load(related(8), inputs_of(chain))
    passes = str(pipelines.quantize(Context(target, target.scheme("int4"), data)))
    assert "Smooth -> " in passes
    assert "RoundBlocks -> " in passes
    assert "RoundBlocks" not in str(pipelines.quantize(Context(target, target.scheme("int4"), None)))
    assert "RoundBlocks" not in str(pipelines.quantize(Context(target, target.scheme("auto"), data)))


def test_outliers_fold_into_what_makes_them_and_the_model_stays_the_same(model_kit):
    """Factors chosen by the error of weights in blocks; in float nothing changes."""
    gain = np.ones(64, np.float32)
    gain[3], gain[40] = 60.0, 25.0
    text = (
        "g (float[n, 5, 64] x) => (float[n, 5, 48] y) "
        "{ a = LayerNormalization (x, G) b = MatMul (a, A) c = Relu (b) y = MatMul (c, B) }"
    )
    model = model_kit.text(
        text, G=gain, A=model_kit.normal(64, 64, scale=0.1) / np.sqrt(gain)[:, None], B=model_kit.normal(64, 48, seed=1)
    )
    target = model_kit.free().in_blocks(32)
    folded = model.clone()
    pipeline = pipelines.prepare(Context(target, target.scheme("int4"), load(related(8), inputs_of(model))))
    pipeline(folded)
    changes = next(one.changes for one in pipeline.passes if type(one).__name__ == "Smooth")
    assert changes
    assert all(one.after > one.before + 0.5 and not one.explicit for one in changes)
    assert model_kit.sqnr(model, folded, related(4)) > 120


def test_late_layers_are_rounded_to_nearest_and_told(chain, model_kit):
    """What a time limit cuts off is named, and has the codes that it would have had anyway."""
    model = chain.clone()
    data = planned(model_kit, model, related(40))
    late = RoundBlocks(data, WRITE, deadline=time.monotonic() - 1)
    late(model)
    assert len(late.refused) == 4 and all("time limit" in why for why in late.refused.values())
    for one in WRITE:
        one(model)
    feeds = related(4, seed=7)
    plain = quantized(model_kit, chain, learn=False)
    for feed in feeds:
        np.testing.assert_array_equal(model_kit.run(model, feed)["y"], model_kit.run(plain, feed)["y"])


ROUTED = """
g (float[n, 64] x) => (float[n, 64] y) {
    a = MatMul (x, A)
    s = ReduceSum <keepdims = 0> (a, last)
    p = Greater (s, zero)
    i = NonZero (p)
    j = Squeeze (i, first)
    b = Gather (a, j)
    c = MatMul (b, B)
    k = Unsqueeze (j, last)
    d = ScatterND (x, k, c)
    y = MatMul (d, C)
}
"""


def test_rows_that_a_router_picks(model_kit):
    """The quantized beginning picks others, and another number of them."""
    weights = {name: model_kit.normal(64, 64, seed=ord(name), scale=0.15) for name in "ABC"}
    constants = {"last": np.array([1]), "first": np.array([0]), "zero": np.float32(0)}
    model = model_kit.text(ROUTED, **weights, **constants)
    feeds = [{"x": feed["x"].reshape(-1, 64)} for feed in related(20)]
    held = [{"x": feed["x"].reshape(-1, 64)} for feed in related(6, seed=1)]
    found = []
    for learn in (False, True):
        copy = model.clone()
        data = planned(model_kit, copy, feeds, "int2")
        rounding = RoundBlocks(data, WRITE)
        if learn:
            rounding(copy)
            assert not rounding.refused
        for one in WRITE:
            one(copy)
        found.append(model_kit.sqnr(model, copy, held))
    assert found[1] > found[0]


@pytest.mark.parametrize("rows", [1, 8, 48])
def test_few_rows_do_little_harm(model_kit, rows):
    """Fewer than inputs, as an expert may see: others than those lose next to nothing by what was learned."""
    text = "g (float[n, 64] x) => (float[n, 48] y) { y = MatMul (x, W) }"
    model = model_kit.text(text, W=model_kit.normal(64, 48))
    all_rows = np.concatenate([feed["x"].reshape(-1, 64) for feed in related(30, seed=2)])
    found = []
    for learn in (False, True):
        copy = model.clone()
        data = planned(model_kit, copy, [{"x": all_rows[:rows]}])
        if learn:
            RoundBlocks(data, WRITE)(copy)
        for one in WRITE:
            one(copy)
        found.append(model_kit.sqnr(model, copy, [{"x": all_rows[rows:]}]))
    assert found[1] > found[0] - 0.1


TIED = """
g (int64[n, 6] i) => (float[n, 6, 300] y) {
    e = Gather (T, i)
    a = MatMul (e, A)
    b = Relu (a)
    h = MatMul (b, B)
    t = Transpose <perm = [1, 0]> (T)
    y = MatMul (h, t)
}
"""


def test_a_head_that_is_the_embedding_learns_its_codes(model_kit):
    """From what the head reads; the embedding picks the same codes, and the model errs less for it."""
    mixer = related(1)[0]["x"].reshape(-1, 64)[:40]
    model = model_kit.text(
        TIED,
        T=(model_kit.normal(300, 40) @ mixer).astype(np.float32) / 4,
        A=model_kit.normal(64, 96, scale=0.2),
        B=model_kit.normal(96, 64, seed=1, scale=0.2),
    )
    feeds = [{"i": np.random.default_rng(n).integers(0, 300, (8, 6))} for n in range(30)]
    target = model_kit.free().in_blocks(32)
    found = []
    for data in (None, load(feeds[:24], inputs_of(model))):
        copy = pipelines.quantize(Context(target, target.scheme("int4"), data, smoothing="none"))(model.clone()).model
        assert model_kit.ops(copy).count("GatherBlockQuantized") == 1
        head = [node for node in copy.graph if node.op_type == "MatMulNBits"][-1]
        picked = next(node for node in copy.graph if node.op_type == "GatherBlockQuantized")
        assert head.inputs[1] is picked.inputs[0]
        found.append((model_kit.sqnr(model, copy, feeds[24:]), head.inputs[1].const_value.numpy()))
    assert found[1][0] > found[0][0] + 1.5
    assert not np.array_equal(found[0][1], found[1][1])
