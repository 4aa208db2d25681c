"""The directory of the pool: whatever reports come, are lost or come twice, it says what was last said."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.blocks import BlockHash
from cluster.policies.directory import Directory, Life, Report, Run
from cluster.types import Epoch, SequenceKey, WorkerId

LIVES = [Life(WorkerId(worker), Epoch(epoch)) for worker in ("a", "b", "c") for epoch in (1, 2)]
LIFE = st.sampled_from(LIVES)
DEPTHS = 6


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
    """Workers that publish and withdraw, reports that arrive, are lost or arrive twice, beside plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory()
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
            holders = {life for life, told in self.told.items() if number in told}
            if not holders:
                break
            expected.append(holders)
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
