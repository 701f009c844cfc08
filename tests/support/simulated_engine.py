"""An engine elsewhere of whose every nanosecond the owner is known: the truth that estimates are held to."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from millicent.core.clock import NS_PER_S
from millicent.step_time import Coefficients, Work

# An 8-billion-parameter model on an accelerator of twice the standing one's bandwidth and three times its
# arithmetic; and a small model on a processor, where computing is soon what takes longest.
LARGE = Coefficients(2e6, 4.5e6, 16_000, 20_000, 40, 0.6)
SMALL = Coefficients(1e6, 9e6, 900_000, 200_000, 300, 60)


@dataclass
class Job:
    number: int
    arrives_ns: int
    prompt: int
    output: int
    ours: bool = True
    read: int = 0
    made: int = 0
    true_ns: float = 0.0


@dataclass(frozen=True)
class Event:
    """What a gateway sees: a call that is sent (`entered`), a token of it, its end; and, in the
    engine's own figures, that it is worked on (`started`)."""

    at_ns: int
    kind: str
    job: Job


def jobs(
    random: Random, count: int, per_s: float, *, prompt: int = 400, output: int = 80, ours: float = 1.0
) -> list[Job]:
    """Poisson arrivals of very different sizes."""
    made, at_s = [], 0.0
    for number in range(count):
        at_s += random.expovariate(per_s)
        size = int(prompt * random.lognormvariate(-0.5, 1.0)) + 8
        length = int(output * random.lognormvariate(-0.5, 1.0)) + 2
        made.append(Job(number, int(at_s * NS_PER_S), size, length, random.random() < ours))
    return made


def simulate(waiting: list[Job], costs: Coefficients, *, most: int = 32, chunk: int = 2048) -> list[Event]:
    """Continuous batching with chunked prefill: each step has a row of every sequence that writes, and of the prompts,
    in the order in which they came, what is left of `chunk` rows. `true_ns` of each job is its share of the steps."""
    waiting = sorted(waiting, key=lambda job: job.arrives_ns)
    events = [Event(job.arrives_ns, "entered", job) for job in waiting]
    running: list[Job] = []
    now_ns = 0
    while waiting or running:
        if not running and waiting[0].arrives_ns > now_ns:
            now_ns = waiting[0].arrives_ns
        while waiting and waiting[0].arrives_ns <= now_ns and len(running) < most:
            running.append(waiting.pop(0))
            events.append(Event(max(now_ns, running[-1].arrives_ns), "started", running[-1]))
        room = chunk
        step: list[tuple[Job, Work, int]] = []
        for job in running:
            if job.read == job.prompt:
                step.append((job, Work(1, 1, job.prompt + job.made, 0), 0))
                room -= 1
        for job in running:
            rows = min(job.prompt - job.read, max(0, room))
            if rows:
                room -= rows
                pairs = rows * job.read + rows * (rows + 1) // 2
                step.append((job, Work(rows, int(job.read + rows == job.prompt), 0, pairs), rows))
        shares = costs.shares([work for _, work, _ in step])
        now_ns += int(sum(shares))
        for (job, work, rows), share_ns in zip(step, shares, strict=True):
            job.true_ns += share_ns
            job.read += rows
            if work.sampled_rows:
                job.made += 1
                events.append(Event(now_ns, "token", job))
                if job.made == job.output:
                    running.remove(job)
                    events.append(Event(now_ns, "ended", job))
    return sorted(events, key=lambda event: event.at_ns)
