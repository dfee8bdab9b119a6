"""The limits of runs, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from broker.settings import Settings


@dataclass(frozen=True, slots=True)
class RunLimits:
    """What a run may take.

    run_timeout_s: time in which a run is worked on; waiting for a person's approval does not count.
    engine_idle_timeout_s: longest silence of an engine; recorded first tokens took up to 100 s, so not below 120 s
    without need. queue_depth: prompts that may wait per conversation. max_tool_steps: rounds of tools in one run.
    max_attempts: tries of a step whose engine failed before its first event, the first one included. retry_delay_s:
    pause before the second try, doubled for each further one, up to retry_delay_max_s; a provider's Retry-After goes
    before. parallel_tools: calls of one run that are worked on at once. stop_grace_s: what an engine gets to end after
    it was cancelled before the run goes on without it. accept_within_s: a prompt that another node stored so long ago and
    that is not in the log is dropped: whoever sent it was not told that it is accepted. max_text_bytes: longest text, as
    JSON, that a final event repeats; a longer one stands in its deltas only. turns_per_conversation: newest turns kept.
    """

    run_timeout_s: float = 900.0
    engine_idle_timeout_s: float = 150.0
    queue_depth: int = 32
    max_tool_steps: int = 8
    max_attempts: int = 3
    retry_delay_s: float = 0.5
    retry_delay_max_s: float = 30.0
    parallel_tools: int = 8
    stop_grace_s: float = 2.0
    accept_within_s: float = 30.0
    max_prompt_bytes: int = 262_144
    max_text_bytes: int = 1_000_000
    max_key_chars: int = 256
    idempotency_window_s: float = 86_400.0
    turn_retention_s: float = 7 * 86_400.0
    turns_per_conversation: int = 500

    @classmethod
    def of(cls, settings: Settings) -> RunLimits:
        """Return the limits that `settings` ask for."""
        return cls(
            run_timeout_s=settings.run_timeout_s,
            engine_idle_timeout_s=settings.engine_idle_timeout_s,
            queue_depth=settings.queue_depth,
            max_tool_steps=settings.max_tool_steps,
            # The prompt travels as one envelope; leave room for what surrounds it and for JSON's escapes.
            max_prompt_bytes=min(262_144, settings.max_envelope_bytes // 2),
            max_text_bytes=settings.max_envelope_bytes - settings.max_envelope_bytes // 16,
            idempotency_window_s=settings.idempotency_window_s,
            turn_retention_s=settings.turn_retention_s,
        )
