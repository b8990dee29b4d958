"""Codecs in job files: a name, or a table with options; what is wrong is said in one line."""

from __future__ import annotations

import pytest

from mpitrain._errors import JobError
from mpitrain.comm import LocalWorld
from mpitrain.comm.codecs import Codec, PowerSGD, TopK
from mpitrain.parallel import DataParallel
from mpitrain.train.assembly import assemble
from mpitrain.train.job import Job

TOML = """
[data]
source = "digits"
[model]
kind = "mlp"
hidden = [32]
[optimizer]
kind = "sgd"
[method]
{}
[train]
epochs = 1
"""


@pytest.mark.parametrize(
    ("line", "codec"),
    [
        ("", None),
        ('codec = "powersgd"', PowerSGD()),
        ('codec = { kind = "topk", ratio = 0.1, values = "fp16" }', TopK(ratio=0.1, values="fp16")),
        ('[method.codec]\nkind = "powersgd"\nrank = 2\nmin_size = 100', PowerSGD(rank=2, min_size=100)),
    ],
)
def test_a_line_gives_the_method_its_codec(line: str, codec: Codec | None):
    job = Job.from_toml(TOML.format(line), "a.toml")
    assert Job.from_toml(job.to_toml(), "b.toml").method == job.method

    def check(comm):
        method = assemble(job, comm).method
        assert isinstance(method, DataParallel)
        assert method.codec == codec

    LocalWorld(1).run(check)


def test_the_command_line_takes_a_name():
    job = Job.from_toml(TOML.format(""), "a.toml", ["method.codec=int8"])
    assert job.method.codec is not None
    assert (job.method.codec.kind, job.method.codec.arguments()) == ("int8", {"min_size": 1024, "block": 256})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'codec = "powersdg"',
            'a.toml: method.codec.kind: is not one of the choices; got "powersdg"; expected one of "fp16", "bf16", '
            '"int8", "topk", "powersgd"; did you mean "powersgd"?',
        ),
        (
            'codec = { kind = "topk", ration = 1 }',
            'a.toml: method.codec.ration: unknown key with kind = "topk"; expected one of kind, min_size, ratio, '
            'values; did you mean "ratio"?',
        ),
        (
            'codec = { kind = "topk", ratio = 2 }',
            "a.toml: method.codec.ratio: is too large; got 2; expected number > 0 and ≤ 1",
        ),
        ("codec = 8", "a.toml: method.codec: is not a table; got 8; expected a table"),
        (
            'average_every = 4\ncodec = "fp16"',
            "a.toml: method.codec.kind: compresses gradients, which average_every > 0 does not send; "
            'got "fp16"; expected average_every = 0',
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(line: str, message: str):
    with pytest.raises(JobError) as caught:
        Job.from_toml(TOML.format(line), "a.toml")
    assert str(caught.value) == message
