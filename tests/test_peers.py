import pytest

from svdd.runs.config import dump_config
from svdd.runs.processes.peers import DONE, FAILED, GONE, LEADER, RUNNING, STOPPING, Launch, Peers, launched, led


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def pair(folder, patience=10.0, unique=True):
    clock = Clock()
    (folder / "config.yaml").write_bytes(dump_config({}))
    return clock, *(Peers(folder, Launch(rank, 2, "ab12", unique), patience, clock=clock) for rank in range(2))


def test_states_are_heard(tmp_path):
    _, one, two = pair(tmp_path)
    one.look()
    assert one.state(1) == RUNNING  # nothing heard yet
    for state in (RUNNING, DONE, STOPPING, FAILED):
        two.say(state)
        one.look()
        assert one.state(1) == state
        assert one.ranks(state) == [1]
    two.leave()
    one.look()
    assert one.state(1) == GONE


def test_who_is_silent_is_lost(tmp_path):
    clock, one, two = pair(tmp_path)
    for second in range(30):
        clock.now = second
        if second < 12:
            two.say(RUNNING)
        one.look()
        assert one.lost() == ([1] if second > 11 + 10 else []), second


def test_who_was_never_heard_is_lost_too(tmp_path):
    clock, one, _ = pair(tmp_path)
    for second in range(12):
        clock.now = second
        one.look()
    assert one.lost() == [1]


def test_who_has_left_is_not_lost(tmp_path):
    clock, one, two = pair(tmp_path)
    two.say(DONE)
    one.look()
    two.leave()
    for second in range(30):
        clock.now = second
        one.look()
    assert one.lost() == []


def test_who_slept_accuses_nobody(tmp_path):
    """A suspended machine stops all processes, and the first to wake must not end the run."""
    clock, one, two = pair(tmp_path)
    two.say(RUNNING)
    one.look()
    clock.now = 1000
    one.look()
    assert one.lost() == []
    clock.now = 1004
    one.look()
    clock.now = 1008
    two.say(RUNNING)
    one.look()
    clock.now = 1012
    one.look()
    assert one.lost() == []


def test_a_folder_that_cannot_be_written_is_no_reason_to_end(tmp_path):
    peers = Peers(tmp_path / "absent", Launch(0, 2, "ab12"), 10.0)
    peers.say(RUNNING)
    peers.look()
    peers.leave()
    Peers.forget(tmp_path / "absent")


@pytest.mark.parametrize("config", [None, "model: mine"])
def test_nothing_is_said_in_a_folder_of_somebody_else(tmp_path, config):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    Peers(tmp_path, Launch(0, 2, "ab12"), 10.0).say(RUNNING)
    assert not list(tmp_path.glob(".rank*"))
    Peers(tmp_path, Launch(0, 2, "ab12"), 10.0, met=True).say(RUNNING)  # rank 0 has taken the folder by then
    assert list(tmp_path.glob(".rank*"))


def test_words_that_may_be_old_count_once_they_change(tmp_path):
    """A repeated command may have the same address, and the last word of the run before is still there."""
    _, _, old = pair(tmp_path)
    old.say(FAILED)
    _, one, two = pair(tmp_path, unique=False)
    one.look()
    assert one.state(1) == RUNNING
    two.say(RUNNING)
    two.say(FAILED)
    one.look()
    assert one.state(1) == FAILED


def test_launches_in_one_folder_do_not_hear_each_other(tmp_path):
    _, one, _ = pair(tmp_path)
    Peers(tmp_path, Launch(1, 2, "cd34"), 10.0).say(FAILED)
    one.look()
    assert one.state(1) == RUNNING


@pytest.mark.parametrize(
    ("launch", "left"),
    [
        (None, []),
        (Launch(0, 2, "ab12"), [".rank-00001-ab12"]),
        (Launch(0, 2, "ab12", unique=False), []),
    ],
)
def test_forget_takes_its_own_files_only(tmp_path, launch, left):
    names = [".rank-00000", ".rank-00012-cd34", ".rank-00001-ab12", ".ranking", ".rank-00000-x", "rank-00001"]
    for name in names:
        (tmp_path / name).write_text("x")
    Peers.forget(tmp_path, launch)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*left, ".ranking", ".rank-00000-x", "rank-00001"]
    )


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "svdd", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("environment", "num_nodes", "expected"),
    [
        ({}, 1, None),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, 1, (3, 4, True)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, 2, (3, 4, False)),
        (SLURM, 2, (3, 4, True)),
        ({LEADER: "12", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}, 1, (3, 4, True)),
        ({LEADER: "12", "LOCAL_RANK": "3", "WORLD_SIZE": "8"}, 2, None),
    ],
)
def test_what_launchers_say(monkeypatch, environment, num_nodes, expected):
    for name in (*TORCHRUN, *SLURM, LEADER, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch = launched(num_nodes)
    assert (launch and (launch.rank, launch.world_size, launch.unique)) == expected


def test_a_leader_and_its_children_have_one_name(monkeypatch):
    for name, value in {LEADER: "12", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launched(1) == led(1, 2, 12)
    assert led(0, 2, 12).name == led(1, 2, 12).name != led(0, 2, 13).name
