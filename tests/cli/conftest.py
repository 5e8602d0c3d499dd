"""One tiny run for all tests of the command; whoever changes it takes a copy."""

import contextlib
import io
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax
import pytest
from PIL import Image

from paramshare.cli import main
from paramshare.data import Digits
from paramshare.report import pictures, predictions
from paramshare.storage import run_path, write_bytes
from paramshare.training import run as training_run
from paramshare.training.derive import load_run

CONFIG = """
from paramshare.data import Digits
from paramshare.training.config import Config, Model, Penalty

config = Config(
    model=Model("swrn-16-1-2"),
    data=Digits(train_examples=64),
    penalty=Penalty(recurrence=0.01),
    epochs=2,
    batch_size=28,
)
"""


@pytest.fixture(autouse=True, scope="session")
def _lenient_promotion():
    # optax's schedules multiply integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        yield


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Pictures have tests of their own; here every run would draw four, and compile a program."""
    png = io.BytesIO()
    Image.new("L", (1, 1)).save(png, "png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "draw_examples", lambda *args: False)
        patch.setattr(
            pictures, "save", lambda figure, file: write_bytes(run_path(file), png.getvalue())
        )
        yield


@pytest.fixture(autouse=True, scope="module")  # other folders draw in the same process
def _pictures_are_not_drawn():
    with undrawn():
        yield


CHECKED: dict = {}
LOADED: dict = {}


@pytest.fixture(autouse=True, scope="module")
def _what_earlier_commands_found(equal_runs_share_programs):
    """Commands run in one process here: each network is traced and each set is read once."""
    check_model, load = training_run.check_model, Digits.load

    def check(model, name, data):
        key = model, name, data.name, data.input_shape, data.task
        if key not in CHECKED:
            CHECKED[key] = check_model(model, name, data)
        return CHECKED[key]

    def read(self, seed=0):
        if (self, seed) not in LOADED:
            LOADED[self, seed] = load(self, seed)
        return LOADED[self, seed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "check_model", check)
        patch.setattr(Digits, "load", read)
        yield


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> str:
    """A configuration: two epochs of two steps; two layers on two templates in each stage."""
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, config_file) -> pathlib.Path:
    """The workdir of a finished run of `config_file`; not to be changed."""
    return train_once(config_file, tmp_path_factory)


def train_once(config_file: str, tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with undrawn():
        assert main(["train", config_file, "--workdir", str(workdir)]) == 0
    return workdir


PATHS = """
from paramshare.data import Curriculum, Grids
from paramshare.training.config import Config, Model, Penalty

config = Config(
    Model("spathnet-4-4-2"),
    Grids(curriculum=Curriculum(6, 0.1, (4,), 80, 7, (), (), ()), validation=0.2),
    penalty=Penalty(recurrence=0.01),
    epochs=2,
    batch_size=28,
)
"""


@pytest.fixture(scope="session")
def small_config_file(tmp_path_factory) -> str:
    """Four layers on two templates and tiny grids: two epochs of two steps, trained in seconds."""
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(PATHS)
    return str(path)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, small_config_file) -> pathlib.Path:
    """The workdir of a finished run of `small_config_file`; not to be changed."""
    return train_once(small_config_file, tmp_path_factory)


DECODER = """
from paramshare.data import Text
from paramshare.training.config import Config, Model, Optimizer

config = Config(
    Model("decoder-2-8-tied", options=("heads=2",)),
    Text(path="FILE", length=8, validation=0.1),
    optimizer=Optimizer("adam", learning_rate=0.05),
    epochs=3,
    batch_size=32,
)
"""


@pytest.fixture(scope="session")
def text_run(tmp_path_factory) -> pathlib.Path:
    """The workdir of a decoder that was trained on a sentence, again and again."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 20)
    (folder / "config.py").write_text(DECODER.replace("FILE", str(folder / "text.txt")))
    return train_once(str(folder / "config.py"), tmp_path_factory)


@pytest.fixture(scope="session")
def loaded(trained):
    """The run of `trained`, its variables and their step."""
    return load_run(trained)


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
    """A copy of the finished run."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def command(capsys) -> Callable[..., str]:
    """A function that runs a command and returns what it prints."""

    def run(*args) -> str:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """A function that runs a command with bad input: one line on stderr, exit code 2."""

    def run(*args) -> str:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.err.count("\n") == 1 and captured.err.startswith("paramshare: ")
        assert "Traceback" not in captured.err and not captured.out
        return captured.err

    return run
