"""What one process is refused, all are: nobody waits for it."""

import pytest
from processes import together

from hf_mlopt import ranks
from hf_mlopt.errors import InputError


def refuse():
    raise InputError("output='x': is a file")


@pytest.mark.distributed
def test_every_process_gets_what_the_first_found_or_was_refused_for():
    def run(rank):
        value = ranks.on_first(lambda: {"rank": rank})
        try:
            ranks.on_first(refuse)
        except InputError as error:
            return value, str(error), ranks.world_size()

    assert together(run) == [[{"rank": 0}, "output='x': is a file", 2]] * 2


def test_one_process_needs_no_group():
    assert ranks.on_first(lambda: 3) == 3
    with pytest.raises(InputError, match="is a file"):
        ranks.on_first(refuse)
