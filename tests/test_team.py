"""The threads of a compiled kernel: every task once, whoever shares, begins, fails or gives up."""
import os
import signal
import threading
import time

import numpy as np
import pytest

pytest.importorskip("numba")

from minifqt.kernels.cpu import board, choice, team  # noqa: E402
from minifqt.kernels.cpu.board import leave, seat, take  # noqa: E402

pytestmark = pytest.mark.skipif(choice.isa() is None, reason="nothing is compiled on this CPU")


@choice.numba.njit(nogil=True)
def count(counter, shape, found, bytes_, scale, by_thread, work):
    """found[task] += scale · bytes_[task] for shape[0] · shape[1] tasks; who did how many."""
    me = seat(counter)
    if me < 0:
        return
    while True:
        task = take(counter)
        if task >= shape[0] * shape[1]:
            break
        if work[0] < 0:
            raise ValueError("no work")
        rest = 0.0
        for i in range(work[0]):
            rest += np.sqrt(i * 1.0)
        found[task] += scale * bytes_[task] + (rest < 0)
        by_thread[me] += 1
    leave(counter, me)


def operands(tasks, threads, work=10):
    rng = np.random.default_rng(tasks)
    return ((1, tasks), np.zeros(tasks), rng.integers(0, 256, tasks, np.uint8), 3.0,
            np.zeros(threads, np.int64), np.array([work]))


def done(given):
    """Whether each task was done once."""
    (_, tasks), found, bytes_, scale, by_thread, _ = given
    return (found == scale * bytes_).all() and by_thread.sum() == tasks


def until(condition):
    """Whether it comes true within ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_task_is_done_once(threads, set_threads):
    set_threads(threads)
    for run in (team.share, team.alone, lambda *given: team.begin(*given)()):
        for tasks in (0, 1, 2, 1000):
            given = operands(tasks, threads)
            run(count, *given)
            assert done(given)


def test_threads_of_the_team_are_started_once(set_threads):
    def members():
        return sorted(id(t) for t in threading.enumerate() if t.name == "minifqt.team")

    set_threads(4)
    team.share(count, *operands(9, 4))
    before = members()
    for threads in (1, 4, 2, 3, 4):
        set_threads(threads)
        team.share(count, *operands(9, 4))
    assert members() == before
    assert len(before) >= 3


def test_threads_asleep_are_woken(set_threads):
    set_threads(2)
    team.share(count, *operands(9, 2))
    assert until(lambda: team._asleep)                    # patience has ended
    for _ in range(100):
        given = operands(300, 2, work=20_000)
        team.share(count, *given)
        if given[4].all():
            break
    assert given[4].all()                                 # both took part


def test_others_begin_without_this_thread(set_threads):
    set_threads(2)
    given = operands(100, 2)
    end = team.begin(count, *given)
    assert until(lambda: done(given))
    end()
    assert done(given)


def test_who_is_at_something_begun_helps_with_what_is_shared_and_comes_back(set_threads):
    set_threads(2)
    begun = operands(2000, 2, work=20_000)
    end = team.begin(count, *begun)
    assert until(lambda: begun[4].any())
    helped = 0
    for _ in range(300):
        given = operands(8, 2, work=20_000)
        team.share(count, *given)
        assert done(given)
        helped += given[4].all() and not done(begun)
    assert helped                                         # not only after it was done
    end()
    assert done(begun)


def test_more_kernels_begun_than_there_are_places(set_threads):
    set_threads(3)
    many = [operands(50, 3) for _ in range(team.PLACES + 5)]
    ends = [team.begin(count, *given) for given in many]
    for i in np.random.default_rng(0).permutation(len(many)):
        ends[i]()
        assert done(many[i])
    assert len(team._free) == team.PLACES - 1


def test_what_is_given_up_is_left_and_its_place_is_free(set_threads):
    set_threads(2)
    begun = operands(1 << 20, 2, work=2_000)              # a second and more
    start = time.monotonic()
    end = team.begin(count, *begun)
    assert until(lambda: begun[4].any())
    del end
    assert len(team._free) == team.PLACES - 1
    assert not done(begun)
    rest = begun[4].copy()
    team.share(count, *operands(9, 2))
    assert (begun[4] == rest).all()                       # nobody is at it
    assert time.monotonic() - start < 10


def test_several_threads_of_python_share_at_a_time(set_threads):
    set_threads(2)
    wrong = []

    def work():
        for _ in range(200):
            given = operands(40, 2, work=500)
            team.share(count, *given)
            if not done(given):
                wrong.append(given)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_an_error_of_a_kernel_is_raised_and_the_next_one_runs(set_threads):
    set_threads(2)
    for _ in range(20):
        with pytest.raises(ValueError, match="no work"):
            team.share(count, *operands(10, 2, work=-1))
        given = operands(100, 2)
        team.share(count, *given)
        assert done(given)


def test_arguments_must_fit_their_room():
    @choice.numba.njit(nogil=True)
    def crowded(counter, many):
        me = seat(counter)
        if me >= 0:
            leave(counter, me)

    with pytest.raises(Exception, match="more arguments than a room holds"):
        crowded(np.zeros(board.WORDS, np.int64), (0.0,) * (board.ROOM // 8 + 1))


def test_no_more_threads_come_than_there_were_when_it_began(set_threads, monkeypatch):
    """Scratch is for the threads of then; without a free place it is shared at the end."""
    monkeypatch.setattr(team, "_free", [])
    counts, share = [], team._share
    monkeypatch.setattr(team, "_share", lambda *a: counts.append(a[0]) or share(*a))
    for before, after in ((2, 6), (3, 1)):
        set_threads(before)
        work = operands(2000, 6)
        end = team.begin(count, *work)
        set_threads(after)
        end()
        assert work[4].sum() == 2000
    assert counts == [2, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")   # Python warns of forks beside threads
def test_a_fork_while_something_is_begun_goes_on_in_both(set_threads):
    set_threads(3)
    for _ in range(5):
        work = operands(3000, 3, 3000)
        end = team.begin(count, *work)
        child = os.fork()
        if child == 0:
            end()
            other = operands(50, 3)
            team.share(count, *other)
            helpers = len(team._members) == 2 and all(one.is_alive() for one in team._members)
            done = work[4].sum() == 3000 and other[4].sum() == 50
            os._exit(0 if done and helpers else 1)
        end()
        assert work[4].sum() == 3000
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)
