"""Text from a trained model: token by token, each drawn from what the model expects after those before it."""

from __future__ import annotations

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays import Key
from mpitrain.data import Tokenizer
from mpitrain.train.predictor import Predictor


def generate(
    predictor: Predictor, prompt: str, length: int, *, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
) -> str:
    """Return the text that a model adds to a prompt.

    Parameters
    ----------
    predictor : Predictor
        The model of a run on text.
    prompt : str
        At least one token; of a run on tokens of the user's own, their numbers.
    length : int
        Tokens to add.
    temperature : float
        What the scores are divided by; 0: the likeliest token is taken.
    top_k : int, optional
        Draw from so many of the likeliest tokens; None: from all.
    seed : int
        The text depends on it and on the place of each token, and on nothing else that is random.

    Raises
    ------
    InputError
        The run is not one on text, or the prompt has no token, or is not text in UTF-8.
    DataError
        The prompt has a token that is not in the run's vocabulary.

    Notes
    -----
    Cost: a forward pass over the whole context for each token.  The model sees the last ``context`` tokens.
    """
    facts = predictor.facts
    if facts.task != "sequence" or not facts.class_names:
        raise InputError("the run's model is not one of text", operation="generate", got=f"a {facts.task}")
    tokenizer = Tokenizer(predictor.job.data.unit, facts.class_names)
    try:  # the command line hands on bytes that are not UTF-8 as surrogates
        tokens = tokenizer.encode(prompt.encode(errors="surrogateescape"), "generate: prompt").tolist()
    except UnicodeError as error:
        raise InputError("the prompt is not text in UTF-8", operation="generate", got=ascii(prompt)) from error
    if not tokens:
        raise InputError("the prompt is empty", operation="generate", expected="at least one token")
    key, start = Key(seed).child("generate"), len(tokens)
    for place in range(start, start + length):
        chance = float(key.uniform(np.array([place]), (0, 1), np.float64)[0, 0])
        tokens.append(draw(_scores(predictor, tokens), temperature, top_k, chance))
    return tokenizer.decode(tokens[start:])


def draw(scores: Array, temperature: float, top_k: int | None, chance: float) -> int:
    """Return a token by its score.

    Parameters
    ----------
    scores : array of float64, shape (vocabulary,)
        Logits.
    temperature, top_k
        As for `generate`; of equal scores, the first tokens are among the likeliest.
    chance : float
        In [0, 1): where in the tokens' cumulative probability the drawn one is, the likeliest first.
    """
    likeliest = np.argsort(-scores, kind="stable")[:top_k]
    if temperature == 0:
        return int(likeliest[0])
    weights = np.exp((scores[likeliest] - scores[likeliest[0]]) / temperature)
    cumulative = np.cumsum(weights)
    place = int(np.searchsorted(cumulative, chance * cumulative[-1], side="right"))
    return int(likeliest[min(place, len(likeliest) - 1)])


def _scores(predictor: Predictor, tokens: list[int]) -> Array:
    """Return the logits of the token after ``tokens``."""
    shape = predictor.facts.sample_shape
    if shape:  # windows; else a model of single tokens
        outputs = predictor.model.predict(predictor.params, np.array([tokens[-shape[0] :]], np.int32))[0]
    else:
        outputs = predictor.model.predict(predictor.params, np.array(tokens[-1:], np.int32))
    scores: Array = outputs[-1].astype(np.float64)
    return scores
