"""What ends a process does what Ctrl-C does."""

import os
import signal
from collections.abc import Iterator

import pytest

from cluster.driver.interrupt import ENDS, end_as_ctrl_c


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Those of before."""
    before = {number: signal.getsignal(number) for number in ENDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDS)
def test_it_is_an_interrupt_and_a_second_one_does_not_cut_the_end_off(number: int) -> None:
    end_as_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    for again in ENDS:
        os.kill(os.getpid(), again)


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_as_ctrl_c()
    os.kill(os.getpid(), signal.SIGHUP)
