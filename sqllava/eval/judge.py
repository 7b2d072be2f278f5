"""The judge of open answers: an OpenAI-compatible server -> reviews (LLaVA-Bench), grades (MM-Vet).

Replies are kept word for word as they come; a killed run goes on with what is missing. A request
that fails for good is counted, and no number stands in for it.
"""

import argparse
import ast
import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from sqllava.eval.metrics.judged import FAILED_REVIEW, parse_grade, parse_review
from sqllava.eval.records import (
    Row,
    by_question_id,
    join,
    line,
    read_answers,
    read_json,
    read_jsonl,
    text_of,
    write_json,
)
from sqllava.eval.tasks import mmvet

logger = logging.getLogger(__name__)

CHARACTERS_A_TOKEN = 4  # of English, roughly: for the estimate of costs
PUBLISHED_JUDGES = {"llavabench": "gpt-4-0314", "mmvet": "gpt-4-0613"}
PROMPT_SHA256 = {
    "llavabench": "2ce22b562d6008864970ea863ac8a4d385ea6f2e64ab1313a23f825202a9529d",
    "mmvet": "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f",
}
REVIEWER = "You are a helpful and precise assistant for checking the quality of the answer."
REVIEW_TOKENS = 1024
GRADE_TOKENS = 3
GRADE_TRIES = 5
ASK_FOR_DIGIT = "\nPredict the correctness of the answer (digit): "


class JudgeError(RuntimeError):
    """The judge gave no reply, after all retries."""


@dataclass(frozen=True)
class Request:
    """One message to the judge."""

    messages: Sequence[Mapping[str, str]]
    max_tokens: int
    temperature: float


@dataclass(frozen=True)
class Reply:
    """What came back, and which model said it."""

    text: str
    model: str


class Judge:
    """A chat model behind an OpenAI-compatible server.

    Args:
        model: its name there.
        base_url: the server; $OPENAI_BASE_URL, or OpenAI's own. The key is in $OPENAI_API_KEY.
        retries: of a request that the server refuses, drops or stalls on, with growing pauses.
    """

    def __init__(
        self, model: str, base_url: str | None, timeout: float, retries: int, concurrency: int
    ) -> None:
        try:
            import openai
        except ImportError:
            raise RuntimeError("no openai: pip install 'sqllava[eval]'") from None
        if "OPENAI_API_KEY" not in os.environ:
            raise ValueError("the judge's key is not in $OPENAI_API_KEY")
        self.model = model
        self._failure = openai.OpenAIError
        self._client = openai.AsyncOpenAI(base_url=base_url, timeout=timeout, max_retries=retries)
        self._slots = asyncio.Semaphore(concurrency)

    async def ask(self, request: Request) -> Reply:
        """Sends one request.

        Raises:
            JudgeError: it failed, or came back without a text.
        """
        async with self._slots:
            try:
                done = await self._client.chat.completions.create(
                    model=self.model,
                    messages=cast(Any, list(request.messages)),
                    max_tokens=request.max_tokens,
                    temperature=request.temperature,
                )
                text = done.choices[0].message.content
            # A server that answers nonsense makes the client stumble in many ways.
            except (self._failure, ValueError, TypeError, AttributeError, LookupError) as error:
                raise JudgeError(f"{type(error).__name__}: {error}") from None
        if not isinstance(text, str):
            raise JudgeError("the reply holds no text")
        return Reply(text, str(getattr(done, "model", self.model)))


# --- LLaVA-Bench ----------------------------------------------------------------------------------


def review_request(context: str, question: str, answers: Sequence[str], rule: Row) -> Request:
    """The published request: context, question, both answers (ours second), and the rule."""
    role = rule["role"]
    blocks = [f"[Context]\n{context}", f"[Question]\n{question}"]
    for number, answer in enumerate(answers, 1):
        blocks += [f"[{role} {number}]\n{answer}", f"[End of {role} {number}]"]
    blocks.append(f"[System]\n{rule['prompt']}")
    user = "".join(f"{block}\n\n" for block in blocks)
    messages = [{"role": "system", "content": REVIEWER}, {"role": "user", "content": user}]
    return Request(messages, REVIEW_TOKENS, 0.2)


def review_requests(answers: Sequence[Row], folder: Path, rules: Path) -> dict[str, Row]:
    """What to ask about each question, by id: the request and the review's other fields.

    The benchmark's three files are joined by id, not line by line.
    """
    questions = {str(row["question_id"]): row for row in read_jsonl(folder / "questions.jsonl")}
    reference = join(read_jsonl(folder / "answers_gpt4.jsonl"), questions, by_question_id)
    ours = join(answers, questions, by_question_id)
    contexts = {row["image"]: row["caption"] for row in read_jsonl(folder / "context.jsonl")}
    rule_of = read_json(rules)
    requests = {}
    for number, (name, question) in enumerate(questions.items(), 1):
        category = f"llava_bench_{question['category']}"
        caption = contexts[question["image"]]
        context = "\n".join(caption) if isinstance(caption, list) else caption
        both = [text_of(reference[name]), text_of(ours[name])]
        requests[name] = {
            "request": review_request(context, question["text"], both, rule_of[category]),
            "id": number,
            "question_id": question["question_id"],
            "answer1_id": (reference[name] or {}).get("answer_id"),
            "answer2_id": (ours[name] or {}).get("answer_id"),
            "category": category,
        }
    return requests


def review_prompt_is_published(rules: Path) -> bool:
    """Whether all three rules have the published text."""
    texts = [row["prompt"] for name, row in read_json(rules).items() if "llava_bench" in name]
    return bool(texts) and all(_sha256(text) == PROMPT_SHA256["llavabench"] for text in texts)


async def review(judge: Judge, requests: Mapping[str, Row], out: Path) -> int:
    """Asks for the reviews that are missing in a file, and appends them.

    Returns:
        How many requests failed; they are asked again in a next run.
    """
    done = {str(row["question_id"]) for row in _whole_rows(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8", newline="\n") as file:

        async def one(name: str) -> None:
            fields = dict(requests[name])
            reply = await judge.ask(fields.pop("request"))
            scores = parse_review(reply.text)
            if scores == FAILED_REVIEW:
                logger.warning("question %s: no two scores in %.60r", name, reply.text)
            row = {**fields, "content": reply.text, "tuple": scores, **_signed(reply)}
            file.write(line(row))
            file.flush()

        return await _all(one, [name for name in requests if name not in done])


def _whole_rows(path: Path) -> list[Row]:
    """The rows of a file, after cutting off the torn line that a kill may have left."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return read_jsonl(path)


# --- MM-Vet ---------------------------------------------------------------------------------------


def read_grading_prompt(path: Path) -> str:
    """The few-shot prompt: the string `prompt` in the official script, or a text file's content."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return content
    for node in ast.parse(content).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "prompt":
            return str(ast.literal_eval(node.value))
    raise ValueError(f"{path} has no `prompt = ...`")


def grade_request(prompt: str, entry: Row, prediction: str, tries: int = 0) -> Request:
    """The published request; after an unreadable reply with a line more, and hotter each time."""
    answer = entry["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = prompt + "\n" + " | ".join([entry["question"], answer, prediction, ""])
    if tries:
        text += ASK_FOR_DIGIT
    temperature = 0.5 * max(tries - 1, 0)
    return Request([{"role": "user", "content": text}], GRADE_TOKENS, temperature)


async def grade_once(judge: Judge, prompt: str, entry: Row, prediction: str) -> Row:
    """One grade; after five unreadable replies the score is None: failed."""
    for tries in range(GRADE_TRIES):
        reply = await judge.ask(grade_request(prompt, entry, prediction, tries))
        score = parse_grade(reply.text)
        if score is not None:
            break
    return {"content": reply.text, "score": score, "model": reply.model}


async def grade(
    judge: Judge,
    prompt: str,
    entries: Mapping[str, Row],
    predictions: Mapping[str, str],
    runs: int,
    out: Path,
) -> int:
    """Asks for the grades that are missing in a file, in the official form.

    Returns:
        How many grades there are not, for want of a reply or of a number in it; a next run asks for
        them again.
    """
    grades: dict[str, Row] = read_json(out) if out.is_file() else {}
    missing = []
    for name in entries:
        row = grades.setdefault(name, {"model": [], "content": [], "score": []})
        for values in row.values():
            values += [None] * (runs - len(values))
        missing += [(name, run) for run in range(runs) if row["score"][run] is None]

    async def one(place: tuple[str, int]) -> None:
        name, run = place
        found = await grade_once(judge, prompt, entries[name], predictions[name])
        for field, value in found.items():
            grades[name][field][run] = value
        write_json(out, grades)

    await _all(one, missing)
    write_json(out, grades)
    return sum(score is None for row in grades.values() for score in row["score"])


# --- both -----------------------------------------------------------------------------------------


async def _all(one: Callable[[Any], Awaitable[None]], names: Sequence[Any]) -> int:
    """Runs a coroutine for each name, under a progress bar; counts those whose judge failed."""
    failed = 0

    async def counted(name: Any) -> None:
        nonlocal failed
        try:
            await one(name)
        except JudgeError as error:
            failed += 1
            logger.warning("%s: %s", name, error)
        bar.update()

    with tqdm(total=len(names), desc="judge", unit="reply", mininterval=1.0) as bar:
        await asyncio.gather(*(counted(name) for name in names))
    return failed


def _signed(reply: Reply) -> Row:
    return {"judge": reply.model, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def estimate(requests: Sequence[Request], price_in: float, price_out: float) -> Row:
    """About how many tokens requests take, and what they cost."""
    sent = sum(len(json.dumps(list(request.messages))) for request in requests)
    tokens_in = sent // CHARACTERS_A_TOKEN
    tokens_out = sum(request.max_tokens for request in requests)
    cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
    return {
        "requests": len(requests),
        "tokens_in": tokens_in,
        "tokens_out_at_most": tokens_out,
        "dollars_at_most": round(cost, 2),
    }


def judge_task(args: argparse.Namespace) -> Row:
    """`sqllava eval judge`: says what it will cost, asks, and says how it went."""
    answers = read_answers(args.answers)
    model = args.judge or PUBLISHED_JUDGES[args.task]
    if args.task == "llavabench":
        requests = review_requests(answers, args.annotations, args.prompts)
        published = review_prompt_is_published(args.prompts)
        all_requests = [row["request"] for row in requests.values()]
    else:
        entries = mmvet.read_entries(args.annotations)
        found = join(answers, entries, mmvet.entry_id)
        predictions = {name: text_of(row) for name, row in found.items()}
        prompt = read_grading_prompt(args.prompts)
        published = _sha256(prompt) == PROMPT_SHA256["mmvet"]
        all_requests = args.runs * [
            grade_request(prompt, entry, predictions[name]) for name, entry in entries.items()
        ]
    told: Row = {
        "task": args.task,
        "judge": model,
        "estimate": estimate(all_requests, args.price_in, args.price_out),
        "comparable": published and model == PUBLISHED_JUDGES[args.task],
    }
    logger.info("about %s", told["estimate"])
    if not told["comparable"]:
        logger.warning("not comparable with published figures: another judge or prompt")
    if args.estimate:
        return told

    async def ask() -> int:
        judge = Judge(model, args.base_url, args.timeout, args.retries, args.concurrency)
        if args.task == "llavabench":
            return await review(judge, requests, args.out)
        return await grade(judge, prompt, entries, predictions, args.runs, args.out)

    told["failed"] = asyncio.run(ask())
    write_json(args.out.with_name(f"{args.out.stem}.header.json"), told)
    return told
