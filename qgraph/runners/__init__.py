"""Runners: runtimes outside this process, by name, on which a target's models are proved."""

from qgraph.runners.base import Ran, Runner
from qgraph.runners.node import WASM, XNNPACK
from qgraph.runners.python import runners

__all__ = ["RUNNERS", "Ran", "Runner"]

RUNNERS: dict[str, Runner] = {runner.name: runner for runner in (*runners(), XNNPACK, WASM)}
"""Each by its name; targets say which is theirs."""
