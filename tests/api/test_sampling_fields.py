"""The list of sampling fields against the value that services take."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tinkerapi.api.fields.sampling import SAMPLING_FIELDS
from training.types import SamplingParams

DEFAULTS = vars(SamplingParams())


def test_every_sampling_parameter_is_one_field() -> None:
    assert {*SAMPLING_FIELDS, "logit_bias"} == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_an_absent_field_means_what_the_service_assumes(name: str) -> None:
    assert SAMPLING_FIELDS[name].default == DEFAULTS[name]
