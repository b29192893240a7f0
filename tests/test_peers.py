from svdd.peers import DONE, FAILED, GONE, RUNNING, STOPPING, Peers


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def pair(folder, patience=10.0):
    clock = Clock()
    return clock, *(Peers(folder, rank, 2, patience, clock) for rank in range(2))


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
    peers = Peers(tmp_path / "absent", 0, 2, 10.0)
    peers.say(RUNNING)
    peers.look()
    peers.leave()
    Peers.forget(tmp_path / "absent")


def test_forget_takes_its_own_files_only(tmp_path):
    for name in (".rank-00000", ".rank-00012", ".ranking", "rank-00001"):
        (tmp_path / name).write_text("x")
    Peers.forget(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ranking", "rank-00001"]
