"""The house's order: imports only go down, no circles, the core knows no pass, passes know no other pass."""

import ast
from pathlib import Path

import networkx as nx
import pytest

from qgraph import registry

ROOT = Path(__file__).parent.parent

# From the roof down; modules of one floor may import each other, without circles.
FLOORS = [
    {"cli", "cli_deploy", "cli_profile", "profile_view", "terminal", "html", "interrupted"},
    {"deploy"},
    {"passes"},
    {"compiler", "inspection", "ranking", "unproved"},
    {"job"},
    {"search", "details", "noises", "race", "unwritten"},
    {"builder", "built", "originals", "outcome"},
    {"registry"},
    {"pipeline", "options"},
    {
        "clock",
        "judge",
        "sensitivity",
        "islands",
        "rebalance",
        "balance",
        "readers",
        "apart",
        "division",
        "unfit",
        "mixing",
        "few_bits",
        "bracket",
        "learning",
        "instead",
        "pricing",
        "part_checks",
        "elsewhere",
    },
    {"proof"},
    {
        "audit",
        "overflow",
        "bench",
        "compare",
        "tally",
        "oddities",
        "footprint",
        "metrics",
        "caches",
        "checks",
        "work",
        "profiling",
        "naming",
    },
    {
        "runners",
        "profiles",
        "calibration",
        "modelio",
        "external",
        "staged",
        "session",
        "brain_floats",
        "data",
        "datafiles",
        "feeds",
        "decoding",
        "kept",
        "shards",
        "language",
        "streams",
        "synthetic",
        "trials",
        "config",
        "fingerprint",
        "named",
    },
    {
        "rules",
        "biases",
        "rounding",
        "block_rounding",
        "block_scales",
        "scaling",
        "scaling_layers",
        "scaling_rules",
        "spread",
        "layouts",
        "attention",
        "roles",
        "sides",
        "axes",
        "heads",
        "head_reads",
        "inference",
        "head_writer",
        "flat_attention",
        "rowwise",
        "swaps",
        "sizes",
        "quiet",
    },
    {
        "observers",
        "targets",
        "graph",
        "report",
        "weights",
        "plots",
        "svg",
        "words",
        "blocks",
        "held",
        "strips",
        "ternary",
        "stored",
        "folded",
        "halves",
        "experts",
        "pieces",
        "narrowing",
        "widened",
        "placement",
        "qconfigs",
        "labels",
        "speeds",
        "complaints",
    },
    {"qparams"},
    {"spec"},
    {"formats", "float_formats", "errors"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

# What goes up all the same. Whoever mends one takes it out here.
KNOWN_UP = {("targets", "session")}


def sources():
    """(module as dotted name, its tree) of everything that is installed."""
    for folder, package in ((ROOT / "qgraph", "qgraph"), (ROOT / "passes", "qgraph.passes")):
        for path in sorted(folder.rglob("*.py")):
            parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), ast.parse(path.read_text())


def imports(tree, known):
    """Modules of ours that a tree imports, wherever in it, with the names taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in known else (node.module, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError("relative imports hide the floor")


@pytest.fixture(scope="module")
def edges():
    """(importer, imported, name or None), modules of ours only."""
    trees = dict(sources())
    assert len(trees) > 30
    return [
        (module, imported, name)
        for module, tree in trees.items()
        for imported, name in imports(tree, trees)
        if imported.split(".")[0] == "qgraph"
    ]


def room(module):
    """The floor's name of a module: `qgraph.targets.cpu` -> `targets`."""
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_floor():
    rooms = {room(module) for module, _ in sources()} - {"", "passes"}
    assert rooms <= set(FLOOR), f"say in FLOORS where these belong: {rooms - set(FLOOR)}"


def test_imports_only_go_down(edges):
    up = {
        (room(importer), room(imported))
        for importer, imported, _ in edges
        if room(importer) and room(imported) and FLOOR[room(importer)] > FLOOR[room(imported)]
    }
    assert up == KNOWN_UP


def test_no_circles(edges):
    # The face of a package stands over its parts; a part that imports it would be a circle, too.
    network = nx.DiGraph((importer, imported) for importer, imported, _ in edges)
    assert list(nx.simple_cycles(network)) == []


def test_the_core_knows_no_pass(edges):
    assert not [
        (importer, imported)
        for importer, imported, _ in edges
        if imported.startswith("qgraph.passes") and not importer.startswith("qgraph.passes")
    ]


def test_only_pipelines_import_passes(edges):
    others, classes = [], []
    for importer, imported, name in edges:
        if importer in (
            "qgraph.passes",
            "qgraph.passes.pipelines",
            "qgraph.passes.rewriting",
        ) or not importer.startswith("qgraph.passes."):
            continue
        if not imported.startswith("qgraph.passes"):
            continue
        if name is None or (name[0].isupper() and not name.isupper()):
            classes.append((importer, imported, name))
        elif not name.isupper():
            others.append((importer, imported, name))
    assert classes == [], "a pass imports another"
    # What a pass may take from another: keys of `meta`, that is, what the two agreed on.
    assert others == [], "what passes share belongs on a floor below"


def test_only_the_face_of_the_package_is_imported_from_the_roof(edges):
    # `import qgraph` inside would be a circle through the face; the command line may, it stands on top.
    assert {importer for importer, imported, _ in edges if imported == "qgraph"} <= {"qgraph.cli"}


def test_file_name_is_pass_name_is_class_name():
    from qgraph import passes

    for name in passes.__all__:
        module = getattr(passes, name).__module__
        assert module.split(".")[-1].replace("_", "") == name.lower()
        assert (ROOT / "passes" / f"{module.split('.')[-1]}.py").is_file()


def test_each_file_says_what_it_is_and_has_one_idea():
    for folder in (ROOT / "qgraph", ROOT / "passes"):
        for path in folder.rglob("*.py"):
            text = path.read_text()
            assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
            assert len(text.splitlines()) <= 300, f"{path} has two ideas in it"


def test_all_is_what_is_there():
    import importlib

    for module, _ in sources():
        if module in ("qgraph.__main__",):
            continue
        loaded = importlib.import_module(module)
        assert sorted(loaded.__all__) == sorted(set(loaded.__all__)), module
        for name in loaded.__all__:
            assert hasattr(loaded, name), f"{module}.{name}"


def test_no_pass_names_a_target():
    for path in (ROOT / "passes").glob("*.py"):
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & set(registry.targets()), path
