"""A model at home in transformers: Auto classes, chat templates, pipelines, batches, and what
inference servers ask of a modeling backend."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_numbers import GOLDEN, image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import sqllava
from sqllava.checkpoint.convert import Options, convert
from sqllava.checkpoint.load import load
from sqllava.conversation import TEMPLATES, Turn
from sqllava.encoding import encode_prompt, encode_record, encode_turns
from sqllava.model.chat import chat_template
from sqllava.pixels import ImagePreparer, to_rgb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden model, merged: a directory that loads by itself."""
    target = tmp_path_factory.mktemp("golden") / "merged"
    convert(GOLDEN / "sqllava-lora", target, "merged", Options(check=False))
    return target


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def message(role, text, images=()):
    pictures = [{"type": "image", "image": picture} for picture in images]
    return {"role": role, "content": [*pictures, {"type": "text", "text": text}]}


# --- Auto classes and pipelines ---


def test_auto_classes_open_a_merged_directory(loaded):
    model, processor = loaded
    assert type(model) is sqllava.SQLlavaForConditionalGeneration
    assert type(processor) is sqllava.SQLlavaProcessor
    assert (processor.conversation_template, model.dtype) == ("v1_sq", torch.float32)


def test_pipeline_answers_as_generate_does(loaded, folder):
    model, processor = loaded
    pipe = pipeline("image-text-to-text", model=str(folder))
    chat = [message("user", "What is shown?", [image("0.png")])]
    answer = pipe(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    turns = [Turn("user", "What is shown?", 1), Turn("assistant", None)]
    inputs = processor.pad([processor.encode_turns(turns)])
    pixels = processor.prepare_image(image("0.png"))[None]
    ids = model.generate(**inputs, pixel_values=pixels, max_new_tokens=8)
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == expected


def test_the_processor_prepares_any_picture_as_training_does(loaded, monkeypatch):
    _, processor = loaded
    scan = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))  # 12 bits in 16
    strip = Image.new("L", (12_000, 2), 250)
    pictures = [scan, strip, image("0.png")]
    text = ["<image>"] * 3
    prepare = ImagePreparer(processor.image_processor)
    expected = torch.stack([prepare(to_rgb(picture).image) for picture in pictures])
    # The published way pads the strip to 12,000 x 12,000 first.
    real = type(processor.image_processor).pad_to_square

    def small_squares_alone(self, image, background_color):
        assert max(image.shape) < 10_000
        return real(self, image, background_color)

    monkeypatch.setattr(type(processor.image_processor), "pad_to_square", small_squares_alone)
    assert torch.equal(processor(images=pictures, text=text)["pixel_values"], expected)
    assert torch.equal(torch.stack([*map(processor.prepare_image, pictures)]), expected)
    assert expected[0].std() > 0.3
    with pytest.raises(ValueError, match="1x70000 has a side of more than 65535"):
        processor(images=Image.new("1", (1, 70_000)), text="<image>")


def test_save_pretrained_writes_a_model_card_and_the_chat_template(loaded, tmp_path):
    model, processor = loaded
    model.config.figures = {"vqa_accuracy": 0.875}
    model.config.training_facts = {"data": "mix665k.json", "sq_r": 0.5}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for fact in ("clip-tiny", "vicuna-tiny", "| data | mix665k.json |", "| sq_r | 0.5 |", "0.875"):
        assert fact in card
    assert card.startswith("---\n") and "pipeline_tag: image-text-to-text" in card
    assert (tmp_path / "chat_template.jinja").read_text() == processor.chat_template
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.figures == {"vqa_accuracy": 0.875}


_OPEN = """
import json, sys, transformers
assert "sqllava" not in sys.modules
folder, *targets = sys.argv[1:]
for trust in (False, True):
    for kind in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"):
        try:
            made = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=trust)
            print(type(made).__name__)
            for target in targets:
                made.save_pretrained(target)
        except ValueError as error:
            print(str(error).splitlines()[0])
"""


def opened_without_our_package(*folders):
    """What transformers' Auto classes make of a folder where nothing imports ours: with
    trust_remote_code=False, then with True. What opens is saved into the other folders."""
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, *map(str, folders)], capture_output=True, text=True, input=""
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # DeepSpeed, where it is installed, logs to standard output.
    return [line for line in done.stdout.splitlines() if not line.startswith("[")]


def check_opened(told):
    """Sentences without trust, a bare tokenizer never, and our classes with trust."""
    for line in told[:4]:
        assert "contains custom code which must be executed to correctly load" in line
    assert told[4:] == [
        "SQLlavaConfig",
        "SQLlavaModel",
        "SQLlavaForConditionalGeneration",
        "SQLlavaProcessor",
    ]


def test_servers_that_import_nothing_of_ours_load_it_with_trust_remote_code(folder):
    check_opened(opened_without_our_package(folder))


@pytest.mark.slow
def test_what_was_opened_by_trust_is_saved_as_it_was(folder, tmp_path):
    check_opened(opened_without_our_package(folder, tmp_path))
    check_opened(opened_without_our_package(tmp_path))
    assert {path.name for path in tmp_path.glob("*.py")} == {"modeling_sqllava.py"}


def test_what_save_pretrained_writes_leads_to_our_classes_too(loaded, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    for part, file, classes in (
        ("model", "config.json", {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}),
        ("processor", "processor_config.json", {"AutoProcessor"}),
    ):
        found = json.loads((tmp_path / part / file).read_text())["auto_map"]
        assert classes <= found.keys()
        for place in found.values():
            module, _, name = place.partition(".")
            assert name in (tmp_path / part / f"{module}.py").read_text()


# --- Chat templates ---


def test_a_chat_with_virtual_user_has_the_ids_of_training(loaded):
    _, processor = loaded
    pictures = [image("0.png")]
    chat = [
        message("user", "What is shown?", pictures),
        message("assistant", "A picture."),
        message("vuser", "Why is it so?"),
        message("assistant", "Because."),
    ]
    turns = [
        Turn("user", "What is shown?", 1),
        Turn("assistant", "A picture."),
        Turn("vuser", "Why is it so?"),
        Turn("assistant", "Because."),
    ]
    for size, ask in ((1, False), (3, False), (2, True), (4, True)):
        opened = [*turns[:size], Turn("vuser" if ask else "assistant", None)]
        inputs = processor.apply_chat_template(
            chat[:size],
            add_generation_prompt=True,
            ask=ask,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert inputs["input_ids"][0].tolist() == processor.encode_turns(opened)
        assert torch.equal(inputs["pixel_values"][0], processor.prepare_image(pictures[0]))


words = st.text(
    st.characters(codec="utf-8", exclude_characters="<>\u2581", exclude_categories=("Cs", "Cc")),
    min_size=1,
    max_size=20,
).map(lambda text: " ".join(text.split()))
sentences = words.filter(bool)


@st.composite
def conversations(draw, asks):
    turns = [Turn("user", draw(sentences), draw(st.integers(0, 2)))]
    for _ in range(draw(st.integers(0, 3))):
        turns.append(Turn("assistant", draw(sentences)))
        role = draw(st.sampled_from(["user", "vuser"] if asks else ["user"]))
        turns.append(Turn(role, draw(sentences)))
    return turns


@pytest.mark.parametrize("name", ["v1", "v1_sq"])
def test_any_chat_has_the_ids_of_encoding_from_the_bare_tokenizer(name, folder):
    """As servers tokenise: the rendered text, one placeholder an image, no tokens added."""
    bare = AutoTokenizer.from_pretrained(folder)
    bare.chat_template = chat_template(TEMPLATES[name], bare)

    @settings(max_examples=80, deadline=None)
    @given(conversations(asks=name == "v1_sq"))
    def check(turns):
        chat = [message(t.role, t.text, [None] * t.images) for t in turns]
        rendered = bare.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        expected = encode_prompt([*turns, Turn("assistant", None)], name, bare)
        assert bare(rendered, add_special_tokens=False).input_ids == expected

    check()


@pytest.mark.parametrize("name", ["v1", "v1_sq"])
def test_the_chats_mask_is_what_training_has_as_targets(name, folder):
    bare = AutoTokenizer.from_pretrained(folder)
    bare.chat_template = chat_template(TEMPLATES[name], bare)

    @settings(max_examples=40, deadline=None)
    @given(conversations(asks=name == "v1_sq"), sentences)
    def check(turns, answer):
        turns = [*turns, Turn("assistant", answer)]
        chat = [message(t.role, t.text, [None] * t.images) for t in turns]
        inputs = bare.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        expected = encode_turns(turns, TEMPLATES[name], bare)
        assert inputs["input_ids"] == expected.input_ids
        assert inputs["assistant_masks"] == [label != -100 for label in expected.labels]

    check()


def test_stage_one_captions_have_the_ids_of_training(folder):
    bare = AutoTokenizer.from_pretrained(folder)
    bare.chat_template = chat_template(TEMPLATES["plain"], bare)
    chat = [message("user", "", [None]), message("assistant", "A red square.")]
    record = {
        "conversations": [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "A red square."},
        ]
    }
    rendered = bare.apply_chat_template(chat, tokenize=False)
    expected = encode_record(record, "plain", bare).input_ids
    assert bare(rendered, add_special_tokens=False).input_ids == expected


def test_a_chat_may_be_plain_strings_and_bring_its_own_system_text(loaded):
    _, processor = loaded
    chat = [{"role": "user", "content": "<image>\nWhat?"}]
    blocks = [message("user", "What?", [None])]
    assert processor.apply_chat_template(chat) == processor.apply_chat_template(blocks)
    own = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *chat])
    assert own == "<s> Be brief. USER: <image> \nWhat? "
    with pytest.raises(Exception, match="no role tool"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


# --- Batches ---


def prompts(count):
    """Prompts of several lengths, about an image and not, in turn."""
    for number in range(count):
        text = "Tell me " + "more and " * number + "all."
        if number % 2:
            yield f"USER: {text} ASSISTANT:", None
        else:
            yield f"USER: <image>\n{text} ASSISTANT:", image(f"{number % 4}.png")


@pytest.mark.parametrize("which", ["images", "text", "mixed"])
@torch.no_grad()
def test_batched_generation_equals_one_by_one(which, loaded):
    model, processor = loaded
    chosen = [
        (text, picture)
        for text, picture in prompts(8)
        if which == "mixed" or (picture is not None) == (which == "images")
    ]
    pictures = [picture for _, picture in chosen if picture is not None]
    batch = processor(text=[text for text, _ in chosen], images=pictures or None)
    assert batch["attention_mask"][0, 0] == 0 or batch["attention_mask"][-1, 0] == 1
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, (text, picture) in enumerate(chosen):
        alone = processor(text=text, images=picture)
        ids = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert together[row].tolist() == ids.tolist(), text


# --- What a modeling backend has to have ---


def test_the_attention_of_both_parts_is_replaceable_and_gets_keyword_arguments(loaded, folder):
    """ALL_ATTENTION_FUNCTIONS by config, kwargs from the model down to the attention layers."""
    seen = []

    def recording(module, *args, **kwargs):
        seen.append((type(module).__name__, kwargs.get("server_says")))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("recording", recording)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="recording")
    assert model._supports_attention_backend
    _, processor = loaded
    inputs = processor(text="USER: <image>\nHi ASSISTANT:", images=image("0.png"))
    expected = loaded[0](**inputs).logits
    logits = model(**inputs, server_says="hello").logits
    assert torch.allclose(logits, expected, atol=1e-5)
    assert ("LlamaAttention", "hello") in seen
    seen.clear()
    model.get_image_features(inputs["pixel_values"], server_says="hello")
    assert set(seen) == {("CLIPAttention", "hello")}


def test_the_base_model_is_made_from_the_config_alone(folder):
    """As vLLM makes it: without a head, on the meta device; it knows its encoder and decoder."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    assert type(model) is sqllava.SQLlavaModel
    assert type(model.get_decoder()).__name__ == "LlamaModel"
    assert type(model.get_encoder(modality="image")).__name__ == "CLIPVisionModel"
    assert model.config.get_text_config().model_type == "llama"


def test_image_features_come_as_one_tensor_an_image(loaded):
    model, processor = loaded
    pixels = torch.stack([processor.prepare_image(image(f"{i}.png")) for i in range(2)])
    for owner in (model, model.model):
        features = owner.get_image_features(pixels, return_dict=True).pooler_output
        assert [tuple(f.shape) for f in features] == [(16, 48), (16, 48)]


def test_the_processor_counts_image_tokens_as_it_writes_them(loaded):
    _, processor = loaded
    sizes = [(60, 80), (10_000, 10_000), (7, 3)]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert counted["num_image_tokens"] == [16, 16, 16]
    assert counted["num_image_patches"] == [1, 1, 1]
    inputs = processor(
        text=["USER: <image>\nHi ASSISTANT:", "USER: <image>\n<image>\nHello ASSISTANT:"],
        images=[image("0.png"), image("1.png"), image("2.png")],
        return_mm_token_type_ids=True,
    )
    marks = inputs["input_ids"] == processor.image_token_id
    assert torch.equal(inputs["mm_token_type_ids"], marks.long())
    assert marks.sum(dim=1).tolist() == [16, 32]
    assert processor.image_token == "<image>" and processor.image_token_ids == [1345]


def test_the_processor_reports_what_each_placeholder_became(loaded):
    _, processor = loaded
    text = "USER: <image>\nHi ASSISTANT:"
    inputs = processor(text=text, images=image("0.png"), return_text_replacement_offsets=True)
    (entry,) = inputs["text_replacement_offsets"][0]
    assert (entry["type"], entry["span"]) == ("image", (6, 13))
    ids = processor.tokenizer(entry["replacement"], add_special_tokens=False).input_ids
    assert ids == [processor.image_token_id] * 16
    bare = processor(text="<image>", images=image("0.png"), add_special_tokens=False)
    assert bare["input_ids"][0].tolist() == [processor.image_token_id] * 16


def test_the_tensor_parallel_plan_covers_the_language_model_and_nothing_else(loaded):
    import re

    model, _ = loaded
    plan = [re.escape(pattern).replace(r"\*", r"\d+") for pattern in model.tp_plan]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            planned = any(re.fullmatch(pattern, name) for pattern in plan)
            assert planned == ("vision_tower" not in name and "projector" not in name), name


def test_truncation_that_could_cut_an_image_is_refused(loaded):
    _, processor = loaded
    with pytest.raises(ValueError, match="cut through an image"):
        processor(text="USER: Hi", truncation=True, max_length=4)


# --- Compilation, quantisation, placement ---


@torch.no_grad()
def test_projector_and_tower_compile_without_graph_breaks(loaded):
    model, processor = loaded
    pixels = processor.prepare_image(image("0.png"))[None]
    tower = torch.compile(model.model.vision_tower, fullgraph=True, backend="aot_eager")
    projector = torch.compile(
        model.model.multi_modal_projector, fullgraph=True, backend="aot_eager"
    )
    features = tower(pixels).last_hidden_state[:, 1:]
    expected = model.get_image_features(pixels).pooler_output[0]
    assert torch.allclose(projector(features)[0], expected, atol=1e-5)


@pytest.fixture(scope="module")
def wide(folder, tmp_path_factory):
    """A random model of the golden one's form, of widths that bitsandbytes' kernels take: on CPUs
    with bfloat16 units, multiples of 32 in 4 bits."""
    config = AutoConfig.from_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    for name, size in sizes.items():
        setattr(config.text_config, name, size)
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("wide") / "model"
    AutoModelForImageTextToText.from_config(config).save_pretrained(target)
    AutoProcessor.from_pretrained(folder).save_pretrained(target)
    return target


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantised_loading_leaves_tower_projector_and_head_alone(bits, wide):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, processor = load(wide, bits=bits, dtype=torch.float32)
    plain, _ = load(wide, dtype=torch.float32)
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, kinds) == ("language_model" in name), name
    whole = dict(plain.named_parameters())
    for name, value in model.named_parameters():
        if "language_model" not in name:
            assert torch.equal(value, whole[name])
    inputs = processor(text="USER: <image>\nHi ASSISTANT:", images=image("0.png"))
    close = torch.nn.functional.cosine_similarity(
        model(**inputs).logits[0, -1], plain(**inputs).logits[0, -1], dim=0
    )
    assert close > 0.9


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_whole_model_loads_with_a_device_map(device_map, folder, loaded):
    model, processor = load(folder, device_map=device_map)
    inputs = processor(text="USER: <image>\nHi ASSISTANT:", images=image("0.png"))
    inputs = inputs.to(model.device)
    logits = model(**inputs).logits.cpu()
    assert torch.allclose(logits, loaded[0](**inputs.to("cpu")).logits, atol=1e-3)


def test_quantising_an_adapter_says_to_merge_it_first():
    with pytest.raises(ValueError, match="sqllava convert .* --to merged"):
        load(GOLDEN / "sqllava-lora", bits=4)
    with pytest.raises(ValueError, match="must be 16, 8 or 4"):
        from sqllava.checkpoint.load import quantization

        quantization(3, torch.float32)
