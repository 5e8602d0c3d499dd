"""Accuracy against bytes on disk: a ring that is pruned and quantised, and narrower plain networks.

    python experiments/studies/compress_curve.py experiments/recipes/quickstart.py \\
        --model resnet20-rpg-10000 --fine-tune 10 --out runs/compress_curve

Further options override the configuration. For every seed, trains the network; prunes its banks
(--prune), quantises them (--bits) and fine-tunes them for --fine-tune epochs, from a tenth of the
learning rate down to zero, for every pair of the two; 32 bits are float32. The network as it is
gets the same fine-tuning. Trains plain residual networks of the depth of --model with fewer
channels (--widths; 16 is the usual width) for as many epochs in all. Bytes are those of the packed
file (`variables.pack`) with all variables, of plain networks too. Every run has its own workdir in
DIR; rerun the study to continue it. Writes DIR/table.md, with 95% intervals of the t distribution
over the seeds, DIR/compress.json and DIR/compress_curve.png.
"""

import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

import jax
import sweep

from paramshare.cli import run_command
from paramshare.models import ResNet
from paramshare.report.path_pictures import interval
from paramshare.report.pictures import compress_curve
from paramshare.shared import Shared
from paramshare.training.config import Compression, Config, ConfigError
from paramshare.training.derive import derive, fine_tuning, load_run
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import fit, train
from paramshare.training.run import Run, prepare
from paramshare.training.workdir import stored_variables
from paramshare.transform.compress import finalise, prune, quantise
from paramshare.transform.packing import PACKED, pack, save_packed

FLOAT = 32  # bits of a number that is not quantised


def main() -> None:
    """Runs the study that the command line describes."""
    parser = sweep.parser(__doc__ or "")
    parser.add_argument("--model", default="resnet20-rpg-10000", help="a shared network")
    parser.add_argument("--bits", nargs="+", type=int, default=[FLOAT, 8, 6, 4, 2])
    parser.add_argument("--prune", nargs="+", type=float, default=[0.0, 0.5, 0.75])
    parser.add_argument("--method", choices=("kmeans", "uniform"), default="kmeans")
    parser.add_argument("--fine-tune", type=int, default=10, metavar="EPOCHS")
    parser.add_argument("--widths", nargs="*", type=int, default=[2, 3, 4])
    args, base = sweep.parse(parser)
    base = sweep.with_network(base, args.model)
    if args.widths and not re.match(r"resnet\d+", args.model):
        raise ConfigError(
            f"--widths needs a residual network, such as resnet20-rpg-10000, got {args.model}; "
            "give --widths without values to leave plain networks out"
        )
    records: list[dict[str, Any]] = []
    for seed in args.seeds:
        config = dataclasses.replace(base, seed=seed)
        records += compressed(config, args)
        records += [plain(config, width, args) for width in args.widths]
        (args.out / "compress.json").write_text(json.dumps(records, indent=1) + "\n")
    kinds = curves(records)
    picture, title = args.out / "compress_curve.png", f"{args.model} on {base.data.name}"
    compress_curve(kinds, picture, score=records[0]["title"], title=title)
    sweep.publish(args.out, tables(records), sweep.provenance())
    print(f"picture        {picture}")


def compressed(config: Config, args: Any) -> list[dict[str, Any]]:
    """Trains the network and compresses it in every way."""
    workdir = args.out / f"float-seed{config.seed}"
    train(config, workdir)
    source, variables, _ = load_run(workdir)
    assert isinstance(source.model, Shared)
    before = make_evaluate(source)(variables, source.data.test)
    records = []
    for bits in args.bits:
        for part in args.prune:
            settings = Compression(None if bits == FLOAT else bits, args.method, part)
            config_of = dataclasses.replace(
                fine_tuning(config, args.fine_tune), compression=settings
            )
            run = prepare(config_of)
            model, start = source.model, prune(source.model, variables, part)
            if settings.bits is not None:
                model, start = quantise(model, start, settings.bits, settings.method)
            folder = args.out / f"bits{bits}-prune{part:g}-seed{config.seed}"
            derived = derive(
                source,
                variables,
                run,
                start,
                workdir=folder,
                origin={"command": "compress", "workdir": workdir.name},
                fine_tune=True,
                resume=True,
                before=before,
            )
            assert derived.fine_tuned is not None
            final, _ = stored_variables(folder, run.shapes)
            name = source.task.score.name
            scores = derived.after.measures[name], derived.fine_tuned.measures[name]
            assert isinstance(run.model, Shared)
            final = finalise(run.model, final)[1]
            records.append(record(run, final, folder, *scores, bits=bits, prune=part))
    return records


def plain(config: Config, width: int, args: Any) -> dict[str, Any]:
    """Trains a plain network with fewer channels."""
    blocks = (int(re.findall(r"\d+", config.model.name)[0]) - 2) // 6
    config = dataclasses.replace(config, epochs=config.epochs + args.fine_tune)
    data = prepare(config).data
    model = ResNet(
        (blocks,) * 3,
        (width, 2 * width, 4 * width),
        stem="cifar",
        stem_width=width,
        shortcut="pad",
        **data.task.network_options(),
    )
    run = prepare(config, model=model, data=data)
    workdir = args.out / f"width{width}-seed{config.seed}"
    score = fit(run, workdir).last_score
    variables, _ = stored_variables(workdir, run.shapes)
    return record(run, variables, workdir, score, score, width=width)


def record(
    run: Run, variables: Any, workdir: pathlib.Path, after: float, tuned: float, **about: Any
) -> dict[str, Any]:
    """What is measured of a network; its packed file is written."""
    packed = pack(jax.device_get(variables))
    save_packed(packed, workdir / PACKED)
    return about | {
        "seed": run.config.seed,
        "title": run.task.score.title,
        "format": run.task.score.format_spec,
        "bytes": (workdir / PACKED).stat().st_size,
        "banks": packed.banks,
        "after": after,
        "tuned": tuned,
    }


def key_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What is the same over the seeds."""
    return tuple(entry.get(name) for name in ("width", "bits", "prune"))


def grouped(records: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The records of all seeds, by what was done."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in records:
        groups.setdefault(key_of(entry), []).append(entry)
    return groups


def curves(
    records: list[dict[str, Any]],
) -> dict[str, list[tuple[float, float, float]]]:
    """Points (bytes, mean score, half the interval) by label."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for (width, _, part), runs in grouped(records).items():
        label = "plain, narrower" if width else f"{part:.0%} pruned" if part else "not pruned"
        size = sum(entry["bytes"] for entry in runs) / len(runs)
        lines.setdefault(label, []).append((size, *interval([entry["tuned"] for entry in runs])))
    return {label: sorted(points) for label, points in lines.items()}


def tables(records: list[dict[str, Any]]) -> str:
    """Means over seeds, by what was done."""
    rows, form = [], records[0]["format"]
    for (width, bits, part), runs in grouped(records).items():
        what = f"plain, width {width}" if width else f"{bits} bits, {part:.0%} pruned"
        sizes = [
            f"{sum(entry[key] for entry in runs) // len(runs):,}" for key in ("bytes", "banks")
        ]
        shown = []
        for key in ("after", "tuned"):
            mean, half = interval([entry[key] for entry in runs])
            shown.append(f"{format(mean, form)} ± {format(half, form)}")
        rows.append([what, *sizes, *shown])
    title = records[0]["title"]
    head = ["network", "bytes of the file", "of them banks", f"{title} compressed", "fine-tuned"]
    return sweep.table(head, rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
