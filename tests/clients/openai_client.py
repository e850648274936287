"""The openai SDK against a running server: python openai_client.py http://127.0.0.1:8000/v1

Every check asserts; the script prints one line per check and exits 0 only if all hold."""

import math
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="unused", max_retries=0, timeout=60)
MODEL = client.models.list().data[0].id
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def models():
    assert client.models.retrieve(MODEL).id == MODEL


def chat():
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)
    choice = answer.choices[0]
    assert "Paris" in choice.message.content, choice
    assert choice.finish_reason == "stop" and choice.message.role == "assistant"
    usage = answer.usage
    assert usage.prompt_tokens > 5 and usage.completion_tokens > 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def chat_stream():
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)
    parts, usage, reasons = [], None, []
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            if choice.finish_reason:
                reasons.append(choice.finish_reason)
    assert "".join(parts) == whole.choices[0].message.content
    assert len([p for p in parts if p]) > 1, "one chunk is no stream"
    assert reasons == ["stop"]
    assert usage.completion_tokens == whole.usage.completion_tokens


def chat_logprobs():
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens or answer.choices[0].finish_reason == "stop"
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0 and token.top_logprobs[0].logprob >= token.logprob - 1e-6
        assert bytes(token.bytes).decode("utf-8", "replace") or token.bytes == []
    text = b"".join(bytes(t.bytes) for t in content).decode()
    assert text.strip() == answer.choices[0].message.content.strip()


def choices_and_seeds():
    def ask(seed):
        answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=1.5, n=3, seed=seed, max_tokens=12)
        return [c.message.content for c in sorted(answer.choices, key=lambda c: c.index)]

    first = ask(7)
    assert len(first) == 3 and len(set(first)) > 1, first
    assert ask(7) == first
    assert ask(8) != first


def completion_with_logprobs():
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=6, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert len(logprobs.token_logprobs) == 6 and all(len(t) >= 2 for t in logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0 or logprobs.text_offset[0] == len("Once upon a time")


def echo_scores_a_prompt():
    text = "Once upon a time"
    answer = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=1, temperature=0)
    choice = answer.choices[0]
    assert choice.text == text, choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(lp < 0 and math.isfinite(lp) for lp in choice.logprobs.token_logprobs[1:])
    assert answer.usage.completion_tokens == 0
    more = client.completions.create(model=MODEL, prompt=text, max_tokens=3, echo=True, logprobs=1, temperature=0)
    assert more.choices[0].text.startswith(text)
    assert more.choices[0].logprobs.token_logprobs[1 : len(choice.logprobs.tokens)] == choice.logprobs.token_logprobs[1:]


def prompt_forms():
    ids = [0, 300, 301, 302]
    one = client.completions.create(model=MODEL, prompt=ids, max_tokens=4, temperature=0)
    many = client.completions.create(model=MODEL, prompt=[ids, [0, 400]], max_tokens=4, temperature=0)
    texts = client.completions.create(model=MODEL, prompt=["Once", "The fox"], max_tokens=4, temperature=0)
    assert one.usage.prompt_tokens == len(ids)
    assert len(many.choices) == 2 and many.choices[0].text == one.choices[0].text
    assert [c.index for c in texts.choices] == [0, 1]


def token_ids_in_logprobs():
    answer = client.completions.create(
        model=MODEL, prompt="Once upon", max_tokens=3, temperature=0, logprobs=0, extra_body={"return_tokens_as_token_ids": True}
    )
    assert all(t.startswith("token_id:") for t in answer.choices[0].logprobs.tokens)


def stop_strings():
    whole = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=30, temperature=0).choices[0].text
    stop = whole[10:14]
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=30, temperature=0, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)], (answer.choices[0].text, whole, stop)
    assert answer.choices[0].finish_reason == "stop"


def refused(status, word, call):
    try:
        call()
    except openai.APIStatusError as error:
        assert error.status_code == status, (error.status_code, error.body)
        assert word in str(error.body), (word, error.body)
        assert {"message", "type", "param", "code"} <= set(error.body), error.body
        return
    raise AssertionError(f"not refused: {word}")


def errors():
    chat = client.chat.completions.create
    text = client.completions.create
    refused(404, "no-such-model", lambda: chat(model="no-such-model", messages=QUESTION))
    refused(400, "temperature", lambda: chat(model=MODEL, messages=QUESTION, temperature=-1))
    refused(400, "top_p", lambda: chat(model=MODEL, messages=QUESTION, top_p=1.5))
    refused(400, "tools", lambda: chat(model=MODEL, messages=QUESTION, tools=[{"type": "function", "function": {"name": "f"}}]))
    refused(400, "response_format", lambda: chat(model=MODEL, messages=QUESTION, response_format={"type": "json_object"}))
    refused(400, "messages", lambda: chat(model=MODEL, messages=[]))
    refused(400, "4096", lambda: text(model=MODEL, prompt=[0, 4096], max_tokens=1))
    refused(400, "prompt", lambda: text(model=MODEL, prompt=[], max_tokens=1))
    refused(400, "max_tokens", lambda: text(model=MODEL, prompt="a", max_tokens="many"))
    refused(400, "suffix", lambda: text(model=MODEL, prompt="a", suffix="b"))
    refused(400, "4096", lambda: text(model=MODEL, prompt=[5] * 4000, max_tokens=200))


CHECKS = [
    models, chat, chat_stream, chat_logprobs, choices_and_seeds, completion_with_logprobs, echo_scores_a_prompt,
    prompt_forms, token_ids_in_logprobs, stop_strings, errors,
]

if __name__ == "__main__":
    for check in CHECKS:
        check()
        print("ok", check.__name__)
