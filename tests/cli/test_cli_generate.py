"""``mpitrain generate``: a prompt, and what a run's model adds."""

from commands import mpitrain

JOB = """
[data]
source = "text"
path = "a.txt"
hold_out = "end"

[data.options]
context = 8
stride = 1

[model]
kind = "gpt"
layers = 1
width = 8
heads = 2

[optimizer]
kind = "adamw"

[train]
batch_size = 8
steps = 2
"""


def test_a_run_goes_on_with_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 20)
    (tmp_path / "job.toml").write_text(JOB)
    assert mpitrain("run", "job.toml", "--quiet", "--run-dir", "run", cwd=tmp_path).code == 0
    options = ("--length", "12", "--temperature", "0.8", "--top-k", "3", "--seed", "7")
    done = mpitrain("generate", "run", "abc", *options, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.startswith("abc")
    assert (len(done.out), set(done.out) <= set("abcdefgh\n")) == (16, True)
    again = mpitrain("generate", "run", "abc", *options, "--json", "--latest", cwd=tmp_path)
    expected = {"run": "run", "checkpoint": "step-00000002", "prompt": "abc", "added": done.out[3:-1]}
    assert again.result == expected
