"""Damages workdirs, command lines and data sets, and counts what the commands make of them.

    python experiments/studies/robustness.py --out runs/robustness

Every case must end in one of three ways: with the right result, with a warning that says what is
missing from the result, or with one line that says what to do. It fails if there is a traceback, if
a result is wrong without a word, if a command does not answer within 120 s, or if anything that
was there before is lost. Failures are printed with the case's number; `--only 17 203` repeats
some. The table is printed and written to OUT/table.md.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Programs run a few times only: compiling them well would take longer. Before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import robustness_cases as cases
import sweep
from tqdm import tqdm

from paramshare.cli import main as command

SECONDS = 120
CONFIG = """from paramshare.training.config import Config, Model, Schedule

config = Config(Model("swrn-16-1-1"), epochs=3, schedule=Schedule("cosine"))
"""
# Files that a command may write where it finds them.
WRITTEN = ("report.html", "similarity.png", "similarity_over_training.png")


@dataclasses.dataclass(frozen=True)
class Call:
    """What a command line did: its exit code, what it printed, and an exception that escaped."""

    code: int
    output: str
    error: str
    exception: str = ""

    @property
    def lines(self) -> list[str]:
        """Standard error without progress bars."""
        lines = re.split(r"[\r\n]+", self.error)
        return [line for line in lines if line.strip() and "img/s" not in line]

    @property
    def said(self) -> bool:
        """Whether it printed a line of its own on standard error."""
        return any(line.startswith("paramshare: ") for line in self.lines)

    def problem(self) -> str:
        """What is wrong with how it ended; "" if nothing is."""
        if self.exception or "Traceback" in self.error:
            return f"traceback: {self.exception or self.lines[-1]}"
        others = [line for line in self.lines if not line.startswith("paramshare: ")]
        if others:
            return f"noise: {others[0]}"
        if self.code and not self.said:
            return f"exit {self.code} without a word"
        return ""


class _NoAnswer(BaseException):
    """The time is over."""


def call(words: Sequence[str]) -> Call:
    """Runs the command in this process, with everything that it prints captured."""

    def stop(*args: Any) -> None:
        raise _NoAnswer

    streams = [open(tempfile.mkstemp()[1], "w+b") for _ in range(2)]  # noqa: SIM115
    before = [os.dup(number) for number in (1, 2)]
    signal.signal(signal.SIGALRM, stop)
    code, exception = 0, ""
    try:
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream.fileno(), number)
        signal.alarm(SECONDS)
        code = command(list(words))
    except SystemExit as error:  # of --help
        code = int(error.code or 0)
    except _NoAnswer:
        exception = f"no answer within {SECONDS} s"
    except BaseException as error:
        exception = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), before, strict=True):
            os.dup2(copy, number)
            os.close(copy)
    texts = []
    for stream in streams:
        texts.append(pathlib.Path(stream.name).read_text(errors="replace"))
        stream.close()
        os.unlink(stream.name)
    return Call(code, texts[0], texts[1], exception)


def files(folder: pathlib.Path) -> dict[str, str]:
    """A hash of every file of a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def measured(workdir: pathlib.Path) -> dict[str, Any]:
    """The test results of a finished run."""
    result = json.loads((workdir / "result.json").read_text())
    return {name: result[name] for name in ("last", "selected")}


# --- Workdirs


def make_workdirs(out: pathlib.Path) -> None:
    """A finished run, one that was stopped after two of three epochs, and one made by `fold`."""
    (out / "config.py").write_text(CONFIG)
    finished, stopped, folded = (out / name for name in cases.WORKDIRS)
    if folded.exists():
        return
    for words in (
        ["train", str(out / "config.py"), "--workdir", str(finished)],
        ["fold", str(finished), "--threshold", "0.3", "--output", str(folded)],
    ):
        outcome = call(words)
        if outcome.code:
            raise RuntimeError(outcome.error)
    shutil.copytree(finished, stopped)
    (stopped / "result.json").unlink()
    newest = max((stopped / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest)


def run_commands(workdir: pathlib.Path) -> Iterator[tuple[str, Call, Any]]:
    """The commands that read a workdir, each with its outcome and the result that it gave."""
    outcome = call(["eval", str(workdir)])
    yield "eval", outcome, json.loads(outcome.output) if not outcome.code else None
    outcome = call(["similarity", str(workdir), "--json"])
    yield "similarity", outcome, json.loads(outcome.output)["banks"] if not outcome.code else None
    yield "report", call(["report", str(workdir)]), None
    outcome = call(["train", "--workdir", str(workdir)])
    yield "train", outcome, measured(workdir) if not outcome.code else None


def damaged_workdir(case: "cases.Damage", out: pathlib.Path, expected: Mapping[str, Any]) -> list:
    """(verdict, problem) of every command on a damaged workdir."""
    verdicts = []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        workdir = pathlib.Path(folder) / case.workdir
        shutil.copytree(out / case.workdir, workdir)
        cases.apply(case, workdir)
        before = files(workdir)
        for name, outcome, result in run_commands(workdir):
            problem = outcome.problem()
            after = files(workdir)
            lost = [
                path
                for path, content in before.items()
                if after.get(path) != content and path not in WRITTEN
            ]
            # A run that trains to its end may fail to draw a picture.
            ended = "result.json" in after and "result.json" not in before
            trained = name == "train" and (not outcome.code or ended)
            if not problem and lost and not trained:
                problem = f"changed {lost[0]}"
            right = result == expected[case.workdir].get(name)
            # An edit with a new digest is a wish of the user, and may lead to other results.
            if not problem and not outcome.code and not right and case.kind != "edited":
                problem = "" if outcome.said else "another result without a word"
            verdict = "refused" if outcome.code else "right" if right else "incomplete, said so"
            verdicts.append((f"{name}: {verdict}", f"{name}: {problem}" if problem else ""))
    return verdicts


# --- Command lines and data sets


def command_line(case: Sequence[str], out: pathlib.Path, expected: Any) -> list:
    """(verdict, problem) of a command line that may be wrong."""
    with tempfile.TemporaryDirectory(dir=out) as folder, contextlib.chdir(folder):
        for name in cases.WORKDIRS[:2]:
            shutil.copytree(out / name, name)
        pathlib.Path("config.py").write_text(CONFIG)
        before = files(pathlib.Path())
        outcome = call(case)
        after = files(pathlib.Path())
        problem = outcome.problem()
        lost = [path for path in before if path not in after]
        new = [
            path for path in after if path not in before and path.rpartition("/")[2] not in WRITTEN
        ]
        if not problem and lost and outcome.code:  # a run that resumes drops what came later
            problem = f"lost {lost[0]}"
        if not problem and outcome.code == 2 and new:
            problem = f"refused, and left {new[0]}"
        if not problem and outcome.code == 2 and len(outcome.lines) != 1:
            problem = f"{len(outcome.lines)} lines"
    return [("refused" if outcome.code else "ran", problem)]


def data_set(name: str, out: pathlib.Path, expected: Any) -> list:
    """(verdict, problem) of a data set that was changed."""
    case = {case.name: case for case in cases.data_sets()}[name]
    with tempfile.TemporaryDirectory(dir=out) as folder:
        place = pathlib.Path(folder)
        case.make(place / "data")
        workdir = place / "run"
        words = ["train", str(out / "config.py"), "--workdir", str(workdir), "--epochs", "1"]
        words += ["--batch-size", "32", "--data.name", "idx", "--data.path", str(place / "data")]
        outcome = call([*words, "--data.data-dir", str(place / "prepared"), *case.options])
        problem = outcome.problem()
        if not problem and case.refused and outcome.code != 2:
            problem = "trained on it"
        if not problem and not case.refused and outcome.code:
            problem = f"refused: {outcome.lines[-1]}"
        if not problem and outcome.code and workdir.exists():
            problem = "refused, and left a workdir"
    return [("refused" if outcome.code else "right", problem)]


# --- All of them

RUNNERS: dict[str, Callable[..., list]] = {
    "workdirs": damaged_workdir,
    "command lines": command_line,
    "data sets": data_set,
}


def run_case(kind: str, case: Any, out: pathlib.Path, expected: Any) -> list:
    """(verdict, problem) of each command of a case; runs in a process of its own."""
    try:
        return RUNNERS[kind](case, out, expected)
    except BaseException as error:
        return [("error", f"the study itself failed: {type(error).__name__}: {error}")]
    finally:
        jax.clear_caches()  # programs would pile up to gigabytes


def expectations(out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What the commands give for the workdirs as they are."""
    expected = {}
    for name in cases.WORKDIRS:
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            workdir = pathlib.Path(scratch) / name
            shutil.copytree(out / name, workdir)
            commands = list(run_commands(workdir))
        bad = [f"{what}: {outcome.error}" for what, outcome, _ in commands if outcome.code]
        if bad:
            raise RuntimeError("\n".join(bad))
        expected[name] = {what: result for what, _, result in commands}
    return expected


def main() -> int:
    """Runs the study that the command line describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--workdirs", type=int, default=200)
    parser.add_argument("--commands", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        pool.submit(make_workdirs, out).result()
        expected = pool.submit(expectations, out).result()
    draw = random.Random(args.seed)
    todo = [("workdirs", case) for case in cases.damages(out, args.workdirs, draw)]
    todo += [("command lines", case) for case in cases.command_lines(args.commands, draw)]
    names = [case.name for case in cases.data_sets()]  # functions cannot be sent to a process
    todo += [("data sets", case) for case in names]
    numbers = args.only or range(len(todo))
    counts, failures = {kind: collections.Counter() for kind in RUNNERS}, 0
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        running = {pool.submit(run_case, *todo[i], out, expected): i for i in numbers}
        done = concurrent.futures.as_completed(running)
        for future in tqdm(done, total=len(running), unit="case"):
            number = running[future]
            kind, case = todo[number]
            for verdict, problem in future.result():
                counts[kind][f"FAILED {verdict}" if problem else verdict] += 1
                if problem:
                    failures += 1
                    print(f"{number} {kind} {case}: {problem}"[:600], flush=True)
    rows = [
        [kind, sum(kind == each for each, _ in (todo[i] for i in numbers)), verdict, count]
        for kind, verdicts in counts.items()
        for verdict, count in sorted(verdicts.items())
    ]
    text = sweep.table(["", "cases", "outcome of a command", "commands"], rows)
    sweep.publish(out, f"{text}\n\n{failures} failures.", sweep.provenance())
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
