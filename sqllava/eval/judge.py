"""The judge of open answers: an OpenAI-compatible server -> reviews (LLaVA-Bench), grades (MM-Vet).

Replies are kept word for word as they come; a run goes on with what is missing or could not be
read. What fails for good is counted and named, and no number stands in for it.
"""

import argparse
import ast
import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sqllava.eval.chat import Judge, JudgeError, Parameters, Reply, Request
from sqllava.eval.metrics.judged import (
    FAILED_REVIEW,
    parse_grade,
    parse_review,
    read_grade,
    read_review,
    review_scores,
)
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
    write_jsonl,
)
from sqllava.eval.tasks import llavabench, mmvet

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
REVIEW_TRIES = 3
ASK_FOR_DIGIT = "\nPredict the correctness of the answer (digit): "


@dataclass(frozen=True)
class Verdict:
    """What came of one thing that was asked: why its reply could not be read, if so."""

    unreadable: str | None = None
    tolerated: bool = False


@dataclass
class Outcome:
    """How a run of the judge went.

    Attributes:
        asked: things that were not there yet.
        tolerated: replies that only the tolerant reading could read.
        unreadable: replies that could not be read; they count as failed too.
        failures: what has no score now, and why; a next run asks for these again.
    """

    asked: int
    tolerated: int = 0
    unreadable: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> Row:
        return {"failed": len(self.failures), **asdict(self)}


async def _all(one: Callable[[Any], Awaitable[Verdict]], names: Sequence[Any]) -> Outcome:
    """Runs a coroutine for each name, under a progress bar."""

    async def counted(name: Any) -> Verdict | JudgeError:
        try:
            return await one(name)
        except JudgeError as error:
            return error
        finally:
            bar.update()

    with tqdm(total=len(names), desc="judge", unit="reply", mininterval=1.0) as bar:
        verdicts = await asyncio.gather(*(counted(name) for name in names))
    outcome = Outcome(len(names))
    for name, verdict in zip(names, verdicts, strict=True):
        shown = name if isinstance(name, str) else f"{name[0]}, run {name[1] + 1}"
        if isinstance(verdict, JudgeError):
            outcome.failures[shown] = str(verdict)
        elif verdict.unreadable:
            outcome.failures[shown] = verdict.unreadable
            outcome.unreadable += 1
        else:
            outcome.tolerated += verdict.tolerated
    for name, reason in outcome.failures.items():
        logger.warning("question %s: %s", name, reason)
    return outcome


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

    Raises:
        ValueError: a question, context or rule is not there or not of the published form.
    """
    path = folder / "questions.jsonl"
    questions = {
        str(row["question_id"]): row
        for row in _rows_with(path, "question_id", "category", "image", "text")
    }
    reference = join(read_answers(folder / "answers_gpt4.jsonl"), questions, by_question_id)
    ours = join(answers, questions, by_question_id)
    contexts = {
        row["image"]: row["caption"]
        for row in _rows_with(folder / "context.jsonl", "image", "caption")
    }
    rule_of = read_rules(rules)
    requests = {}
    for number, (name, question) in enumerate(questions.items(), 1):
        category = f"llava_bench_{question['category']}"
        if question["image"] not in contexts:
            raise ValueError(f"{folder / 'context.jsonl'} has nothing on {question['image']!r}")
        if category not in rule_of:
            raise ValueError(f"{rules} has no rule {category!r} for question {name}")
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


def _rows_with(path: Path, *fields: str) -> list[Row]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        lacking = [field for field in fields if row.get(field) is None]
        if lacking:
            raise ValueError(f"{path}, record {number} has no {lacking[0]}, found {list(row)}")
    return rows


def read_rules(path: Path) -> dict[str, Row]:
    """LLaVA-Bench's rules by category, of a rule.json.

    Raises:
        ValueError: there are none, or one has no role and prompt.
    """
    rules = read_json(path)
    found = {
        name: rule
        for name, rule in (rules.items() if isinstance(rules, dict) else ())
        if name.startswith("llava_bench_")
    }
    if not found:
        raise ValueError(f"{path} has no rule of LLaVA-Bench (llava_bench_conv, ...)")
    for name, rule in found.items():
        for part in ("role", "prompt"):
            if not isinstance(rule, dict) or not isinstance(rule.get(part), str):
                raise ValueError(f"{path}, {name}: a rule needs a {part}, found {rule!r:.60}")
    return found


def review_prompt_is_published(rules: Path) -> bool:
    """Whether all three rules have the published text."""
    texts = [rule["prompt"] for rule in read_rules(rules).values()]
    return all(_sha256(text) == PROMPT_SHA256["llavabench"] for text in texts)


async def review(judge: Judge, requests: Mapping[str, Row], out: Path) -> Outcome:
    """Asks for the reviews that are missing in a file or hold no scores, and writes them there.

    A reply without scores is asked for again, REVIEW_TRIES times in a run; the last is kept.
    """
    stored = _stored_reviews(out)
    unreadable = {
        name: row for name, row in stored.items() if name in requests and not review_scores(row)
    }
    if unreadable:
        write_jsonl(out, [row for name, row in stored.items() if name not in unreadable])
    asked = [name for name in requests if name not in stored or name in unreadable]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8", newline="\n") as file:

        async def one(name: str) -> Verdict:
            fields = dict(requests[name])
            request = fields.pop("request")
            row = unreadable.get(name)
            try:
                for _ in range(REVIEW_TRIES):
                    row = _reviewed(await judge.ask(request), fields)
                    if row["tuple"] != FAILED_REVIEW:
                        break
            finally:
                if row is not None:
                    file.write(line(row))
                    file.flush()
            assert row is not None  # something was asked, and came back
            if row["tuple"] == FAILED_REVIEW:
                return Verdict(f"no two scores of 0 to 10 in {row['content']!r:.60}")
            return Verdict(tolerated=row["official_tuple"] == FAILED_REVIEW)

        return await _all(one, asked)


def _reviewed(reply: Reply, fields: Row) -> Row:
    """A review's row: the published fields, and what the official parser makes of the reply."""
    return {
        **fields,
        "content": reply.text,
        "tuple": read_review(reply.text),
        "official_tuple": parse_review(reply.text),
        "judge": reply.model,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _stored_reviews(path: Path) -> dict[str, Row]:
    """The reviews of a file by question, after cutting off the torn line that a kill may leave."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return {str(row["question_id"]): row for row in llavabench.read_reviews(path)}


# --- MM-Vet ---------------------------------------------------------------------------------------


def read_grading_prompt(path: Path) -> str:
    """The few-shot prompt: the string `prompt` in the official script, or a text file's content."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return content
    try:
        script = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no Python script ({error})") from None
    for node in script.body:
        named = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "prompt"
        value = getattr(getattr(node, "value", None), "value", None)
        if named and isinstance(value, str):
            return value
    raise ValueError(f"{path} has no `prompt = ...` with a string")


def grade_request(prompt: str, entry: Row, prediction: str, tries: int = 0) -> Request:
    """The published request; after an unreadable reply with a line more, and hotter each time."""
    answer = entry["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = prompt + "\n" + " | ".join([entry["question"], answer, prediction, ""])
    if tries:
        text += ASK_FOR_DIGIT
    temperature = 0.5 * max(tries - 1, 0)
    return Request([{"role": "user", "content": text}], GRADE_TOKENS, temperature)


async def grade_once(judge: Judge, prompt: str, entry: Row, prediction: str) -> Row:
    """One grade, as both parsers read it; after five unreadable replies the score is None."""
    for tries in range(GRADE_TRIES):
        reply = await judge.ask(grade_request(prompt, entry, prediction, tries))
        score = read_grade(reply.text)
        if score is not None:
            break
    official = parse_grade(reply.text)
    return {"model": reply.model, "content": reply.text, "score": score, "official": official}


async def grade(
    judge: Judge,
    prompt: str,
    entries: Mapping[str, Row],
    predictions: Mapping[str, str],
    runs: int,
    out: Path,
) -> Outcome:
    """Asks for the grades that are missing in a file or hold no score, in the official form."""
    grades = mmvet.read_grades(out) if out.is_file() else {}
    missing = []
    for name in entries:
        row = grades.setdefault(name, {name: [] for name in mmvet.GRADE_FIELDS})
        for values in row.values():
            values += [None] * (runs - len(values))
        missing += [(name, run) for run in range(runs) if row["score"][run] is None]

    async def one(place: tuple[str, int]) -> Verdict:
        name, run = place
        found = await grade_once(judge, prompt, entries[name], predictions[name])
        for part, value in found.items():
            grades[name][part][run] = value
        write_json(out, grades)
        if found["score"] is None:
            return Verdict(f"no score of 0 to 1 in {found['content']!r:.60}")
        return Verdict(tolerated=found["official"] is None)

    outcome = await _all(one, missing)
    write_json(out, grades)
    return outcome


# --- the command ----------------------------------------------------------------------------------


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
    """`sqllava eval judge`: says what it will cost, asks, and says how it went.

    Raises:
        ValueError: files do not belong together, or replies to something else are stored already.
    """
    if args.task == "llavabench" and args.runs != 1:
        raise ValueError("--runs is MM-Vet's: a review of LLaVA-Bench is asked for once")
    answers = read_answers(args.answers)
    model = args.judge or PUBLISHED_JUDGES[args.task]
    if args.task == "llavabench":
        requests = review_requests(answers, args.annotations, args.prompts)
        published = review_prompt_is_published(args.prompts)
        each = [row["request"] for row in requests.values()]
    else:
        entries = mmvet.read_entries(args.annotations)
        found = join(answers, entries, mmvet.entry_id)
        predictions = {name: text_of(row) for name, row in found.items()}
        prompt = read_grading_prompt(args.prompts)
        published = _sha256(prompt) == PROMPT_SHA256["mmvet"]
        each = [grade_request(prompt, entry, predictions[name]) for name, entry in entries.items()]
    parameters = Parameters(args.max_tokens_name, args.max_tokens, args.temperature)
    told: Row = {
        "task": args.task,
        "judge": model,
        "asked_sha256": _sha256(json.dumps([list(request.messages) for request in each])),
        "estimate": estimate(each * args.runs, args.price_in, args.price_out),
        "parameters": asdict(parameters),
        "comparable": published
        and model == PUBLISHED_JUDGES[args.task]
        and parameters.are_published,
    }
    logger.info("about %s", told["estimate"])
    if not told["comparable"]:
        logger.warning("not comparable with published figures: another judge, prompt or parameters")
    if args.estimate:
        return told
    header = args.out.with_name(f"{args.out.stem}.header.json")
    _go_on_with(args.out, header, told)

    async def ask() -> Outcome:
        judge = Judge(
            model, args.base_url, args.timeout, args.retries, args.concurrency, parameters
        )
        write_json(header, told)
        if args.task == "llavabench":
            return await review(judge, requests, args.out)
        return await grade(judge, prompt, entries, predictions, args.runs, args.out)

    outcome = asyncio.run(ask())
    # What the judge refused has been given up meanwhile.
    told["parameters"] = asdict(parameters)
    told["comparable"] = told["comparable"] and parameters.are_published
    told |= outcome.as_json()
    write_json(header, told)
    return told


def _go_on_with(out: Path, header: Path, told: Row) -> None:
    """Checks that stored replies are of this judge, and about these answers; they make it all
    incomparable if they are."""
    before = read_json(header) if out.is_file() and header.is_file() else {}
    for name, what in (("judge", "of another judge"), ("asked_sha256", "to other answers")):
        if before.get(name, told[name]) != told[name]:
            raise ValueError(f"{out} holds replies {what}: give another --out, or remove it")
    told["comparable"] = told["comparable"] and before.get("comparable", True)
