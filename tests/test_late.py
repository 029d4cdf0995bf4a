"""Calls that wait for the next step: in order, and once."""

import pytest

from wmjax.run.late import Late


def test_calls_are_made_in_order_when_settled_and_once():
    made, late = [], Late()
    for number in range(3):
        late.add(lambda number=number: made.append(number))
    assert made == []
    late.settle()
    late.settle()
    assert made == [0, 1, 2]
    late.add(lambda: made.append(3))
    late.settle()
    assert made == [0, 1, 2, 3]


def test_what_a_call_adds_waits_for_the_next_time():
    made, late = [], Late()
    late.add(lambda: late.add(lambda: made.append("later")) or made.append("now"))
    late.settle()
    assert made == ["now"]
    late.settle()
    assert made == ["now", "later"]


def test_after_a_call_that_fails_nothing_is_made_twice():
    made, late = [], Late()
    late.add(lambda: made.append("before"))
    late.add(lambda: 1 / 0)
    late.add(lambda: made.append("after"))
    with pytest.raises(ZeroDivisionError):
        late.settle()
    late.settle()
    assert made == ["before"]
