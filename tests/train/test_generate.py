"""Text from a run: what is drawn follows the model's chances, the seed and nothing else."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpitrain._errors import DataError, InputError, JobError
from mpitrain.comm import LocalWorld
from mpitrain.data.windows import windows
from mpitrain.train import Job, train_job
from mpitrain.train.facts import Facts
from mpitrain.train.generate import draw, generate
from mpitrain.train.models import build_model
from mpitrain.train.predictor import Predictor

TEXT = "abcdefgh" * 40
GPT = {"kind": "gpt", "layers": 1, "width": 16, "heads": 2}


def trained(folder: Path, data: dict, model: dict, steps: int = 60) -> Predictor:
    """Train on one rank."""
    job = Job.from_dict(
        {
            "data": {"hold_out": "end", "test": 0.2, **data},
            "model": model,
            "optimizer": {"kind": "adamw", "lr": 0.01},
            "train": {"batch_size": 8, "steps": steps, "evaluate_every_steps": steps},
        },
        folder / "job.toml",
    )
    LocalWorld(1).run(lambda comm: train_job(job, comm, run_dir=folder / "run"))
    return Predictor(folder / "run")


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("letters")
    (folder / "a.txt").write_text(TEXT)
    return trained(folder, {"source": "text", "path": "a.txt", "options": {"context": 8, "stride": 1}}, GPT)


def test_what_was_learnt_is_written_also_beyond_the_context(letters: Predictor):
    assert generate(letters, "c", 20, temperature=0) == (TEXT * 2)[3:23]
    assert generate(letters, "abcdefghabcdefghab", 5, temperature=0) == "cdefg"
    assert generate(letters, "a", 0) == ""


def test_the_result_of_a_text_has_no_matrix_of_its_letters(tmp_path: Path):
    (tmp_path / "a.txt").write_text(TEXT)
    trained(tmp_path, {"source": "text", "path": "a.txt"}, {"kind": "bigram"}, steps=1)
    result = json.loads((tmp_path / "run" / "result.json").read_bytes())
    assert "test_accuracy" in result["metrics"]
    assert not {"confusion", "classes"} & set(result)


def test_the_seed_and_the_place_decide(letters: Predictor):
    texts = {seed: generate(letters, "a", 30, temperature=5.0, seed=seed) for seed in (0, 1)}
    assert texts[0] != texts[1]
    assert generate(letters, "a", 30, temperature=5.0, seed=0) == texts[0]
    assert generate(letters, "a" + texts[0][:10], 20, temperature=5.0, seed=0) == texts[0][10:]
    assert generate(letters, "a", 30, temperature=50.0, top_k=1) == generate(letters, "a", 30, temperature=0)


def test_each_place_has_a_chance_of_its_own(letters: Predictor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mpitrain.train.generate._scores", lambda predictor, tokens: np.zeros(8))
    text = generate(letters, "a", 400)
    counts = [text.count(letter) for letter in "abcdefgh"]
    assert sum(counts) == 400
    assert 25 < min(counts) <= max(counts) < 75  # 50 ± 6.6


def test_tokens_a_second_are_in_the_records(letters: Predictor):
    run = Path(letters.job.data.path).parent / "run"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [each for each in map(json.loads, lines) if each["kind"] == "train"]
    assert records
    for each in records:
        assert each["tokens_per_s"] == pytest.approx(8 * each["samples_per_s"])


def test_bits_per_character_are_in_the_result(letters: Predictor):
    run = Path(letters.job.data.path).parent / "run"
    assert '"test_bits_per_character": 0.' in (run / "result.json").read_text()
    assert '"bits_per_character": ' in (run / "metrics.jsonl").read_text()
    assert "Test bits per character" in (run / "report.html").read_text()


def test_a_model_of_single_tokens_writes_too(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    data = {"source": "text", "path": "a.txt", "options": {"unit": "byte"}}
    bigram = trained(tmp_path, data, {"kind": "bigram"}, steps=200)
    assert generate(bigram, "c", 12, temperature=0) == "defghabcdefg"
    assert "bits_per_byte" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_tokens_of_ones_own(tmp_path: Path):
    (np.arange(400) % 7).astype(np.uint16).tofile(tmp_path / "t.bin")
    data = {"source": "tokens", "path": "t.bin", "options": {"vocabulary_size": 8, "context": 4, "stride": 1}}
    assert generate(trained(tmp_path, data, GPT), "2 3", 4, temperature=0) == "4 5 6 0"
    assert "bits_per_token" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_what_cannot_be_gone_on_with(letters: Predictor):
    with pytest.raises(DataError, match=r"generate: prompt: the text has tokens that are not in .*; got 'X'"):
        generate(letters, "aX", 3)
    with pytest.raises(InputError, match=r"generate: the prompt is not text in UTF-8; got 'a\\udcff'"):
        generate(letters, "a\udcff", 5)
    with pytest.raises(InputError, match="generate: the prompt is empty; expected at least one token"):
        generate(letters, "", 3)
    digits = copy(letters)
    digits.facts = replace(letters.facts, task="classification")
    with pytest.raises(InputError, match="generate: the run's model is not one of text; got a classification"):
        generate(digits, "a", 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_chances(temperature: float):
    scores = np.array([0.5, 2.0, -1.0, 2.0])
    chances = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    places = (np.arange(20_000) + 0.5) / 20_000
    drawn = [draw(scores, temperature, None, place) for place in places]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(drawn), chances, atol=1e-4)
    kept = [draw(scores, temperature, 2, place) for place in places]
    assert np.bincount(kept, minlength=4).tolist() == [0, 10_000, 0, 10_000]


def test_draws_at_the_ends():
    scores = np.array([0.0, 800.0, -800.0])
    assert draw(scores, 1.0, None, 0.0) == 1
    assert draw(scores, 1.0, None, np.nextafter(1.0, 0.0)) == 1
    assert draw(scores, 0.0, 3, 0.9) == 1
    assert draw(np.zeros(3), 1.0, None, np.nextafter(1.0, 0.0)) == 2


def test_overlapping_windows_are_hashed_but_once():
    whole = windows(np.arange(500) % 7, "text", 50, 1, "abcdefg")
    changed = windows(np.append(np.arange(499) % 7, 0), "text", 50, 1, "abcdefg")
    assert Facts.of(whole).fingerprint == Facts.of(whole.cover()).fingerprint != Facts.of(changed).fingerprint


def test_a_gpt_of_data_of_unknown_kind_needs_windows_of_tokens(letters: Predictor):
    for task, shape in (("classification", (5,)), ("sequence", (5, 2)), ("sequence", ())):
        with pytest.raises(JobError, match=r'model.kind = "gpt": needs windows of tokens; got .*shape \(context,\)'):
            build_model(letters.job, Facts(task, shape, 3))
