"""The miniature world: its questions, data files and base models are what they claim to be."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

SHAPES = Path(__file__).parents[1] / "demo" / "shapes"
BASE = SHAPES / "base"


@pytest.fixture(scope="module", autouse=True)
def shapes_path():
    sys.path.insert(0, str(SHAPES))
    yield
    sys.path.remove(str(SHAPES))


@pytest.fixture(scope="module")
def world():
    return importlib.import_module("world")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The files of a small run, made by the script's own function."""
    out = tmp_path_factory.mktemp("shapes")
    importlib.import_module("make_data").make_data(
        out, pretrain=40, finetune=120, evaluation=40, seed=3
    )
    return out


def some_scenes(world, count, seed=0):
    rng = random.Random(seed)
    return [world.sample_scene(rng, held_out=bool(n % 2)) for n in range(count)]


def test_every_question_checks_as_its_own_answer(world):
    for scene in some_scenes(world, 300):
        for question in world.questions(scene):
            check = world.check_question(question.text, scene)
            assert check == world.Check(True, True, question.kind, question.answer)


@pytest.mark.parametrize(
    ("text", "well_formed", "grounded", "answer"),
    [
        ("What color is the circle?", True, True, "red"),
        ("What color is the star?", True, False, None),
        ("what color is the circle?", False, False, None),
        ("What color is the circle? ", False, False, None),
        ("What color is the red?", False, False, None),
        ("What shape is the blue object?", True, True, "square"),
        ("Is there a red square?", True, True, "no"),
        ("Is there a green square?", True, True, "no"),
        ("Is there a green star?", True, False, None),
        ("Is the circle above the square?", True, True, "yes"),
        ("Is the square above the circle?", True, True, "no"),
        ("Is the circle above the circle?", True, False, None),
        ("Is the circle above the star?", True, False, None),
        ("How many objects are there?", True, True, "two"),
        ("How many small objects are there?", True, True, "one"),
        ("Where is the square?", True, True, "south"),
        ("", False, False, None),
    ],
)
def test_check_question(world, text, well_formed, grounded, answer):
    things = (world.Thing("small", "red", "circle", 0), world.Thing("large", "blue", "square", 7))
    check = world.check_question(text, world.Scene(things))
    assert (check.well_formed, check.grounded, check.answer) == (well_formed, grounded, answer)


def test_yes_and_no_are_balanced_and_no_count_is_always_right(world):
    rng = random.Random(1)
    answers = {"exist": [], "relation": [], "count": [], "size": []}
    for scene in some_scenes(world, 2000):
        for kind, found in answers.items():
            if question := world.sample_question(scene, rng, kind):
                found.append(question.answer)
    for found in answers.values():
        assert max(found.count(answer) for answer in set(found)) / len(found) < 0.6


def test_scenes_hold_out_their_pairs(world):
    for number, scene in enumerate(some_scenes(world, 500)):
        assert sum(thing.unseen for thing in scene.things) == number % 2
        for values in zip(*[(t.color, t.shape, t.cell) for t in scene.things], strict=True):
            assert len(set(values)) == len(scene.things)


def test_pictures_are_reproducible_and_show_the_color(world):
    scene = world.Scene((world.Thing("large", "red", "square", 4),))
    first, second = (world.render(scene, random.Random(5)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.size == (world.IMAGE_SIZE, world.IMAGE_SIZE)
    red, green, blue = first.getpixel((world.IMAGE_SIZE // 2, world.IMAGE_SIZE // 2))
    assert red > 190 > 70 > max(green, blue)


def test_no_training_file_shows_or_names_a_held_out_pair(world, data):
    training = data / "mixTraindata"
    text = "".join(path.read_text() for path in training.glob("*.json"))
    assert "cross" in text
    for color, shape in world.HELD_OUT:
        assert f"{color} {shape}" not in text


def test_training_records_have_the_real_form(data):
    training = data / "mixTraindata"
    pretrain = json.loads((training / "shapes_pretrain.json").read_text())
    finetune = json.loads((training / "shapes_finetune.json").read_text())
    assert len({record["id"] for record in pretrain + finetune}) == 160
    assert any("image" not in record for record in finetune)
    for record in pretrain + finetune:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert ("<image>" in turns[0]["value"]) == ("image" in record)
        if "image" in record:
            assert (training / record["image"]).stat().st_size > 500


def test_evaluation_files_agree_with_the_scenes(world, data):
    folder = data / "eval"
    scenes = {
        name: world.Scene.from_json(things)
        for name, things in json.loads((folder / "scenes.json").read_text()).items()
    }
    rows = [json.loads(line) for line in (folder / "vqa.jsonl").read_text().splitlines()]
    annotations = json.loads((folder / "vqa" / "annotations.json").read_text())["annotations"]
    gqa = json.loads((folder / "gqa" / "testdev_balanced_questions.json").read_text())
    assert {row["kind"] for row in rows} == set(world.KINDS)
    assert any(row["unseen_pair"] for row in rows)
    for row, annotation in zip(rows, annotations, strict=True):
        check = world.check_question(row["text"], scenes[row["image"]])
        assert (check.kind, check.answer) == (row["kind"], row["answer"])
        assert [answer["answer"] for answer in annotation["answers"]] == [row["answer"]] * 10
        assert gqa[str(row["question_id"])]["answer"] == row["answer"]


def test_pope_labels_are_true_and_balanced(world, data):
    scenes = json.loads((data / "eval" / "scenes.json").read_text())
    for style in ("adversarial", "popular", "random"):
        file = data / "eval" / "pope" / "coco" / f"coco_pope_{style}.json"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert sum(row["label"] == "yes" for row in rows) * 2 == len(rows)
        for row in rows:
            present = [
                f"Is there a {thing['color']} {thing['shape']}?" for thing in scenes[row["image"]]
            ]
            assert (row["text"] in present) == (row["label"] == "yes")


def test_data_are_the_same_for_the_same_seed(data, tmp_path):
    importlib.import_module("make_data").make_data(
        tmp_path, pretrain=40, finetune=120, evaluation=40, seed=3
    )
    files = [path.relative_to(data) for path in sorted(data.rglob("*")) if path.is_file()]
    assert files == [
        path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()
    ]
    assert all((data / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


# --- the shipped base models ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return importlib.import_module("transformers").AutoTokenizer.from_pretrained(BASE / "lm")


def test_the_base_is_small():
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 10_000_000


def test_every_word_is_one_piece_and_ids_equal_sentencepiece(world, tokenizer):
    sentencepiece = pytest.importorskip("sentencepiece")
    original = sentencepiece.SentencePieceProcessor(model_file=str(BASE / "lm" / "tokenizer.model"))
    words = [*world.COLORS, *world.SHAPES, *world.SIZES, *world.PLACES, *world.NUMBERS, "yes", "no"]
    for word in words:
        assert tokenizer(word, add_special_tokens=False).input_ids == original.encode(word)
        assert len(original.encode(word)) == 1
    for scene in some_scenes(world, 20):
        for text in (
            world.describe(scene),
            f"The image shows {world.describe(scene)}\nWhere is it? ünï 日本",
        ):
            assert tokenizer(text, add_special_tokens=False).input_ids == original.encode(text)


def test_the_tower_sees_one_patch_a_cell(world):
    transformers = importlib.import_module("transformers")
    tower = transformers.CLIPVisionModel.from_pretrained(BASE / "tower")
    assert tower.config.image_size // tower.config.patch_size == world.GRID
    assert (
        json.loads((BASE / "tower" / "preprocessor_config.json").read_text())["crop_size"]["height"]
        == 96
    )


def test_documents_show_a_scene_in_words_or_as_cells_that_are_never_targets(world, tokenizer):
    maker = importlib.import_module("base_text").DocumentMaker(tokenizer, seed=0)
    grids = placed = 0
    for number in range(120):
        document = (maker.questions, maker.caption, maker.makers["chat"])[number % 3]()
        assert len(document.ids) == len(document.weights)
        assert len(document.cells) in (0, world.GRID**2)
        assert all(document.weights[at] == 0 for at in document.cells)
        grids += bool(document.cells)
        things = [
            {word.lstrip("▁") for word in tokenizer.convert_ids_to_tokens(words)}
            for words in document.cells.values()
            if words
        ]
        assert bool(things) == bool(document.cells)
        # A grid's things have all their place among their words, or none has.
        places = {len(words & set(world.PLACES)) for words in things}
        assert places in (set(), {0}, {1})
        placed += places == {1}
        for words in things:
            for names in (world.SIZES, world.COLORS, world.SHAPES):
                assert len(words & set(names)) == 1
            assert len(words) == 3 + max(places)
    assert 40 < grids < 80 and 0.3 * grids < placed < 0.7 * grids


def test_a_cell_is_its_words_blended_and_everything_else_its_token(world, tokenizer):
    torch = importlib.import_module("torch")
    base_lm, base_text = (importlib.import_module(name) for name in ("base_lm", "base_text"))
    model = importlib.import_module("transformers").LlamaForCausalLM.from_pretrained(
        BASE / "lm", dtype=torch.float32
    )
    table = model.get_input_embeddings().weight
    words = tokenizer("red star", add_special_tokens=False).input_ids
    document = base_text.Document([1, 1, 1, 7], [0.0] * 4, cells={1: words, 2: []})
    torch.manual_seed(0)
    embedded = torch.stack(
        [base_lm.embed(model, base_lm.collate([document]))[0] for _ in range(200)]
    )
    assert torch.equal(embedded[:, [0, 3]], table[[1, 7]].expand(200, 2, -1))
    blended = embedded[:, 1].mean(0)
    assert torch.cosine_similarity(blended, table[words].sum(0), dim=0) > 0.99
    assert embedded[:, 2].mean(0).norm() < 0.2 * blended.norm()


@pytest.mark.slow
@pytest.mark.parametrize("template", ["v1", "v1_sq"])
def test_the_base_answers_about_scenes_given_as_text(world, tokenizer, template):
    torch = importlib.import_module("torch")
    model = importlib.import_module("transformers").LlamaForCausalLM.from_pretrained(
        BASE / "lm", dtype=torch.float32
    )
    accuracy = importlib.import_module("base_lm").text_accuracy(
        model, tokenizer, scenes=150, template=template
    )
    assert accuracy["all"] >= 0.95
    assert all(accuracy[kind] >= 0.9 for kind in (*world.KINDS, "describe")), accuracy
