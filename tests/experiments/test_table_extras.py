"""What a table might have in addition: the smoke run."""

import pytest

import table_extras


@pytest.mark.slow
def test_both_additions_are_judged_next_to_the_table_alone(run):
    record = run(table_extras)["table-extras"]
    noise, classes = record.data["rows"]
    assert noise["gamma"] in table_extras.GAMMAS
    assert 0.5 < noise["with"] / noise["without"] < 3
    assert classes["classes"] == 4
    assert classes["with"] > 0
    text = table_extras.EXPERIMENT.tables({"table-extras": record})["table-extras"]
    assert "noise before an evaluation" in text
