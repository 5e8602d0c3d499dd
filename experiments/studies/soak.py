"""Trains with the command itself, in several processes and under SIGKILL, and compares.

    python experiments/studies/soak.py --out runs/soak

Undisturbed runs: `paramshare train --distributed` in 2 and in 4 processes of one CPU device each,
with the environment variables of Slurm. Every process must end with exit code 0, process 0 with a
result and a report, and the losses must be those of one process with as many devices. Half of the
runs divide the banks over the devices (`--shard-banks`).

Kills: runs that are killed (SIGKILL) at random moments, again and again, and rerun by the same
command until they end. Some of them have two processes, of which one at random is killed. The last
state, the selected variables, the metrics and the result must be those of a run that was left
alone, bit for bit, except for times.

Disagreements: two processes with another seed, other images, another version of a package, or a
workdir of their own; a process that is killed, stopped (SIGSTOP), or fails alone. Each must print
one line; the study gives the seconds from their start, or from the kill, until both have ended.

The study exits with 1 if a run fails. The tables are printed and written to OUT/table.md.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import sweep

from paramshare.training.checkpoint import Checkpoints
from paramshare.training.derive import load_run
from paramshare.training.run import Run

CONFIG = """from paramshare.training.config import Config, Model, Schedule

config = Config(
    Model("swrn-16-1-2", sync_batch_norm=True),
    schedule=Schedule("cosine"), epochs=4, batch_size=256, log_every=3, checkpoint_steps=2,
)
"""
PATCHES = {  # what differs in one of two processes
    "images": """
import dataclasses

from paramshare.data import ArraySource, Digits

load = Digits.load


def changed(self, seed):
    data = load(self, seed)
    images = data.train.input.copy()
    images[0, 3, 3] += 1
    return dataclasses.replace(data, train=ArraySource(images, data.train.label))


Digits.load = changed
""",
    "version": """
import importlib.metadata

before = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.1" if name == "optax" else before(name)
""",
    "fails": """
from paramshare.training.track import Track


def write_line(*args):
    raise ZeroDivisionError("only here")


Track.write_line = write_line
""",
}
TIMES = ("seconds", "images_per_second", "sha256")
LIMIT = 600  # seconds that a command may take
TOLERANCE = 1e-3  # float32 rounding, grown over 20 steps of training


@dataclasses.dataclass(frozen=True)
class End:
    """How the processes of one command ended."""

    codes: list[int]
    errors: list[str]
    seconds: float

    def problem(self, allowed: Sequence[int] = (0,)) -> str:
        """What is wrong; "" if nothing is."""
        for number, (code, error) in enumerate(zip(self.codes, self.errors, strict=True)):
            lines = [x for x in error.replace("\r", "\n").splitlines() if x and "img/s" not in x]
            if code not in allowed:
                return f"process {number} ends with {code}: {' '.join(lines)[-300:]}"
            if "Traceback" in error:
                return f"process {number} prints a traceback: {lines[-1]}"
        return ""


def start(
    folder: pathlib.Path,
    workdir: str,
    count: int,
    *words: str,
    second: Sequence[str] = (),
) -> list[subprocess.Popen]:
    """The command in `count` processes of one device each; 0 is one process of its own.

    `second` is what the second process gets for `config.py --workdir WORKDIR`.
    """
    job, processes = free_job(), []
    for rank in range(max(1, count)):
        slurm = {
            "SLURM_JOB_ID": job,
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
        }
        command = [sys.executable, "-m", "paramshare", "train"]
        command += second if second and rank == 1 else ["config.py", "--workdir", workdir]
        processes.append(
            subprocess.Popen(
                [
                    *command,
                    *(["--distributed", "--heartbeat-timeout", "5"] if count else []),
                    *words,
                ],
                cwd=folder,
                env=os.environ | {"JAX_PLATFORMS": "cpu"} | (slurm if count else {}),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    return processes


def free_job() -> str:
    """A job number whose port, which JAX derives from it, is free."""
    while True:
        job = random.randrange(4096)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 65535 - 4095 + job)):
                return str(job)


def wait(processes: Sequence[subprocess.Popen]) -> End:
    """Waits for the processes, and kills them after `LIMIT` seconds."""
    begin, errors = time.monotonic(), []
    for process in processes:
        try:
            left = LIMIT - (time.monotonic() - begin)
            errors.append(process.communicate(timeout=max(1.0, left))[1])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            errors.append(f"it did not end within {LIMIT} s " + process.communicate()[1])
    return End([process.returncode for process in processes], errors, time.monotonic() - begin)


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def undisturbed(out: pathlib.Path, count: int, runs: int) -> list[dict[str, Any]]:
    """Trains in `count` processes, `runs` times, and compares with one process."""
    flags = f"--xla_force_host_platform_device_count={count}"
    single = f"devices{count}"
    os.environ["XLA_FLAGS"] = flags
    end = wait(start(out, single, 0))
    del os.environ["XLA_FLAGS"]
    if end.problem():
        sys.exit(end.problem())
    expected = [x["loss"] for x in lines(out / single) if x["kind"] == "train"]
    rows = []
    for number in range(runs):
        words = ["--shard-banks"] if number % 2 else []
        name = f"processes{count}-{number}"
        end = wait(start(out, name, count, *words))
        problem, difference = end.problem(), float("nan")
        if not problem:
            losses = [x["loss"] for x in lines(out / name) if x["kind"] == "train"]
            if len(losses) != len(expected):
                problem = f"{len(losses)} lines of steps, not {len(expected)}"
            else:
                difference = float(np.max(np.abs(np.subtract(losses, expected) / expected)))
                missing = [
                    x for x in ("result.json", "report.html") if not (out / name / x).exists()
                ]
                problem = f"no {missing[0]}" if missing else ""
                problem = problem or (f"losses differ by {difference}" * (difference > TOLERANCE))
        rows.append(
            {
                "processes": count,
                "banks": "divided" if words else "whole",
                "problem": problem,
                "difference": difference,
                "seconds": end.seconds,
            }
        )
        print(
            f"{name} {' '.join(words)}: {problem or 'as one process'}, {difference:.1e}", flush=True
        )
        if not problem:
            shutil.rmtree(out / name)
    return rows


def stored(run: Run, workdir: pathlib.Path) -> dict[str, Any]:
    """What a finished run has stored, without times."""
    result = json.loads((workdir / "result.json").read_text())
    with Checkpoints(workdir / "checkpoints") as newest, Checkpoints(workdir / "best") as best:
        arrays = {
            f"{name} {step}": [np.asarray(x).tobytes() for x in leaves(folder, like, step)]
            for name, folder, like in (
                ("state", newest, run.shapes),
                ("best", best, run.shapes.variables),
            )
            for step in folder.steps
        }
    leftovers = [str(path) for path in workdir.rglob("*") if path.name.startswith(".")]
    return {
        "metrics": lines(workdir),
        "result": {name: value for name, value in result.items() if name not in TIMES},
        "leftovers": [x for x in leftovers if not x.endswith(".lock")],
        "files": sorted(str(path.relative_to(workdir)) for path in workdir.glob("*")),
        **arrays,
    }


def leaves(folder: Checkpoints, like: Any, step: int) -> list[Any]:
    """The arrays of a checkpoint."""
    import jax

    return jax.tree.leaves(folder.restore(like, step)[0])


def killed(out: pathlib.Path, count: int, kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """Kills runs at random moments until `kills` are done; compares each that ends."""
    reference, quick = f"alone{count}", ["--init-timeout", "30"] if count else []
    begin = time.monotonic()
    end = wait(start(out, reference, count))
    if end.problem():
        sys.exit(end.problem())
    whole = time.monotonic() - begin
    run, _, _ = load_run(out / reference)
    expected = stored(run, out / reference)
    rows, done, number = [], 0, 0
    while done < kills:
        name, problem, times = f"killed{count}-{number}", "", 0
        number += 1
        while not problem:
            begin, processes, hit = time.monotonic(), start(out, name, count, *quick), False
            if done < kills and times < 8:
                time.sleep(draw.uniform(0.2, whole))
                victim = draw.choice(processes)
                hit = victim.poll() is None
                if hit:
                    os.killpg(victim.pid, signal.SIGKILL)
                    done, times = done + 1, times + 1
            end = wait(processes)
            if not hit:  # a run that resumes takes less time
                whole = min(whole, time.monotonic() - begin)
            # A peer says 4, or has ended before the kill; the killed one -9.
            problem = end.problem(allowed=(0, 4, -signal.SIGKILL))
            if all(code == 0 for code in end.codes):
                break
        if not problem:
            actual = stored(run, out / name)
            different = [key for key in expected if actual.get(key) != expected[key]]
            different += [key for key in actual if key not in expected]
            problem = f"{', '.join(different)} differ" if different else ""
        rows.append({"processes": max(1, count), "kills": times, "problem": problem})
        print(f"{name}: {times} kills, {problem or 'as the run that was left alone'}", flush=True)
        if not problem:
            shutil.rmtree(out / name)
    return rows


def disagreements(out: pathlib.Path) -> list[dict[str, Any]]:
    """Pairs of processes that cannot go on together."""
    for name, lines_of in PATCHES.items():
        (out / f"{name}.py").write_text(CONFIG + lines_of)
    cases = {
        "another seed": ["config.py", "--workdir", "pair", "--seed", "1"],
        "other images": ["images.py", "--workdir", "pair"],
        "another version of optax": ["version.py", "--workdir", "pair"],
        "another workdir": ["config.py", "--workdir", "elsewhere"],
        "one fails alone": ["fails.py", "--workdir", "pair"],
        "one is killed": [],
        "one is stopped": [],
    }
    signals = {"one is killed": signal.SIGKILL, "one is stopped": signal.SIGSTOP}
    rows = []
    for name, second in cases.items():
        for folder in ("pair", "elsewhere"):
            shutil.rmtree(out / folder, ignore_errors=True)
        begin = time.monotonic()
        long = ["--epochs", "400"] if name in signals else []
        processes = start(out, "pair", 2, *long, second=second)
        if name in signals:
            while not (out / "pair" / "checkpoints" / "4").exists():
                time.sleep(0.1)
            begin = time.monotonic()
            os.killpg(processes[1].pid, signals[name])
        ended = wait(processes[:1] if name in signals else processes)
        seconds = time.monotonic() - begin
        if name in signals:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(processes[1].pid, signal.SIGKILL)
            processes[1].communicate()
        texts = []
        for error in ended.errors:
            texts.append(
                [
                    x
                    for x in error.replace("\r", "\n").splitlines()
                    if x.strip() and "img/s" not in x
                ]
            )
        alone = name == "one fails alone"
        expected = [4, 1] if alone else [4] if name in signals else [2, 2]
        problem = "" if ended.codes == expected else f"exit codes {ended.codes}"
        if any(len(x) != 1 for x in (texts[:1] if alone else texts)):
            problem = problem or f"not one line: {texts}"
        rows.append({"case": name, "problem": problem, "seconds": seconds})
        print(f"{name}: {problem or 'one line'} after {seconds:.0f} s: {texts}", flush=True)
    return rows


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--runs", type=int, default=20, help="undisturbed runs for each of them")
    parser.add_argument("--kills", type=int, default=40, help="of one process")
    parser.add_argument("--kills-of-two", type=int, default=10, help="of one process of two")
    parser.add_argument(
        "--disagreements", action=argparse.BooleanOptionalAction, default=True, help="pairs"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.py").write_text(CONFIG)

    runs = [row for count in args.processes for row in undisturbed(args.out, count, args.runs)]
    draw = random.Random(args.seed)
    kills = killed(args.out, 0, args.kills, draw) if args.kills else []
    kills += killed(args.out, 2, args.kills_of_two, draw) if args.kills_of_two else []

    pairs = disagreements(args.out) if args.disagreements else []

    tables = []
    if runs:
        head = ("processes", "banks", "runs", "failed", "largest difference of a loss", "seconds")
        body = []
        for count, banks in dict.fromkeys((row["processes"], row["banks"]) for row in runs):
            rows = [row for row in runs if (row["processes"], row["banks"]) == (count, banks)]
            failed = sum(bool(row["problem"]) for row in rows)
            largest = max(row["difference"] for row in rows)
            seconds = sum(row["seconds"] for row in rows) / len(rows)
            body.append((count, banks, len(rows), failed, f"{largest:.1e}", f"{seconds:.0f}"))
        tables.append(sweep.table(head, body))
    if kills:
        body = []
        for count in sorted({row["processes"] for row in kills}):
            rows = [row for row in kills if row["processes"] == count]
            failed = sum(bool(row["problem"]) for row in rows)
            body.append((count, sum(row["kills"] for row in rows), len(rows), failed))
        tables.append(sweep.table(("processes", "kills", "runs", "runs that differ"), body))
    if pairs:
        body = [
            (row["case"], f"{row['seconds']:.0f}", row["problem"] or "one line") for row in pairs
        ]
        tables.append(sweep.table(("two processes", "seconds until they end", "output"), body))
    sweep.publish(args.out, "\n\n".join(tables), sweep.provenance())
    sys.exit(any(row["problem"] for row in (*runs, *kills, *pairs)))


if __name__ == "__main__":
    main()
