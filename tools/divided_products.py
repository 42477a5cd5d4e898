"""One product whose result is taken apart, as queries, keys and values are, against a product for each part.

Each layer is an attention block of a vision transformer up to its scores: MatMul, Add, Reshape, Transpose, three times
Gather, one product of queries and keys, one with the values. Both forms are written by qgraph in the same scheme, and
timed in alternating blocks; gain is the joined form's time over the divided one's (median, then range over pairs).

    python tools/divided_products.py --rows 197 --width 384 --heads 6 --scheme int8
"""

from __future__ import annotations

import click
import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
from qgraph.passes import DivideProducts

from qgraph import registry
from qgraph.bench import alternate
from qgraph.compare import Runnable
from qgraph.data import inputs_of, load
from qgraph.errors import QGraphError
from qgraph.pipeline import Context


def block(rows: int, width: int, heads: int, layers: int) -> ir.Model:
    """`layers` blocks in a row, each adding to what it reads."""
    rng, size = np.random.default_rng(0), width // heads
    text, weights = [], {}
    for n in range(layers):
        text.append(
            f"""
            n{n} = LayerNormalization(x{n}, g, z)
            p{n} = MatMul(n{n}, w{n})
            a{n} = Add(p{n}, b)
            r{n} = Reshape(a{n}, apart)
            t{n} = Transpose<perm=[2,0,3,1,4]>(r{n})
            q{n} = Gather<axis=0>(t{n}, i0)
            k{n} = Gather<axis=0>(t{n}, i1)
            v{n} = Gather<axis=0>(t{n}, i2)
            kt{n} = Transpose<perm=[0,1,3,2]>(k{n})
            s{n} = MatMul(q{n}, kt{n})
            m{n} = MatMul(s{n}, v{n})
            h{n} = Transpose<perm=[0,2,1,3]>(m{n})
            o{n} = Reshape(h{n}, whole)
            x{n + 1} = Add(x{n}, o{n})
            """
        )
        weights[f"w{n}"] = rng.standard_normal((width, 3 * width)).astype(np.float32) / np.float32(width)
    weights |= {"g": np.ones(width, np.float32), "z": np.zeros(width, np.float32), "b": np.zeros(3 * width, np.float32)}
    weights |= {f"i{n}": np.array(n, np.int64) for n in range(3)}
    weights |= {"apart": np.array([0, 0, 3, heads, size]), "whole": np.array([0, 0, width])}
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        f"g (float[1,{rows},{width}] x0) => (float[1,{rows},{width}] x{layers}) {{ {''.join(text)} }}"
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(proto)


def written(model: ir.Model, context: Context, divided: bool) -> ir.Model:
    """The model in the context's scheme, with the pass or without it."""
    pipeline = registry.pipeline(context.scheme.pipeline)(context)
    made = model.clone()
    for one in pipeline.passes:
        if divided or not isinstance(one, DivideProducts):
            made = one(made).model
    return made


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", type=click.IntRange(1), default=197, show_default=True, help="Tokens.")
@click.option("--width", type=click.IntRange(1), default=384, show_default=True, help="Features.")
@click.option("--heads", type=click.IntRange(1), default=6, show_default=True, help="Of the attention.")
@click.option("--layers", type=click.IntRange(1), default=8, show_default=True, help="Blocks in a row.")
@click.option("--scheme", "schemes", multiple=True, default=["int8", "int8-dynamic"], show_default=True)
@click.option("--threads", type=click.IntRange(1), multiple=True, default=[1, 2], show_default=True)
@click.option("--seconds", type=float, default=8.0, show_default=True, help="For each line.")
def main(
    rows: int, width: int, heads: int, layers: int, schemes: list[str], threads: list[int], seconds: float
) -> None:
    """Time both forms."""
    try:
        model = block(rows, width, heads, layers)
        rng = np.random.default_rng(1)
        feeds = [{"x0": rng.standard_normal((1, rows, width)).astype(np.float32)} for _ in range(8)]
        target = registry.target("cpu")
        for scheme in schemes:
            context = Context(target, target.scheme(scheme), load(feeds, inputs_of(model)))
            joined, parted = (Runnable(written(model, context, divided)) for divided in (False, True))
            for count in threads:
                speed = alternate(joined, parted, feeds[0], target.options(), count, seconds)
                click.echo(
                    f"{scheme}, {rows} x {width}, {count} thread(s): {speed.ratio:.3f} "
                    f"({speed.ratio_low:.3f} to {speed.ratio_high:.3f}), {1e3 * speed.after.median:.2f} ms"
                )
    except QGraphError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
