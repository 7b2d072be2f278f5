"""Judges behind a real HTTP server that fails, stalls, limits rates and answers nonsense."""

import hashlib
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from eval_data import RULE, dump, lines, read, write_answers, write_llavabench, write_mmvet

pytest.importorskip("openai", reason="the eval extra is not installed")

from sqllava.eval import cli, judge  # noqa: E402
from sqllava.eval.tasks import get_task  # noqa: E402


def completion(text):
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge-1",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
        ],
    }


@contextmanager
def server(behave):
    """A chat server on this machine; `behave(number, body)` gives (status, reply) of a request.

    Yields its address and the list of what it was asked.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            status, reply = behave(len(asked), body)
            kind = "application/json"
            if isinstance(reply, tuple):
                kind, reply = reply
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has given up

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """LLaVA-Bench with our answers."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    write_llavabench(tmp_path)
    folder = tmp_path / "llava-bench-in-the-wild"
    task = get_task("llavabench")
    write_answers(tmp_path / "a.jsonl", task, folder / "questions.jsonl", ["ours 0", "ours 1"])
    return folder


def review(bench, address, *more):
    cli.main(
        ["judge", "llavabench", "--answers", str(bench.parent / "a.jsonl")]
        + ["--annotations", str(bench), "--prompts", str(bench / "rule.json")]
        + ["--out", str(bench.parent / "reviews.jsonl"), "--base-url", address, *more]
    )


def test_the_request_is_the_published_one(bench, capsys):
    with server(lambda *_: (200, completion("8 6\nGood."))) as (address, asked):
        review(bench, address)
    (body,) = [body for body in asked if "What is left?" in body["messages"][1]["content"]]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4-0314", 0.2, 1024)
    assert body["messages"][1]["content"] == (
        "[Context]\nNothing.\n\n[Question]\nWhat is left?\n\n"
        "[Assistant 1]\nIt is 2.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nours 0\n\n[End of Assistant 2]\n\n"
        f"[System]\n{RULE['prompt']}\n\n"
    )
    (listed,) = [body for body in asked if "What is dog?" in body["messages"][1]["content"]]
    assert "[Context]\nA dog.\nA cat.\n\n" in listed["messages"][1]["content"]
    rows = read(bench.parent / "reviews.jsonl")
    assert sorted(row["question_id"] for row in rows) == [0, 1, 2]
    assert all(row["content"] == "8 6\nGood." and row["tuple"] == [8, 6] for row in rows)
    assert all(row["judge"] == "judge-1" and row["date"] for row in rows)
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == 0 and told["comparable"] is False  # the rule is not the published one
    reviews = ["--reviews", str(bench.parent / "reviews.jsonl"), "--annotations", str(bench)]
    cli.main(["score", "llavabench", *reviews])
    assert json.loads(capsys.readouterr().out)["metrics"]["all"]["ratio"] == 75.0


def test_failures_are_tried_again_counted_and_never_averaged(bench, capsys):
    """Rate limits and server errors pass; nonsense in every form is left out and asked again."""
    nonsense = [b"<html>busy</html>", b"[]", b"null", completion(None), {"choices": []}]

    def behave(number, body):
        if "What is red?" in body["messages"][1]["content"]:
            return (429, {"error": {"message": "slow down"}}) if number < 4 else (500, b"")
        if "What is dog?" in body["messages"][1]["content"]:
            return 200, nonsense.pop() if nonsense else completion("I like both.")
        return 200, completion("8 8")

    with server(behave) as (address, asked):
        review(bench, address, "--retries", "1")
        assert json.loads(capsys.readouterr().out)["failed"] == 2
        for _ in range(5):
            with pytest.raises(SystemExit, match="all 2 requests failed; question 0: "):
                review(bench, address, "--retries", "0")
        told = json.loads(capsys.readouterr().out.split("\n}\n")[-2] + "\n}")
    assert (told["asked"], told["failed"], told["unreadable"]) == (2, 2, 1)
    assert told["failures"]["1"] == "no two scores of 0 to 10 in 'I like both.'"
    assert told["failures"]["0"].endswith("(500: nothing more)")
    # What could be read is not asked for again.
    assert sum("What is left?" in str(body) for body in asked) == 1
    rows = {row["question_id"]: row for row in read(bench.parent / "reviews.jsonl")}
    assert set(rows) == {1, 2} and rows[1]["content"] == "I like both."
    reviews = ["--reviews", str(bench.parent / "reviews.jsonl"), "--annotations", str(bench)]
    with pytest.raises(SystemExit, match="1 of 3 answers are missing"):
        cli.main(["score", "llavabench", *reviews])
    cli.main(["score", "llavabench", *reviews, "--allow-missing"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["all"] == {
        "ratio": 100.0,
        "reference": 80.0,
        "candidate": 80.0,
        "count": 1,
    }
    assert printed["counts"]["failed"] == 1 and printed["counts"]["missing"] == 1
    assert printed["counts"]["items"] == 3


def test_a_stalling_server_fails_in_time(bench, capsys):
    def stall(number, body):
        time.sleep(3)
        return 200, completion("8 8")

    started = time.monotonic()
    failed = pytest.raises(SystemExit, match=r"all 3 requests failed.*no reply within 0.3 s")
    with server(stall) as (address, _), failed:
        review(bench, address, "--retries", "0", "--timeout", "0.3")
    assert time.monotonic() - started < 20
    assert json.loads(capsys.readouterr().out)["failed"] == 3


def test_a_torn_review_is_asked_for_again(bench, capsys):
    with server(lambda *_: (200, completion("8 8"))) as (address, asked):
        review(bench, address)
        path = bench.parent / "reviews.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
        review(bench, address)
    assert len(asked) == 4
    assert sorted(row["question_id"] for row in read(path)) == [0, 1, 2]


def test_the_estimate_asks_nothing(bench, capsys):
    with server(lambda *_: (200, completion("8 8"))) as (address, asked):
        review(bench, address, "--estimate", "--price-in", "30", "--price-out", "60")
    assert not asked and not (bench.parent / "reviews.jsonl").exists()
    told = json.loads(capsys.readouterr().out)["estimate"]
    assert told["requests"] == 3 and told["tokens_out_at_most"] == 3 * 1024
    assert told["dollars_at_most"] == pytest.approx(3 * 1024 * 60e-6, abs=0.03)


def test_without_a_key_the_error_says_where_it_belongs(bench, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SystemExit, match="key is not in .OPENAI_API_KEY"):
        review(bench, "http://127.0.0.1:9")


def test_only_the_published_prompt_and_judge_are_comparable(tmp_path, monkeypatch):
    rules = dump(tmp_path / "rule.json", {f"llava_bench_{k}": RULE for k in ("conv", "detail")})
    assert not judge.review_prompt_is_published(rules)
    published = hashlib.sha256(RULE["prompt"].encode()).hexdigest()
    monkeypatch.setitem(judge.PROMPT_SHA256, "llavabench", published)
    assert judge.review_prompt_is_published(rules)


def refused(message, param=None):
    return {"error": {"message": message, "param": param, "type": "invalid_request_error"}}


@pytest.mark.parametrize(
    ("status", "reply", "sentence"),
    [
        (401, refused("Incorrect API key"), r"refuses the key in .OPENAI_API_KEY .401: Incorrect"),
        (403, refused("Not yours"), r"may not use this judge .403: Not yours"),
        (404, refused("No model x"), r"look at --judge and --base-url .404: No model x"),
        (404, ("text/html", b"<html>Not found</html>"), r"--base-url .404: a web page"),
        (429, refused("Slow down"), r"limit of requests is reached.*429: Slow down.*wait 0 s"),
        (400, refused("The context is full"), r"refuses or fails .400: The context is full"),
        (500, ("text/plain", b"Internal\nError"), r"fails .500: Internal Error"),
        (502, b"", r"fails .502: nothing more"),
        (200, ("text/html", b"<html>Sign in</html>"), "is a web page: look at --base-url"),
        (200, ("text/event-stream", b'data: {"x": 1}\n\ndata: [DONE]\n'), "a stream of events"),
        (200, ("text/plain", b"8 9"), "no chat completion: '8 9'"),
        (200, b"{broken", "no chat completion"),
        (200, b"null", "the reply holds no choices"),
        (200, [], "the reply holds no choices"),
        (200, {"error": {"message": "overloaded", "code": 502}}, "the server fails: overloaded"),
        (200, {"choices": []}, "the reply holds no choices"),
        (200, {"choices": None}, "the reply holds no choices"),
        (200, {"choices": [None]}, "the reply holds no text"),
        (200, {"choices": [{"message": None}]}, "the reply holds no text"),
        (200, {"choices": [{"message": {"content": None}}]}, "the reply holds no text"),
        (200, {"choices": [{"message": {"content": 8}}]}, "the reply holds no text"),
        (
            200,
            {"choices": [{"message": {"content": None, "refusal": "I cannot"}}]},
            "the judge refuses: I cannot",
        ),
        (
            200,
            {"choices": [{"message": {"content": ""}, "finish_reason": "length"}]},
            "length was used up before .--max-tokens",
        ),
    ],
)
def test_what_is_no_reply_ends_with_a_sentence(status, reply, sentence, bench):
    failed = f"^error: all 3 requests failed; question 0: .*{sentence}"
    with (
        server(lambda *_: (status, reply)) as (address, _),
        pytest.raises(SystemExit, match=failed),
    ):
        review(bench, address, "--retries", "0")
    with pytest.raises(SystemExit, match="3 of 3 answers are missing"):
        reviews = ["--reviews", str(bench.parent / "reviews.jsonl"), "--annotations", str(bench)]
        cli.main(["score", "llavabench", *reviews])


def test_a_server_that_is_not_there_is_named(bench):
    with pytest.raises(SystemExit, match=r"cannot reach http://127.0.0.1:9"):
        review(bench, "http://127.0.0.1:9", "--retries", "0")


def test_a_key_or_an_address_that_cannot_be_is_refused(bench, monkeypatch):
    with pytest.raises(SystemExit, match="begins with http:// or https://, found 'localhost:80'"):
        review(bench, "localhost:80")
    for key in ("ключ", "sk-1\nsk-2"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(SystemExit, match="holds characters that no key has"):
            review(bench, "http://127.0.0.1:9")


def test_half_a_character_in_an_answer_can_be_sent(bench):
    task = get_task("llavabench")
    write_answers(bench.parent / "a.jsonl", task, bench / "questions.jsonl", ["a \ud83d dog"])
    with server(lambda *_: (200, completion("8 9"))) as (address, asked):
        review(bench, address)
    assert "a ? dog" in asked[0]["messages"][1]["content"]


def test_text_in_parts_is_a_reply(bench):
    parts = completion([{"type": "text", "text": "8 "}, {"type": "text", "text": "9\n"}])
    with server(lambda *_: (200, parts)) as (address, _):
        review(bench, address)
    assert read(bench.parent / "reviews.jsonl")[0]["tuple"] == [8, 9]


@pytest.mark.parametrize(
    "said",
    [  # vLLM's; OpenAI's
        "'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's maximum context "
        "length is 2048 tokens and your request has 1800 input tokens",
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens "
        "(7976 in the messages, 1024 in the completion: max_tokens).",
    ],
)
def test_one_request_that_is_too_long_takes_nothing_from_the_others(said, bench, capsys):
    def behave(number, body):
        return (400, refused(said, "max_tokens")) if number == 1 else (200, completion("8 9"))

    with server(behave) as (address, asked):
        review(bench, address, "--concurrency", "1")
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == 1 and "context length" in told["failures"]["0"]
    assert told["parameters"]["limit_name"] == "max_tokens"
    assert all("max_tokens" in body for body in asked) and len(asked) == 3


def test_a_judge_that_refuses_parameters_is_asked_without_them(bench, capsys):
    """As gpt-5 does; two requests at once are both refused, and both asked again."""

    def behave(number, body):
        if "max_tokens" in body:
            said = "'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            return 400, refused(said, "max_tokens")
        if "temperature" in body:
            return 400, refused("Only the default (1) is supported", "temperature")
        return 200, completion("8 9")

    with server(behave) as (address, asked):
        review(bench, address, "--judge", "gpt-5")
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == 0 and told["comparable"] is False
    assert told["parameters"] == {
        "limit_name": "max_completion_tokens",
        "limit": None,
        "temperature": None,
    }
    assert told == json.loads((bench.parent / "reviews.header.json").read_text())
    assert asked[-1]["max_completion_tokens"] == 1024 and "temperature" not in asked[-1]
    assert len(read(bench.parent / "reviews.jsonl")) == 3


def test_a_judge_that_knows_no_limit_at_all_is_asked_without_one(bench, capsys):
    def behave(number, body):
        limits = [name for name in body if name.startswith("max_")]
        return (422, refused(f"{limits}: extra")) if limits else (200, completion("8 9"))

    with server(behave) as (address, asked):
        review(bench, address)
    assert json.loads(capsys.readouterr().out)["parameters"]["limit_name"] is None
    assert asked[-1]["temperature"] == 0.2


def test_parameters_can_be_given(bench):
    with server(lambda *_: (200, completion("8 9"))) as (address, asked):
        more = ["--max-tokens", "4000", "--max-tokens-name", "max_completion_tokens"]
        review(bench, address, *more, "--temperature", "none")
        assert asked[-1]["max_completion_tokens"] == 4000
        assert not {"max_tokens", "temperature"} & set(asked[-1])
        review(bench, address, "--temperature", "0.7", "--out", str(bench.parent / "other.jsonl"))
    assert (asked[-1]["temperature"], asked[-1]["max_tokens"]) == (0.7, 1024)


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "warm"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--concurrency", "0"],
        ["--max-tokens", "0"],
        ["--retries", "-1"],
        ["--retries", "many"],
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, bench, capsys):
    with pytest.raises(SystemExit) as left:
        review(bench, "http://127.0.0.1:9", *flags)
    assert left.value.code == 2 and flags[0] in capsys.readouterr().err


def test_unreadable_reviews_are_asked_for_three_times_and_again_in_the_next_run(bench, capsys):
    mind = {"made up": False}

    def behave(number, body):
        clear = mind["made up"] or "What is dog?" not in str(body)
        return 200, completion("8 9" if clear else "80 90\nBoth are good.")

    with server(behave) as (address, asked):
        review(bench, address)
        told = json.loads(capsys.readouterr().out)
        assert (told["asked"], told["failed"], told["unreadable"], len(asked)) == (3, 1, 1, 2 + 3)
        assert list(told["failures"]) == ["1"] and "'80 90\\nBoth" in told["failures"]["1"]
        kept = {row["question_id"]: row for row in read(bench.parent / "reviews.jsonl")}
        assert kept[1]["content"] == "80 90\nBoth are good." and kept[1]["tuple"] == [-1, -1]
        assert kept[1]["official_tuple"] == [80, 90]
        mind["made up"] = True
        review(bench, address)
        assert len(asked) == 6 and "What is dog?" in str(asked[-1])
    rows = read(bench.parent / "reviews.jsonl")
    assert sorted(row["question_id"] for row in rows) == [0, 1, 2]
    assert all(row["tuple"] == [8, 9] for row in rows)


def test_an_unreadable_review_outlives_a_failing_run(bench):
    for reply in ((200, completion("I like both.")), (500, b"")):
        failed = pytest.raises(SystemExit, match="all 3 requests failed")
        with server(lambda *_, reply=reply: reply) as (address, _), failed:
            review(bench, address, "--retries", "0")
    assert [row["content"] for row in read(bench.parent / "reviews.jsonl")] == ["I like both."] * 3


def test_replies_that_only_the_tolerant_reading_knows_are_counted(bench, capsys):
    def behave(number, body):
        return 200, completion("8 9" if "What is dog?" in str(body) else "**8** **6**")

    with server(behave) as (address, _):
        review(bench, address)
    assert json.loads(capsys.readouterr().out)["tolerated"] == 2
    reviews = ["--reviews", str(bench.parent / "reviews.jsonl"), "--annotations", str(bench)]
    cli.main(["score", "llavabench", *reviews])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["counts"]["tolerated"], printed["counts"]["failed"]) == (2, 0)
    assert printed["metrics"]["all"]["candidate"] == 70.0
    cli.main(["score", "llavabench", *reviews, "--reading", "official"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["counts"]["tolerated"], printed["counts"]["failed"]) == (0, 2)
    assert printed["metrics"]["all"]["candidate"] == 90.0


def test_replies_of_another_judge_or_to_other_answers_are_not_mixed(bench, capsys):
    with server(lambda *_: (200, completion("8 9"))) as (address, _):
        review(bench, address, "--judge", "one")
        with pytest.raises(SystemExit, match="holds replies of another judge: give another --out"):
            review(bench, address, "--judge", "two")
        task = get_task("llavabench")
        write_answers(bench.parent / "a.jsonl", task, bench / "questions.jsonl", ["new"])
        with pytest.raises(SystemExit, match="holds replies to other answers"):
            review(bench, address, "--judge", "one")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rule.json", "{}", "has no rule of LLaVA-Bench"),
        (
            "rule.json",
            '{"llava_bench_conv": {"role": "A"}}',
            "llava_bench_conv: a rule needs a prompt",
        ),
        ("rule.json", "[]", "has no rule of LLaVA-Bench"),
        (
            "rule.json",
            '{"llava_bench_conv": {"role": "A", "prompt": "B"}}',
            "has no rule 'llava_bench_detail' for question 1",
        ),
        ("context.jsonl", '{"image": "001.jpg", "caption": "x"}', "has nothing on '002.jpg'"),
        ("context.jsonl", '{"image": "001.jpg"}', "record 1 has no caption"),
        ("questions.jsonl", '{"question_id": 0}', "record 1 has no category"),
        ("answers_gpt4.jsonl", '{"question_id": 0}', "record 1: an answer needs"),
    ],
)
def test_a_file_of_another_form_is_named(name, content, sentence, bench):
    (bench / name).write_text(content)
    with pytest.raises(SystemExit, match=f"^error: .*{name}.*{sentence}"):
        review(bench, "http://127.0.0.1:9")


# --- MM-Vet ---------------------------------------------------------------------------------------

PROMPT = "Compare.\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"


@pytest.fixture
def vet(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    write_mmvet(tmp_path)
    folder = tmp_path / "mm-vet"
    task = get_task("mmvet")
    write_answers(tmp_path / "a.jsonl", task, folder / "llava-mm-vet.jsonl", ["x = 3"])
    (folder / "mm-vet_evaluator.py").write_text(f"import os\n\nprompt = {PROMPT!r}\n")
    return folder


def grade(vet, address, *more):
    cli.main(
        ["judge", "mmvet", "--answers", str(vet.parent / "a.jsonl"), "--annotations", str(vet)]
        + ["--prompts", str(vet / "mm-vet_evaluator.py"), "--base-url", address]
        + ["--out", str(vet.parent / "grades.json"), *more]
    )


def test_grades_are_asked_for_run_by_run_and_resumed(vet, capsys):
    with server(lambda *_: (200, completion("0.5"))) as (address, asked):
        grade(vet, address)
        assert len(asked) == 4
        grade(vet, address, "--runs", "2")
        assert len(asked) == 8
    # The four of a run are asked side by side, and come in any order.
    first_run = [body["messages"] for body in asked[:4]]
    prompt = PROMPT + "\nWhat is red? | -1 <AND> -5 | x = 3 | "
    assert [{"role": "user", "content": prompt}] in first_run
    assert (asked[0]["temperature"], asked[0]["max_tokens"]) == (0, 3)
    grades = json.loads((vet.parent / "grades.json").read_text())
    graded = {"model": ["judge-1"] * 2, "content": ["0.5"] * 2, "score": [0.5] * 2}
    assert grades["v1_0"] == {**graded, "official": [0.5] * 2}
    capsys.readouterr()
    path = ["--grades", str(vet.parent / "grades.json"), "--annotations", str(vet)]
    cli.main(["score", "mmvet", *path])
    printed = json.loads(capsys.readouterr().out)["metrics"]
    assert (printed["total"], printed["runs"]) == (50.0, [50.0, 50.0])


def test_unreadable_grades_are_asked_for_five_times_hotter_then_failed(vet, capsys):
    def behave(number, body):
        return 200, completion("bad" if "What is red?" in str(body) else "1.0")

    with server(behave) as (address, asked):
        grade(vet, address)
    tries = [body for body in asked if "What is red?" in str(body)]
    assert [body["temperature"] for body in tries] == [0, 0, 0.5, 1.0, 1.5]
    assert tries[1]["messages"][0]["content"].endswith(judge.ASK_FOR_DIGIT)
    assert json.loads(capsys.readouterr().out)["failed"] == 1
    path = ["--grades", str(vet.parent / "grades.json"), "--annotations", str(vet)]
    cli.main(["score", "mmvet", *path])
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["total"] == 100.0 and printed["counts"]["failed"] == 1
    cli.main(["score", "mmvet", *path, "--unreadable", "zero"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["total"] == 75.0
    assert (printed["counts"]["failed"], printed["counts"]["unreadable"]) == (0, 1)


def test_the_grading_prompt_is_read_from_the_script_or_a_text_file(vet, tmp_path):
    assert judge.read_grading_prompt(vet / "mm-vet_evaluator.py") == PROMPT
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert judge.read_grading_prompt(tmp_path / "prompt.txt") == PROMPT
    (tmp_path / "other.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="has no `prompt"):
        judge.read_grading_prompt(tmp_path / "other.py")


def test_answers_must_be_all_there(vet):
    rows = read(vet.parent / "a.jsonl")
    lines(vet.parent / "a.jsonl", rows[1:])
    with pytest.raises(SystemExit, match="1 of 4 answers are missing: 'v1_0'"):
        grade(vet, "http://127.0.0.1:9")


def test_a_judge_without_a_single_grade_is_an_error_and_no_score_of_zero(vet, capsys):
    path = ["--grades", str(vet.parent / "grades.json"), "--annotations", str(vet)]
    failed = pytest.raises(SystemExit, match="all 4 requests failed; question v1_0, run 1: .*key")
    with server(lambda *_: (401, refused("Incorrect API key"))) as (address, _), failed:
        grade(vet, address)
    for more in ([], ["--unreadable", "zero"], ["--allow-missing"]):
        with pytest.raises(SystemExit, match="none of the grades of 4 questions is a number"):
            cli.main(["score", "mmvet", *path, *more])


def test_tolerated_grades_are_kept_apart_from_official_ones(vet, capsys):
    with server(lambda *_: (200, completion("**0.5**"))) as (address, asked):
        grade(vet, address)
    assert len(asked) == 4 and json.loads(capsys.readouterr().out)["tolerated"] == 4
    path = ["--grades", str(vet.parent / "grades.json"), "--annotations", str(vet)]
    cli.main(["score", "mmvet", *path])
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["total"] == 50.0 and printed["counts"]["tolerated"] == 4
    official = ["score", "mmvet", *path, "--reading", "official"]
    with pytest.raises(SystemExit, match="none of the grades"):
        cli.main(official)


def test_grades_of_a_published_file_are_gone_on_with(vet):
    """The official script's files have no `official` verdicts."""
    dump(vet.parent / "grades.json", {"v1_0": {"model": ["m"], "content": ["1.0"], "score": [1.0]}})
    with server(lambda *_: (200, completion("0.5"))) as (address, asked):
        grade(vet, address)
    assert len(asked) == 3
    grades = json.loads((vet.parent / "grades.json").read_text())
    assert grades["v1_0"]["score"] == grades["v1_0"]["official"] == [1.0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("x = (", "is no Python script"), ("prompt = f()", "no `prompt = ...` with a string")],
)
def test_a_script_without_a_prompt_is_named(content, sentence, tmp_path):
    (tmp_path / "evaluator.py").write_text(content)
    with pytest.raises(ValueError, match=f"evaluator.py.*{sentence}"):
        judge.read_grading_prompt(tmp_path / "evaluator.py")
