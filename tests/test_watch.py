"""How a run ends: on signals in every part of it, and when others have ended."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from operator import methodcaller

import pytest

from svdd import Stopped
from svdd.runs.config import dump_config
from svdd.runs.processes.peers import DONE, FAILED, RUNNING, STOPPING, Launch, Peers
from svdd.runs.processes.watch import Watch

LAUNCHES = [Launch(rank, 2, "ab12") for rank in range(2)]


class Shop:
    """What of a Trainer a watch looks at, without several processes."""

    def __init__(self, children=()):
        self.global_rank, self.world_size, self.num_nodes = 0, 1, 1
        self.strategy = self.launcher = self
        self.procs = list(children)


def child(code="pass"):
    return subprocess.Popen([sys.executable, "-c", code])


def test_the_children_of_a_run_that_is_through_are_waited_for(tmp_path):
    """Without a prompt left to draw Lightning calls no hook of the loop."""
    with Watch(tmp_path) as watch:
        started = child()
        watch.attend(Shop([started]))
    assert started.returncode == 0


def end(folder, *steps, patience=25.0):
    """Takes the steps under a watch."""
    with Watch(folder, patience) as watch:
        for step in steps:
            step(watch)


def begin(watch):
    watch.on_predict_start(None, None)


def finish(watch):
    watch.on_predict_start(None, None)
    watch.on_predict_epoch_end(None, None)


def send(number):
    return lambda watch: os.kill(os.getpid(), number)


def fail(error):
    def step(watch):
        watch.on_exception(None, None, error)
        raise error

    return step


def test_an_error_at_the_start_ends_the_children_at_once(tmp_path):
    started = child("import time; time.sleep(60)")
    with pytest.raises(KeyError):
        end(tmp_path, lambda watch: watch.attend(Shop([started])), fail(KeyError()))
    assert started.returncode == -signal.SIGKILL


def test_a_signal_at_the_start_raises(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="143"):
        end(tmp_path, send(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_the_loop_waits_for_the_batch(tmp_path):
    drawn = []
    with pytest.raises(Stopped, match="130"):
        end(
            tmp_path,
            begin,
            send(signal.SIGINT),
            drawn.append,
            lambda w: w.on_predict_batch_end(None, None, None, [], 0),
        )
    assert drawn


def test_a_signal_before_the_summary_waits_for_it(tmp_path):
    written = []
    with pytest.raises(Stopped, match="143"):
        end(tmp_path, finish, send(signal.SIGTERM), written.append, lambda watch: watch.on_predict_end(None, None))
    assert written


@pytest.mark.parametrize("last", [("on_predict_end", None, None), ("teardown", None, None, "predict")])
def test_a_signal_after_the_summary_raises(tmp_path, last):
    with pytest.raises(Stopped, match="143"):
        end(tmp_path, finish, methodcaller(*last), send(signal.SIGTERM))


def between_summaries(folder):
    """A watch of which the other process has said that it is through, and that other process."""
    (folder / "config.yaml").write_bytes(dump_config({}))
    other = Peers(folder, LAUNCHES[1], 25.0)
    other.say(DONE)
    return other


def meet(watch):
    watch.meet(LAUNCHES[0])


@pytest.mark.parametrize(("word", "expected"), [(STOPPING, Stopped), (RUNNING, KeyError), (FAILED, KeyError)])
def test_an_error_because_another_has_stopped_is_no_error(tmp_path, word, expected):
    """A collective that nobody answers fails on the CPU, and may do so before the thread has heard why."""
    other = between_summaries(tmp_path)
    steps = (meet, finish, Watch._join, lambda watch: other.say(word), fail(KeyError("nobody answers")))
    with pytest.raises(expected, match="143" if expected is Stopped else None):
        end(tmp_path, *steps)
    said = next(tmp_path.glob(".rank-00000*")).read_text()
    assert said.split()[1] == (STOPPING if expected is Stopped else FAILED)


def wait_for_a_collective(folder):
    stop = Peers(folder, LAUNCHES[1], 25.0)
    end(folder, meet, finish, lambda watch: stop.say(STOPPING), lambda watch: time.sleep(60), patience=1.0)


def test_a_collective_that_nobody_answers_is_not_waited_for(tmp_path):
    """As on a GPU."""
    between_summaries(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=wait_for_a_collective, args=(tmp_path,))
    process.start()
    process.join(60)
    process.kill()
    process.join()
    assert process.exitcode == 143


def test_the_last_word_stays(tmp_path):
    """The thread repeats what it has found last, never what came before."""
    between_summaries(tmp_path)
    with pytest.raises(KeyError):
        end(tmp_path, meet, fail(KeyError()), patience=1.0)
    said = next(tmp_path.glob(".rank-00000*")).read_text()
    assert said.split()[1] == FAILED


def test_who_is_through_says_goodbye(tmp_path):
    between_summaries(tmp_path)
    end(tmp_path, meet)
    assert not list(tmp_path.glob(".rank-00000*"))
