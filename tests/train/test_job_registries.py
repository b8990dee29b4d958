"""A name or an option that a registry has and the job file has not, or the other way round, is found here."""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_args

import pytest

from mpitrain.comm.codecs import CODECS, FORMATS
from mpitrain.data import DATASETS, PARTITIONS, SAMPLINGS
from mpitrain.nn import LOSSES, MODELS
from mpitrain.nn.activations import ACTIVATIONS
from mpitrain.optim import OPTIMIZERS, SCHEDULES
from mpitrain.train.job import Job
from mpitrain.train.job import model as job_model
from mpitrain.train.job.data import Data, PartitionOptions
from mpitrain.train.job.section import KindSection, Section, choices, kind_of
from mpitrain.train.job.train import MethodSection


def sections(owner: type[Section], field: str) -> dict[str, type[KindSection]]:
    return {
        kind_of(held): held for held in choices(owner.model_fields[field].annotation) if issubclass(held, KindSection)
    }


def options(section: type[KindSection]) -> set[str]:
    return set(section.model_fields) - section.not_options


OPTIMIZER_SECTIONS = sections(Job, "optimizer")
MODEL_SECTIONS = sections(Job, "model")
CODEC_SECTIONS = sections(MethodSection, "codec")
SCHEDULE_SECTIONS = sections(OPTIMIZER_SECTIONS["sgd"], "schedule")


def test_the_job_has_every_name():
    assert set(OPTIMIZER_SECTIONS) == set(OPTIMIZERS)
    assert set(MODEL_SECTIONS) == {*MODELS, "build"}
    assert set(job_model.LOSSES) == set(LOSSES)
    assert set(get_args(job_model.Activation)) == set(ACTIVATIONS)
    assert set(SCHEDULE_SECTIONS) == set(SCHEDULES)
    assert set(CODEC_SECTIONS) == set(CODECS)
    assert get_args(CODEC_SECTIONS["topk"].model_fields["values"].annotation) == tuple(FORMATS)
    assert set(get_args(Data.model_fields["source"].annotation)) == {*DATASETS, "build"}
    assert set(get_args(Data.model_fields["partition"].annotation)) == {*PARTITIONS, "none"}
    assert set(get_args(Data.model_fields["sampling"].annotation)) == set(SAMPLINGS)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_has_the_options_and_defaults_of_its_section(name: str):
    section = OPTIMIZER_SECTIONS[name]
    declared = {field.name: field.default for field in dataclasses.fields(OPTIMIZERS[name])}
    assert {option: section.model_fields[option].default for option in options(section)} == declared


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_has_the_options_and_defaults_of_its_section(name: str):
    section = MODEL_SECTIONS[name]
    given_by_the_data = {"inputs", "outputs", "input_shape", "vocabulary", "context"}
    parameters = inspect.signature(MODELS[name]).parameters.values()
    declared = {each.name: each.default for each in parameters if each.name not in given_by_the_data}
    assert {option: section.model_fields[option].default for option in options(section)} == declared


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_codec_has_the_options_and_defaults_of_its_section(name: str):
    section = CODEC_SECTIONS[name]
    declared = {field.name: field.default for field in dataclasses.fields(CODECS[name])}
    assert {option: section.model_fields[option].default for option in options(section)} == declared


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_has_the_options_of_its_section(name: str):
    given_by_the_trainer = {"lr", "steps"}
    declared = {field.name for field in dataclasses.fields(SCHEDULES[name])} - given_by_the_trainer
    assert options(SCHEDULE_SECTIONS[name]) - {"warmup_steps", "warmup_start"} == declared


def test_the_partitions_have_the_options_of_the_section():
    declared = set()
    for way in PARTITIONS.values():
        declared |= set(inspect.signature(way).parameters) - {"dataset", "parts", "seed"}
    assert set(PartitionOptions.model_fields) == declared
