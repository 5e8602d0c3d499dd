"""The cases of `robustness.py`: damaged workdirs, wrong command lines, changed data sets."""

import dataclasses
import gzip
import json
import pathlib
import random
from collections.abc import Callable, Sequence

import numpy as np

from paramshare.data import idx_files
from paramshare.storage import read_json, write_json

WORKDIRS = ("finished", "stopped", "folded")
KINDS = ("one bit", "many bytes", "half", "empty", "deleted", "random", "folder", "edited")
JSON = ("config.json", "identity.json", "result.json", "origin.json")


@dataclasses.dataclass(frozen=True)
class Damage:
    """One file of a workdir, damaged."""

    workdir: str
    file: str
    kind: str
    seed: int


def damages(out: pathlib.Path, count: int, draw: random.Random) -> list[Damage]:
    """Damages of every kind to every file, in an order that covers the files and kinds first."""
    all_of_them = []
    for workdir in WORKDIRS:
        files = [path for path in (out / workdir).rglob("*") if path.is_file()]
        for file in sorted(path.relative_to(out / workdir).as_posix() for path in files):
            for kind in KINDS[: None if file in JSON else -1]:
                all_of_them.append(Damage(workdir, file, kind, draw.randrange(2**31)))
    draw.shuffle(all_of_them)
    chosen, seen = [], {}
    # The folder of a checkpoint holds many files; each group of files gets an equal share.
    for _ in range(count):
        case = min(
            all_of_them, key=lambda case: (seen.get(_group(case), 0), seen.get(case.kind, 0))
        )
        all_of_them.remove(case)
        chosen.append(case)
        for key in (_group(case), case.kind):
            seen[key] = seen.get(key, 0) + 1
    return chosen


def _group(case: Damage) -> str:
    parts = case.file.split("/")
    return (
        f"{case.workdir}/{parts[0]}/{parts[-1] if len(parts) > 1 and len(parts[-1]) < 30 else ''}"
    )


def apply(case: Damage, workdir: pathlib.Path) -> None:
    """Damages the file of a copy of the workdir."""
    path, draw = workdir / case.file, random.Random(case.seed)
    content = bytearray(path.read_bytes())
    if case.kind in ("one bit", "many bytes") and content:
        for _ in range(1 if case.kind == "one bit" else 200):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif case.kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif case.kind == "empty":
        path.write_bytes(b"")
    elif case.kind == "random":
        path.write_bytes(draw.randbytes(len(content) + 10))
    elif case.kind == "edited":
        _edit(path, draw)
    else:
        path.unlink()
        if case.kind == "folder":
            path.mkdir()


def _edit(path: pathlib.Path, draw: random.Random) -> None:
    """Another value in one place of a JSON file, whose digest is made to fit."""
    value = read_json(path, ValueError, "")
    nested = json.loads("[" * 200 + "]" * 200)
    values = [None, -1, 10**400, "x", "", [], {}, 1e308, True, nested, "$\\frac$", [2**31], "\0", 0]
    node, name = value, draw.choice(list(value))
    while isinstance(node[name], dict) and node[name] and draw.random() < 0.9:
        node, name = node[name], draw.choice(list(node[name]))
    node[name] = draw.choice(values)
    write_json(path, value)


# --- Command lines. They run in a folder with the workdirs `finished` and `stopped` and config.py.

WORDS = (
    *("", "--", "-", "-1", "0", "nan", "inf", "1e999", "9" * 20, "9" * 400, "9" * 5000, "1.5", "x"),
    *("é" * 200, "a\0b", "a\nb", "b" * 300, "a/" * 2500, "gs://bucket/run", "s3://b", "~nobody/x"),
    *("$\\frac$", "None", "True", "[]", "{}", "*", "(", "stage(", "stage1=", "=0,1", "stage1=0,1"),
    *("finished", "stopped", "config.py", "nowhere", "finished/config.json", "/dev/null", "/"),
    *("--jsn", "--epochs", "--workdir", "--output", "--seed", "--help", "--data.name", "-q"),
)
VALID = (
    "train config.py --workdir new --epochs 1",
    "train config.py --workdir new --epochs 1 --model.name wrn-10-1",
    "train config.py --workdir new --epochs 1 --optimizer.learning-rate 0.1",
    "train config.py --workdir new --epochs 1 --optimizer.momentum 0.5 --optimizer.clip-norm 1",
    "train config.py --workdir new --epochs 1 --schedule.name step --schedule.milestones 1",
    "train config.py --workdir new --epochs 1 --augment.pad-crop 1 --augment.cutout 2",
    "train config.py --workdir new --epochs 1 --penalty.recurrence 0.1",
    "train config.py --workdir new --epochs 1 --data.name digits --data.validation 0.2",
    "train config.py --workdir new --epochs 1 --data.name idx --data.path nowhere",
    "train config.py --workdir new --epochs 1 --model.tied stage1=0,0,0",
    "train config.py --workdir new --epochs 1 --batch-size 64 --label-smoothing 0.1 --seed 3",
    "train config.py --workdir new --epochs 1 --model.stem cifar --model.num-classes 10",
    "train config.py --workdir new --epochs 1 --mapping shard_map --log-every 3",
    "train config.py --workdir new --seeds 0 1 --epochs 1",
    "train --workdir finished",
    "train --workdir stopped --log-every 5",
    "eval finished --split test --checkpoint best",
    "eval finished --split validation",
    "models swrn-*",
    "summary swrn-28-10-2 --num-classes 100 --input-shape 32 32 3 --json",
    "summary resnet50-shared --stem cifar",
    "summary finished --json",
    "similarity finished --threshold 0.5 0.9 --json",
    "similarity stopped --checkpoint last",
    "report finished",
    "fold finished --threshold 0.3 --output folded",
    "fold finished --threshold 0.3 --output folded --fine-tune 1 --optimizer.momentum 0.5",
    "convert finished --model swrn-16-1-2 --output converted",
    "convert finished --model wrn-16-1 --output converted --epochs 2",
    "export finished --form looped --output exported",
    "export finished --form baked --checkpoint best --output exported",
)
EXAMPLES = (
    ["--version"],
    [],
    ["help"],
    ["train"],
    ["train", "config.py"],
    ["train", "--workdir", "new"],
    ["train", "exits.py", "--workdir", "new"],
    ["summary", "swrn-1000-50-4"],
    ["summary", "wrn-28-" + "9" * 9],
    ["summary", "resnet18-rpg-" + "9" * 9],
    ["fold", "nowhere", "--output", "folded", "--epochs", "x"],
    ["convert", "nowhere", "--model", "x", "--output", "c", "--epohcs", "1"],
    ["convert", "finished", "--model", "wrn-16-2", "--output", "converted"],
    ["fold", "finished", "--threshold", "0.3", "--output", "finished"],
    ["export", "finished", "--output", "config.py/below"],
    ["eval", "finished", "--split", "train", "extra"],
)


def command_lines(count: int, draw: random.Random) -> list[list[str]]:
    """Command lines: some by hand, the others valid ones in which one or two words are changed."""
    lines = [list(words) for words in EXAMPLES]
    while len(lines) < count:
        words: list[str] = list(draw.choice(VALID).split())
        for _ in range(draw.choice((1, 1, 1, 2))):
            place = draw.randrange(1, len(words)) if len(words) > 1 else 0
            change = draw.choice(("replace", "replace", "replace", "insert", "drop", "repeat"))
            if change == "replace":
                words[place] = draw.choice(WORDS)
            elif change == "insert":
                words.insert(place, draw.choice(WORDS))
            elif change == "repeat":
                words.insert(place, words[place])
            elif len(words) > 1:
                del words[place]
        lines.append(words)
    return lines[:count]


# --- Data sets


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A folder of IDX files, how it was changed, and whether it has to be refused."""

    name: str
    make: Callable[[pathlib.Path], None]
    refused: bool = True
    options: Sequence[str] = ()


def data_sets() -> list[DataSet]:
    """Changed copies of scikit-learn's digits."""
    return [
        DataSet("as it is", _digits(), refused=False),
        DataSet("no label 0", _digits(lambda label: np.maximum(label, 1))),
        DataSet("no label 0, meant", _digits(lambda x: np.maximum(x, 1)), False, NUM_CLASSES),
        DataSet("labels 1 to 10", _digits(lambda label: label + 1)),
        DataSet("one stray label", _digits(lambda x: np.where(np.arange(len(x)) == 5, 200, x))),
        DataSet("one class", _digits(np.zeros_like)),
        DataSet("test labels 1 to 10", _digits(test=lambda label: label + 1)),
        DataSet("three bytes a label", _digits(lambda label: label[:, None].repeat(3, 1))),
        DataSet("too few labels", _digits(lambda label: label[:-5])),
        DataSet("channels first", _digits(image=lambda x: x[:, None].repeat(3, 1))),
        DataSet("no images", _digits(lambda x: x[:0], image=lambda x: x[:0])),
        DataSet("images of no size", _digits(image=lambda x: x[:, :0])),
        DataSet("fewer images than a batch", _digits(lambda x: x[:20], image=lambda x: x[:20])),
        DataSet("images are labels", _changed("train-images-idx3-ubyte.gz", _labels)),
        DataSet("half a file", _changed("train-images-idx3-ubyte.gz", lambda x: x[: len(x) // 2])),
        DataSet("a flipped bit", _changed("train-images-idx3-ubyte.gz", _flip)),
        DataSet("an empty file", _changed("t10k-images-idx3-ubyte.gz", lambda x: b"")),
        DataSet("a huge header", _changed("t10k-images-idx3-ubyte.gz", _huge)),
        DataSet("a missing file", _changed("t10k-labels-idx1-ubyte.gz", lambda x: None)),
        DataSet("a web page", _changed("t10k-labels-idx1-ubyte.gz", lambda x: b"<html>404</html>")),
    ]


NUM_CLASSES = ("--data.num-classes", "10")


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _digits(
    label: Callable = _same, test: Callable | None = None, image: Callable = _same
) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        pixels = (pixels.reshape(-1, 8, 8) * 15).astype(np.uint8)
        idx_files.write(
            folder,
            (image(pixels[:300]), label(labels[:300])),
            (image(pixels[300:400]), (test or label)(labels[300:400])),
            compress=True,
        )

    return make


def _changed(file: str, change: Callable[[bytes], bytes | None]) -> Callable[[pathlib.Path], None]:
    def make(folder: pathlib.Path) -> None:
        _digits()(folder)
        content = change((folder / file).read_bytes())
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)

    return make


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def _labels(content: bytes) -> bytes:
    return gzip.compress(b"\0\0\x08\x01\0\0\1\x2c" + bytes(300))


def _huge(content: bytes) -> bytes:
    return gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + bytes(100))
