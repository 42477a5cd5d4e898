"""What a runner is: a runtime of its own (another interpreter, Node, an emulator) that runs a model for us.

Providers that cannot live in this process, because they are another build of the runtime, another processor or a
browser's, are run in a process of their own; one that crashes is an error there and not the end of ours. The job goes
to it as a folder of plain files, and so does the answer come back.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qgraph.errors import ExecutionError, OptionError, UnprovedError
from qgraph.modelio import size_on_disk
from qgraph.session import Feeds, KernelTime

__all__ = ["FOLDER", "JOB", "RESULT", "SECONDS", "Ran", "Runner", "patience", "runners_folder"]

FOLDER = "QGRAPH_RUNNERS"
"""The environment's variable that names the folder of the runners."""
SECONDS = "QGRAPH_RUNNER_SECONDS"
"""The environment's variable that says how long a runner may take for one job."""

JOB = "job.json"
"""What to do, in the folder of a job. See `write_job`."""
RESULT = "result.json"
"""What came of it. See `read_result`."""
_ALIGNMENT = 16
_PATIENCE = 600.0
_SLOWEST = 1e6
"""Bytes of weights a second that a simulator at least gets through."""


def runners_folder() -> Path:
    """Where runners are set up, each in a folder of its name: $QGRAPH_RUNNERS, or a place in the user's cache."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER]).expanduser().absolute()
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "qgraph" / "runners"


def patience(model: Path) -> float:
    """Seconds that a runner may take: $QGRAPH_RUNNER_SECONDS, or ten minutes and a second more for each megabyte.

    Raises:
        OptionError: the variable is no positive number.
    """
    said = os.environ.get(SECONDS)
    if not said:
        return _PATIENCE + (size_on_disk(model) / _SLOWEST if model.is_file() else 0.0)
    try:
        found = float(said)
    except ValueError:
        found = math.nan
    if not found > 0:
        raise OptionError(f"{SECONDS} is a number of seconds above 0, and not {said!r}.")
    return found


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a runner saw.

    Attributes:
        outputs: for each sample, arrays by name.
        kernels: nodes as the runtime ran them, in order of first execution, with provider and time; empty when it
            keeps no profile.
        assigned: provider -> names of the model's nodes that it was given before later fusions; empty when the
            runtime does not tell.
        runtime: name and version of what ran.
    """

    outputs: list[dict[str, NDArray[Any]]]
    kernels: list[KernelTime]
    assigned: dict[str, list[str]]
    runtime: str


class Runner(abc.ABC):
    """Something that runs models on one provider.

    Attributes:
        name: what targets call it.
        provider: the execution provider that it runs models on.
        how: what runs there, in words.
        setup: the command that sets it up.
    """

    name: str
    provider: str
    how: str
    setup: str

    @property
    @abc.abstractmethod
    def missing(self) -> str | None:
        """What is not here that it needs, in words; None when it can run."""

    @abc.abstractmethod
    def command(self, folder: Path) -> tuple[list[str], Mapping[str, str]]:
        """The command that does the job in `folder`, and what its environment has besides ours."""

    @abc.abstractmethod
    def job(self, config: Mapping[str, str]) -> dict[str, Any]:
        """What the job says besides model and inputs: provider, its options, session entries."""

    def run(
        self,
        model: Path,
        feeds: Sequence[Feeds],
        *,
        config: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> Ran:
        """Run `model` on each of the feeds, in a process of its own.

        Args:
            model: a file; its external data lies beside it.
            feeds: arrays by input name, one mapping for each sample.
            config: further session config entries.
            seconds: how long it may take; None for what `patience` says.

        Raises:
            UnprovedError: it takes too long.
            ExecutionError: the runner is not here, or its runtime refuses the model or crashes.
        """
        if self.missing is not None:
            raise ExecutionError(f"Cannot run on {self.provider}: {self.missing}. Set it up: {self.setup}")
        with tempfile.TemporaryDirectory(prefix=f"qgraph-{self.name}-") as name:
            folder = Path(name)
            write_job(folder, {**self.job(config or {}), "model": str(model.resolve())}, feeds)
            command, environment = self.command(folder)
            self._call(command, environment, model, patience(model) if seconds is None else seconds)
            return read_result(folder, model, self.how)

    def _call(self, command: list[str], environment: Mapping[str, str], model: Path, seconds: float) -> None:
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **environment},
                capture_output=True,
                timeout=seconds,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            late = f"{self.how} took more than {seconds:.0f} s on {model.name}: {SECONDS} allows it more."
            raise UnprovedError(late) from error
        except OSError as error:
            raise ExecutionError(f"Cannot start {command[0]!r}: {error.strerror}.") from error
        if done.returncode != 0:
            words = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            what = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            raise ExecutionError(
                f"{self.how} ended with {what} on {model.name}: {' '.join(words[-3:])[-500:] or 'no word'}"
            )


def write_job(folder: Path, job: Mapping[str, Any], feeds: Sequence[Feeds]) -> None:
    """Write job.json and inputs.bin.

    job.json holds what `job` says and `samples`: for each sample a list of {name, dtype, shape, offset, bytes}, dtype
    as numpy or ml_dtypes calls it, offset and length in bytes in inputs.bin (raw, C order, little-endian).
    """
    samples: list[list[dict[str, Any]]] = []
    with (folder / "inputs.bin").open("wb") as file:
        for one in feeds:
            samples.append([_put(file, name, np.asarray(array)) for name, array in one.items()])
    (folder / JOB).write_text(json.dumps({**job, "samples": samples}))


def _put(file: Any, name: str, array: NDArray[Any]) -> dict[str, Any]:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    data = np.ascontiguousarray(array)
    offset = file.tell()
    file.write(data.tobytes())
    return {"name": name, "dtype": data.dtype.name, "shape": list(array.shape), "offset": offset, "bytes": data.nbytes}


def read_result(folder: Path, model: Path, how: str) -> Ran:
    """Read result.json and outputs.bin, which has the form of inputs.bin.

    result.json holds `error` (words; all else may be missing then), `runtime`, `outputs` (as `samples` of the job),
    `kernels` (a list of {name, op, provider, seconds}: medians over the samples) and `assigned`.

    Raises:
        ExecutionError: the runtime refused the model.
    """
    try:
        found = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError) as error:
        raise ExecutionError(f"{how} gave no answer for {model.name}.") from error
    if found.get("error"):
        raise ExecutionError(f"{found.get('runtime') or how} cannot run {model.name}: {found['error'][:500]}")
    data = (folder / "outputs.bin").read_bytes()
    outputs = [{one["name"]: _array(data, one) for one in sample} for sample in found["outputs"]]
    kernels = [KernelTime(k["name"], k["op"], float(k["seconds"]), k["provider"]) for k in found["kernels"]]
    return Ran(outputs, kernels, found.get("assigned") or {}, found["runtime"])


def _array(data: bytes, one: Mapping[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(getattr(ml_dtypes, one["dtype"], one["dtype"]))
    return np.frombuffer(data, dtype, one["bytes"] // dtype.itemsize, one["offset"]).reshape(one["shape"]).copy()
