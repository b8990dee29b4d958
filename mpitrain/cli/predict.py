"""``mpitrain predict``: apply a trained model to new inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from mpitrain._errors import InputError


@click.command("predict", short_help="Apply a trained model to new inputs.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("inputs", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Write the model's outputs to this .npy file.")
@click.option("--latest", is_flag=True, help="Take the newest checkpoint instead of the best.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line per sample.")
def command(run: Path, inputs: Path, output: Path | None, latest: bool, as_json: bool) -> None:
    """Apply the model of the run directory RUN to INPUTS (.npy, .npz or .csv, one sample a row).

    Prints the class, or the predicted numbers, of each sample.  Samples have the shape that the model was trained on;
    flat ones of as many numbers, as all rows of a .csv file are, are taken too, and given that shape.
    """
    from mpitrain.train.predictor import Predictor
    from mpitrain.train.storage import disk

    if output is not None and output.suffix != ".npy":
        raise InputError("--output writes NumPy files", got=str(output), expected="a name that ends in .npy")
    predictor = Predictor(run, latest=latest)
    outputs = predictor.outputs(predictor.read(inputs))
    if output is not None:
        with disk("write outputs", output):
            np.save(output, outputs)
    answers = predictor.answers(outputs)
    if as_json:
        click.echo(json.dumps({"run": str(run), "checkpoint": predictor.checkpoint, "predictions": answers}))
    else:
        for answer in answers:
            click.echo(_line(answer))


def _line(answer: Any) -> str:
    return " ".join(f"{value:.6g}" for value in answer) if isinstance(answer, list) else str(answer)
