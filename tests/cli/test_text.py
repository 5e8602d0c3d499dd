"""A decoder trained on text: every command that takes its run, and `paramshare sample`."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.training.derive import load_run
from paramshare.training.result import Result, RunFacts


@pytest.fixture(scope="module")
def loaded_text(text_run):
    return load_run(text_run)


def test_the_epoch_with_the_fewest_bits_is_selected(text_run):
    lines = map(json.loads, (text_run / "metrics.jsonl").read_text().splitlines())
    bits = [line["validation_bits"] for line in lines if line["kind"] == "epoch"]
    selected = Result.read(text_run / "result.json").selected
    assert len(bits) == 3 and len(set(bits)) == 3 and selected is not None
    assert (selected.epoch - 1, selected.validation) == (int(np.argmin(bits)), min(bits))


def test_the_facts_say_that_inputs_are_tokens(text_run):
    facts = RunFacts.read(text_run / "identity.json")
    assert (facts.example.shape, facts.example.dtype) == ((1, 8), jnp.int32)


def test_greedy_samples_are_those_of_whole_forward_passes(text_run, loaded_text, command):
    run, variables, _ = loaded_text
    encode, decode = run.data.vocabulary.encode, run.data.vocabulary.decode
    tokens = encode("the q")
    apply = jax.jit(lambda tokens: run.model.apply(variables, tokens, train=False))
    while len(tokens) < 8:  # within the length, all tokens are seen
        padded = jnp.pad(jnp.asarray(tokens), (0, 8 - len(tokens)))
        tokens = np.append(tokens, np.argmax(apply(padded[None])[0, len(tokens) - 1]))
    words = ("sample", text_run, "--prompt", "the q", "--temperature", 0)
    assert command(*words, "--length", 3) == decode(tokens) + "\n"
    longer = command(*words, "--length", 30)  # beyond the length of the network
    assert longer.startswith(decode(tokens)) and len(longer) == 5 + 30 + 1


def test_samples_depend_on_the_seed_only(text_run, command):
    texts = [command("sample", text_run, "--length", 30, "--seed", seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("\n") and len(text) == 32 for text in texts)
    best = command("sample", text_run, "--checkpoint", "best", "--length", 30)
    assert len(best) == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "é"), "--prompt: the text has 'é', which the vocabulary does not have"),
        (("--prompt", ""), "--prompt is empty"),
        (("--length", "0"), "--length is 0"),
        (("--temperature", "-1"), "--temperature is -1.0"),
        (("--temperature", "nan"), "--temperature is nan"),
        (("--top-k", "-1"), "--top-k is -1"),
        (("--seed", "-1"), "--seed is -1"),
    ],
)
def test_bad_options(text_run, refused, options, message):
    assert message in refused("sample", text_run, *options)


def test_a_run_on_images_has_no_text(trained, refused):
    assert "'digits', which is no text" in refused("sample", trained)


def test_evaluation_and_summaries(text_run, command):
    evaluated = json.loads(command("eval", text_run))
    result = Result.read(text_run / "result.json")
    assert evaluated["measures"] == pytest.approx(result.last.measures)
    assert "sequences of 8 tokens" in command("summary", text_run)
    text = command("summary", "decoder-2-8", "--input-shape", "4", "--num-classes", "9")
    assert "sequences of 4 tokens" in text
    assert "attention.query" in command("similarity", text_run)


def test_a_shared_decoder_becomes_dense_and_runs_without_paramshare(
    text_run, loaded_text, command, refused, tmp_path
):
    text = command("convert", text_run, "--model", "decoder-2-8")
    before, after = (line for line in text.splitlines() if "bits per character" in line)
    assert before.split("test")[1] == after.split("test")[1]
    assert "nothing was folded" in command("fold", text_run)
    assert "cannot be shown" in refused(
        "export", text_run, "--predictions", "--output", tmp_path / "predictions"
    )
    command("export", text_run, "--output", tmp_path / "exported")
    run, variables, _ = loaded_text
    tokens = run.data.test.input[:3]
    np.save(tmp_path / "inputs.npy", tokens)
    script = [sys.executable, str(tmp_path / "exported" / "run.py")]
    files = [str(tmp_path / name) for name in ("inputs.npy", "outputs.npz")]
    done = subprocess.run(script + files, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = run.model.apply(variables, jnp.asarray(tokens), train=False)
    with np.load(files[1]) as outputs:
        np.testing.assert_allclose(outputs["output"], expected, rtol=1e-4, atol=1e-4)
