import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import rigs
from rigs import Script, plain
from waiting import HANG_SECONDS

from onlinespec.config import GenerationParams
from onlinespec.core import DecodeStats
from onlinespec.drafters.ngram import Ngram
from onlinespec.engine.request import ContextOverflow
from onlinespec.engine.scheduler import CANCELLED, ERROR, Busy, Scheduler
from onlinespec.engine.settings import Limits
from onlinespec.engine.step import DecodeLoop
from onlinespec.server.engine import Closed, Engine

TARGET = rigs.random_target()
PROMPTS = [[5, 9, 200, 31], [7], [31, 77, 14, 9] * 20]
PARAMS = GenerationParams(30)


def make(limits=None, drafter=None):
    return Engine(Scheduler(DecodeLoop(TARGET, drafter or Ngram()), limits))


def run(use, engine=None):
    """Runs a coroutine function of an engine that is started before and stopped after it."""
    engine = engine or make()

    async def main():
        engine.start()
        try:
            return await asyncio.wait_for(use(engine), HANG_SECONDS)
        finally:
            await engine.stop(0)

    result = asyncio.run(main())
    assert not engine._thread.is_alive()
    assert not engine.scheduler.has_work
    assert not engine.scheduler.loop._cache.lengths
    return result


async def collect(answer):
    return [piece async for piece in answer]


def test_answers_asked_for_together_come_whole_and_exact():
    async def use(engine):
        answers = engine.submit([(prompt, PARAMS) for prompt in PROMPTS])
        return await asyncio.gather(*map(collect, answers))

    for prompt, pieces in zip(PROMPTS, run(use), strict=True):
        alone = plain(TARGET, prompt, PARAMS)
        assert [i for piece in pieces for i in piece.token_ids] == alone.output_ids
        assert "".join(piece.text for piece in pieces) == alone.text.text
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert pieces[-1].stats.tokens == 30


def test_a_piece_says_which_of_its_tokens_were_drafted():
    answer_ids = plain(TARGET, PROMPTS[0], PARAMS).output_ids
    script = Script(PROMPTS[0] + answer_ids, wrong_at={len(PROMPTS[0]) + 7})

    async def use(engine):
        return await collect(engine.submit([(PROMPTS[0], GenerationParams(30, 4))])[0])

    pieces = run(use, make(drafter=script))
    assert [list(piece.is_drafted) for piece in pieces[:3]] == [
        [True] * 4 + [False],
        [True] * 2 + [False],
        [True] * 4 + [False],
    ]
    assert sum(sum(piece.is_drafted) for piece in pieces) == pieces[-1].stats.accepted


def test_a_cancelled_answer_frees_its_request_while_others_go_on():
    async def use(engine):
        long, short = engine.submit([(PROMPTS[0], GenerationParams(900)), (PROMPTS[1], PARAMS)])
        async for _ in long:
            break
        long.cancel()
        pieces = await collect(short)
        while long.request in engine._answers:
            await asyncio.sleep(0.01)
        return long.request, pieces

    request, pieces = run(use)
    assert (request.finish_reason, request.slot) == (CANCELLED, -1)
    assert sum(len(piece.token_ids) for piece in pieces) == 30


def test_what_can_not_be_answered_is_refused_where_it_is_asked():
    async def use(engine):
        with pytest.raises(ContextOverflow):
            engine.submit([(PROMPTS[0], PARAMS), ([5] * 2000, PARAMS)])
        with pytest.raises(ValueError, match="no tokens"):
            engine.submit([([], PARAMS)])
        engine.submit([(PROMPTS[0], GenerationParams(900))])
        with pytest.raises(Busy):
            engine.submit([(PROMPTS[0], PARAMS)] * 2)

    run(use, make(Limits(max_running=1, max_waiting=0)))


def test_stopping_finishes_what_runs_and_takes_nothing_more():
    async def main():
        engine = make(Limits(max_running=1))
        engine.start()
        first, second = engine.submit([(PROMPTS[0], GenerationParams(200)), (PROMPTS[1], PARAMS)])
        stopping = asyncio.create_task(engine.stop(HANG_SECONDS))
        await asyncio.sleep(0)
        with pytest.raises(Closed, match="shutting down"):
            engine.submit([(PROMPTS[0], PARAMS)])
        results = await asyncio.gather(collect(first), collect(second))
        await stopping
        return [pieces[-1].finish_reason for pieces in results], engine.is_ready

    assert asyncio.run(main()) == (["length", "length"], False)


def test_stopping_gives_up_what_takes_too_long():
    async def main():
        engine = make()
        step = engine.scheduler.step
        engine.scheduler.step = lambda: time.sleep(0.01) or step()  # the whole takes ten seconds on any machine
        engine.start()
        (answer,) = engine.submit([(PROMPTS[0], GenerationParams(1000, num_draft_tokens=0))])
        num_given_up = await engine.stop(0.05)
        return (await collect(answer))[-1].finish_reason, num_given_up, engine.num_answering

    assert asyncio.run(main()) == (CANCELLED, 1, 0)


def test_an_engine_that_fails_ends_every_answer_and_says_so(monkeypatch, caplog):
    engine = make()

    async def main():
        engine.start()
        answers = engine.submit([(PROMPTS[0], GenerationParams(900)), (PROMPTS[1], GenerationParams(900))])
        async for _ in answers[0]:
            break
        monkeypatch.setattr(engine.scheduler, "step", lambda: 1 / 0)
        results = await asyncio.wait_for(asyncio.gather(*map(collect, answers)), HANG_SECONDS)
        assert not engine.is_alive
        with pytest.raises(Closed, match="has failed"):
            engine.submit([(PROMPTS[0], PARAMS)])
        await engine.stop(1)
        return results, answers

    results, answers = asyncio.run(main())
    for pieces in results:
        assert (pieces[-1].finish_reason, pieces[-1].error) == (ERROR, "ZeroDivisionError: division by zero")
    assert "decoding has failed" in caplog.text
    assert engine.totals.finished == {ERROR: 2}
    assert engine.totals.stats == sum((answer.request.stats for answer in answers), DecodeStats())
    assert engine.totals.stats.tokens > 0


def test_what_was_served_is_counted():
    async def use(engine):
        answers = engine.submit([(prompt, PARAMS) for prompt in PROMPTS])
        await asyncio.gather(*map(collect, answers))
        return engine.totals

    totals = run(use)
    assert (totals.stats.requests, totals.stats.tokens) == (3, 90)
    assert totals.prompt_tokens == sum(map(len, PROMPTS))
    assert totals.finished == {"length": 3}


def test_an_idle_engine_wakes_for_work_and_not_by_the_clock():
    engine, is_idle = make(), threading.Event()
    wait = engine.scheduler.wait

    def wait_long(_):  # until something was answered
        is_idle.set()
        return wait(0.01 if engine.totals.finished else 2 * HANG_SECONDS)

    engine.scheduler.wait = wait_long

    async def use(engine):
        await asyncio.to_thread(is_idle.wait, HANG_SECONDS)
        return await collect(engine.submit([(PROMPTS[1], GenerationParams(1))])[0])

    assert len(run(use, engine)) == 1


NUM_THREADS = """
import asyncio, ctypes, re, sys
import torch
from test_engine import GenerationParams, make

openmp = ctypes.CDLL(re.search(r"\\S*lib[gi]omp\\S*[.]so\\S*", open("/proc/self/maps").read())[0])
seen = []

async def main():
    engine = make()
    step = engine.scheduler.step
    engine.scheduler.step = lambda: seen.append(openmp.omp_get_max_threads()) or step()
    engine.start()
    async for _ in engine.submit([([5, 9], GenerationParams(3))])[0]:
        pass
    await engine.stop(5)

torch.set_num_threads(1)
asyncio.run(main())
print(*set(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="finds OpenMP by the process's files")
def test_the_number_of_threads_holds_in_the_engines_own_thread_too():
    environment = os.environ | {
        "OMP_NUM_THREADS": "3",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", NUM_THREADS], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.stdout == "1\n", done.stderr
