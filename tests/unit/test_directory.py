"""The directory of the pool: whatever reports come, are lost or come twice, it says what was last said."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.blocks import BlockHash
from cluster.policies.directory import Directory, HeldBlock, Life, Report, Run, runs_of
from cluster.types import Epoch, SequenceKey, WorkerId

LIVES = [Life(WorkerId(worker), Epoch(epoch)) for worker in ("a", "b", "c") for epoch in (1, 2)]
LIFE = st.sampled_from(LIVES)
DEPTHS = 6
CHANGES_MOST = 2
NEVER = -10


def identity(number: int) -> BlockHash:
    """The identity of the block with so many before it in the one chain of these tests."""
    return BlockHash(number.to_bytes(32, "little"))


def entry(number: int) -> tuple[BlockHash, int]:
    """The same as reports name it."""
    return identity(number), number + 1


def key(name: int) -> SequenceKey:
    """A sequence."""
    return SequenceKey(f"r{name}")


class DirectoryMachine(RuleBasedStateMachine):
    """Workers that publish and withdraw, reports that arrive, are lost or arrive twice, beside plain sets;
    and a copy, kept from what the directory says of changes, from which another life of it begins.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory(changes_most=CHANGES_MOST)
        self.copy: dict[BlockHash, HeldBlock] = {}
        self.numbers = dict.fromkeys(LIVES, 0)
        self.told: dict[Life, set[int]] = {}
        """What a life's last report that was taken made true here."""
        self.sequences: dict[Life, dict[SequenceKey, int]] = {}
        self.taken = dict.fromkeys(LIVES, 0)

    @rule(
        life=LIFE,
        published=st.sets(st.integers(0, DEPTHS - 1)),
        withdrawn=st.sets(st.integers(0, DEPTHS - 1)),
        held=st.dictionaries(st.integers(0, 2), st.integers(0, 3), max_size=2),
        starts_over=st.booleans(),
        fate=st.sampled_from(["arrives", "arrives", "arrives twice", "is lost"]),
    )
    def report(
        self,
        life: Life,
        published: set[int],
        withdrawn: set[int],
        held: dict[int, int],
        starts_over: bool,
        fate: str,
    ) -> None:
        """It is taken exactly if it starts over, or follows the last one taken."""
        self.numbers[life] += 1
        withdrawn -= published
        report = Report(
            life,
            self.numbers[life],
            starts_over,
            [entry(number) for number in published],
            [identity(number) for number in withdrawn],
            [(key(name), blocks) for name, blocks in held.items()],
        )
        if fate == "is lost":
            return
        follows = life in self.told and self.taken[life] == self.numbers[life] - 1
        assert self.directory.apply(report) == (starts_over or follows)
        if starts_over:
            self.told[life], self.sequences[life] = set(), {}
        if starts_over or follows:
            self.taken[life] = self.numbers[life]
            self.told[life] = (self.told[life] - withdrawn) | published
            self.sequences[life] |= {key(name): blocks for name, blocks in held.items()}
            if fate == "arrives twice":
                assert self.directory.apply(report)

    @rule(life=LIFE)
    def forget(self, life: Life) -> None:
        """A life that is over holds nothing, and its next report is missing all before it."""
        self.directory.forget(life)
        self.told.pop(life, None)
        self.sequences.pop(life, None)

    @rule(living=st.sets(LIFE))
    def retain(self, living: set[Life]) -> None:
        """Whoever does not live is forgotten."""
        self.directory.retain(living.__contains__)
        for life in set(self.told) - living:
            del self.told[life], self.sequences[life]

    @rule(parts=st.integers(0, 2), size=st.integers(1, 3))
    def follow(self, parts: int, size: int) -> None:
        """The copy gets some of what changed; from an empty one where the directory lost track."""
        if not self.directory.is_followed:
            self.copy = {}
            self.directory.follow(from_nothing=True)
        for _ in range(parts):
            self.take(size)

    def take(self, most: int) -> int:
        """Changes as they come; returns how many."""
        changed = self.directory.take_changed(most)
        for block in changed:
            self.copy[block.identity] = block
            if not block.holders:
                del self.copy[block.identity]
        return len(changed)

    @rule()
    def catch_up(self) -> None:
        """A copy that took all changes says what the directory says."""
        self.follow(0, 0)
        while self.take(2):
            assert self.directory.is_followed
        for number in range(DEPTHS):
            kept = self.copy.get(identity(number))
            assert (set(kept.holders) if kept else set()) == self.holders(number)
            assert kept is None or kept.prefix_blocks == number + 1

    @rule(living=st.sets(LIFE), lost=st.booleans(), report=st.sets(st.integers(0, DEPTHS - 1), max_size=2))
    def restart(self, living: set[Life], lost: bool, report: set[int]) -> None:
        """Another life of the directory begins with what the copy says of the living, whatever one of them
        reported first; until they report in full nothing they say is taken.
        """
        self.directory = Directory(changes_most=CHANGES_MOST)
        self.told, self.sequences = {}, {}
        if lost:
            self.copy = {}
        self.directory.follow(from_nothing=False)
        first = LIVES[0]
        self.report(first, report, set(), {}, starts_over=True, fate="arrives")
        blocks = list(self.copy.values())
        for at in range(0, len(blocks), 2):
            self.directory.restore(blocks[at : at + 2], living.__contains__)
        for block in blocks:
            for life in living.intersection(block.holders) - {first}:
                self.told.setdefault(life, set()).add(block.prefix_blocks - 1)
                self.sequences[life], self.taken[life] = {}, NEVER

    def holders(self, number: int) -> set[Life]:
        """Who publishes a block, as far as was told."""
        return {life for life, told in self.told.items() if number in told}

    @rule(first=st.integers(0, DEPTHS - 1))
    def find(self, first: int) -> None:
        """The longest run from `first` on, each block with exactly the lives that publish it."""
        found = [
            set(run.holders)
            for run in self.directory.find(map(identity, range(first, DEPTHS)), first)
            for _ in range(run.blocks)
        ]
        expected = []
        for number in range(first, DEPTHS):
            if not self.holders(number):
                break
            expected.append(self.holders(number))
        assert found == expected

    @invariant()
    def knows_what_was_told(self) -> None:
        """The sequences of lives, and the number of identities are those that were told."""
        assert len(self.directory) == len(set().union(*self.told.values()))
        for life in LIVES:
            held = self.sequences.get(life, {})
            assert self.directory.sequences_at(life) == {name: n for name, n in held.items() if n}
            assert self.directory.blocks_at(life) == sum(held.values())


TestDirectory = DirectoryMachine.TestCase
TestDirectory.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_an_identity_of_another_length_is_no_hit() -> None:
    """Identity and length are compared: a block found behind another number of blocks ends the run."""
    directory = Directory()
    directory.apply(Report(LIVES[0], 1, starts_over=True, published=[entry(0), (identity(1), 3)]))
    assert directory.find([identity(0), identity(1)]) == (Run(1, (LIVES[0],)),)
    assert directory.find([identity(1)], 2) == (Run(1, (LIVES[0],)),)
    assert directory.find([identity(0)], 5) == ()


def test_runs_are_as_long_as_their_holders_agree() -> None:
    """Consecutive blocks of the same holders are one run."""
    directory = Directory()
    directory.apply(Report(LIVES[0], 1, starts_over=True, published=[entry(n) for n in (0, 1, 2)]))
    directory.apply(Report(LIVES[2], 1, starts_over=True, published=[entry(n) for n in (2, 3)]))
    runs = directory.find(map(identity, range(6)))
    assert runs == (
        Run(2, (LIVES[0],)),
        Run(1, (LIVES[0], LIVES[2])),
        Run(1, (LIVES[2],)),
    )


def test_a_run_of_a_copy_ends_at_another_length() -> None:
    """Blocks that a copy names become runs as those of the directory do."""
    first, second = (HeldBlock(identity(n), n + 1, (LIVES[n],)) for n in (0, 1))
    assert runs_of([first, second]) == (Run(1, (LIVES[0],)), Run(1, (LIVES[1],)))
    assert runs_of([second], 1) == (Run(1, (LIVES[1],)),)
    assert runs_of([first, first]) == (Run(1, (LIVES[0],)),)
    assert runs_of([second]) == runs_of([]) == ()


def test_a_life_that_reports_is_believed_before_a_copy() -> None:
    """What a life withdrew since the copy was written is not restored, in whatever order both come; nor what
    a life holds that is over. The copy is told of the differences, and of nothing else.
    """
    living, over = LIVES[0], LIVES[1]
    blocks = [HeldBlock(identity(n), n + 1, (living, over)[: 1 + n % 2]) for n in range(4)]
    directory = Directory()
    directory.follow(from_nothing=False)
    directory.restore(blocks, living.__eq__)
    assert directory.take_changed(9) == [block._replace(holders=(living,)) for block in blocks[1::2]]
    report = Report(living, 9, starts_over=True, published=[entry(0), entry(5)])
    for reports_first in (True, False):
        directory = Directory()
        directory.follow(from_nothing=False)
        if reports_first:
            directory.apply(report)
        directory.restore(blocks, living.__eq__)
        if not reports_first:
            assert directory.find(map(identity, range(6))) == (Run(4, (living,)),)
            assert not directory.apply(Report(living, 9))
            assert directory.apply(report)
        assert directory.find(map(identity, range(6))) == (Run(1, (living,)),)
        changed = {block.identity: block.holders for block in directory.take_changed(9)}
        changed.pop(identity(0), None)
        assert changed == {identity(1): (), identity(2): (), identity(3): (), identity(5): (living,)}


def test_a_copy_may_lag_as_far_as_there_are_blocks() -> None:
    """A copy that begins with nothing lags by all there is, and changes are noted all the same. Too many
    blocks that came and went meanwhile end that, and nothing is kept of them.
    """
    directory = Directory(changes_most=2)
    directory.apply(Report(LIVES[0], 1, starts_over=True, published=[entry(n) for n in range(10)]))
    directory.follow(from_nothing=True)
    for times in range(3):
        assert directory.is_followed
        passing = 10 + times
        directory.apply(Report(LIVES[0], 2 + 2 * times, published=[entry(passing)]))
        directory.apply(Report(LIVES[0], 3 + 2 * times, withdrawn=[identity(passing)]))
    assert not directory.is_followed
    assert directory.take_changed(99) == []
