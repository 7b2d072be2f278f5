"""What comes before loading: a model's name, device and dtype; and folders that are not whole."""

import json
import shutil

import pytest
import torch
from golden_numbers import GOLDEN, image

from sqllava.checkpoint import dtype_name
from sqllava.checkpoint.cli import main as convert_main
from sqllava.checkpoint.convert import Options, convert
from sqllava.checkpoint.load import load
from sqllava.eval.engine import is_transformers_model, open_engine

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476925163\n"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    target = tmp_path_factory.mktemp("loading") / "merged"
    convert(GOLDEN / "sqllava-lora", target, "merged", Options(check=False))
    return target


@pytest.fixture
def spoilt(adapter, merged, tmp_path):
    """Makes a copy of an adapter or a whole model with one file's bytes changed, or it left out."""

    def make(kind, name, data):
        copy = tmp_path / "copy"
        shutil.copytree(adapter if kind == "adapter" else merged, copy)
        if data is None:
            (copy / name).unlink()
        else:
            whole = (copy / name).read_bytes() if (copy / name).exists() else b""
            (copy / name).write_bytes(whole[: len(whole) // 2] if data == "half" else data)
        return copy

    return make


# --- Devices and dtypes ---


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("auto", torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_go_by_their_short_names_too(name, dtype, merged):
    assert load(merged, dtype=name, device="cpu")[0].dtype == dtype


@pytest.mark.parametrize("name", ["banana", "int8", "float8_e4m3fn", "", "FP16"])
def test_other_dtypes_are_refused_before_anything_is_loaded(name, tmp_path, capsys):
    with pytest.raises(ValueError, match="no dtype .* choose auto, float32"):
        load(tmp_path, dtype=name)
    with pytest.raises(ValueError, match="no dtype"):
        open_engine("some-org/some-model", dtype=name)
    with pytest.raises(SystemExit, match="^error: no dtype [^\n]*$"):
        convert_main([str(GOLDEN / "sqllava-lora"), str(tmp_path / "x"), "--to", "merged",
                      "--dtype", name])  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_whole_numbers_are_no_dtype_of_a_model(merged):
    with pytest.raises(ValueError, match="cannot be held in torch.int8"):
        load(merged, dtype=torch.int8)


def test_converting_takes_short_names(tmp_path):
    convert(GOLDEN / "sqllava-lora", tmp_path / "m", "merged", Options(dtype="bf16", check=False))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert dtype_name("half") == "float16"


@pytest.mark.parametrize("device", ["cuda:99", "cuda:x", "banana", "meta", "mps:4"])
def test_devices_that_are_not_there_are_told(device, tmp_path):
    with pytest.raises(ValueError, match=r"device .*choose cpu"):
        load(tmp_path, device=device)
    with pytest.raises(ValueError, match=r"device .*choose cpu"):
        open_engine("some-org/some-model", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_told(tmp_path):
    with pytest.raises(ValueError, match="there is no device 'cuda' here: choose cpu"):
        load(tmp_path, device="cuda")


# --- Names ---


def test_a_hub_id_is_fetched(monkeypatch, adapter, tmp_path):
    asked = []

    def fetch(name, **options):
        asked.append(name)
        return str(adapter)

    monkeypatch.setattr("sqllava.checkpoint.hub.snapshot_download", fetch)
    assert load("some-org/some-model")[1].conversation_template == "v1_sq"
    convert("some-org/some-model", tmp_path / "ours", "ours")
    assert asked == ["some-org/some-model"] * 2


def test_a_hub_id_that_cannot_be_fetched_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="^some-org/none: no such folder, .* fetched: "):
        load("some-org/none")


def test_an_evaluated_hub_id_may_be_a_model_of_ours(monkeypatch):
    for kind, theirs in (("sqllava", False), ("llava_llama", False), ("llava", True)):
        config = {"model_type": kind} | ({"vision_config": {}} if theirs else {})
        monkeypatch.setattr("sqllava.eval.engine.config_dict", lambda _, found=config: found)
        assert is_transformers_model("some-org/some-model") == theirs


# --- Folders that are not whole ---


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("config.json", b"{", "config.json is not valid JSON"),
        ("config.json", b"[]", "config.json must hold a JSON object, found"),
        ("config.json", "{}".encode("utf-16"), "config.json is not valid JSON"),
        ("config.json", b"{}", "a model of type None"),
        ("processor_config.json", b"{", "processor_config.json is not valid JSON"),
        ("processor_config.json", b"{}", "processor_config.json: no image_processor"),
        ("tokenizer.json", None, "no tokenizer.json or tokenizer.model"),
        ("tokenizer.json", b"{", "tokenizer.json is not valid JSON"),
        ("WEIGHTS", "half", "WEIGHTS is not a safetensors file"),
        ("WEIGHTS", b"", "WEIGHTS is not a safetensors file"),
        ("WEIGHTS", LFS, "WEIGHTS is a Git LFS pointer.* git lfs pull"),
        ("WEIGHTS", None, "neither adapter_model.safetensors nor a model's weights"),
    ],
)
def test_a_damaged_or_missing_file_is_named(kind, name, data, told, spoilt):
    weights = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    name, told = (word.replace("WEIGHTS", weights) for word in (name, told))
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        load(spoilt(kind, name, data))


@pytest.mark.parametrize(
    ("kind", "name", "data", "told"),
    [
        ("adapter", "adapter_config.json", None, "no adapter_config.json beside adapter_model"),
        ("adapter", "adapter_config.json", b"{}", "adapter_config.json: no alpha_pattern"),
        ("adapter", "config.json", b'{"model_type": "sqllava"}', "its config names no base"),
        ("model", "config.json", b'{"model_type": "sqllava"}', "no text_config, vision_config"),
        ("model", "processor_config.json", None, "no processor_config.json"),
        ("model", "model.safetensors.index.json", b"{}", "index.json is damaged"),
        ("model", "model.safetensors.index.json", b"{", "index.json is damaged"),
        (
            "model",
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-2-of-2.safetensors"}}',
            r"shards that are missing: \['model-2-of-2.safetensors'\]",
        ),
    ],
)
def test_what_a_folder_lacks_is_named(kind, name, data, told, spoilt):
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        load(spoilt(kind, name, data))


def test_an_adapter_without_a_processor_has_that_of_its_parts(adapter, spoilt, caplog):
    prompt = {"text": "USER: <image>\nWho? ASSISTANT:", "images": image("0.png")}
    inputs = [
        load(f)[1](**prompt) for f in (spoilt("adapter", "processor_config.json", None), adapter)
    ]
    assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[1])
    assert "no processor_config.json: text and images are prepared as its base" in caplog.text
