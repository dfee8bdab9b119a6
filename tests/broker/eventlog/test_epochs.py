"""Names of lives: a conversation that begins keeps the epoch that its clients were told, whatever is erased meanwhile."""

from __future__ import annotations

from broker.eventlog.epochs import _PROMISES_MAX, PromisedEpochs, epoch_of


def test_each_life_has_a_name_of_its_own() -> None:
    names = [epoch_of(life, erasures) for life in ("one", "two") for erasures in range(4)]
    assert len(set(names)) == len(names)
    assert epoch_of("one", 0) == "one"


def test_what_was_told_first_stays_whatever_is_erased_meanwhile() -> None:
    promised = PromisedEpochs()
    assert promised.told("c", 3) == 3
    assert promised.told("c", 4) == 3
    assert promised.kept("c", 5) == 3
    assert promised.kept("nobody asked for it", 5) == 5


def test_an_erased_conversation_was_promised_nothing() -> None:
    promised = PromisedEpochs()
    promised.told("c", 3)
    promised.void("c")
    promised.void("never told")
    assert promised.kept("c", 4) == 4
    assert promised.told("c", 4) == 4


def test_of_very_many_the_one_that_was_not_asked_for_longest_is_forgotten() -> None:
    promised = PromisedEpochs()
    for number in range(_PROMISES_MAX):
        promised.told(f"c{number}", 1)
    promised.told("c0", 2)  # asked for again
    promised.told("one more", 1)
    assert promised.kept("c0", 9) == 1
    assert promised.kept("c1", 9) == 9
    assert promised.kept("c2", 9) == 1
    assert promised.kept("one more", 9) == 1
