"""An audit's JSON against the schema that the docs describe."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import xent
from xent.auditing.records import Measures

DOCS = Path(__file__).parents[2] / "docs" / "reference"
SCHEMA = json.loads((DOCS / "audit.schema.json").read_text())


@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize("classes", [2, 5, 1100])
def test_the_json_is_of_the_schema(classes, sweeps):
    rng = np.random.default_rng(0)
    z = 2 * rng.standard_normal((300, classes))
    result = xent.audit(logits=z, target=z.argmax(1), sweeps=sweeps)
    jsonschema.validate(json.loads(result.to_json(), parse_constant=pytest.fail), SCHEMA)


def test_odd_rows_are_of_the_schema():
    p = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for target, weight in (([1, 1, 0], None), ([0, 1, 0], None), ([0, 0, 0], [0.0, 0.0, 2.0])):
        result = xent.audit(p, target=target, sample_weight=weight)
        jsonschema.validate(json.loads(result.to_json(), parse_constant=pytest.fail), SCHEMA)
        str(result)


def test_the_schema_and_the_page_name_every_measure():
    assert {*SCHEMA["properties"]["measures"]["properties"]} == {*Measures.__dataclass_fields__}
    page = (DOCS.parent / "explanation" / "audit.md").read_text()
    assert not [name for name in Measures.__dataclass_fields__ if f"`{name}`" not in page]
