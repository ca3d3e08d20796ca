"""Driver: real runs of the command line, in which something goes wrong on purpose.

The faults live here and not in the product: before ``main`` is called, one callable is wrapped, and
on one rank the fault strikes before one of its calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from tests.programs import variables_of_ranks
from tests.ranks import PRELOADED
from worm_dist.training.data import Data
from worm_dist.training.run_config import DataConfig

__all__ = ["SMALL", "STEP", "Act", "Driver", "Ended", "Fault", "Run", "busy", "small_data"]

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "digits.yaml"
STEP = "worm_dist.training.trainer:Trainer._train_step"
"""Its n-th call is the n-th step."""
STRUCK = "struck"

SMALL = {
    "preset": "dense",
    "epochs": "2",
    "data.batch_size": "16",
    "model.arguments": "{widths: [4, M, 8]}",
    "distributed.startup_timeout_seconds": "60",
}
"""Eight steps an epoch."""

Act = Callable[..., Any]
"""Called instead of a call, with what would have been called and its arguments."""


def small_data(rank: int, num_train: int = 128, num_test: int = 16) -> Data:
    """Noise, the same on every rank; scikit-learn would take seconds to import."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_train + num_test, 1, 8, 8, generator=generator)
    classes = torch.arange(num_train + num_test) % 10
    return Data(
        train=TensorDataset(images[:num_train], classes[:num_train]),
        test=TensorDataset(images[num_train:], classes[num_train:]),
        num_classes=10,
        sample_shape=(1, 8, 8),
        description="noise",
    )


def busy(seconds: float) -> float:
    """How long so many seconds of work may take here, now.

    What the product waits for is a time by the clock, and stays as it is.  What it does besides
    takes as many times longer as there are processes for each core.
    """
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


# ---- faults --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What happens on one rank, instead of one call of one callable.

    Attributes:
        act: what happens, of the top level of a module.
        rank: on which; None for all.
        call: instead of which call, from 1 on; None for every one.
        target: ``module:name``, where the callable is.
        attempt: in which of torchrun's attempts, from 0 on; None for all.
    """

    act: Act
    rank: int | None
    call: int | None
    target: str = STEP
    attempt: int | None = None

    @classmethod
    def kill(cls, rank: int, step: int) -> Fault:
        """As the kernel does when memory is out."""
        return cls(_kill, rank, step)

    @classmethod
    def stop(cls, rank: int, step: int) -> Fault:
        """The process is there, and nothing in it runs any more."""
        return cls(_stop, rank, step)

    @classmethod
    def hang(cls, rank: int, step: int) -> Fault:
        """The training thread waits for something; others run."""
        return cls(_hang, rank, step)

    @classmethod
    def raise_(cls, rank: int, step: int) -> Fault:
        """A bug in somebody's code."""
        return cls(_raise, rank, step)

    @classmethod
    def do(cls, act: Act, rank: int | None, step: int | None) -> Fault:
        """Something else."""
        return cls(act, rank, step)

    def at(self, target: str) -> Fault:
        """Instead of a call of something else than a step."""
        return dataclasses.replace(self, target=target)

    def in_attempt(self, attempt: int) -> Fault:
        """Only then: 0 is before torchrun starts all ranks anew."""
        return dataclasses.replace(self, attempt=attempt)

    def plant(self, rank: int, folder: Path) -> None:
        """Wrap the target, if the fault is meant for this process; when it strikes, that is noted
        in the folder."""
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if self.rank not in (None, rank) or self.attempt not in (None, attempt):
            return
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        real, calls = getattr(owner, name), 0

        def struck(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if self.call not in (None, calls):
                return real(*args, **kwargs)
            if not (folder / STRUCK).exists():
                (folder / STRUCK).write_text(str(time.time()))
            return self.act(real, *args, **kwargs)

        setattr(owner, name, struck)


def _kill(real: Act, *args: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(real: Act, *args: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang(real: Act, *args: Any) -> Any:
    time.sleep(60)


def _raise(real: Act, *args: Any) -> Any:
    raise ValueError("a bug")


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How one rank ended.

    Attributes:
        exitcode: negative if a signal ended it; None if it had to be killed at the limit.
        seconds: after the fault struck, or after the start if none did.
        said: on its standard error.
        printed: on its standard output.
    """

    rank: int
    exitcode: int | None
    seconds: float
    said: str
    printed: str = ""

    @property
    def errors(self) -> list[str]:
        """The lines in which worm_dist speaks of an error."""
        return [line for line in self.said.splitlines() if line.startswith("worm_dist: error")]


@dataclass(frozen=True)
class Run:
    """What is to be run.

    Attributes:
        faults: that strike it.
        settings: dotted keys and values, beside those that make it small.
        per_rank: settings of single ranks.
        environment: variables of single ranks.
        data: what a rank loads; None for what its settings say.
    """

    faults: tuple[Fault, ...] = ()
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    per_rank: Mapping[int, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    environment: Mapping[int, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    data: Callable[[int], Data] | None = small_data

    def words(self, rank: int, out: Path) -> list[str]:
        """Of the command line."""
        settings = {**SMALL, **self.settings, **self.per_rank.get(rank, {})}
        pairs = [f"--{key}={value}" for key, value in settings.items()]
        return ["train", str(CONFIG), "--out", str(out), *pairs]


class Driver:
    """Runs the command line on several ranks of this machine.

    Args:
        folder: for what they print.

    Attributes:
        out: the run's own folder.
    """

    def __init__(self, folder: Path) -> None:
        self.out = folder / "run"
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __call__(self, world_size: int, run: Run, limit: float = 300.0) -> list[Ended]:
        """Start plain processes, and wait until they have ended or are stopped for good; afterwards
        none is left.

        Args:
            world_size: how many.
            run: what they run.
            limit: seconds after which they are killed.
        """
        began = time.time()
        processes = []
        for rank, variables in enumerate(variables_of_ranks(world_size)):
            order = (
                run,
                rank,
                {**variables, **run.environment.get(rank, {})},
                self._folder,
                self.out,
            )
            process = self._context.Process(target=_obey, args=(pickle.dumps(order),))
            process.start()
            processes.append(process)
        ends: dict[int, float] = {}
        while time.time() < began + limit:
            running = {p.sentinel: r for r, p in enumerate(processes) if r not in ends}
            for sentinel in connection.wait(list(running), timeout=0.5):
                ends[running[sentinel]] = time.time()  # type: ignore[index]
            if all(rank in ends or _is_stopped(p) for rank, p in enumerate(processes)):
                break
        for process in processes:
            process.kill()  # the stopped ones, too
            process.join()
        since = self._since(began)
        return [
            Ended(
                rank,
                process.exitcode if rank in ends else None,
                ends.get(rank, float("inf")) - since,
                *((self._folder / f"{rank}.{stream}").read_text() for stream in ("err", "out")),
            )
            for rank, process in enumerate(processes)
        ]

    def under_torchrun(self, world_size: int, run: Run, max_restarts: int = 0) -> Ended:
        """What torchrun comes to."""
        order = self._folder / "order.pickle"
        order.write_bytes(pickle.dumps((run, self._folder, self.out)))
        began = time.time()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(world_size), "--max-restarts", str(max_restarts)),
                *("-m", "tests.faults.driver", str(order)),
            ],
            cwd=ROOT,
            env={key: os.environ[key] for key in os.environ if not key.startswith("PYTEST")},
            start_new_session=True,  # a fault may signal torchrun's process group
            capture_output=True,
            text=True,
        )
        return Ended(
            -1, done.returncode, time.time() - self._since(began), done.stderr, done.stdout
        )

    def _since(self, began: float) -> float:
        """When the fault has struck, or the run began."""
        struck = self._folder / STRUCK
        return float(struck.read_text()) if struck.exists() else began


def _is_stopped(process: BaseProcess) -> bool:
    """As by SIGSTOP; such a process ends only when it is killed."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # before the read, or in it
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _obey(order: bytes) -> None:
    """A rank of its own, started by the fork server."""
    run, rank, variables, folder, out = pickle.loads(order)
    os.environ.update(variables)
    for stream, number in (("out", 1), ("err", 2)):
        with (folder / f"{rank}.{stream}").open("w") as file:
            os.dup2(file.fileno(), number)
    # The fork server has handed its own way on; loader processes would import torch for seconds.
    multiprocessing.set_start_method("fork", force=True)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    _train(run, rank, folder, out)


def _train(run: Run, rank: int, folder: Path, out: Path) -> None:
    from worm_dist.__main__ import main
    from worm_dist.distributed.error_report import hard_exit
    from worm_dist.training import build

    if run.data is not None:
        vars(build)["load_data"] = functools.partial(_ignore, run.data, rank)
    for fault in run.faults:
        fault.plant(rank, folder)
    hard_exit(main(run.words(rank, out)))


def _ignore(data: Callable[[int], Data], rank: int, config: DataConfig) -> Data:
    return data(rank)


if __name__ == "__main__":
    # Faults were pickled by their names in the module, not in the script.
    from tests.faults import driver

    what, place, folder = pickle.loads(Path(sys.argv[1]).read_bytes())
    driver._train(what, int(os.environ["RANK"]), place, folder)
