from itertools import combinations

import pytest
import torch

from hf_accel.utils.seeding import generator, rows_generator


def draw(seed: int, *key: int | str) -> torch.Tensor:
    return torch.rand(8, generator=generator(seed, *key))


def test_a_draw_is_a_function_of_its_key_alone():
    first = draw(3, "crop", 7)
    torch.manual_seed(99)
    draw(3, "crop", 8)
    before = torch.get_rng_state()
    assert torch.equal(draw(3, "crop", 7), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_that_differ_in_value_type_order_or_borders_draw_differently():
    keys = [(), (1,), ("1",), (1, 2), (2, 1), (12,), ("12",), ("1", 2), (1, "2"), ("a", "bc"), ("ab", "c"), ("abc",)]
    draws = {(seed, key): draw(seed, *key) for seed in (0, 1, 2) for key in keys}
    for one, other in combinations(draws, 2):
        assert not torch.equal(draws[one], draws[other]), (one, other)


def test_draws_are_the_same_on_every_machine():
    # Python's own hash() of a text differs from process to process
    assert generator(0, "order", 3).initial_seed() == 1855528780364446383


@pytest.mark.parametrize("width", [1, 3, 49, 300])
def test_each_process_gets_its_rows_of_the_global_draw(width):
    rows, key = 12, (5, "tokens", 2, "query1")
    whole = torch.rand(rows, width, generator=generator(*key))
    for processes in (1, 2, 3, 4):
        share = rows // processes
        parts = [
            torch.rand(share, width, generator=rows_generator(rank * share, width, *key)) for rank in range(processes)
        ]
        assert torch.equal(torch.cat(parts), whole), processes
