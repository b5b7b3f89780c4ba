"""Each deliberate fault quotes the source as it is."""

from typing import Any

import pytest
from helpers.tools import tool

faults = tool("robustness/deliberate_faults")


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_source_contains_the_text_of_a_fault_once(fault: Any) -> None:
    assert faults.is_current(fault), f"mura_dist/{fault.file}: {fault.old!r}"
