"""Times and weighs the index of a large instruction file beside `json.load` of the same file.

    python tests/bench/bench_index.py [--records 20000] [--check] [--curve docs/figures/index.svg]

Makes a synthetic file in the shape of the 665K mixes (about 1.9 kB a record; --records 665000 gives
1.26 GB), measures each thing in a process of its own, and prints one JSON object last. With --check
it exits 1 beyond a limit. --curve repeats it for 10,000 to 1,000,000 records and draws the memory.
`METHOD` says how it measures.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import log10
from pathlib import Path

LIMITS = {
    "index_peak_mb": 500,
    "index_seconds_over_json_load": 2.0,
    "open_seconds": 1.0,
    "read_10000_mb_over_imports": 150,
    "worker_private_mb": 60,
}
METHOD = (
    "each figure is of a fresh process; seconds: processor time (user + system) of that process, "
    "which others on the machine disturb little, and wall seconds beside it; peak: VmHWM, the most "
    "that was resident; mb over imports: VmHWM less its value after the imports; worker: the most "
    "private memory (Private_Dirty + Private_Clean of smaps_rollup, less its value after the fork) "
    "of any forked worker that reads every record: 8 at once of the index, 2 one after another of "
    "json.load's list, which would not fit 8 times"
)
TEXT = (
    "the a of and image shows person holding red blue large small table window street dog cat "
    "standing near behind under while background foreground appears suggesting atmosphere "
    "possibly several visible located activity scene detail color light façade naïve 日本 caption"
)
# json.load of a million records would take 8 GB.
CURVE = {
    10_000: ("json_load", "index", "read"),
    100_000: ("json_load", "index", "read"),
    1_000_000: ("index", "read"),
}
WORDS = TEXT.split()


def make_file(path: Path, count: int) -> None:
    """Writes records like those of the mixes: an id, perhaps an image, one to nine exchanges."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(6, 40))) for _ in range(5000)]
    with path.open("w") as handle:
        handle.write("[")
        for number in range(count):
            handle.write(",\n" if number else "\n")
            handle.write(json.dumps(make_record(number, sentences, rng)))
        handle.write("\n]\n")


def make_record(number: int, sentences: list[str], rng: random.Random) -> dict:
    """One record; one in fifteen has no image."""
    turns = []
    for _ in range(rng.choice((1, 3, 5, 7, 9))):
        turns.append({"from": "human", "value": rng.choice(sentences) + "?"})
        turns.append({"from": "gpt", "value": rng.choice(sentences) + "."})
    record: dict = {"id": f"{number:012d}", "conversations": turns}
    if number % 15:
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        record["image"] = f"coco/train2017/{number:012d}.jpg"
    return record


# What runs in a process of its own: prints a JSON object of figures. `file` is the source.
PRELUDE = """
import json, os, random, sys, time
from pathlib import Path
file, cache = Path(sys.argv[1]), sys.argv[2]
def status(key):
    return next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith(key))
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith("Private_")) / 1024
"""
PROGRAMS = {
    "json_load": """
start, cpu = time.perf_counter(), time.process_time()
data = json.load(file.open())
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"seconds": cpu, "wall": wall, "peak_mb": status("VmHWM:")}))
""",
    "index": """
from sqllava.data.index import open_index
imports = status("VmHWM:")
start, cpu = time.perf_counter(), time.process_time()
open_index(file, cache)
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"seconds": cpu, "wall": wall, "peak_mb": status("VmHWM:"),
                  "peak_mb_over_imports": status("VmHWM:") - imports}))
""",
    "open": """
from sqllava.data.index import open_index
start = time.perf_counter()
index = open_index(file, cache)
columns = len(index.images) + len(index.characters)
print(json.dumps({"wall": time.perf_counter() - start}))
""",
    "read": """
from sqllava.data.index import open_index
imports = status("VmHWM:")
index = open_index(file, cache)
rng = random.Random(0)
numbers = [rng.randrange(len(index)) for _ in range(10_000)]
start = time.perf_counter()
for number in numbers:
    index[number]
wall = time.perf_counter() - start
print(json.dumps({"wall": wall, "microseconds_each": wall * 100,
                  "mb_over_imports": status("VmHWM:") - imports}))
""",
    "index_workers": """
from sqllava.data.index import open_index
data = open_index(file, cache)
WORKERS
""",
    "json_workers": """
data = json.load(file.open())
WORKERS
""",
}
WORKERS = """
def work(pipe):
    before = most = private()
    for number in range(len(data)):
        record = data[number]
        if number % 20_000 == 0 or number == len(data) - 1:
            most = max(most, private())
    os.write(pipe, json.dumps(most - before).encode() + b"\\n")
    os._exit(0)
read, write = os.pipe()
rounds, at_once = ROUNDS
for _ in range(rounds):
    children = []
    for _ in range(at_once):
        child = os.fork()
        if child == 0:
            work(write)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
os.close(write)
figures = [json.loads(line) for line in os.fdopen(read)]
print(json.dumps({"worker_private_mb": max(figures), "workers": len(figures)}))
"""


def run(name: str, file: Path, cache: Path) -> dict:
    """Runs one program in a fresh process; returns its figures."""
    program = PRELUDE + PROGRAMS[name].replace("WORKERS", WORKERS)
    program = program.replace("ROUNDS", "1, 8" if name == "index_workers" else "2, 1")
    words = [sys.executable, "-c", program, str(file), str(cache)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return {key: round(value, 3) for key, value in figures.items()}


def measure(count: int, folder: Path, names: Sequence[str] = tuple(PROGRAMS)) -> dict:
    """The figures of the programs for a file of so many records, which is made and deleted."""
    file = folder / f"{count}.json"
    make_file(file, count)
    results = {"records": count, "megabytes": round(file.stat().st_size / 1e6, 1)}
    for name in names:
        start = time.perf_counter()
        results[name] = run(name, file, folder / "cache")
        print(f"{name}: {results[name]} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
    file.unlink()
    return results


def held_against_limits(results: dict) -> dict[str, float]:
    """The figures that have a limit."""
    return {
        "index_peak_mb": results["index"]["peak_mb"],
        "index_seconds_over_json_load": round(
            results["index"]["seconds"] / results["json_load"]["seconds"], 2
        ),
        "open_seconds": results["open"]["wall"],
        "read_10000_mb_over_imports": results["read"]["mb_over_imports"],
        "worker_private_mb": results["index_workers"]["worker_private_mb"],
    }


def draw(curve: list[dict], path: Path) -> None:
    """Peak memory of `json.load`, of making the index, and of reading it, over records (log)."""
    series = {
        "json.load": ("json_load", "peak_mb", "#b3261e"),
        "making the index": ("index", "peak_mb_over_imports", "#1f5fa8"),
        "10,000 random reads": ("read", "mb_over_imports", "#2e7d32"),
    }
    low, high = log10(curve[0]["records"]), log10(curve[-1]["records"])
    top = max(row["json_load"]["peak_mb"] for row in curve if "json_load" in row)

    def at(count: int, value: float) -> tuple[float, float]:
        return 70 + 470 * (log10(count) - low) / (high - low), 300 - 260 * value / top

    shapes = []
    for line, (name, (program, figure, color)) in enumerate(series.items()):
        rows = [(row["records"], row[program][figure]) for row in curve if program in row]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*row) for row in rows))
        shapes.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
        label = f"{name}: {rows[-1][1]:.0f} MB for {rows[-1][0]:,}"
        shapes.append(f'<text x="90" y="{60 + 18 * line}" fill="{color}">{label}</text>')
    taken = 700.0
    for row in reversed(curve):
        x, _ = at(row["records"], 0)
        if taken - x < 75:  # no room for its label
            continue
        taken = x
        shapes.append(f'<text x="{x:.0f}" y="318" text-anchor="middle">{row["records"]:,}</text>')
    for share in (0, 0.5, 1):
        y = 300 - 260 * share
        shapes.append(f'<text x="62" y="{y + 4:.0f}" text-anchor="end">{top * share:.0f}</text>')
        shapes.append(f'<line x1="70" x2="540" y1="{y}" y2="{y}" stroke="#ddd"/>')
    body = "\n".join(shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 580 340" font-family="sans-serif" '
        f'font-size="12">\n<rect width="580" height="340" fill="white"/>\n{body}\n'
        '<text x="305" y="335" text-anchor="middle">records</text>\n'
        '<text x="70" y="24">peak memory, MB</text>\n</svg>\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--check", action="store_true", help="exit 1 beyond the limits")
    parser.add_argument("--curve", type=Path, help="draw memory over records to this SVG")
    parser.add_argument("--folder", type=Path, help="where the file is made (a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure(args.records, Path(folder))
        others = []
        if args.curve:
            others = [measure(count, Path(folder), names) for count, names in CURVE.items()]
            draw(sorted([*others, results], key=lambda row: row["records"]), args.curve)
    held = held_against_limits(results)
    report = {
        "bench": "index",
        "method": METHOD,
        "results": results,
        "others": others,
        "ratios": held,
        "limits": LIMITS,
    }
    print(json.dumps(report))
    exceeded = [name for name, limit in LIMITS.items() if held[name] > limit]
    if args.check and exceeded:
        print(f"beyond the limits: {exceeded}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
