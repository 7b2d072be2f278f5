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
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
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
        # What has a reply is not asked again; nonsense in the text is a reply, kept as it is.
        for _ in range(5):
            review(bench, address, "--retries", "0")
    told = json.loads(capsys.readouterr().out.split("\n}\n")[-2] + "\n}")
    assert told["failed"] == 1
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
    assert printed["counts"]["failed"] == 1


def test_a_stalling_server_fails_in_time(bench, capsys):
    def stall(number, body):
        time.sleep(3)
        return 200, completion("8 8")

    started = time.monotonic()
    with server(stall) as (address, _):
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
    assert grades["v1_0"] == {"model": ["judge-1"] * 2, "content": ["0.5"] * 2, "score": [0.5] * 2}
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
