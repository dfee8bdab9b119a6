"""The contract of run stores and turn stores, over each of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.errors import InvalidInput, LimitExceeded
from broker.runs.state import ACTIVE, STATUSES, TERMINAL, TRANSITIONS, PendingCall, Run, RunStatus, Verdict
from broker.runs.store import ConversationState, KeyRecord, RunStore
from broker.runs.turns import Turn, TurnStore

QUEUED: frozenset[RunStatus] = frozenset({"queued"})


def a_run(run_id: str = "r1", conv_id: str = "c", **more: Any) -> Run:
    fields: dict[str, Any] = {
        "prompt": "hi ⚘",
        "message_id": f"m-{run_id}",
        "engine_profile": "p",
        "overrides": {"temperature": 0.5},
        "idempotency_key": run_id,
        "session_id": "s",
        "created_at_ms": 1,
        "updated_at_ms": 1,
        "announced": True,
    }
    return Run(run_id, conv_id, **{**fields, **more})


def a_key(key: str = "k", **more: Any) -> KeyRecord:
    return KeyRecord(**{"scope": "alice", "key": key, "body_hash": "h", "conv_id": "", "created_at_ms": 10, **more})


async def prepare(store: RunStore, *run_ids: str, conv_id: str = "c") -> None:
    for run_id in run_ids:
        await store.prepare(a_run(run_id, conv_id), record=None, max_queued=9)


async def test_prepared_runs_wait_in_order_and_are_stored_whole(store: RunStore) -> None:
    first = await store.prepare(a_run("r1"), record=None, max_queued=9)
    second = await store.prepare(a_run("r2"), record=None, max_queued=9)
    assert (first.status, first.queue_position) == ("started", 0)
    assert (second.status, second.queue_position) == ("queued", 2)
    assert [run.run_id for run in await store.queued("c")] == ["r1", "r2"]
    stored = await store.get("r1")
    assert stored is not None
    assert stored == first.run
    assert stored.overrides == {"temperature": 0.5}
    assert stored.prompt == "hi ⚘"
    assert (await store.conversation("c")) == ConversationState("c", "s", engine_profile="p")


async def test_a_prompt_that_was_withdrawn_holds_up_nobody(store: RunStore) -> None:
    await prepare(store, "r1", "r2")
    await store.update("r1", QUEUED, {"status": "cancelled"}, 5)
    claimed = await store.claim("c", 6)
    assert claimed is not None
    assert claimed.run_id == "r2"


async def test_calls_that_may_have_been_carried_out_are_given_up(store: RunStore) -> None:
    """Only those that were named, and only if they were approved: what was decided meanwhile stands."""
    await prepare(store, "r1")
    await store.claim("c", 2)
    decisions: dict[str, Any] = {"a": "approved", "b": "approved", "c": "pending", "d": "denied"}
    calls = tuple(PendingCall(id, "t", {}, decision, "alice") for id, decision in decisions.items())
    await store.update("r1", ACTIVE, {"status": "awaiting_tool_approval", "calls": calls}, 3)
    run = await store.give_up_calls("r1", frozenset({"a", "c", "d"}), 4)
    assert run is not None
    assert run == await store.get("r1")
    assert [(call.id, call.decision) for call in run.calls] == [
        ("a", "auto"),
        ("b", "approved"),
        ("c", "pending"),
        ("d", "denied"),
    ]
    assert await store.give_up_calls("r1", frozenset(), 5) == run
    await store.update("r1", ACTIVE, {"status": "cancelled"}, 6)
    assert await store.give_up_calls("r1", frozenset({"b"}), 7) is None
    assert await store.give_up_calls("unknown", frozenset(), 8) is None


async def test_claim_gives_one_run_at_a_time(store: RunStore) -> None:
    await prepare(store, "r1", "r2")
    claims = await asyncio.gather(*(store.claim("c", 5) for _ in range(8)))
    assert [run.run_id for run in claims if run] == ["r1"]
    assert (await store.active("c")) is not None
    assert await store.claim("c", 6) is None
    await store.update("r1", ACTIVE, {"status": "finished"}, 7)
    assert await store.claim("c", 7) is None  # its terminal event has to be in the log before the next one begins
    await store.update("r1", TERMINAL, {"terminal_published": True}, 7)
    claimed = await store.claim("c", 8)
    assert claimed is not None
    assert (claimed.run_id, claimed.status, claimed.started_at_ms) == ("r2", "running", 8)


async def test_a_run_begins_only_when_its_prompt_is_known_to_be_in_the_log(store: RunStore) -> None:
    await store.prepare(a_run("r1", announced=False), record=None, max_queued=9)
    assert await store.claim("c", 2) is None
    await prepare(store, "r2")
    admitted, claimed = await store.admit("r1", 3)
    assert admitted == claimed == await store.get("r1")
    assert claimed is not None
    assert (claimed.announced, claimed.status, claimed.started_at_ms) == (True, "running", 3)
    await store.prepare(a_run("r3", announced=False), record=None, max_queued=9)
    admitted, claimed = await store.admit("r3", 4)
    assert claimed is None  # r1 is active
    assert admitted is not None
    assert (admitted.status, admitted.announced) == ("queued", True)
    assert not await store.discard("r3")
    assert await store.admit("r1", 5) == (await store.get("r1"), None)
    assert await store.admit("gone", 6) == (None, None)


async def test_who_stood_in_line_before_begins_before(store: RunStore) -> None:
    await prepare(store, "r1")
    await store.prepare(a_run("r2", announced=False), record=None, max_queued=9)
    admitted, claimed = await store.admit("r2", 3)
    assert admitted is not None
    assert (admitted.run_id, admitted.status) == ("r2", "queued")
    assert claimed is not None
    assert (claimed.run_id, claimed.status) == ("r1", "running")


async def test_a_full_queue_refuses_and_keeps_nothing(store: RunStore) -> None:
    await prepare(store, "r1")
    await store.claim("c", 1)
    await prepare(store, "r2", "r3")
    with pytest.raises(LimitExceeded, match="2 prompts waiting"):
        await store.prepare(a_run("r4"), record=a_key(), max_queued=2)
    assert await store.get("r4") is None
    assert await store.key("alice", "k") is None


async def test_an_empty_conversation_takes_a_prompt_even_with_no_queue_allowed(store: RunStore) -> None:
    assert (await store.prepare(a_run(), record=None, max_queued=0)).status == "started"


async def test_a_key_keeps_the_first_answer(store: RunStore) -> None:
    prepared = await store.prepare(a_run("r1"), record=a_key(), max_queued=9)
    again = await store.prepare(a_run("r2"), record=a_key(body_hash="other"), max_queued=9)
    assert again.run is None
    assert again.record == prepared.record
    assert again.record is not None
    assert again.record.answer == {
        "conv_id": "c",
        "run_id": "r1",
        "message_id": "m-r1",
        "status": "started",
        "queue_position": 0,
    }
    assert await store.get("r2") is None
    assert await store.key("alice", "k") == again.record
    assert await store.key("bob", "k") is None


async def test_racing_prepares_with_one_key_make_one_run(store: RunStore) -> None:
    results = await asyncio.gather(*(store.prepare(a_run(f"r{i}"), record=a_key(), max_queued=9) for i in range(6)))
    assert len([result for result in results if result.run is not None]) == 1
    assert len({result.record.answer["run_id"] for result in results if result.record}) == 1


async def test_discard_takes_back_a_waiting_run_with_its_key(store: RunStore) -> None:
    await store.prepare(a_run("r1", announced=False), record=a_key(), max_queued=9)
    assert await store.discard("r1")
    assert await store.get("r1") is None
    assert await store.key("alice", "k") is None
    await prepare(store, "r2")
    await store.claim("c", 1)
    assert not await store.discard("r2")


async def test_update_goes_only_from_the_expected_status(store: RunStore) -> None:
    await prepare(store, "r1")
    assert await store.update("r1", ACTIVE, {"status": "finished"}, 3) is None
    assert await store.update("gone", QUEUED, {"status": "running"}, 3) is None
    await store.claim("c", 4)
    ended = await store.update("r1", ACTIVE, {"status": "failed", "error": {"code": "x"}}, 5)
    assert ended is not None
    assert (ended.ended_at_ms, ended.error) == (5, {"code": "x"})
    assert await store.update("r1", ACTIVE, {"status": "cancelled"}, 6) is None
    assert (await store.get("r1")) == ended


async def test_of_two_racing_ends_one_wins(store: RunStore) -> None:
    await prepare(store, "r1")
    await store.claim("c", 1)
    ends = await asyncio.gather(
        *(store.update("r1", ACTIVE, {"status": status}, 2) for status in ("finished", "cancelled", "failed"))
    )
    assert len([run for run in ends if run is not None]) == 1


@pytest.mark.parametrize("status", sorted(STATUSES))
async def test_only_the_transitions_of_the_state_machine_exist(store: RunStore, status: RunStatus) -> None:
    await store.prepare(a_run("r1", status=status), record=None, max_queued=9)
    for target in sorted(STATUSES - {status}):
        await store.prepare(a_run(f"to-{target}", f"c-{target}", status=status), record=None, max_queued=9)
        if target in TRANSITIONS[status]:
            assert await store.update(f"to-{target}", STATUSES, {"status": target}, 2) is not None
        else:
            with pytest.raises(InvalidInput, match=f"cannot go from {status}"):
                await store.update(f"to-{target}", STATUSES, {"status": target}, 2)
    assert not any(TRANSITIONS[end] for end in TERMINAL)


async def test_saving_what_is_saved_already_is_skipped_and_counted(store: RunStore) -> None:
    await prepare(store, "r1")
    await store.claim("c", 1)
    before = store.stats()
    await store.update("r1", ACTIVE, {"usage": {"total_tokens": 3}}, 2)
    await store.update("r1", ACTIVE, {"usage": {"total_tokens": 3}}, 3)
    state = await store.conversation("c")
    assert state is not None
    await store.save_conversation(state)
    after = store.stats()
    assert after["saves"] - before["saves"] == 1
    assert after["saves_skipped"] - before["saves_skipped"] == 2


async def test_move_to_front(store: RunStore) -> None:
    await prepare(store, "r1", "r2", "r3")
    await store.claim("c", 1)
    assert (await store.move_to_front("r3", 2)) is not None
    assert [run.run_id for run in await store.queued("c")] == ["r3", "r2"]
    await store.move_to_front("r3", 3)
    await prepare(store, "r4")
    assert [run.run_id for run in await store.queued("c")] == ["r3", "r2", "r4"]
    assert await store.move_to_front("r1", 4) is None
    assert await store.move_to_front("gone", 4) is None


async def test_decisions_are_taken_once(store: RunStore) -> None:
    calls = (
        PendingCall("a", "t", {"x": 1}, "pending"),
        PendingCall("b", "t", {}, "pending"),
        PendingCall("c", "t", {}, "auto"),
    )
    await prepare(store, "r1")
    await store.claim("c", 1)
    assert await store.decide("r1", Verdict("approved", "alice"), 2) == (None, {})
    await store.update("r1", ACTIVE, {"status": "awaiting_tool_approval", "calls": calls}, 2)
    run, outcomes = await store.decide("r1", Verdict("approved", "alice", frozenset({"a", "zz", "c"})), 3)
    assert outcomes == {"a": "approved", "zz": "stale", "c": "stale"}
    assert run is not None
    assert [(call.id, call.decision, call.by) for call in run.calls] == [
        ("a", "approved", "alice"),
        ("b", "pending", None),
        ("c", "auto", None),
    ]
    _, outcomes = await store.decide("r1", Verdict("denied", "bob", frozenset({"a"})), 4)
    assert outcomes == {"a": "already_approved"}
    run, outcomes = await store.decide("r1", Verdict("denied", "bob"), 5)
    assert outcomes == {"b": "denied"}
    assert run is not None
    assert run == await store.get("r1")
    assert run.pending_calls == []


async def test_unsettled_are_those_that_need_an_end_or_its_event(store: RunStore) -> None:
    await prepare(store, "r1", "r2", "r3")
    await prepare(store, "q1", conv_id="b")
    await store.claim("c", 1)
    await store.update("r1", ACTIVE, {"status": "finished"}, 2)
    assert [run.run_id for run in await store.unsettled()] == ["q1", "r1", "r2", "r3"]
    await store.update("r1", TERMINAL, {"terminal_published": True}, 3)
    assert [run.run_id for run in await store.unsettled()] == ["q1", "r2", "r3"]


async def test_runs_are_listed_newest_first(store: RunStore) -> None:
    await prepare(store, "r1", "r2", "r3")
    assert [run.run_id for run in await store.runs("c", limit=2)] == ["r3", "r2"]


async def test_keys_are_forgotten_by_age(store: RunStore) -> None:
    await store.prepare(a_run("r1"), record=a_key("old", created_at_ms=10), max_queued=9)
    await store.prepare(a_run("r2"), record=a_key("new", created_at_ms=20), max_queued=9)
    assert await store.prune_keys(20) == 1
    assert await store.key("alice", "old") is None
    assert await store.key("alice", "new") is not None


async def test_however_many_keys_and_turns_are_old_all_of_them_go(store: RunStore, turns: TurnStore) -> None:
    """More than one step of the SQLite stores."""
    for number in range(205):
        await store.prepare(a_run(f"r{number}"), record=a_key(f"k{number}", created_at_ms=number), max_queued=300)
        await turns.add(a_turn(number), keep=300)
    assert await store.prune_keys(203) == 203
    assert await turns.prune(203) == 203
    assert await store.key("alice", "k202") is None
    assert await store.key("alice", "k203") is not None
    assert [turn.turn_id for turn in await turns.turns("c")] == ["t204", "t203"]


async def test_opaque_data_belongs_to_its_message(store: RunStore) -> None:
    await store.save_opaque("c", "m1", [{"signature": "abc"}])
    await store.save_opaque("c", "m1", [{"signature": "abc"}, {"more": 1}])
    assert await store.opaque("c") == {"m1": [{"signature": "abc"}, {"more": 1}]}
    assert await store.opaque("b") == {}


async def test_erase_removes_one_conversation_only(store: RunStore) -> None:
    for conv_id in ("c", "d"):
        await store.prepare(a_run(f"r-{conv_id}", conv_id), record=a_key(conv_id), max_queued=9)
        await store.save_opaque(conv_id, "m", [{}])
    await store.erase("c")
    assert await store.runs("c", limit=9) == []
    assert await store.key("alice", "c") is None
    assert await store.conversation("c") is None
    assert await store.opaque("c") == {}
    assert await store.get("r-c") is None
    assert len(await store.runs("d", limit=9)) == 1
    assert await store.key("alice", "d") is not None


def a_turn(number: int, **more: Any) -> Turn:
    fields = {"session_id": "s", "run_id": "r", "phase": "request", "created_at_ms": number, "content": {"n": number}}
    return Turn(f"t{number}", more.pop("conv_id", "c"), **{**fields, **more})


async def test_turns_are_kept_newest_first_and_narrowed(turns: TurnStore) -> None:
    for number in range(4):
        await turns.add(a_turn(number, phase="request" if number % 2 else "response", run_id=f"r{number // 2}"), keep=9)
    assert [turn.turn_id for turn in await turns.turns("c")] == ["t3", "t2", "t1", "t0"]
    assert [turn.turn_id for turn in await turns.turns("c", run_id="r0", phase="response")] == ["t0"]
    assert [turn.turn_id for turn in await turns.turns("c", limit=1)] == ["t3"]
    assert await turns.get("c", "t2") == a_turn(2, phase="response", run_id="r1")
    assert await turns.get("other", "t2") is None


async def test_old_turns_are_forgotten(turns: TurnStore) -> None:
    await turns.add(a_turn(50, conv_id="d"), keep=3)
    for number in range(6):
        await turns.add(a_turn(number), keep=3)
    assert [turn.turn_id for turn in await turns.turns("c")] == ["t5", "t4", "t3"]
    assert await turns.prune(5) == 2
    assert [turn.turn_id for turn in await turns.turns("c")] == ["t5"]
    await turns.erase("c")
    assert await turns.turns("c") == []
    assert len(await turns.turns("d")) == 1
