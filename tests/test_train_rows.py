"""Rows: the same loss and gradients as records one by one, every record once, and level ranks."""

import copy
import random
from functools import cache

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig

from sqllava.data.dataset import Sample
from sqllava.data.sampler import RECORDS_OF_AN_IMAGE, image_steps
from sqllava.encoding import IGNORE_INDEX, NothingTrainedError, TooLongError, encode_record
from sqllava.model import attention
from sqllava.model.adapters import Lora, Training, prepare_training
from sqllava.model.attention import BY_PIECES, dense_mask, predictors, row_arguments, sees
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.train.rows import (
    Attentions,
    RowCollator,
    RowSampler,
    Sizes,
    choose_attention,
    deal,
    image_cost,
)

IMAGE_TOKENS, IMAGE_ID, WIDTH = 4, 1345, 32
PROJECTORS = {
    "cluster": {"centres": 3},
    "cluster_soft": {"centres": 3},
    "linear": {},
    "mlp2x_gelu": {},
    "identity": {},
}
RELAXED = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@cache
def trained_model(projector: str = "linear", full: bool = False) -> torch.nn.Module:
    """A small random model with what trains in both stages; its LoRAs have begun to learn."""
    torch.manual_seed(0)
    config = SQLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=IMAGE_ID,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        projector_type=projector,
        projector_options=PROJECTORS[projector],
    )
    model = SQLlavaForConditionalGeneration(config)
    model.model.language_model.set_attn_implementation(BY_PIECES)
    loras = {} if full else {"vision_lora": Lora(2, 4), "language_lora": Lora(2, 4)}
    trained = prepare_training(model, Training(full_language=full, **loras))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return trained.eval()


def loss_and_gradients(model, batches):
    """The loss of a step that is cut into these batches, and every trained tensor's gradient."""
    model.zero_grad()
    items = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        batch = {name: value for name, value in batch.items() if name != "sample_stats"}
        loss = model(**batch, num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    return total, {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def alone(sample: Sample) -> dict:
    """A batch of one record, as a rectangle."""
    batch = {"input_ids": sample.input_ids[None], "labels": sample.labels[None]}
    return batch | ({} if sample.pixel_values is None else {"pixel_values": sample.pixel_values})


def difference(found, expected) -> float:
    """The largest difference between two results, in the units that they may differ by.

    A gradient that is a millionth of the whole is what float32 left of larger ones.
    """
    loss = abs(found[0] - expected[0]) / abs(expected[0]) / 1e-5
    assert found[1].keys() == expected[1].keys()
    least = 1e-6 * float(torch.stack([g.norm() for g in expected[1].values()]).norm())
    gradients = [
        float((found[1][name] - value).norm() / value.norm().clamp(min=least)) / 1e-4
        for name, value in expected[1].items()
    ]
    return max([loss, *gradients])


# Where the image's mark stands, and whether another image comes with it, or later, or both.
KINDS = ["first", "last", "two", "later", "both"]
WORDS = ["Is", "it", "a", "red", "cube", "or", "what", "two", "dogs", "there"]


@st.composite
def records(draw, template: str) -> list[dict]:
    """Records in random order: one to six an image, some about two images, some about none."""
    rng = random.Random(draw(st.integers(0, 10**6)))

    def words():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    found = []
    for image in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 6))):
            names, kind = (
                [f"{image}"],
                draw(st.sampled_from(["first", "last", "two", "later", "both"])),
            )
            start = {"first": "<image>\n{}", "last": "{}\n<image>"}.get(kind, "<image>\n{}")
            turns = [start.format(words()), words()]
            if template != "plain":
                for _ in range(draw(st.integers(0, 2))):
                    turns += [words(), words()]
                if kind in ("two", "both"):
                    names, turns[0] = [*names, "9"], f"<image> <image>\n{words()}"
                if kind in ("later", "both") and len(turns) > 2:
                    names, turns[2] = [*names, "8"], f"{words()} <image>"
            found.append((names, turns))
    if template != "plain":
        found += [([], [words(), words()]) for _ in range(draw(st.integers(0, 2)))]
    rng.shuffle(found)
    return [
        {
            "image": names,
            "conversations": [
                {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)
            ],
        }
        for names, turns in found
    ]


def samples_of(some: list[dict], template: str, tokenizer, max_length: int | None) -> list[Sample]:
    found = []
    for number, record in enumerate(some):
        rng = random.Random(number)
        try:
            encoded = encode_record(record, template, tokenizer, 0.5, rng, IMAGE_TOKENS, max_length)
        except (TooLongError, NothingTrainedError):
            continue
        kept = record["image"][: encoded.input_ids.count(IMAGE_ID) // IMAGE_TOKENS]
        found.append(
            Sample(
                torch.tensor(encoded.input_ids),
                torch.tensor(encoded.labels),
                torch.stack([pixels(name) for name in kept]) if kept else None,
                number,
                images=tuple(kept),
            )
        )
    return found


@cache
def pixels(name: str) -> torch.Tensor:
    return torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(int(name)))


def row_of(samples, share=True):
    return RowCollator(IMAGE_ID, 0, share)(samples)


@pytest.mark.parametrize("template", ["plain", "v1", "v1_sq"])
@pytest.mark.parametrize("projector", PROJECTORS)
@RELAXED
@given(data=st.data(), max_length=st.sampled_from([None, None, 60, 75, 90]), share=st.booleans())
def test_a_row_learns_what_its_records_teach_one_by_one(
    projector, template, tokenizer, data, max_length, share
):
    samples = samples_of(data.draw(records(template)), template, tokenizer, max_length)
    if not samples:
        return
    model = trained_model(projector)
    expected = loss_and_gradients(model, [alone(sample) for sample in samples])
    found = loss_and_gradients(model, [row_of(samples, share)])
    assert difference(found, expected) < 1


@RELAXED
@given(data=st.data())
def test_full_finetuning_learns_the_same_in_rows(tokenizer, data):
    samples = samples_of(data.draw(records("v1_sq")), "v1_sq", tokenizer, None)
    model = trained_model(full=True)
    expected = loss_and_gradients(model, [alone(sample) for sample in samples])
    assert difference(loss_and_gradients(model, [row_of(samples)]), expected) < 1


def about_one_image(tokenizer, count=3, template="v1_sq") -> list[Sample]:
    some = [
        {
            "image": ["0"],
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is number {number}?"},
                {"from": "gpt", "value": f"It is a dog and {number}"},
            ],
        }
        for number in range(count)
    ]
    return samples_of(some, template, tokenizer, None)


def test_a_leak_between_branches_is_found(tokenizer, monkeypatch):
    """The comparison above can fail: by a mask that lets a branch see another, either way made."""
    samples = about_one_image(tokenizer)
    model = trained_model()
    expected = loss_and_gradients(model, [alone(sample) for sample in samples])
    batch = row_of(samples)
    assert difference(loss_and_gradients(model, [batch]), expected) < 1
    trunk, *branches = batch["row"][0]
    wrong = [{**batch, "row": ((trunk, branches[0] + branches[1], *branches[2:]),)}]
    assert difference(loss_and_gradients(model, wrong), expected) > 100

    def leaking(row, device="cpu"):
        right = sees(row, device)
        return lambda b, h, q, k: right(b, h, q, k) | (k == trunk) & (q > k)

    language_model = model.get_base_model().model.language_model
    monkeypatch.setattr(language_model.config, "_attn_implementation", "eager")
    assert difference(loss_and_gradients(model, [batch]), expected) < 1
    monkeypatch.setattr(attention, "sees", leaking)
    assert difference(loss_and_gradients(model, [batch]), expected) > 100


def test_every_way_to_attend_gives_the_same(tokenizer, monkeypatch):
    samples = about_one_image(tokenizer)
    model = copy.deepcopy(trained_model())
    batch = row_of(samples)
    model.get_base_model().model.language_model.set_attn_implementation("sdpa")
    expected = loss_and_gradients(model, [batch])
    for name in ("eager", BY_PIECES):
        model.get_base_model().model.language_model.set_attn_implementation(name)
        assert difference(loss_and_gradients(model, [batch]), expected) < 1
    model.get_base_model().model.language_model.set_attn_implementation("sdpa")
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    assert difference(loss_and_gradients(model.train(), [batch]), expected) < 1


ROWS = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4
).map(tuple)


@RELAXED
@given(ROWS)
def test_a_token_sees_its_trunk_and_its_branch_and_nothing_else(row):
    length = sum(map(sum, row))
    names = [
        (tree, branch)
        for tree, lengths in enumerate(row)
        for branch, n in enumerate(lengths)
        for _ in range(n)
    ]
    mask = dense_mask(row, torch.zeros(1))[0, 0] == 0
    for q in range(length):
        for k in range(length):
            same_tree = names[q][0] == names[k][0]
            own = same_tree and names[k][1] in (0, names[q][1])
            assert bool(mask[q, k]) == (own and k <= q)
    for token, place in enumerate(predictors(row).tolist()):
        # The last of those that it sees, but for itself.
        before = [k for k in range(token) if mask[token, k]]
        assert place == (before[-1] if before else -1)


def test_flash_attention_refuses_branches_and_takes_rows_without():
    embeds = torch.zeros(1, 9, 4)
    with pytest.raises(ValueError, match="flex_attention or sdpa"):
        row_arguments(((4, 5),), "flash_attention_2", embeds)
    given_to_it = row_arguments(((4,), (5,)), "flash_attention_2", embeds)
    assert given_to_it["attention_mask"] is None
    assert given_to_it["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]


def test_a_row_of_another_length_than_its_ids_is_refused():
    with pytest.raises(ValueError, match="the row has 9 tokens"):
        row_arguments(((4, 5),), BY_PIECES, torch.zeros(1, 8, 4))


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_holds_the_same_mask_and_gives_the_same_loss(tokenizer):
    row = ((130, 20, 9), (60,))
    embeds = torch.zeros(1, sum(map(sum, row)), 4)
    block_mask = row_arguments(row, "flex_attention", embeds)["attention_mask"]
    places = torch.arange(embeds.shape[1])
    held = block_mask.mask_mod(0, 0, places[:, None], places[None, :])
    assert torch.equal(held, dense_mask(row, embeds)[0, 0] == 0)
    # Gradients need a GPU; the forward runs here.
    model, batch = copy.deepcopy(trained_model()), row_of(about_one_image(tokenizer))
    batch.pop("sample_stats")
    expected = model(**batch).loss
    model.get_base_model().model.language_model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize(
    ("asked", "pack", "device", "flash", "flex", "expected"),
    [
        (None, "off", "cpu", False, True, ("sdpa", "sdpa")),
        (None, "off", "cuda", True, True, ("flash_attention_2", "flash_attention_2")),
        ("eager", "off", "cuda", True, True, ("eager", "eager")),
        (None, "rows", "cpu", False, True, ("sdpa", BY_PIECES)),
        (None, "shared", "cpu", False, True, ("sdpa", BY_PIECES)),
        ("sdpa", "shared", "cuda", True, True, ("sdpa", BY_PIECES)),
        (None, "rows", "cuda", True, True, ("flash_attention_2", "flash_attention_2")),
        (None, "rows", "cuda", False, True, ("sdpa", "flex_attention")),
        (None, "shared", "cuda", True, True, ("flash_attention_2", "flex_attention")),
        (None, "shared", "cuda", True, False, ("flash_attention_2", BY_PIECES)),
        (None, "rows", "cuda", False, False, ("sdpa", BY_PIECES)),
        ("flash_attention_2", "rows", "cuda", True, True, ("flash_attention_2",) * 2),
        ("flex_attention", "rows", "cuda", True, True, ("flash_attention_2", "flex_attention")),
        ("eager", "shared", "cpu", False, False, ("eager", "eager")),
    ],
)
def test_attention_is_what_can_run_the_rows(asked, pack, device, flash, flex, expected):
    assert choose_attention(asked, pack, device, flash, flex) == Attentions(*expected)


@pytest.mark.parametrize(
    ("asked", "pack", "device", "flex", "says"),
    [
        ("flash_attention_2", "shared", "cuda", True, "--pack rows"),
        ("flex_attention", "shared", "cpu", True, "use sdpa"),
        ("flex_attention", "rows", "cuda", False, "use sdpa"),
        ("paged|sdpa", "rows", "cuda", True, "--pack off"),
    ],
)
def test_attention_that_cannot_run_the_rows_is_refused(asked, pack, device, flex, says):
    with pytest.raises(ValueError, match=says):
        choose_attention(asked, pack, device, False, flex)


def test_an_image_stands_once_in_a_row_that_shares_it(tokenizer):
    samples = about_one_image(tokenizer, 3)
    apart, shared = row_of(samples, share=False), row_of(samples)
    assert len(apart["pixel_values"]) == 3 and len(shared["pixel_values"]) == 1
    assert apart["row"] == tuple((len(sample.input_ids),) for sample in samples)
    stats = shared["sample_stats"]
    assert stats["tokens"] == sum(len(sample.input_ids) for sample in samples)
    assert stats["computed"] == shared["input_ids"].numel() < stats["tokens"]
    assert (stats["images"], stats["images_of_records"]) == (1, 3)


def test_records_that_begin_unlike_or_show_other_images_share_nothing(tokenizer):
    first, second = about_one_image(tokenizer, 2)
    second.images = ("1",)
    assert all(len(lengths) == 1 for lengths in row_of([first, second])["row"])
    second.images = first.images
    second.input_ids = second.input_ids.clone()
    second.input_ids[2] += 1
    assert all(len(lengths) == 1 for lengths in row_of([first, second])["row"])


def test_a_row_without_samples_has_a_token_that_teaches_nothing():
    batch = row_of([])
    assert batch["input_ids"].shape == (1, 1) and (batch["labels"] == IGNORE_INDEX).all()
    loss, gradients = loss_and_gradients(trained_model(), [row_of([]) | {"num_items": None}][:0])
    assert loss == 0 and not gradients
    out = trained_model()(input_ids=batch["input_ids"], labels=batch["labels"], row=batch["row"])
    out.loss.backward()
    assert out.loss.item() == 0


# --- which records make up a step, and who gets them ---------------------------------------------


@st.composite
def epochs(draw):
    """Sizes of random records, 1 to 40 about an image."""
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    count = draw(st.integers(1, 300))
    images = draw(st.sampled_from([1, 3, 40, 300]))
    keys = rng.integers(1, images + 1, count)
    keys[rng.random(count) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    return Sizes(
        lengths=rng.integers(1, 900, count) + 576 * (keys > 0),
        images=(keys > 0).astype(np.int16),
        keys=draw(st.sampled_from([keys, None])),
        image_tokens=576,
        image_cost=100.0,
    )


@RELAXED
@given(epochs(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_every_record_comes_once_and_ranks_have_as_many_rows(sizes, batch, accumulation, ranks, n):
    sampler = RowSampler(sizes, batch, accumulation, ranks, seed=1)
    sampler.set_epoch(n)
    shards = [list(BatchSamplerShard(sampler, ranks, rank)) for rank in range(ranks)]
    assert len({len(shard) for shard in shards}) == 1
    assert len(sampler) == sum(map(len, shards)) == len(list(sampler))
    keys = [key for shard in shards for row in shard for key in row]
    assert sorted(key.index for key in keys) == list(range(len(sizes)))
    assert {key.epoch for key in keys} == {n}
    steps = sampler.steps(n)
    for number, step in enumerate(steps):
        place = slice(number * accumulation, (number + 1) * accumulation)
        dealt_out = [key.index for shard in shards for row in shard[place] for key in row]
        assert sorted(dealt_out) == sorted(step.tolist())
    assert {len(step) for step in steps[:-1]} <= {batch * accumulation * ranks}


@RELAXED
@given(epochs(), st.integers(1, 4), st.integers(1, 3))
def test_a_step_holds_the_same_records_on_any_number_of_ranks(sizes, batch, ranks):
    several = RowSampler(sizes, batch, 2, ranks).steps(1)
    one = RowSampler(sizes, batch * ranks * 2, 1, 1).steps(1)
    assert [step.tolist() for step in several] == [step.tolist() for step in one]


@RELAXED
@given(epochs(), st.integers(1, 3), st.integers(1, 3))
def test_incomplete_micro_batches_are_dropped_on_demand(sizes, batch, ranks):
    sampler = RowSampler(sizes, batch, 2, ranks, drop_last=True)
    found = [key.index for row in sampler for key in row]
    assert len(found) == len(set(found)) == len(sizes) // (batch * ranks) * batch * ranks
    assert len(list(sampler)) == len(sampler)


@RELAXED
@given(epochs(), st.sampled_from([4, 8, 32]), st.integers(0, 5))
def test_a_step_takes_no_more_of_an_image_than_it_may(sizes, size, seed):
    if sizes.keys is None:
        return
    steps = image_steps(sizes.keys, size, np.random.default_rng(seed))
    whole = max(sum(len(step) == size for step in steps), 1)
    _, counts = np.unique(sizes.keys[sizes.keys > 0], return_counts=True)
    if counts.max(initial=0) > RECORDS_OF_AN_IMAGE * whole // 2:
        return  # such an image must take its share of every step
    for step in steps:
        keys = sizes.keys[step]
        _, found = np.unique(keys[keys > 0], return_counts=True)
        assert found.max(initial=0) <= RECORDS_OF_AN_IMAGE


def test_records_about_an_image_come_in_one_step():
    rng = np.random.default_rng(0)
    keys = rng.permutation(np.concatenate([np.repeat(np.arange(1, 201), 3), np.zeros(200, int)]))
    steps = image_steps(keys, 32, np.random.default_rng(1))
    assert [len(step) for step in steps] == [32] * 25
    parted = sum(
        len({s for s, step in enumerate(steps) if (keys[step] == k).any()}) > 1
        for k in range(1, 201)
    )
    assert parted == 0


def test_steps_differ_by_seed_and_epoch_and_keep_other_company():
    keys = np.repeat(np.arange(1, 101), 2)
    sizes = Sizes(np.full(200, 700), np.ones(200, np.int16), keys, 576, 100.0)
    epochs = [{frozenset(s.tolist()) for s in RowSampler(sizes, 8, 1, 1).steps(n)} for n in (0, 1)]
    assert not epochs[0] & epochs[1]
    others = {frozenset(s.tolist()) for s in RowSampler(sizes, 8, 1, 1, seed=1).steps(0)}
    assert not epochs[0] & others


def test_rows_of_a_step_have_like_costs():
    rng = np.random.default_rng(0)
    lengths = rng.integers(600, 1600, 128)
    sizes = Sizes(lengths, np.ones(128, np.int16), None, 576, 100.0)
    sums = [lengths[row].sum() for row in deal(range(128), sizes, 8, None)]
    assert max(sums) < 1.05 * min(sums)
    assert sums == sorted(sums, reverse=True)


def test_an_image_with_too_many_tokens_for_a_row_is_read_in_several():
    sizes = Sizes(np.full(6, 1576), np.ones(6, np.int16), np.ones(6, np.int64), 576, 100.0)
    assert sorted(map(len, deal(range(6), sizes, 3, None))) == [0, 0, 6]
    # 576 + 2 * 1000 tokens stand in 3000, one more record does not.
    assert sorted(map(len, deal(range(6), sizes, 3, 3000))) == [2, 2, 2]


def test_an_image_costs_its_share_of_the_model():
    assert image_cost(trained_model(), 4) == pytest.approx(
        4 * _parameters("vision_tower") / (_parameters("language_model") - IMAGE_ID * WIDTH)
    )


def _parameters(part: str) -> int:
    named = trained_model().named_parameters()
    return sum(parameter.numel() for name, parameter in named if part in name)
