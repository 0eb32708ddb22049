"""``from moe_recipes import AutoModelForCausalLM``: the arguments, classes and files of Transformers' own."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.utils.quantization_config import FineGrainedFP8Config

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models.auto import _finish, enable_activation_checkpointing
from moe_recipes.models.loading.warnings import warn_of_code
from tests.tiny_models import save_tiny_model, tiny_config

IDS = torch.arange(48).mul(37).remainder(256).view(2, 24)


def tiny() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that plain Transformers saved."""
    path = tmp_path_factory.mktemp("dropin") / "model"
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(tiny()).save_pretrained(path)
    return path


def plain(folder: Path, **options) -> Qwen3MoeForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options)


def same_logits(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=2e-5)


def experts_of(model: torch.nn.Module) -> str:
    return model.config._experts_implementation


def test_the_same_class_logits_and_generation(folder: Path) -> None:
    ours, reference = AutoModelForCausalLM.from_pretrained(folder), plain(folder)
    assert type(ours) is Qwen3MoeForCausalLM
    assert issubclass(AutoModelForCausalLM, transformers.AutoModelForCausalLM)
    assert experts_of(ours) == "moe_recipes"
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in reference.named_parameters()]
    same_logits(ours, reference)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(IDS, **options), reference.generate(IDS, **options))


def test_from_config_draws_what_transformers_draws_and_leaves_the_config_alone() -> None:
    config = tiny()
    before = config.to_dict()
    torch.manual_seed(5)
    ours = AutoModelForCausalLM.from_config(config)
    assert type(ours) is Qwen3MoeForCausalLM
    assert config.to_dict() == before
    assert config._experts_implementation is None
    torch.manual_seed(5)
    reference = transformers.AutoModelForCausalLM.from_config(config)
    assert experts_of(reference) == "grouped_mm"
    assert experts_of(AutoModelForCausalLM.from_config(config)) == "moe_recipes", "what Transformers left in the config"
    assert experts_of(reference) == "grouped_mm"
    for (name, mine), theirs in zip(ours.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_save_pretrained_is_read_by_plain_transformers(folder: Path, tmp_path: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.01)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()
    names = []
    for place in (tmp_path, folder):
        with safe_open(place / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names[0]
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for (name, mine), theirs in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(
    ("options", "experts", "attention", "dtype"),
    [
        ({"experts_implementation": "eager"}, "eager", "sdpa", torch.float32),
        ({"experts_implementation": "grouped_mm"}, "grouped_mm", "sdpa", torch.float32),
        ({"experts_implementation": None}, "moe_recipes", "sdpa", torch.float32),
        ({"attn_implementation": "eager"}, "moe_recipes", "eager", torch.float32),
        ({"dtype": "auto"}, "moe_recipes", "sdpa", torch.float32),
        ({"dtype": torch.bfloat16}, "moe_recipes", "sdpa", torch.bfloat16),
        ({"dtype": "bfloat16"}, "moe_recipes", "sdpa", torch.bfloat16),
        ({"device_map": None}, "moe_recipes", "sdpa", torch.float32),
        ({"revision": "main", "local_files_only": True}, "moe_recipes", "sdpa", torch.float32),
        ({"trust_remote_code": False, "use_safetensors": True}, "moe_recipes", "sdpa", torch.float32),
        ({"num_experts_per_tok": 3}, "moe_recipes", "sdpa", torch.float32),
    ],
)
def test_options_keep_their_meaning(folder: Path, options: dict, experts: str, attention: str, dtype) -> None:
    ours = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert (experts_of(ours), ours.config._attn_implementation, ours.dtype) == (experts, attention, dtype)
    assert ours.config.num_experts_per_tok == options.get("num_experts_per_tok", 2)
    with torch.no_grad():
        ours(IDS)


def test_a_choice_in_the_config_is_respected(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder, experts_implementation="eager")
    assert experts_of(AutoModelForCausalLM.from_pretrained(folder, config=config)) == "eager"
    assert experts_of(AutoModelForCausalLM.from_config(config)) == "eager"
    config = AutoConfig.from_pretrained(folder)
    assert experts_of(AutoModelForCausalLM.from_pretrained(folder, config=config)) == "moe_recipes"
    assert config._experts_implementation is None


def test_loading_info_comes_back_as_a_pair(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, tuple)
    assert type(loaded[0]) is Qwen3MoeForCausalLM
    assert loaded[1]["missing_keys"] == set()


def test_wrong_arguments_fail_as_in_transformers(folder: Path, tmp_path: Path) -> None:
    for options in ({"experts_implementation": "no_such"}, {"attn_implementation": "no_such"}):
        with pytest.raises(ValueError, match="no_such"):
            AutoModelForCausalLM.from_pretrained(folder, **options)
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=tiny())


def spoil(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


def test_a_deep_copy_owns_all_its_weights(folder: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(folder)
    twin = copy.deepcopy(ours)
    spoil(ours)
    same_logits(twin, plain(folder))


def test_a_deep_copy_routes_once_under_recomputation(folder: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(folder)
    twin = copy.deepcopy(ours)
    spoil(ours)
    twin.train()
    enable_activation_checkpointing(twin)
    calls = {"router": 0, "attention": 0}

    def count(kind: str):
        def hook(*_) -> None:
            calls[kind] += 1

        return hook

    # The class's forward is what `route_once` calls; a hook on the module would count replays too.
    linear = torch.nn.functional.linear
    routers = {id(layer.mlp.gate.weight) for layer in twin.model.layers}

    def counting_linear(x, weight, bias=None):
        calls["router"] += id(weight) in routers
        return linear(x, weight, bias)

    for layer in twin.model.layers:
        layer.self_attn.o_proj.register_forward_hook(count("attention"))
    torch.nn.functional.linear = counting_linear
    try:
        twin(IDS, labels=IDS).loss.backward()
    finally:
        torch.nn.functional.linear = linear
    assert calls == {"router": 2, "attention": 4}
    reference = plain(folder).train()
    reference(IDS, labels=IDS).loss.backward()
    for (name, mine), theirs in zip(twin.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_pickle_and_torch_save_in_a_new_process(folder: Path, tmp_path: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(folder)
    same_logits(pickle.loads(pickle.dumps(ours)), plain(folder))
    torch.save(ours, tmp_path / "whole.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])\n"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    places = [str(tmp_path / name) for name in ("whole.pt", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *places], check=True, timeout=120)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), plain(folder)(IDS).logits, rtol=1e-5, atol=2e-5)


def test_state_dict_and_moves_are_those_of_the_plain_model(folder: Path) -> None:
    ours, reference = AutoModelForCausalLM.from_pretrained(folder), plain(folder)
    assert ours.state_dict().keys() == reference.state_dict().keys()
    spoil(ours)
    ours.load_state_dict(reference.state_dict())
    same_logits(ours, reference)
    same_logits(ours.to(torch.float64).to(torch.float32), reference)
    assert ours.half().dtype == torch.float16


def test_load_state_dict_takes_what_save_pretrained_wrote(folder: Path) -> None:
    ours, reference = AutoModelForCausalLM.from_pretrained(folder), plain(folder)
    on_disk = load_file(folder / "model.safetensors")
    assert reference.load_state_dict(on_disk, strict=False).missing_keys, "plain Transformers reads these keys by now"
    for model in (ours, copy.deepcopy(ours)):
        spoil(model)
        parameters = [id(parameter) for parameter in model.parameters()]
        model.load_state_dict(on_disk)
        assert [id(parameter) for parameter in model.parameters()] == parameters
        for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(mine, theirs), name

    first_layer = {key: tensor for key, tensor in on_disk.items() if "layers.0." in key} | {"stray": torch.ones(1)}
    spoil(ours)
    before = ours.model.layers[1].mlp.experts.down_proj.clone()
    state = torch.get_rng_state()
    found = ours.load_state_dict(first_layer, strict=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.unexpected_keys == ["stray"]
    assert "model.layers.1.mlp.experts.down_proj" in found.missing_keys
    assert not any("layers.0." in key for key in found.missing_keys)
    assert torch.equal(ours.model.layers[0].mlp.experts.down_proj, reference.model.layers[0].mlp.experts.down_proj)
    assert torch.equal(ours.model.layers[1].mlp.experts.down_proj, before)

    some_experts = {key: tensor for key, tensor in on_disk.items() if "experts.3." not in key}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ours.load_state_dict(some_experts, strict=False)


def test_loss_has_the_meaning_of_transformers(folder: Path) -> None:
    ours, reference = AutoModelForCausalLM.from_pretrained(folder), plain(folder)
    labels = IDS.clone()
    labels[0, :9] = -100
    for extra in ({}, {"num_items_in_batch": 17}):
        mine, theirs = ours(IDS, labels=labels, **extra).loss, reference(IDS, labels=labels, **extra).loss
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
        ours.zero_grad()
        reference.zero_grad()
        mine.backward()
        theirs.backward()
        for (name, one), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile(folder: Path, dtype: torch.dtype) -> None:
    """Compiled, Transformers' own experts compute, so the outside reference is Transformers, not compiled."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = plain(IDS, labels=IDS).loss
    expected.backward()
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")(IDS, labels=IDS).loss
    compiled.backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 2e-3}
    torch.testing.assert_close(compiled, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
    for (name, parameter), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name, **tolerance)


def test_one_line_says_what_was_applied(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny_model("llama", tmp_path)
    with caplog.at_level(logging.INFO, logger="moe_recipes.models"):
        AutoModelForCausalLM.from_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        AutoModelForCausalLM.from_pretrained(tmp_path)
    fast, eager, dense = [record.getMessage() for record in caplog.records if record.name == "moe_recipes.models"]
    assert fast.startswith("Qwen3MoeForCausalLM: fused experts: applied (2 layers")
    assert "expert dispatch: not applied (ep_size is 1" in fast
    assert "router kept under recomputation: applied" in fast
    assert "fused experts: not applied (experts_implementation is 'eager')" in eager
    assert dense.startswith("LlamaForCausalLM: fused experts: not applied (the model has no experts")
    assert "expert dispatch: not applied (the model has no experts" in dense
    assert "\n" not in fast + eager + dense


def test_quantised_experts_keep_their_own_computation(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    model = replace_with_fp8_linear(model, quantization_config=FineGrainedFP8Config(weight_block_size=(16, 16)))
    with caplog.at_level(logging.INFO, logger="moe_recipes.models"):
        _finish(model, experts=None, layout=None)
    assert experts_of(model) == "grouped_mm"
    assert "fused experts: not applied (the experts' weights are quantised)" in caplog.text


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, moe_recipes\n"
        "assert moe_recipes.__version__ and 'AutoModelForCausalLM' in dir(moe_recipes)\n"
        "bad = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "from moe_recipes import AutoModelForCausalLM\n"
        "assert 'torch' in sys.modules and AutoModelForCausalLM is moe_recipes.AutoModelForCausalLM\n"
        "try:\n    moe_recipes.AutoModel\nexcept AttributeError as error:\n    assert 'AutoModel' in str(error)\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ""),
        ({"use_safetensors": False}, "its weights are pickled"),
        ({"trust_remote_code": True}, ""),
    ],
)
def test_pickled_weights_load_as_in_transformers_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, bool], told: str
) -> None:
    save_tiny_model("llama_tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with caplog.at_level("WARNING", "moe_recipes"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])
        assert [told in line for line in caplog.messages] == [True] * bool(told)
        (tmp_path / "model.safetensors").unlink()
        caplog.clear()
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert len(caplog.messages) == 1
    assert "its weights are pickled, which can run any code when they are read" in caplog.text


@pytest.mark.parametrize(("revision", "warnings"), [(None, 1), ("main", 1), ("0123456789abcdef" * 2 + "01234567", 0)])
def test_code_of_an_open_revision_is_warned_of(
    caplog: pytest.LogCaptureFixture, revision: str | None, warnings: int
) -> None:
    with caplog.at_level("WARNING", "moe_recipes"):
        warn_of_code("someone/something", {"trust_remote_code": True, "revision": revision})
    assert len(caplog.messages) == warnings
    assert all("pin revision to a commit of 40 hex digits" in line for line in caplog.messages)
