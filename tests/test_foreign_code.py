"""Code that a model's folder brings along never runs, and nobody is asked whether it may."""

import ast
import io
import json
import shutil

import pytest
from conftest import REPO
from golden_numbers import GOLDEN

from sqllava.checkpoint.load import load
from sqllava.data.view import open_view
from sqllava.eval.engine import open_engine

LOOKED_AT = ("sqllava", "demo", "scripts", "tests/bench")
HELPERS = ("tests/conftest.py", "tests/training.py", "tests/eval_data.py")
# These read files alone: no folder's code can come in by them.
HARMLESS = ("SQLlavaConfig", "GenerationConfig", "LlamaForCausalLM")


def sources():
    for place in LOOKED_AT:
        yield from sorted((REPO / place).rglob("*.py"))
    yield from (REPO / name for name in HELPERS)


def openings(tree):
    """Calls that may find a class in a folder: of from_pretrained, and of Auto's from_config."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value).rpartition(".")[2]
            opens = node.func.attr == "from_pretrained" and owner not in HARMLESS
            if opens or (node.func.attr == "from_config" and owner.startswith("Auto")):
                yield node


def test_whatever_opens_a_folder_says_that_its_code_is_not_to_run():
    silent, calls = [], 0
    for path in sources():
        for call in openings(ast.parse(path.read_text(encoding="utf-8"))):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            calls += 1
            if given.get("trust_remote_code") != "False":
                silent.append(f"{path.relative_to(REPO)}:{call.lineno}")
    assert not silent
    assert calls > 10


@pytest.fixture
def piped_yes(monkeypatch):
    """Standard input that says yes to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))


def foreign(folder, kind, tmp_path):
    """A copy of a folder that names code of its own; returns it and what that code would make."""
    copy, mark = tmp_path / "foreign", tmp_path / "it-ran"
    shutil.copytree(folder, copy)
    (copy / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    file = copy / ("tokenizer_config.json" if kind == "AutoTokenizer" else "config.json")
    values = json.loads(file.read_text())
    if kind == "AutoTokenizer":
        values |= {"auto_map": {kind: ["modeling_own.Own", None]}, "tokenizer_class": "Own"}
    else:
        names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
        values |= {"model_type": "own", "auto_map": dict.fromkeys(names, "modeling_own.Own")}
    file.write_text(json.dumps(values))
    return copy, mark


@pytest.mark.parametrize("kind", ["AutoModel", "AutoTokenizer"])
@pytest.mark.parametrize("part", ["base", "vision_tower"])
def test_a_part_with_code_of_its_own_is_told_and_not_run(part, kind, adapter, tmp_path, piped_yes):
    if (part, kind) == ("vision_tower", "AutoTokenizer"):
        pytest.skip("a tower has no tokenizer")
    folder = GOLDEN / ("vicuna-tiny" if part == "base" else "clip-tiny")
    copy, mark = foreign(folder, kind, tmp_path)
    with pytest.raises(ValueError, match=r"foreign wants to run code of its own \(.*modeling_own"):
        load(adapter, **{part: str(copy)})
    assert not mark.exists()


def test_a_processor_with_code_of_its_own_is_told_and_not_run(adapter, tmp_path, piped_yes):
    copy, mark = foreign(adapter, "AutoTokenizer", tmp_path)
    with pytest.raises(ValueError, match="tokenizer_config.json: .*none is run here"):
        load(copy)
    with pytest.raises(ValueError, match="foreign: it wants to run code of its own"):
        open_view(str(copy))
    assert not mark.exists()


def test_a_model_to_evaluate_or_look_with_is_told_and_not_run(tmp_path, piped_yes):
    copy, mark = foreign(GOLDEN / "vicuna-tiny", "AutoModel", tmp_path)
    values = json.loads((copy / "config.json").read_text()) | {"vision_config": {}}
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="foreign wants to run code of its own"):
        open_engine(str(copy))
    (copy / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["modeling_own.Own", None]}})
    )
    with pytest.raises(ValueError, match="foreign: it wants to run code of its own"):
        open_view(str(copy))
    assert not mark.exists()


def test_code_that_comes_along_unneeded_is_left_alone(adapter, tmp_path, piped_yes):
    """Where transformers has the class itself, a folder's `auto_map` changes nothing."""
    copy, mark = foreign(GOLDEN / "vicuna-tiny", "AutoModel", tmp_path)
    values = json.loads((copy / "config.json").read_text()) | {"model_type": "llama"}
    (copy / "config.json").write_text(json.dumps(values))
    model, _ = load(adapter, base=str(copy))
    assert type(model.model.language_model).__name__ == "LlamaModel"
    assert not mark.exists()
