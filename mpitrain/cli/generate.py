"""``mpitrain generate``: let a trained model of text go on with a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("generate", short_help="Let a trained model of text go on with a prompt.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--length", type=click.IntRange(min=0), default=500, show_default=True, help="Tokens to add.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="Divides the scores: below 1 the likely becomes likelier; 0 always takes the likeliest.",
)  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the K likeliest tokens only.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another seed, another text.")
@click.option("--latest", is_flag=True, help="Take the newest checkpoint instead of the best.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def command(
    run: Path, prompt: str, length: int, temperature: float, top_k: int | None, seed: int, latest: bool, as_json: bool
) -> None:
    """Print PROMPT and what the model of the run directory RUN adds to it."""
    from mpitrain.train.generate import generate
    from mpitrain.train.predictor import Predictor

    predictor = Predictor(run, latest=latest)
    added = generate(predictor, prompt, length, temperature=temperature, top_k=top_k, seed=seed)
    if as_json:
        click.echo(json.dumps({"run": str(run), "checkpoint": predictor.checkpoint, "prompt": prompt, "added": added}))
    else:
        click.echo(prompt + added)
