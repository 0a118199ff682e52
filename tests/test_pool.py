"""Payloads are worked on here or in processes of their own, with the same results."""

from __future__ import annotations

import os

import pytest

from benchmarks.pool import results

PAYLOADS = [{"number": number} for number in (3, 1, 2)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_payload_comes_with_its_result(num_workers: int) -> None:
    found = list(results("tests.pool_targets:square", PAYLOADS, num_workers))
    assert sorted(value for _, value in found) == [1, 4, 9]
    assert all(value == payload["number"] ** 2 for payload, value in found)
    if num_workers == 1:
        assert [payload for payload, _ in found] == PAYLOADS


def test_one_worker_is_this_process_and_two_are_others() -> None:
    (here,) = [pid for _, pid in results("tests.pool_targets:process", PAYLOADS[:1], 1)]
    there = {pid for _, pid in results("tests.pool_targets:process", PAYLOADS, 2)}
    assert here == os.getpid()
    assert here not in there


def test_a_worker_that_dies_is_told_after_what_was_done() -> None:
    done: list[object] = []
    payloads = [*PAYLOADS, {"number": 0}]
    work = (done.append(job) for job, _ in results("tests.pool_targets:square", payloads, 2))
    with pytest.raises(RuntimeError, match=r"'number': 0.* died with exit code 3"):
        list(work)
    assert done
