"""Damaged, hostile and impatient clients: each gets one sentence, nobody another's text, and the server goes on."""

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server_tools import KEY, metrics, send
from tether.causal.loading import load
from tether.server.entrance import BODY_BYTES

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HEADERS = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"


def completion(**fields):
    return json.dumps({"model": "plain", "prompt": "a", "max_tokens": 2} | fields).encode()


def chat(**fields):
    turn = {"role": "user", "content": "a"}
    return json.dumps({"model": "fused", "messages": [turn], "max_tokens": 2} | fields).encode()


BAD = {
    "no JSON": (COMPLETIONS, b"{", 400, "not a JSON object"),
    "no text at all": (COMPLETIONS, b"", 400, "not a JSON object"),
    "another kind of JSON": (COMPLETIONS, b"[1, 2]", 400, "not a JSON object"),
    "not UTF-8": (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400, "not a JSON object"),
    "deep JSON": (COMPLETIONS, b'{"prompt": ' + b"[" * 100_000, 400, "not a JSON object"),
    "deep JSON that ends": (COMPLETIONS, b'{"stop": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "stop: "),
    "a huge whole number": (COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, ""),
    "no prompt": (COMPLETIONS, b'{"model": "plain"}', 400, "prompt: field required"),
    "an empty prompt": (COMPLETIONS, completion(prompt=""), 400, "at least one token"),
    "prompts": (COMPLETIONS, completion(prompt=["a", "b"]), 400, "prompt: "),
    "a prompt of ids": (COMPLETIONS, completion(prompt=[1, 2]), 400, "prompt: "),
    "half a character": (COMPLETIONS, completion(prompt="a\ud800b"), 400, "half a character"),
    "half a character to stop at": (COMPLETIONS, completion(stop="\udfff"), 400, "half a character"),
    "half a character in a turn": (
        CHAT, chat(messages=[{"role": "user", "content": "\ud800"}]), 400, "half a character",
    ),
    "noncharacters": (COMPLETIONS, completion(model="numeric", prompt="a\ufdd1\ufdd0c"), 400, "noncharacters"),
    "a long prompt": (COMPLETIONS, completion(prompt="a" * 512), 400, "512 tokens leave no room"),
    "a huge prompt": (COMPLETIONS, completion(prompt="a" * 1_000_000), 400, "1,000,000 characters are more"),
    "a huge body": (COMPLETIONS, completion(prompt="a" * BODY_BYTES), 413, "a body of more than"),
    "a huge turn": (CHAT, chat(messages=[{"role": "user", "content": "a" * 600}]), 400, "tokens leave no room"),
    "too many tokens": (COMPLETIONS, completion(max_tokens=481), 400, "481 are more than the 480"),
    "more than the window": (COMPLETIONS, completion(prompt="a" * 500, max_tokens=13), 400, "more than the 12"),
    "no tokens": (COMPLETIONS, completion(max_tokens=0), 400, "max_tokens"),
    "part of a token": (COMPLETIONS, completion(max_tokens=1.5), 400, "max_tokens"),
    "tokens as a text": (COMPLETIONS, completion(max_tokens="2"), 400, "max_tokens"),
    "a cold temperature": (COMPLETIONS, completion(temperature=-1), 400, "temperature: expected 0"),
    "a temperature that overflows": (COMPLETIONS, completion(temperature=1e-40), 400, "temperature: expected 0"),
    "no number": (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
    "infinity": (COMPLETIONS, b'{"prompt": "a", "top_p": Infinity}', 400, "top_p"),
    "top-p of 0": (COMPLETIONS, completion(top_p=0), 400, "top_p"),
    "top-p above 1": (COMPLETIONS, completion(top_p=1.1), 400, "top_p"),
    "temperature in mode causal": (COMPLETIONS, completion(model="causal", temperature=1), 400, "mode causal"),
    "a negative seed": (COMPLETIONS, completion(seed=-1), 400, "seed"),
    "a large seed": (COMPLETIONS, completion(seed=2**63), 400, "seed"),
    "an empty text to stop at": (COMPLETIONS, completion(stop=[""]), 400, "stop: expected"),
    "many texts to stop at": (COMPLETIONS, completion(stop=list("abcde")), 400, "stop: expected"),
    "a number to stop at": (COMPLETIONS, completion(stop=3), 400, "stop: "),
    "stream as a text": (COMPLETIONS, completion(stream="yes"), 400, "stream: "),
    "several answers": (COMPLETIONS, completion(n=2), 400, "n: not supported"),
    "log-probabilities": (COMPLETIONS, completion(logprobs=3), 400, "logprobs: not supported"),
    "echo": (COMPLETIONS, completion(echo=True), 400, "echo: not supported"),
    "suffix": (COMPLETIONS, completion(suffix="b"), 400, "suffix: not supported"),
    "a penalty": (COMPLETIONS, completion(frequency_penalty=0.5), 400, "frequency_penalty: not supported"),
    "a field of ours": (COMPLETIONS, completion(generation_config="{}"), 400, "generation_config: not supported"),
    "an unknown field": (COMPLETIONS, completion(**{"a\nb": 1}), 400, "a\\nb: not supported"),
    "log-probabilities of a chat": (CHAT, chat(logprobs=True, top_logprobs=2), 400, "logprobs: not supported"),
    "tools": (CHAT, chat(tools=[{"type": "function"}]), 400, "tools: not supported"),
    "no messages": (CHAT, chat(messages=[]), 400, "messages: "),
    "messages that are none": (CHAT, chat(messages="hi"), 400, "messages: "),
    "a message that is none": (CHAT, chat(messages=["hi"]), 400, "messages.0: "),
    "an unknown role": (CHAT, chat(messages=[{"role": "root", "content": "a"}]), 400, "messages.0.role: "),
    "a picture": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]),
        400,
        "messages.0.content",
    ),
    "no content": (CHAT, chat(messages=[{"role": "user"}]), 400, "messages.0.content: "),
    "no chat template": (CHAT, chat(model="plain"), 400, "no chat template"),
    "another model": (COMPLETIONS, completion(model="gpt2"), 404, "expected one of fused"),
    "no model": (COMPLETIONS, b'{"prompt": "a"}', 404, "no model is named"),
    "a model that is none": (COMPLETIONS, completion(model=["plain"]), 400, "model: "),
    "an unknown path": ("/v1/embeddings", completion(), 404, "not served here"),
    "a path upwards": ("/v1/../v1/completions", completion(), 404, "not served here"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_in_one_sentence(running, case):
    path, body, status, said = BAD[case]
    got, answer = send(running, "POST", path, body)
    told = json.loads(answer)["error"]
    assert (got, said in told["message"]) == (status, True), (got, told)
    assert "\n" not in told["message"]
    assert "Traceback" not in told["message"]
    assert len(told["message"]) < 400
    if ": " in said and status == 400 and said.split(":")[0] in json.loads(body or b"{}"):
        assert told["param"] == said.split(":")[0]


def raw(running, text, *, wait=0.0):
    """Send bytes as they are and close; gives what came back within `wait` seconds."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        connection.sendall(text if isinstance(text, bytes) else text.encode())
        connection.settimeout(wait or None)
        try:
            return connection.recv(65536) if wait else b""
        except TimeoutError:
            return b""


def body_of(canary, draw, *, stream):
    prompt = f"{canary} {draw.randrange(10**6)}"
    return {
        "model": "plain",
        "prompt": prompt,
        "max_tokens": 6,
        "temperature": 0,
        "stream": stream,
        "user": canary,
    }


@pytest.mark.slow
def test_two_hundred_hostile_requests_beside_valid_ones(running, work):
    """Every valid request has a canary of its own in prompt, user and id; its answer is the text of a single one."""
    draw = random.Random(7)
    model, tokenizer = load(str(work / "plain"))

    def alone(prompt):
        encoded = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**encoded, max_new_tokens=6, do_sample=False, pad_token_id=257)
        return tokenizer.decode(ids[0, len(encoded["input_ids"][0]) :], skip_special_tokens=True)

    def valid(canary):
        body = body_of(canary, random.Random(canary), stream=False)
        status, answer = send(
            running, "POST", COMPLETIONS, json.dumps(body).encode(), **{"X-Request-ID": canary}
        )
        return canary, status, answer, alone(body["prompt"])

    def cut(canary):
        body = json.dumps(body_of(canary, random.Random(canary), stream=draw.random() < 0.5)).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\n{HEADERS}Content-Length: {len(body)}\r\n\r\n".encode()
        return head, body

    hostile = [
        lambda c: send(running, *BAD_CALLS[hash(c) % len(BAD_CALLS)])[1],
        lambda c: send(running, "POST", COMPLETIONS, completion(user=c), key=c)[1],
        lambda c: raw(running, cut(c)[0] + cut(c)[1][: len(c) + 9]),
        lambda c: raw(running, b"".join(cut(c))),
        lambda c: raw(running, b"".join(cut(c)), wait=0.02),
        lambda c: raw(running, cut(c)[0][:30], wait=0.01),
        lambda c: raw(running, b"\x16\x03\x01" + c.encode() * 20, wait=0.1),
        lambda c: raw(
            running, f"POST {COMPLETIONS} HTTP/1.1\r\n{HEADERS}Content-Length: 5\r\n\r\n{{}}{c}", wait=0.1
        ),
        lambda c: raw(
            running, f"POST {COMPLETIONS} HTTP/1.1\r\n{HEADERS}Content-Length: -3\r\n\r\n{c}", wait=0.1
        ),
        lambda c: raw(
            running,
            f"POST {COMPLETIONS} HTTP/1.1\r\n{HEADERS}Transfer-Encoding: chunked\r\n\r\nzz\r\n{c}",
            wait=0.1,
        ),
    ]
    hostiles = [f"canary-hostile-{number}-{draw.getrandbits(64):x}" for number in range(200)]
    valids = [f"canary-valid-{number}-{draw.getrandbits(64):x}" for number in range(60)]
    with ThreadPoolExecutor(16) as pool:
        bad = [pool.submit(hostile[at % len(hostile)], canary) for at, canary in enumerate(hostiles)]
        good = [pool.submit(valid, canary) for canary in valids]
        answered = [each.result() for each in good]
        told = [each.result() for each in bad]
    for canary, status, answer, text in answered:
        assert status == 200
        assert json.loads(answer)["choices"][0]["text"] == text
        assert not any(other.encode() in answer for other in hostiles + valids if other != canary)
    for canary, answer in zip(hostiles, told, strict=True):
        assert not any(other.encode() in answer for other in hostiles + valids if other != canary)
        assert b"Traceback" not in answer
    assert running.process.poll() is None
    assert send(running, "POST", COMPLETIONS, completion())[0] == 200
    assert not any(canary in running.text() for canary in hostiles + valids)


BAD_CALLS = [("POST", path, body) for path, body, *_ in BAD.values()]


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_stops_the_work(running, stream):
    before = metrics(running)
    body = completion(max_tokens=480, stream=stream, temperature=0)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\n{HEADERS}Content-Length: {len(body)}\r\n\r\n".encode()
    begun = time.perf_counter()
    raw(running, head + body, wait=0.5 if stream else 0.3)
    assert send(running, "POST", COMPLETIONS, completion())[0] == 200
    waited = time.perf_counter() - begun
    after = metrics(running)
    label = 'model="plain"'
    written = after["tether_written_tokens_total", label] - before.get(
        ("tether_written_tokens_total", label), 0
    )
    assert 2 < written < 400, (written, waited)
    left = ("tether_requests_total", 'model="plain",status="499"')
    until = time.monotonic() + 10
    while metrics(running).get(left, 0) == before.get(left, 0) and time.monotonic() < until:
        time.sleep(0.05)
    assert metrics(running)[left] == before.get(left, 0) + 1
