"""The list of injected faults follows the code; that each is caught, `tests.mutate` shows."""

from __future__ import annotations

from collections import Counter

from tests.fault import Fault
from tests.mutate import FAULTS, stale


def test_every_fault_can_still_be_injected() -> None:
    reasons = {fault.name: stale(fault) for fault in FAULTS}
    assert {name: reason for name, reason in reasons.items() if reason} == {}


def test_names_and_changes_are_unique() -> None:
    names = Counter(fault.name for fault in FAULTS)
    changes = Counter((fault.file, fault.right, fault.wrong) for fault in FAULTS)
    assert [key for key, count in (names + Counter(changes)).items() if count > 1] == []  # type: ignore[operator]


def test_what_no_longer_fits_is_told() -> None:
    file, tests = "tests/fault.py", "tests/test_faults.py"
    right = "class Fault:"
    assert stale(Fault("", file, right, "", tests)) == ""
    assert "is not in" in stale(Fault("", file, right + right, "", tests))
    assert "changes nothing" in stale(Fault("", file, right, right, tests))
    assert "no test" in stale(Fault("", file, right, "", f"{tests}::test_absent"))
    assert "there is no" in stale(Fault("", "tests/absent.py", right, "", tests))
