"""Send malformed requests to a server: each must get a 4xx, none a 5xx or silence.

    python -m examples.benchmarks.server.server_fuzz \
        --url http://127.0.0.1:8080 --requests 2000

Every request starts as a good one and is spoilt by up to three changes: a field takes
another type or value, an unknown field appears, the JSON is cut or filled with odd
bytes, the headers or the path are wrong. The API's schema, server_schema.json, decides
whether a request is malformed; then only a 4xx will do. A request that still fits the
schema may be answered, or refused for a reason that no schema can express; it is
counted separately. Tools and their calls are among the fields if the model's template
knows them. Needs `pip install jsonschema`. Last line: JSON; the exit status is 1 if a
malformed request was answered, or any request with a 5xx or not at all.
"""

import argparse
import http.client
import json
import random
import string
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jsonschema import Draft202012Validator

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSE = "/v1/responses"
PATHS = (CHAT, TEXT, RESPONSE)
ODD: list[Any] = [None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, 10**30, "", " ", "x"]
ODD += ["\u0000", "\ud83d\ude00", "é" * 50, "9" * 400, [], [[]], [None], [1, "2"]]
ODD += [{}, {"type": "text"}, {"": ""}, {"type": "json_schema"}, [{}], [{"role": 1}]]
ODD += ["none", "required", {"type": "function"}, {"type": "function_call"}, "[" * 9000]
ODD += ["../../etc/passwd", "tiny@", "@", "system", "tool", {"include_usage": 3}]
RAW = [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"a":NaN}', b"[" * 20000]
RAW += [b'{"model":"\\ud800"}', b'{"a":1}{', b"9" * 5000, b'{"model":1e999}', b"\x00"]
FUNCTION = {
    "description": "Adds.",
    "strict": False,
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
Request = tuple[str, str, bytes, dict[str, str]]  # method, path, body, headers


def validators() -> dict[str, Draft202012Validator]:
    """Return the validators of bodies, by path."""
    schema = json.loads(Path(__file__).with_name("server_schema.json").read_text())
    escaped = {path: path.replace("/", "~1") for path in PATHS}
    return {
        path: Draft202012Validator(schema | {"$ref": f"#/$defs/{escaped[path]}"})
        for path in PATHS
    }


def is_malformed(
    request: Request, checks: dict[str, Draft202012Validator], host: str
) -> bool:
    """Whether a request breaks a rule of the schema or of HTTP."""
    method, path, raw, headers = request
    if method != "POST" or path not in checks or headers.get("Host", host) != host:
        return True
    if headers["Content-Type"] != "application/json":
        return True
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return True
    return not checks[path].is_valid(body)


def good(model: str, path: str, tools: bool) -> dict[str, Any]:
    """Return a request that would be answered, with every field that is known.

    Args:
        model: that is asked.
        path: where.
        tools: whether the model's template knows tools.
    """
    body: dict[str, Any] = {
        "model": model,
        "temperature": 0.5,
        "top_p": 0.9,
        "stream": False,
        "user": "someone",
        "ifp": {"instruction": "Answer.", "keep": 0.5, "selector": "random"},
    }
    if path == RESPONSE:
        return body | good_response(tools)
    body |= {
        "max_tokens": 2,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 3,
        "stop": ["\n"],
        "n": 2,
        "logprobs": 1,
        "logit_bias": {"5": 1},
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "repetition_context_size": 8,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
    }
    if path == TEXT:
        body["ifp"] |= {"check": 0.5, "draft_tokens": 4, "reselect": "drift"}
        return body | {"prompt": "Hello"}
    return body | good_chat(tools)


def good_chat(tools: bool) -> dict[str, Any]:
    """Return the fields of a chat, with a call and its result."""
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    body = {"logprobs": True, "top_logprobs": 2, "response_format": {"type": "text"}}
    body["chat_template_kwargs"] = {"enable_thinking": False}
    if not tools:
        return body | {"messages": said}
    called: dict[str, Any] = {"id": "a1", "type": "function"}
    called |= {"function": {"name": "add", "arguments": '{"a": 1}'}}
    thought = {"reasoning": "Hm.", "content": None, "tool_calls": [called]}
    said += [{"role": "assistant"} | thought]
    said += [{"role": "tool", "tool_call_id": "a1", "content": "2"}]
    tool = {"type": "function", "function": {"name": "add"} | FUNCTION}
    how = {"tools": [tool], "tool_choice": "auto", "parallel_tool_calls": True}
    return body | {"messages": said} | how


def good_response(tools: bool) -> dict[str, Any]:
    """Return the fields of a response, with a call and its result."""
    said: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "message", "role": "assistant", "content": "Hi."},
        {"type": "reasoning", "summary": [], "content": []},
    ]
    body: dict[str, Any] = {"instructions": "Be brief.", "max_output_tokens": 2}
    body |= {"metadata": {"a": "b"}}
    body |= {"text": {"format": {"type": "text"}}}
    if tools:
        call = {"type": "function_call", "call_id": "a1", "name": "add"}
        said += [call | {"arguments": "{}"}]
        said += [{"type": "function_call_output", "call_id": "a1", "output": "2"}]
        tool = {"type": "function", "name": "add"} | FUNCTION
        body |= {"tools": [tool], "tool_choice": "auto"}
    said.append({"role": "user", "content": "Go on."})
    return body | {"input": said}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) inside a JSON value."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in places(value[key])]


def spoil(body: dict[str, Any], rng: random.Random) -> None:
    """Change one place of a request, in place."""
    container, key = rng.choice(places(body))
    kind = rng.randrange(4)
    if kind == 0 and isinstance(container, dict):
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        container[word] = rng.choice(ODD)
    elif kind == 1 and not isinstance(container, list):
        del container[key]
    else:
        container[key] = json.loads(json.dumps(rng.choice(ODD)))


def spoilt(model: str, rng: random.Random, tools: bool) -> Request:
    """Return one request that most likely is malformed."""
    path = rng.choice(PATHS)
    body = good(model, path, tools and rng.random() < 0.8) | {"stream_options": None}
    body["stream"] = rng.random() < 0.3
    if path == CHAT and rng.random() < 0.3:
        form = {"name": "x", "strict": True, "schema": {"type": "object"}}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    for _ in range(rng.randint(1, 3)):
        spoil(body, rng)
    raw = json.dumps(body).encode()
    method, headers = "POST", {"Content-Type": "application/json"}
    kind = rng.randrange(20)
    if kind == 0:
        raw = rng.choice(RAW)
    elif kind == 1:
        raw = raw[: rng.randrange(len(raw))]
    elif kind == 2:
        at = rng.randrange(len(raw))
        raw = raw[:at] + rng.randbytes(3) + raw[at:]
    elif kind == 3:
        headers["Content-Type"] = rng.choice(["text/plain", "", "a/b; c", "\x7f"])
    elif kind == 4:
        path = rng.choice(["/", "/v1", "/v1/models/x", "/v1/embeddings", path + "/x"])
    elif kind == 5:
        method = rng.choice(["GET", "PUT", "DELETE", "PATCH"])
    elif kind == 6:
        headers["Host"] = rng.choice(["evil.example", "", "127.0.0.1.evil", "[::"])
    return method, path, raw, headers


def send(address: tuple[str, int], request: Request, key: str) -> tuple[int, bytes]:
    """Send one request on a connection of its own; return status and answer."""
    method, path, body, headers = request
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(
            method, path, body, headers | {"Authorization": f"Bearer {key}"}
        )
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def main() -> None:
    """Fuzz the server and end with its count."""
    parser = argparse.ArgumentParser(description="Send malformed requests.")
    parser.add_argument("--url", required=True, help="http://host:port")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key", default="")
    args = parser.parse_args()
    url = urlsplit(args.url)
    address = (str(url.hostname), int(url.port or 80))
    models = json.loads(send(address, ("GET", "/v1/models", b"", {}), args.api_key)[1])
    model = models["data"][0]["id"]
    rng, counts, failures = random.Random(args.seed), Counter[str](), 0
    checks = validators()
    tools = False
    for path, check in checks.items():  # the schema, and the server, know good ones
        for able in (False, True):
            check.validate(good(model, path, able))
            body = json.dumps(good(model, path, able)).encode()
            request = ("POST", path, body, {"Content-Type": "application/json"})
            status, answer = send(address, request, args.api_key)
            tools |= able and path == CHAT and status == 200
            assert status == 200 or (able and not tools), (path, answer)
    while counts["malformed"] < args.requests:
        request = spoilt(model, rng, tools)
        bad = is_malformed(request, checks, url.netloc)
        try:
            status, answer = send(address, request, args.api_key)
        except OSError as error:  # no answer, or none in time
            status, answer = 599, repr(error).encode()
        counts["malformed" if bad else "fit the schema"] += 1
        counts[f"{status // 100}xx"] += 1
        broken = b'"server_error"' in answer  # in a stream, after its status
        if broken or not (400 if bad else 200) <= status < 500:
            failures += 1
            print(status, bad, request, answer[:300], file=sys.stderr)
    print(json.dumps({**counts, "failures": failures}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
