"""The largest chunk follows from two small ones."""

import pytest

from umarvel_ray.errors import ConfigError
from umarvel_ray.train.chunk import largest_chunk


@pytest.mark.parametrize(
    ("fixed", "per_token", "room"), [(0, 1e6, 20e9), (3e9, 4.8e6, 80e9), (1e9, 5e5, 6e9)]
)
def test_what_is_found_fills_the_room_and_fits(fixed, per_token, room):
    tokens = largest_chunk(lambda tokens: fixed + per_token * tokens, room)
    assert fixed + per_token * tokens <= 0.85 * room < fixed + per_token * (tokens + 101)


def test_no_chunk_is_larger_than_what_helps():
    assert largest_chunk(lambda tokens: 1e4 * tokens, 100e9) == 65536


def test_a_device_that_holds_nothing_is_told():
    with pytest.raises(ConfigError, match=r"a chunk of 2048 tokens takes 10.2 GB, and 1.0 GB are left"):
        largest_chunk(lambda tokens: 5e6 * tokens, 1e9)
