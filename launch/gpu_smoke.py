"""GPU smoke test: short runs and measurements on this machine's GPUs, as one report in Markdown.

Every section is a program of its own with a time limit, so that one that hangs or crashes does not
take the others with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import worm_dist

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 900
CONFIG = "configs/digits.yaml"
SMALL = ("--epochs", "9", "--model.arguments", "{widths: [16, 16, M, 32, 32]}")
"""The demo's network in a rehearsal."""
EVERY_EPOCH = ("--checkpoint.every", "1ep", "--checkpoint.keep_last", "100")
RESUMED_AT = 5
"""Number of the checkpoint to resume from: channels are being removed then."""


class Machine(NamedTuple):
    """What it runs on.

    Attributes:
        device: ``cuda`` or ``cpu``.
        num_ranks: one for each GPU; two on CPUs.
        out: the folder of the report.
    """

    device: str
    num_ranks: int
    out: Path

    def torchrun(self, *words: object, num_ranks: int | None = None) -> str:
        """Run a program on all ranks; return what it printed.

        Raises:
            RuntimeError: it failed, with the end of its output, or took too long.
        """
        nproc = str(num_ranks or self.num_ranks)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", nproc, *map(str, words)]
        hidden = {} if self.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **hidden},
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"still running after {LIMIT_SECONDS} s") from error
        if done.returncode:
            end = (done.stdout + done.stderr).strip()[-2000:]
            raise RuntimeError(f"exit code {done.returncode}:\n{end}")
        return done.stdout

    def train(self, name: str, *settings: str) -> Mapping[str, Any]:
        """Train the demo; return its result."""
        small = () if self.device == "cuda" else SMALL
        folder = self.out / name
        shutil.rmtree(folder, ignore_errors=True)
        words = ("-m", "worm_dist", "train", CONFIG, "--out", folder, *small, *settings)
        self.torchrun(*words)
        result: Mapping[str, Any] = json.loads((folder / "result.json").read_text())
        if result["status"] != "ticket":
            raise RuntimeError(f"no ticket: {result['reason']}")
        return result


# ---- sections: they yield lines of the report, and raise if they fail ----------------------------


def demo(machine: Machine) -> Iterator[str]:
    """The demo, from the search to the ticket."""
    yield from _described(machine.train("demo", *EVERY_EPOCH))


def resume(machine: Machine) -> Iterator[str]:
    """The demo again from one of its checkpoints: the same end?"""
    demo_folder = machine.out / "demo"
    if not (demo_folder / "result.json").exists():
        machine.train("demo", *EVERY_EPOCH)
    steps = sorted(int(p.name[5:]) for p in (demo_folder / "checkpoints").glob("step-*"))
    step = steps[RESUMED_AT]
    path = demo_folder / "checkpoints" / f"step-{step}"
    yield from _described(machine.train("resumed", *EVERY_EPOCH, "--resume", str(path)))
    one, other = (_sha256(machine.out / name) for name in ("demo", "resumed"))
    are = "are" if one == other else "are not"
    yield f"- resumed from step {step}; the ticket's weights {are} equal to the bit"
    if machine.device == "cpu" and one != other:
        raise RuntimeError("on CPUs a resumed run must be equal to the bit")


def zero(machine: Machine) -> Iterator[str]:
    """The demo under DeepSpeed's ZeRO stage 2."""
    settings = ("--backend", "deepspeed", "--distributed.deepspeed", "configs/deepspeed/zero2.json")
    yield from _described(machine.train("zero", *settings))


def checks(machine: Machine) -> Iterator[str]:
    """The packed hook beside masked DDP, a draw's memory, operations of a step."""
    printed = machine.torchrun("launch/gpu_smoke_rank.py")
    yield from printed[printed.index("- ") :].splitlines()


def bench(machine: Machine) -> Iterator[str]:
    """``bench step --quick``: seconds of a step over gloo, on two ranks, on CPUs."""
    words = ("-m", "worm_dist", "bench", "step", "--quick", "--out", machine.out / "bench")
    yield from ("```", *machine.torchrun(*words, num_ranks=2).rstrip().splitlines(), "```")


SECTIONS: Mapping[str, Callable[[Machine], Iterator[str]]] = {
    section.__name__: section for section in (demo, resume, zero, checks, bench)
}


def _described(result: Mapping[str, Any]) -> Iterator[str]:
    accuracy, parameters, traffic = (result[key] for key in ("accuracy", "parameters", "traffic"))
    yield f"- {result['world_size']} ranks over {result['backend']}, {result['seconds']['total']} s"
    yield (
        f"- ticket at epoch {result['ticket_epoch']:g}, {parameters['ticket']:,} of "
        f"{parameters['dense']:,} parameters, mask {result['mask_digest'][:8]}"
    )
    yield (
        f"- test accuracy {accuracy['before_draw']:.4f} before and {accuracy['after_draw']:.4f} "
        f"after the draw, {accuracy['final']:.4f} at the end"
    )
    yield (
        f"- bytes a step: {traffic['dense_bytes_per_step']:,} dense, "
        f"{traffic['ticket_bytes_per_step']:,} as the ticket"
    )


def _sha256(run: Path) -> str:
    return hashlib.sha256((run / "ticket" / "ticket.safetensors").read_bytes()).hexdigest()


# ---- the report ----------------------------------------------------------------------------------


def report(machine: Machine, sections: Sequence[str]) -> int:
    """Run the sections and write the report; return the number of those that failed."""
    lines = [f"# GPU smoke test\n\n{_described_machine(machine)}"]
    num_failed = 0
    machine.out.mkdir(parents=True, exist_ok=True)
    for name in sections:
        print(f"gpu-smoke: {name} ...", flush=True)
        begin, found, outcome = time.monotonic(), [], "ok"
        try:
            found += SECTIONS[name](machine)
        except (RuntimeError, OSError, ValueError, LookupError) as error:
            outcome, num_failed = "FAILED", num_failed + 1
            found += ["```", str(error), "```"]
        title = f"## {name}: {outcome}, {time.monotonic() - begin:.0f} s"
        print(f"gpu-smoke: {title[3:]}", flush=True)
        lines += [f"\n{title}\n\n{SECTIONS[name].__doc__}\n", *found]
        (machine.out / "report.md").write_text("\n".join([*lines, ""]))
    print(f"gpu-smoke: {machine.out / 'report.md'}")
    return num_failed


def _described_machine(machine: Machine) -> str:
    versions = f"torch {torch.__version__}, worm_dist {worm_dist.__version__}"
    if machine.device == "cpu":
        return f"Rehearsal without GPUs, {machine.num_ranks} ranks over gloo; {versions}"
    names = Counter(map(torch.cuda.get_device_name, range(machine.num_ranks)))
    gpus = ", ".join(f"{count} x {name}" for name, count in names.items())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{gpus}; {versions}, CUDA {torch.version.cuda}, nccl {nccl}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/gpu-smoke", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="the rehearsal, also where GPUs are")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-smoke"))
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    options = parser.parse_args()
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"there is no section {name!r}; choose from {', '.join(SECTIONS)}")
    num_gpus = 0 if options.cpu else torch.cuda.device_count()
    if not num_gpus:
        print("gpu-smoke: no GPU is used; this is a rehearsal over gloo, on two ranks")
    device = "cuda" if num_gpus else "cpu"
    machine = Machine(device, num_gpus or 2, options.out.resolve())
    return min(1, report(machine, options.sections or list(SECTIONS)))


if __name__ == "__main__":
    sys.exit(main())
