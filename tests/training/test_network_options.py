"""Options of the network as text in a configuration."""

from typing import Any

import pytest

from paramshare.training.config import Config, ConfigError, Model
from paramshare.training.network_options import further_options
from paramshare.training.run import named_network


def test_options_reach_the_network():
    model = Model("decoder-2-8", options=("heads=2", "dropout=0.5", "tied=True", "kv_heads=1"))
    network: Any = named_network(Config(model), {"num_classes": 9}, (4,))
    assert (network.heads, network.dropout, network.tied, network.kv_heads) == (2, 0.5, True, 1)
    assert (network.vocabulary, network.length) == (9, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("decoder-2-8", ("head=2",), "holds 'head=2', which is no option of decoder-2-8"),
        ("decoder-2-8", ("length=2",), "holds 'length=2'"),
        ("decoder-2-8", ("heads",), "it must be NAME=VALUE.* such as heads=4"),
        ("decoder-2-8", ("heads=two",), "holds 'heads=two'; it must be NAME=VALUE"),
        ("decoder-2-8", ("heads=2", "heads=1"), "holds 'heads' twice"),
        ("vgg4", ("heads=2",), "no option of vgg4 to set here; it has none"),
        ("vgg4", ("num_classes=2",), "no option of vgg4"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ConfigError, match=message):
        further_options(Model(name, options=options))
