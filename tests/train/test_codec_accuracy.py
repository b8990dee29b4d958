"""The digits CNN learns as well with each codec as without one, on two ranks, and sends less."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import codec_accuracy

from mpitrain.comm.codecs import CODECS

LEAST_RATIO = {"fp16": 1.9, "bf16": 1.9, "int8": 3.5, "topk": 10, "powersgd": 3.5}


def test_every_codec_has_a_row():
    assert {name for name in CODECS if any(f'"{name}"' in row for row in codec_accuracy.CODECS)} == set(CODECS)
    assert set(LEAST_RATIO) == set(CODECS)


@pytest.mark.parametrize("codec", sorted(LEAST_RATIO))
def test_fewer_bytes_go_over_the_wire(codec):
    assert codec_accuracy.wire_ratio(f'"{codec}"') > LEAST_RATIO[codec]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("codec", codec_accuracy.CODECS)
def test_accuracy_is_within_a_point(codec):
    print(codec_accuracy.row(codec))
    assert codec_accuracy.points_lost(codec) <= 1.0
