"""Nodes of one role share what becomes of their errors; measured ones tell of the others."""

import numpy as np
import pytest

from qgraph.roles import role

BLOCK = """n{i} = LayerNormalization (x{i}, gain, gain)
    q{i} = MatMul (n{i}, w)  qb{i} = Add (q{i}, row)  qr{i} = Reshape (qb{i}, heads)
    k{i} = MatMul (n{i}, w)  kr{i} = Reshape (k{i}, turned)
    s{i} = MatMul (qr{i}, kr{i})  p{i} = Softmax (s{i})
    u{i} = MatMul (n{i}, up)  a{i} = Relu (u{i})  d{i} = MatMul (a{i}, down)  db{i} = Add (d{i}, row)
    x{j} = Sum (x{i}, db{i})"""


def network(kit, blocks):
    body = "  ".join(BLOCK.format(i=i, j=i + 1) for i in range(blocks))
    scores = ", ".join(f"float[A, B, C] p{i}" for i in range(blocks))
    model = kit.text(
        f"g (float[N, S, 4] x0) => (float[N, S, 4] x{blocks}, {scores}) {{ {body} }}",
        w=np.eye(4, dtype=np.float32), up=np.ones((4, 8), np.float32), down=np.ones((8, 4), np.float32),
        gain=np.ones(4, np.float32), row=np.ones(4, np.float32),
        heads=np.array([0, -1, 4]), turned=np.array([0, 4, -1]),
    )  # fmt: skip
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def test_nodes_of_repeated_blocks_have_one_role(model_kit):
    roles = {node.name: role(node) for node in network(model_kit, 3).graph}
    for kind in "qkud":
        assert len({roles[f"{kind}{i}"] for i in range(3)}) == 1, kind
    assert len({roles[f"{kind}0"] for kind in "qkud"}) == 4, "each side of the scores is a role of its own"


def test_a_measurement_tells_of_all_nodes_of_its_role(model_kit, lab):
    """One scale for all would leave nodes of one role thousands of times too loud beside those of the other."""
    model = network(model_kit, 6)
    names = [f"{kind}{i}" for i in range(6) for kind in "qd"]
    saved = {(name, "int8"): 1.0 for name in names}
    guessed = {pair: 1e-3 * (1 + i / 100) for i, pair in enumerate(saved)}
    noise = {pair: guessed[pair] * (10 if pair[0].startswith("d") else 0.01) for pair in saved}
    search, builder, judge = lab.searched(saved, noise, 1.0, estimates=guessed, run=False)
    builder.prepared = model
    assert search.noises.measure(2, lambda: False) and len(judge.seen) == 2
    for pair, value in search.noises.values().items():
        assert value == pytest.approx(noise[pair]), pair


def test_only_what_is_chosen_is_measured(lab):
    saved = {(node, scheme): 1.0 for node in "ab" for scheme in ("int8", "int4")}
    noise = {pair: 1e-2 if pair[1] == "int4" else 1e-3 for pair in saved}
    search, _, _ = lab.searched(saved, noise, 1.0, run=False)
    search.noises.measure(4, lambda: False, {"a": "int8", "b": "int8"})
    assert set(search.trials.noises) == {("a", "int8"), ("b", "int8")}


def test_each_way_to_scale_channels_has_noises_of_its_own(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3)])
    search, builder, judge = lab.searched(saved, noise, 1.0, run=False)
    builder.variants = ("none", "explicit")
    search.noises.measure(1, lambda: False)
    builder.variant, judge.noise = "explicit", {("n0", "int8"): 1e-5}
    search.noises.measure(1, lambda: False)
    assert search.noises.values() == {("n0", "int8"): pytest.approx(1e-5)}
    builder.variant = "none"
    assert search.noises.values() == {("n0", "int8"): pytest.approx(1e-3)}
