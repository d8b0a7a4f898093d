"""Numbers of things, in words."""

import pytest

from hf_accel.utils.counts import count_of


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [(1, "class", "1 class"), (0, "class", "0 classes"), (1, "stage", "1 stage"), (1200, "stage", "1,200 stages")],
)
def test_a_count_of_one_is_singular(number, noun, expected):
    assert count_of(number, noun) == expected
