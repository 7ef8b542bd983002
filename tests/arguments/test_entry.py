"""The way of a plain call is short, and comes back to no module that it has left."""

import entry


def test_the_way_to_the_first_function_is_short_and_leads_down():
    calls = entry.calls_before_apply()
    assert len(calls) <= entry.LIMIT
    assert entry.steps_back(calls) == []


def test_a_step_back_is_found():
    calls = [("/x/xent/losses/a.py", "f"), ("/x/xent/_core/b.py", "g"), ("/x/xent/losses/a.py", "h")]
    assert entry.steps_back(calls) == [("xent/_core/b.py", "xent/losses/a.py", "h")]
