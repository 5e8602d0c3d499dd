"""Every comparison of results/speed.md, as tables.

    python experiments/studies/bench/run.py --out runs/speed
    python experiments/studies/bench/run.py --out runs/speed --torch PYTHON --only peers

Each comparison is a `paramshare bench` command, printed above its table. `--torch` names a Python
that has PyTorch; its programs and ours then take turns, a process each. Run it on an idle machine.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

# On CPUs the command takes convolutions off YNNPACK. This is JAX's own default.
DEFAULT = "--xla_cpu_experimental_ynn_fusion_type=+LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
FOUR = "--xla_force_host_platform_device_count=4"
CIFAR100 = "--input-shape 32 32 3 --num-classes 100"
# Name -> arguments of `paramshare bench`.
COMPARISONS = {
    "forms": "wrn-28-2 --ops auto xla",
    "soft sharing": "swrn-28-2-2 wrn-28-2",
    "filter bases": f"resnet34-s32u1 resnet34 --batch-size 16 {CIFAR100}",
    "ring, batch 16": f"resnet18-rpg resnet18 --batch-size 16 {CIFAR100}",
    "ring, batch 64": f"resnet18-rpg resnet18 {CIFAR100}",
    "repetition": "resnet16-4-repeat resnet16-4 --batch-size 16",
    "grouped": f"resnext50 --batch-size 4 {CIFAR100} --ops auto xla --rounds 3",
    "depthwise": f"mobilenetv2 --batch-size 16 {CIFAR100} --ops auto xla --rounds 5",
    "compile time": "wrn-40-2 swrn-40-2-4 wrn-40-2 --batch-size 16 --rounds 3",
    "four devices": "swrn-28-2-2 wrn-28-2 --devices 4",
    "baked": "swrn-28-2-2 wrn-28-2 --what baked --batch-size 1 --rounds 100",
    "baked, ring": f"resnet18-rpg resnet18 --what baked --batch-size 1 {CIFAR100} --rounds 100",
    "generation, soft": "swrn-28-10-2 --what generation",
    "generation, ring": "resnet18-rpg --what generation",
    "generation, repetition": "resnet16-4-repeat --what generation",
}
PEERS = (
    ("wrn-28-2", 64, 10),
    ("swrn-28-2-2", 64, 10),
    ("resnet34-s32u1", 16, 100),
    ("resnet18-rpg", 16, 100),
)
MODES = ("eager", "channels_last", "compiled")


def bench(words: list[str], flags: str = "") -> dict[str, Any]:
    """What `paramshare bench` prints as JSON, with these XLA_FLAGS."""
    code = "import sys; from paramshare.cli import main; sys.exit(main())"
    environment = {"XLA_FLAGS": flags} if flags else {}
    command = [sys.executable, "-c", code, "bench", "--devices", "1", *words, "--json"]
    return json.loads(run(command, environment))[0]


def run(command: list[str], environment: dict[str, str]) -> str:
    """The standard output of a command; exits with its last line of errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def table(result: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| program | ms | ratio (10%-90%) | trace + compile, s | MB | GB/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for x in result["timings"]:
        speed = f"{x['bytes_per_second'] / 1e9:.1f}" if x["bytes_per_second"] else ""
        lines.append(
            f"| {x['name']} | {x['median']:.1f} | {x['ratio']:.2f} "
            f"({x['ratio_low']:.2f}-{x['ratio_high']:.2f}) "
            f"| {x['trace_seconds']:.1f} + {x['compile_seconds']:.1f} | {x['memory'] / 1e6:.0f} "
            f"| {speed} |"
        )
    return lines


def peers(python: str, rounds: int, networks: list[str] | None) -> list[str]:
    """Medians over the rounds of each process's median; in each round every program runs once."""
    script = str(pathlib.Path(__file__).with_name("torch_peer.py"))
    heads = "paramshare", "paramshare, JAX's default", *(f"PyTorch {mode}" for mode in MODES)
    lines = [f"| network, batch | {' | '.join(heads)} | ours / best PyTorch |"]
    lines.append("| --- " * (len(heads) + 2) + "|")
    for name, batch, classes in PEERS:
        if networks and name not in networks:
            continue
        words = [name, "--batch-size", str(batch), "--num-classes", str(classes)]
        words += ["--input-shape", "32", "32", "3", "--rounds", "5"]
        times: dict[str, list[float]] = {head: [] for head in heads}
        for _ in range(rounds):
            for head, flags, ops in ((heads[0], "", "auto"), (heads[1], DEFAULT, "xla")):
                first = bench([*words, "--ops", ops], flags)["timings"][0]
                times[head].append(first["median"])
            for mode in MODES:
                command = [python, script, name, "--batch-size", str(batch), "--mode", mode]
                times[f"PyTorch {mode}"].append(statistics.median(json.loads(run(command, {}))))
        medians = {head: statistics.median(values) for head, values in times.items()}
        ratio = medians[heads[0]] / min(medians[f"PyTorch {mode}"] for mode in MODES)
        cells = " | ".join(f"{medians[head]:.0f}" for head in heads)
        lines.append(f"| {name}, {batch} | {cells} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+", choices=(*COMPARISONS, "peers"))
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has PyTorch")
    parser.add_argument("--rounds", type=int, default=3, help="of the peers")
    parser.add_argument(
        "--networks", nargs="+", choices=[name for name, *_ in PEERS], help="of the peers"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    page = []
    for name, words in COMPARISONS.items():
        if args.only and name not in args.only:
            continue
        choices = [FOUR] if "--devices 4" in words else [""]
        if "--ops" in words:  # what JAX does without the command's option
            choices.append(DEFAULT)
        for flags in choices:
            result = bench(words.split(), flags)
            about = ", ".join(f"{key} {value}" for key, value in result["about"].items())
            before = f"XLA_FLAGS={flags} " if flags else ""
            page += [f"### {name}", "", f"    {before}paramshare bench --devices 1 {words}", ""]
            page += [about, "", *table(result), ""]
            print("\n".join(page[-9 - len(result["timings"]) :]), flush=True)
    if args.torch and (not args.only or "peers" in args.only):
        page += ["### PyTorch", "", *peers(args.torch, args.rounds, args.networks), ""]
    elif args.only and "peers" in args.only:
        raise SystemExit("peers need --torch PYTHON, an interpreter that has PyTorch")
    (args.out / "speed.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
