"""A real server, a real client of OpenAI's library: text, numbers, seeds, keys, models, figures, counts."""

import json
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from torch.testing import assert_close

from server_tools import KEY, Running, metrics, send
from tether.causal.loading import load
from tether.causal.losses import IGNORE
from tether.causal.noise import Noise
from tether.causal.softmax import softmax_kl
from tether.delta.account import account
from tether.delta.regret import account_figures, shares
from tether.delta.windows import Windows

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you? <eos>"}]
TURNS_AS_TEXT = "system:Be brief. user:Who are you? <eos> assistant:"


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=running.url, api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(work):
    return {name: load(str(work / name)) for name in ("fused", "numeric", "causal", "plain")}


def written(loaded, name, prompt, count, *, seed=0, temperature=0.0, **options):
    """What `generate` writes, alone in this process."""
    model, tokenizer = loaded[name]
    encoded = tokenizer(prompt, return_tensors="pt") if isinstance(prompt, str) else prompt
    options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if name == "causal":
        options = {"noise": Noise.draw(1, model.latent_size, seed=seed)}
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        output = model.generate(
            **encoded, max_new_tokens=count, pad_token_id=257, return_dict_in_generate=True, **options
        )
    start = encoded["input_ids"].shape[1]
    ids = output["sequences"][0, start:]
    if name != "numeric":
        return tokenizer.decode(ids, skip_special_tokens=True)
    values = output["numeric_values"][0, start:]
    return tokenizer.decode(ids, values, skip_special_tokens=True, precision=6)


def turns_of(tokenizer):
    """The conversation by hand: control tokens of the template, letters of the turns."""
    ids, numbers = [], []
    for said in ("system:", "Be brief.", None, "user:", "Who are you? <eos>", None, "assistant:"):
        if not ids or said is None:
            ids.append(256)
            numbers.append(0.0)
        if said:
            encoded = tokenizer(said, split_special_tokens=True)
            ids += encoded["input_ids"]
            numbers += encoded.get("numeric_values", [0.0] * len(encoded["input_ids"]))
    encoded = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if any("numeric_values" in name for name in tokenizer.model_input_names):
        encoded["numeric_values"] = torch.tensor([numbers], dtype=torch.float64)
    return encoded


@pytest.mark.parametrize("name", ["fused", "numeric"])
def test_a_chat_and_a_completion_are_streamed(client, loaded, name):
    wanted = written(loaded, name, turns_of(loaded[name][1]), 24)
    asked = {"model": name, "messages": TURNS, "max_tokens": 24, "temperature": 0}
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
    assert len([piece for piece in pieces if piece.choices[0].delta.content]) > 4
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == wanted
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].usage == whole.usage

    prompt = "Rate 12.50 of 3,000"
    wanted = written(loaded, name, prompt, 24)
    asked = {"model": name, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    pieces = list(client.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == wanted
    assert client.completions.create(**asked).choices[0].text == wanted
    if name == "numeric":
        assert "<NUM>" not in wanted
        assert re.search(r"\d\.\d{3}", wanted)
        # The value is read, not its digits.
        same, other = (written(loaded, name, f"Rate {rate} of 3000", 24) for rate in ("12.5", "99"))
        assert same == wanted != other


REQUESTS = [
    (name, f"request {number} of 32, {7 * number}.5 to go", 8 + number % 13, number % 3 * 0.5, 1000 + number)
    for number in range(32)
    for name in [("fused", "numeric", "causal", "plain")[number % 4]]
]


def ask(client, name, prompt, count, temperature, seed, *, stream=False, **more):
    heat = {} if name == "causal" else {"temperature": temperature}
    answer = client.completions.create(
        model=name, prompt=prompt, max_tokens=count, seed=seed, stream=stream, **heat, **more
    )
    return "".join(piece.choices[0].text for piece in answer) if stream else answer.choices[0].text


def test_parallel_requests_get_the_texts_of_single_ones(client, loaded):
    wanted = [written(loaded, n, p, c, seed=s, temperature=t) for n, p, c, t, s in REQUESTS]
    assert len(set(wanted)) > 24
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda each: ask(client, *REQUESTS[each], stream=bool(each // 4 % 2)), range(32)))
    assert got == wanted


def test_parallel_answers_tell_of_themselves(client):
    def last(number):
        *_, piece = client.completions.create(
            model="fused", prompt=f"text {number ** 3} " * (1 + number), max_tokens=2 + number, stream=True,
            stop=["never comes"], extra_body={"tether": True},
        )  # fmt: skip
        return piece.tether, piece.usage, piece.choices[0].finish_reason

    alone = [last(number) for number in range(8)]
    assert len({each[0]["prompt_regret"] for each in alone}) == 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(last, range(8))) == alone


def test_seeds_repeat_and_do_not_leak(client):
    def draw(seed, **more):
        return ask(client, "fused", "ab", 24, 1.0, seed, **more)

    first = draw(5)
    assert draw(6) != first
    unseeded = {draw(None) for _ in range(3)}
    assert len(unseeded) == 3
    assert draw(5) == first
    assert draw(5, top_p=0.2) != first
    # Without temperature and top-p the model's own way of writing, which is greedy.
    assert client.completions.create(model="fused", prompt="ab", max_tokens=24).choices[0].text == ask(
        client, "fused", "ab", 24, 0, None
    )


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_ends_before_a_text_to_stop_at(client, loaded, stream):
    whole = written(loaded, "plain", "ab", 40)
    stop = whole[11:14]
    asked = {
        "model": "plain",
        "prompt": "ab",
        "max_tokens": 40,
        "stop": ["never comes", stop],
        "stream": stream,
    }
    answer = client.completions.create(**asked)
    pieces = list(answer) if stream else [answer]
    assert "".join(piece.choices[0].text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert pieces[-1].usage.completion_tokens < 40


def test_models_are_those_that_were_named_and_no_others(client, running):
    assert [each.id for each in client.models.list()] == ["fused", "numeric", "causal", "plain"]
    assert client.models.retrieve("plain").id == "plain"
    for name in ("other", "gpt2", "../fused", "fused@main", ""):
        with pytest.raises(openai.NotFoundError, match="expected one of fused, numeric, causal, plain"):
            client.completions.create(model=name, prompt="a")
    for path in (
        "/load_model",
        "/reset",
        "/v1/audio/transcriptions",
        "/v1/responses",
        "/v1/systemone",
        "/docs",
    ):
        assert send(running, "POST", path, b"{}")[0] == 404
    assert "hub" not in running.text()


def test_a_key_is_asked_for(running):
    body = json.dumps({"model": "plain", "prompt": "a", "max_tokens": 1}).encode()
    for key in (None, "", "a key for test", KEY + "s", "\xe9" * 5):
        for path in ("/v1/completions", "/v1/chat/completions", "/metrics", "/load_model"):
            status, said = send(running, "POST", path, body, key)
            assert status == 401
            assert json.loads(said)["error"]["type"] == "authentication_error"
    assert send(running, "POST", "/v1/completions", body)[0] == 200
    assert send(running, "GET", "/health", None, None) == (200, b'{"status":"ok"}')
    # A web page can make a browser send this.
    assert send(running, "POST", "/v1/completions", body, **{"Content-Type": "text/plain"})[0] == 415


def test_an_answer_tells_who_spoke(client, loaded):
    model, tokenizer = loaded["fused"]
    prompt = "To whom it may concern: 12.50 of 3,000"
    answer = client.completions.create(
        model="fused", prompt=prompt, max_tokens=20, temperature=0, extra_body={"tether": True}
    )
    told = answer.tether
    # Once by the account, as certificates make it.
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**encoded, max_new_tokens=20, do_sample=False, pad_token_id=257)[0]
    start, total = encoded["input_ids"].shape[1], len(ids)

    def windows(ids):
        targets = torch.cat([ids[1:], torch.tensor([IGNORE])])
        return Windows(ids, targets, torch.zeros(len(ids), dtype=torch.long), torch.tensor([0, len(ids)]))

    (whole,) = account([model], windows(ids), written=start)
    (read,) = account([model], windows(ids[:start]))
    regret = account_figures(model.fusion, read)["regret"]["base"]
    assert (told["prompt_regret"], told["prompt_regret_allowed"]) == (regret["largest"], regret["allowed"])
    answered = whole._replace(log_weights=whole.log_weights[start - 1 : -1])
    assert told["shares"] == shares(model.fusion, answered)
    # And once step by step, as the text was written, against the base's own law.
    base = client.completions.create(model="plain", prompt=prompt, max_tokens=1, temperature=0)
    assert base.usage.prompt_tokens == start
    cache, steps, kl = None, [], []
    with torch.no_grad():
        for at in range(start - 1, total):
            new = ids[None, :start] if cache is None else ids[None, at : at + 1]
            output = model(
                input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1, written_from=start,
                output_weights=True,
            )  # fmt: skip
            cache = output.past_key_values
            plain = loaded["plain"][0](input_ids=ids[None, : at + 1], logits_to_keep=1).logits[0, -1]
            steps.append(output.log_weights[0, -1].exp())
            kl.append(softmax_kl(plain.log_softmax(-1), output.logits[0, -1].log_softmax(-1)))
    names = ["base", "domain1", "domain2"]
    mean = torch.stack(steps[:-1]).mean(0)
    assert_close(
        torch.tensor([told["shares"][name] for name in names]).double(), mean.double(), rtol=1e-4, atol=1e-6
    )
    at_end = torch.tensor([told["shares_at_end"][name] for name in names])
    assert_close(at_end.double(), steps[-1].double(), rtol=1e-4, atol=1e-6)
    assert told["largest_kl"] == pytest.approx(float(max(kl[:-1])), rel=1e-2, abs=1e-6)
    assert told["largest_kl"] > 0
    # Streamed, it comes with the last piece; unasked, not at all.
    *rest, last = client.completions.create(
        model="fused", prompt=prompt, max_tokens=20, temperature=0, stream=True, extra_body={"tether": True}
    )
    assert last.tether == told
    assert not any(hasattr(piece, "tether") for piece in rest)
    chat = client.chat.completions.create(
        model="fused", messages=TURNS, max_tokens=3, extra_body={"tether": True}
    )
    assert set(chat.tether) == set(told)
    assert not hasattr(client.completions.create(model="fused", prompt="a", max_tokens=1), "tether")
    with pytest.raises(openai.BadRequestError, match="not a fusion by evidence"):
        client.completions.create(model="plain", prompt="a", extra_body={"tether": True})


def test_what_is_counted(client, running):
    before = metrics(running)
    answer = client.completions.create(model="fused", prompt="count me", max_tokens=7, temperature=0)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="a model of somebody's invention", prompt="a")
    after = metrics(running)

    def grown(name, labels):
        return after[name, labels] - before.get((name, labels), 0.0)

    assert grown("tether_requests_total", 'model="fused",status="200"') == 1
    assert grown("tether_requests_total", 'model="",status="404"') == 1
    assert grown("tether_read_tokens_total", 'model="fused"') == 8
    tokens = grown("tether_written_tokens_total", 'model="fused"')
    assert tokens == answer.usage.completion_tokens == 7
    weights = [
        grown("tether_weight_tokens_total", f'domain="{name}",model="fused"')
        for name in ("base", "domain1", "domain2")
    ]
    assert sum(weights) == pytest.approx(tokens)
    assert min(weights) > 0
    assert grown("tether_answering_seconds_total", 'model="fused"') > 0
    assert not any("invention" in labels for _, labels in after)


@pytest.mark.slow
def test_a_server_ends_when_it_is_asked_to_while_it_writes(work):
    """So many wait that not all can be answered in the seconds that it takes its leave."""
    server = Running(work, "fused", "--port", 0)
    begun = threading.Event()

    def read(stream):
        told = []
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as client:
            try:
                answer = client.completions.create(
                    model="fused", prompt="ab", max_tokens=480, temperature=0, stream=stream
                )
                for piece in answer if stream else [answer]:
                    told.append(piece)
                    begun.set()
                return told[-1].choices[0].finish_reason
            except openai.APIError as error:
                return str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(read, bool(number % 2)) for number in range(16)]
        assert begun.wait(60)
        assert server.end(signal.SIGTERM) == 0
        ends = [each.result() for each in answers]
    assert "Traceback" not in server.text(), server.text()
    cut = [end for end in ends if end not in ("length", "stop")]
    assert len(cut) > 8
    assert all("the server ends" in end for end in cut), ends
