import gc
from dataclasses import fields

import pytest
import rigs
import torch
from rigs import Recorder

from onlinespec.config import GenerationParams
from onlinespec.core import DrafterWeights, Feedback
from onlinespec.drafters.ngram import Ngram
from onlinespec.engine.step import DecodeLoop
from onlinespec.publishing.protocol import (
    Batch,
    Forget,
    Incoming,
    LogLine,
    Outgoing,
    Publish,
    Report,
    SetShare,
    decode,
    encode,
)

TARGET = rigs.random_target()
PROMPTS = [[5, 9, 200, 31, 5, 9], [7], [31, 77, 14, 9] * 20]


def served(prompts=PROMPTS, count=20):
    """Feedback of requests that ran together, and these."""
    recorder = Recorder()
    jobs = [(prompt, GenerationParams(count)) for prompt in prompts]
    requests = rigs.run_together(DecodeLoop(TARGET, Ngram(), recorder), jobs)
    return recorder.feedback, requests


def passed_on(feedback, size=1):
    """The same at the other end."""
    outgoing, incoming, arrived = Outgoing(), Incoming(), []
    for i in range(0, len(feedback), size):
        arrived += incoming.records(decode(encode(outgoing.batch(feedback[i : i + size]))))
    return arrived


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 1, 5)])
def test_a_tensor_arrives_as_it_was(dtype, shape):
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    weights = DrafterWeights({"w": sent.T if sent.dim() == 2 else sent}, 1)
    arrived = decode(encode(Publish.of(weights))).checked().params["w"]
    assert arrived.dtype == dtype
    assert torch.equal(arrived, sent.T if sent.dim() == 2 else sent)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_feedback_arrives_as_it_was_and_every_state_is_sent_once(size):
    feedback, requests = served()
    arrived = passed_on(feedback, size)
    names = [field.name for field in fields(Feedback) if field.name != "trace"]
    for record, sent in zip(arrived, feedback, strict=True):
        assert [getattr(record, name) for name in names] == [getattr(sent, name) for name in names]
    for request in requests:
        trace = next(one.trace for one in arrived if one.request_id == request.info.request_id)
        assert trace.token_ids == request.trace.token_ids
        assert trace.max_tokens == request.trace.max_tokens
        states = trace.features.final_SD[: trace.num_features]
        assert torch.equal(states, request.trace.features.final_SD[: request.trace.num_features])
    outgoing = Outgoing()
    sizes = [len(rows.features) for rows in outgoing.batch(feedback).messages]
    assert sum(sizes) == sum(request.trace.num_features for request in requests)


def test_records_that_were_dropped_leave_their_text_whole():
    feedback, requests = served()
    arrived = passed_on(feedback[::3] + [record for record in feedback if record.is_last])
    for record in arrived:
        request = next(one for one in requests if one.info.request_id == record.request_id)
        end = record.start + record.num_rows
        assert record.trace.token_ids[: end + 1] == request.trace.token_ids[: end + 1]
        assert torch.equal(record.trace.features.final_SD[:end], request.trace.features.final_SD[:end])


def test_both_ends_let_go_of_a_text_that_no_one_holds():
    outgoing, incoming = Outgoing(), Incoming()

    def send(records):
        incoming.records(outgoing.batch(records))

    for _ in range(3):
        feedback, requests = served()
        send(feedback)
        del feedback, requests
        gc.collect()
    feedback, _ = served(PROMPTS[:1], 1)
    send(feedback[:1])
    assert len(incoming) == len(outgoing._sent) == 1


def test_a_message_that_is_missing_is_noticed():
    feedback, _ = served(PROMPTS[:1])
    outgoing, incoming = Outgoing(), Incoming()
    first, second = (outgoing.batch([record]) for record in feedback[:2])
    with pytest.raises(ValueError, match="text 0 goes on at token 7, of it 0 are known"):
        incoming.records(second)
    incoming.records(Batch([Forget(0)]))
    assert len(incoming.records(first) + incoming.records(second)) == 2


def test_weights_arrive_with_their_number_and_a_changed_bit_is_noticed():
    weights = DrafterWeights({"b": torch.randn(3, 4), "a": torch.randn(2)}, 7)
    published = decode(encode(Publish.of(weights)))
    arrived = published.checked()
    assert arrived.version == 7
    assert all(torch.equal(arrived.params[name], weights.params[name]) for name in "ab")
    published.weights.params["b"].view(torch.int32)[2, 3] ^= 1
    with pytest.raises(ValueError, match=r"weights version 7 came with checksum \d+, not \d+"):
        published.checked()


@pytest.mark.parametrize("message", [Report({"loss": None, "rounds": 3}), LogLine("a.b", 30, "x"), SetShare(0.5)])
def test_other_messages_arrive_as_they_were(message):
    assert decode(encode(message)) == message


@pytest.mark.parametrize("data", [b"", b"\xff\x00", encode(SetShare(0.5))[:-1], b"\x81\xa4type\xa3Who"])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(ValueError, match="no message between serving and learning"):
        decode(data)
