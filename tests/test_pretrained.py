"""Hugging Face's layout: equal to transformers, both ways, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minillm.pretrained import (
    DEFAULTS,
    FAMILIES,
    GPT2_LAYOUT,
    LLAMA_LAYOUT,
    family_of,
    find_model,
    from_their_config,
    layout_of,
    load_pretrained,
    locate,
    put_in_place,
    read_weights,
    save_pretrained,
    to_ours,
    to_their_config,
    to_theirs,
    warn_of_dropouts,
)
from minillm.tokenizer import train_bpe
from minillm.transformer import GPT, GPTConfig, preset_fields

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

GPT2_SHAPES = [  # layers, heads, width, context, vocabulary, more
    (1, 1, 8, 16, 11, {}),
    (2, 4, 32, 24, 50, {"activation_function": "gelu"}),
    (3, 3, 48, 40, 101, {"n_inner": 72, "tie_word_embeddings": False}),
    (5, 2, 24, 33, 64, {"activation_function": "relu"}),
    (2, 8, 64, 64, 257, {"layer_norm_epsilon": 1e-3}),
]
LLAMA_SHAPES = [
    (1, 1, 8, 16, 11, {}),
    (2, 4, 32, 24, 50, {"num_key_value_heads": 2}),
    (3, 6, 48, 40, 101, {"num_key_value_heads": 1, "intermediate_size": 88,
                         "tie_word_embeddings": True}),
    (2, 8, 64, 64, 257, {"num_key_value_heads": 4, "attention_bias": True,
                         "mlp_bias": True, "rms_norm_eps": 1e-3}),
    (4, 2, 32, 128, 64, {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
]
OTHERS = [
    ("mistral", {"sliding_window": 5, "num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                                   "rope_theta": 10000.0}}),
]


def their_model(family, shape, seed=0):
    """Build a random reference model whose every weight is moved."""
    n_layers, n_heads, width, context, vocab, more = shape
    if family == "gpt2":
        cfg = transformers.GPT2Config(
            n_layer=n_layers, n_head=n_heads, n_embd=width,
            n_positions=context, vocab_size=vocab, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
            eos_token_id=None, **more)
    else:
        sizes = {"intermediate_size": 3 * width} | more
        cfg = getattr(transformers, {
            "llama": "LlamaConfig", "mistral": "MistralConfig",
            "qwen3": "Qwen3Config"}[family])(
            num_hidden_layers=n_layers, num_attention_heads=n_heads,
            hidden_size=width, max_position_embeddings=context,
            vocab_size=vocab, bos_token_id=None, eos_token_id=None, **sizes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(cfg)
    with torch.no_grad():  # biases and norms start at 0 and 1: move them
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def loss_of(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1),
                           tokens[:, 1:].flatten())


def assert_equal_models(ours, theirs, dtype=torch.float32):
    """Compare logits, loss and every gradient."""
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    tight = dict(atol=1e-4, rtol=1e-4)
    if dtype == torch.float64:
        tight = dict(atol=1e-9, rtol=1e-9)
    tokens = torch.randint(ours.cfg.vocab_size,
                           (3, min(ours.cfg.context_length, 48)))
    logits = ours(tokens)
    reference = theirs(tokens, labels=tokens)
    assert_close(logits, reference.logits, **tight)
    loss = loss_of(logits, tokens)
    their_loss = (reference.loss if dtype == torch.float32  # it is always so
                  else loss_of(reference.logits, tokens))
    assert_close(loss, their_loss, **tight)
    ours.zero_grad()
    theirs.zero_grad()
    loss.backward()
    their_loss.backward()
    family = family_of(ours.cfg)
    names = dict(ours.named_parameters())
    layout = layout_of(family)
    grads = to_ours({n: p.grad for n, p in theirs.named_parameters()},
                    names, layout)
    for name, parameter in names.items():
        assert parameter.grad.abs().sum() > 0, name
        assert_close(parameter.grad, grads[name], **tight, msg=name)


def every_shape():
    for shape in GPT2_SHAPES:
        yield "gpt2", shape
    for shape in LLAMA_SHAPES:
        yield "llama", shape
    for family, more in OTHERS:
        yield family, (2, 4, 32, 24, 50, more)


@pytest.mark.parametrize("family,shape", list(every_shape()))
def test_reads_what_transformers_writes(family, shape, tmp_path):
    theirs = their_model(family, shape)
    theirs.save_pretrained(tmp_path / "m")
    ours = GPT.from_pretrained(tmp_path / "m")
    assert not ours.training
    assert ours.cfg.tie_weights == (
        ours.lm_head.weight is ours.tok_emb.weight)
    assert_equal_models(ours, theirs)
    if family == "gpt2":  # the others' norms and angles are float32 always
        assert_equal_models(ours, theirs, torch.float64)


@pytest.mark.parametrize("family,shape", list(every_shape()))
def test_transformers_reads_what_we_write(family, shape, tmp_path):
    their_model(family, shape).save_pretrained(tmp_path / "m")
    ours = GPT.from_pretrained(tmp_path / "m")
    ours.save_pretrained(tmp_path / "n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "n", output_loading_info=True)
    assert type(theirs).__name__.lower().startswith(family)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal_models(ours, theirs)
    again = GPT.from_pretrained(tmp_path / "n")
    assert again.cfg == ours.cfg
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, again.state_dict()[name]), name


OWN = [
    GPTConfig(50, 24, 32, 2, 4),
    GPTConfig(50, 24, 32, 2, 4, bias=False, activation="gelu_tanh",
              dropout=0.2),
    GPTConfig(50, 24, 32, 3, 4, tie_weights=False, d_ff=40),
    GPTConfig(50, 24, 32, 2, 4, n_kv_heads=2, norm="rms", positions="rope",
              activation="swiglu", bias=False, dropout=0.1),
    GPTConfig(50, 24, 32, 2, 4, norm="rms", positions="rope", bias=True,
              activation="swiglu", tie_weights=False, rope_theta=500.0),
    GPTConfig(50, 24, 32, 2, 4, norm="rms", positions="rope", bias=False,
              activation="swiglu", qk_norm=True),
    GPTConfig(50, 24, 32, 2, 4, norm="rms", positions="rope", bias=False,
              activation="swiglu", sliding_window=7),
]


@pytest.mark.parametrize("cfg", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_of_our_own(cfg, dtype, tmp_path):
    model = GPT(cfg, seed=3).to(dtype)
    model.save_pretrained(tmp_path / "m")
    again = GPT.from_pretrained(tmp_path / "m")
    assert again.cfg == cfg
    for name, parameter in model.named_parameters():
        other = again.get_parameter(name)
        assert other.dtype == dtype and torch.equal(parameter, other), name
    assert GPT.from_pretrained(
        tmp_path / "m", dtype=torch.float64, dropout=0.0
    ).tok_emb.weight.dtype == torch.float64
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.dtype == dtype
    if dtype == torch.float32:
        tokens = torch.randint(50, (2, 20))
        with torch.no_grad():
            assert_close(model.eval()(tokens), theirs.eval()(tokens).logits,
                         atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(preset_fields()))
def test_every_preset_has_a_family(name):
    cfg = GPTConfig.preset(name)
    config = to_their_config(cfg)
    assert config["model_type"] in FAMILIES
    assert from_their_config(json.loads(json.dumps(config))) == cfg


def test_trained_biases_are_not_dropped(tmp_path):
    model = GPT(OWN[1], seed=0)
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    weights["transformer.h.0.mlp.c_fc.bias"] += 1.0
    save_file(weights, file, {"format": "pt"})
    again = GPT.from_pretrained(tmp_path / "m")
    assert again.cfg == replace(OWN[1], bias=True)
    assert (again.blocks[0].ffn.up_proj.bias == 1).all()


def test_tokenizer_and_generation_config_travel_along(tmp_path):
    tokenizer = train_bpe("a kite, a red kite and a naïve 猫 " * 40, 270)
    cfg = GPTConfig(300, 32, 16, 1, 2)
    GPT(cfg, seed=0).save_pretrained(tmp_path / "m", tokenizer)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in ("a red kite", " naïve 猫\n\n", "12 <|endoftext|> x", ""):
        ids = tokenizer.encode(text, allowed_special="all")
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    end = tokenizer.end_of_text
    assert theirs.eos_token_id == end and theirs.model_max_length == 32
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.generation_config.eos_token_id == end
    out = model.generate(torch.tensor([[end]]), max_new_tokens=5,
                         do_sample=False)
    assert out.shape[1] <= 6


def test_several_files_and_a_body_without_the_stem(tmp_path):
    theirs = their_model("gpt2", GPT2_SHAPES[1])
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    assert_equal_models(GPT.from_pretrained(tmp_path / "many"), theirs)
    theirs.transformer.save_pretrained(tmp_path / "body")  # as the hub's gpt2
    assert "wte.weight" in read_weights(tmp_path / "body")
    assert_equal_models(GPT.from_pretrained(tmp_path / "body"), theirs)


def test_old_files_hold_masks_and_the_head_twice(tmp_path):
    theirs = their_model("gpt2", GPT2_SHAPES[1])
    theirs.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, file, {"format": "pt"})
    assert_equal_models(GPT.from_pretrained(tmp_path / "m"), theirs)


def test_names_go_both_ways_for_every_weight():
    for cfg, layout in ((OWN[0], GPT2_LAYOUT), (OWN[2], GPT2_LAYOUT),
                        (OWN[4], LLAMA_LAYOUT), (OWN[5], LLAMA_LAYOUT)):
        ours = dict(GPT(cfg, seed=1).state_dict())
        if cfg.tie_weights:
            del ours["lm_head.weight"]
        theirs = to_theirs(ours, layout)
        back = to_ours(theirs, ours, layout)
        assert all(torch.equal(back[n], ours[n]) for n in ours)
        assert sum(t.numel() for t in theirs.values()) == sum(
            t.numel() for t in ours.values())
    assert locate("blocks.1.attn.k_proj.bias", GPT2_LAYOUT) == (
        "transformer.h.1.attn.c_attn.bias", 1, False)


# ---- files of other ages and hands

def edited(source, target, drop=(), **changes):
    """Copy a model and change its config.json."""
    shutil.copytree(source, target)
    file = target / "config.json"
    config = json.loads(file.read_text())
    for key in drop:
        del config[key]
    file.write_text(json.dumps(config | changes))
    return target


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
AGES = [  # family, what version 4 leaves out, what it says instead
    ("gpt2", ["tie_word_embeddings", "dtype"], {"torch_dtype": "float32"}),
    ("gpt2", ["n_inner", "layer_norm_epsilon", "activation_function",
              "scale_attn_weights"], {"n_ctx": 24}),
    ("llama", ["rope_parameters"], {"rope_theta": 5e5}),
    ("llama", ["rope_parameters"], {"rope_theta": 500000,
                                    "rope_scaling": LLAMA3}),
    ("llama", ["rope_parameters"],
     {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("llama", ["rope_parameters", "rms_norm_eps", "head_dim", "mlp_bias",
               "attention_bias", "tie_word_embeddings"], {}),
    ("llama", [], {"num_key_value_heads": None, "head_dim": None,
                   "hidden_act": "swish"}),
    ("mistral", ["rope_parameters"], {"rope_theta": 1e6,
                                      "sliding_window": None}),
    ("mistral", [], {"attention_bias": True}),  # which Mistral never reads
    ("qwen3", ["rope_parameters", "layer_types"], {"rope_theta": 1e6}),
]


@pytest.mark.parametrize("family,drop,changes", AGES)
def test_config_json_of_version_4_and_with_gaps(
        family, drop, changes, tmp_path):
    more = {"gpt2": {}, "llama": {}}.get(
        family, {"num_key_value_heads": 2, "head_dim": 8})
    their_model(family, (2, 4, 32, 24, 50, more)).save_pretrained(
        tmp_path / "m")
    path = edited(tmp_path / "m", tmp_path / "n", drop, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = torch.randint(50, (2, 24))
    with torch.no_grad():
        assert_close(GPT.from_pretrained(path)(tokens), theirs(tokens).logits,
                     atol=1e-4, rtol=1e-4)


def test_defaults_are_those_of_transformers():
    config = {"vocab_size": 50, "hidden_size": 1024, "num_hidden_layers": 2,
              "num_attention_heads": 8, "intermediate_size": 64,
              "max_position_embeddings": 24, "model_type": "mistral"}
    cfg = from_their_config(config)
    theirs = transformers.MistralConfig()
    assert cfg.sliding_window == theirs.sliding_window == 4096
    assert cfg.n_kv_heads == theirs.num_key_value_heads == 8
    assert cfg.norm_eps == theirs.rms_norm_eps
    for family, name in (("gpt2", "GPT2Config"), ("llama", "LlamaConfig"),
                         ("mistral", "MistralConfig"),
                         ("qwen3", "Qwen3Config")):
        theirs = getattr(transformers, name)()
        for key, value in DEFAULTS[family].items():
            if key == "rope_theta":
                assert theirs.rope_parameters["rope_theta"] == value
            elif value is not None:  # None: from the widths
                assert getattr(theirs, key) == value, (family, key)


def test_one_type_name_for_each_version(tmp_path):
    GPT(OWN[0], seed=0).bfloat16().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_bias_note_survives_the_way_through_transformers(tmp_path):
    GPT(OWN[1], seed=0).save_pretrained(tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    theirs.save_pretrained(tmp_path / "n")
    assert GPT.from_pretrained(tmp_path / "n").cfg == OWN[1]
    file = tmp_path / "n" / "model.safetensors"
    weights = load_file(file)  # a mask, as old files have it, is no bias
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    save_file(weights, file, {"format": "pt"})
    assert GPT.from_pretrained(tmp_path / "n").cfg == OWN[1]
    for note in (3, None, "no"):
        path = edited(tmp_path / "m", tmp_path / f"x{note}", minillm=note)
        assert GPT.from_pretrained(path).cfg.bias


def test_tied_head_that_is_another(tmp_path):
    theirs = their_model("gpt2", GPT2_SHAPES[1])
    theirs.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    head = torch.randn(50, 32)
    save_file(load_file(file) | {"lm_head.weight": head}, file,
              {"format": "pt"})
    with pytest.raises(ValueError, match="tie_weights=False"):
        GPT.from_pretrained(tmp_path / "m")
    kept = GPT.from_pretrained(tmp_path / "m", tie_weights=False)
    assert torch.equal(kept.lm_head.weight, head)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokens = torch.randint(50, (2, 20))
    with torch.no_grad():  # transformers 5 does not tie two different ones
        assert_close(kept(tokens), again.eval()(tokens).logits,
                     atol=1e-4, rtol=1e-4)
    tied = GPT.from_pretrained(tmp_path / "m", tie_weights=True)
    assert tied.lm_head.weight is tied.tok_emb.weight
    assert_equal_models(tied, theirs)


def test_links_of_the_hubs_cache(tmp_path, monkeypatch):
    """Read a cache as the hub's library keeps it: links to blobs."""
    theirs = their_model("gpt2", GPT2_SHAPES[1])
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    commit = "c" * 40
    repo = tmp_path / "hub" / "models--some--model.v1.2"
    snapshot = repo / "snapshots" / commit
    for path in (repo / "blobs", repo / "refs", snapshot):
        path.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for i, file in enumerate((tmp_path / "many").iterdir()):
        shutil.move(file, repo / "blobs" / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
    assert_equal_models(GPT.from_pretrained(snapshot), theirs)
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_equal_models(GPT.from_pretrained("some/model.v1.2"), theirs)
    with pytest.raises(FileNotFoundError, match="no-such"):
        GPT.from_pretrained("some/model.v1.2", revision="no-such")


def test_no_second_copy_is_fetched(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **more: (
        asked.update(more) or tmp_path))
    assert find_model("some/model", "v1") == tmp_path
    names = ["config.json", "model.safetensors", "consolidated.safetensors",
             "model-00001-of-00002.safetensors", "pytorch_model.bin",
             "model.safetensors.index.json", "original/model.safetensors"]
    assert asked["revision"] == "v1"
    assert list(hub.utils.filter_repo_objects(
        names, allow_patterns=asked["allow_patterns"])) == [
            names[0], names[1], names[3], names[5]]


# ---- what is refused

@pytest.mark.parametrize("changes,said", [
    ({"model_type": "bert"}, "bert"),
    ({"model_type": None}, "None"),
    ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
    ({"activation_function": "tanh"}, "tanh"),
    ({"add_cross_attention": True}, "cross"),
    ({"n_embd": 33}, "33"),
    ({"n_embd": None}, "n_embd"),
    ({"n_head": 0}, "n_heads=0"),
    ({"n_head": "4"}, "n_heads='4'"),
    ({"resid_pdrop": None}, "dropout=None"),
    ({"tie_word_embeddings": None}, "tie_weights=None"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
])
def test_configs_that_gpt_is_not(changes, said):
    config = to_their_config(OWN[0]) | changes
    with pytest.raises(ValueError, match=said):
        from_their_config(config)


def test_llama_configs_that_gpt_is_not():
    config = to_their_config(OWN[3])
    for changes, said in (({"head_dim": 16}, "head_dim"),
                          ({"mlp_bias": True}, "mlp_bias"),
                          ({"hidden_act": "gelu"}, "hidden_act"),
                          ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
                          ({"num_attention_heads": 0}, "n_heads=0"),
                          ({"num_attention_heads": "4"}, "n_heads='4'"),
                          ({"hidden_size": None}, "hidden_size"),
                          ({"rope_theta": None}, "rope_theta=None"),
                          ({"attention_bias": True, "mlp_bias": False},
                           "mlp_bias")):
        with pytest.raises(ValueError, match=said):
            from_their_config(config | changes)
    del config["hidden_size"]
    with pytest.raises(ValueError, match="hidden_size"):
        from_their_config(config)
    del config["mlp_bias"]  # absent in old files, and then false
    with pytest.raises(ValueError, match="mlp_bias"):
        from_their_config(config | {"hidden_size": 32,
                                    "attention_bias": True})
    for wrong in ([], "gpt2", None, 3):
        with pytest.raises(ValueError, match="model_type"):
            from_their_config(wrong)


def test_a_window_is_refused_where_llama_has_none():
    config = to_their_config(OWN[3])
    with pytest.raises(ValueError, match="sliding_window=8.*mistral"):
        from_their_config(config | {"sliding_window": 8})
    same = {"sliding_window": None, "pretraining_tp": 4}  # slices: equal sums
    assert from_their_config(config | same) == from_their_config(config)


def test_one_dropout_for_three_is_said(tmp_path):
    save_pretrained(GPT(OWN[0], seed=0), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("embd_pdrop", "attn_pdrop"):
        path.write_text(json.dumps(config | {key: 0.25}), encoding="utf-8")
        with pytest.warns(UserWarning, match=f"{key}.*0.25.*dropout=") as w:
            load_pretrained(tmp_path / "m")
        assert len(w) == 1 and w[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # who chooses is not warned
            model = load_pretrained(tmp_path / "m", dropout=0.0)
        assert model.cfg.dropout == 0.0
    few = {k: v for k, v in config.items() if not k.endswith("pdrop")}
    few |= {"resid_pdrop": 0.0}  # the others' default is 0.1
    with pytest.warns(UserWarning, match="embd_pdrop.*attn_pdrop.* 0.0;"):
        warn_of_dropouts(few, 0.0)


@pytest.mark.parametrize("changes,said", [
    ({"positions": "alibi"}, "alibi"),
    ({"norm_position": "post"}, "post"),
    ({"qk_norm": True}, "qk_norm"),
    ({"n_kv_heads": 2}, "n_kv_heads"),
    ({"norm": "rms"}, "norm"),
    ({"activation": "swiglu"}, "swiglu"),
    ({"positions": "rope", "norm": "rms"}, "activation"),
    ({"positions": "rope", "norm": "rms", "activation": "swiglu",
      "sliding_window": 4, "n_sinks": 1}, "n_sinks"),
    ({"positions": "rope", "norm": "rms", "activation": "swiglu",
      "qk_norm": True}, "bias"),
])
def test_models_that_no_family_holds(changes, said, tmp_path):
    cfg = replace(OWN[0], **changes)
    with pytest.raises(ValueError, match=said):
        save_pretrained(GPT(cfg, seed=0), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_there_or_not_right(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/at-all"):
        find_model("nowhere/at-all")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path)
    model = GPT(OWN[0], seed=0)
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)

    def refuses(error, said, changed):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(error, match=said):
            load_pretrained(tmp_path / "m")

    lacking = dict(weights)
    del lacking["transformer.h.1.ln_2.bias"]
    refuses(ValueError, r"ln_2\.bias", lacking)
    refuses(ValueError, "no place", weights | {"extra": torch.zeros(1)})
    refuses(ValueError, "shape",
            weights | {"transformer.wte.weight": torch.zeros(49, 32)})
    for shape in ((32, 32, 1), (), (32, 95), (96,), (96, 32)):
        refuses(ValueError, "shape", weights | {
            "transformer.h.0.attn.c_attn.weight": torch.zeros(shape)})
    refuses(ValueError, r"shape \(32, 32, 1\)", weights | {
        "transformer.h.0.attn.c_proj.weight": torch.zeros(32, 32, 1)})
    for dtype in (torch.int8, torch.float8_e4m3fn):
        refuses(ValueError, "quantised",
                {k: t.to(dtype) for k, t in weights.items()})
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="is a file"):
        load_pretrained(file)
    with pytest.raises(ValueError, match="'dropout' for 'dropot'"):
        load_pretrained(tmp_path / "m", dropot=0.0)
    nonzero = {k: t + 1 if k.endswith("c_fc.bias") else t
               for k, t in weights.items()}
    save_file(nonzero, file, {"format": "pt"})
    with pytest.raises(ValueError, match="bias=False"):
        load_pretrained(tmp_path / "m", bias=False)
    file.unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*code"):
        load_pretrained(tmp_path / "m")
    file.write_bytes(b"\x80\x02 a pickle under another name")
    with pytest.raises(ValueError, match="pickle"):
        load_pretrained(tmp_path / "m")


def test_nothing_is_overwritten_unasked_and_no_half_is_left(
        tmp_path, monkeypatch):
    model = GPT(OWN[0], seed=0)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        model.save_pretrained(tmp_path / "m")
    (tmp_path / "f").write_text("a file")
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "f")
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minillm.pretrained.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(model, tmp_path / "m", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    monkeypatch.undo()
    GPT(OWN[0], seed=9).save_pretrained(tmp_path / "m", overwrite=True)
    assert not (tmp_path / "m" / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_index_that_is_damaged(tmp_path):
    theirs = their_model("gpt2", GPT2_SHAPES[1])
    theirs.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(iter(good["weight_map"]))
    for bad in ({}, [], {"weight_map": 3}, {"weight_map": None},
                {"weight_map": good["weight_map"] | {name: 5}}):
        index.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"index\.json.*damaged"):
            load_pretrained(tmp_path / "m")
    good["weight_map"][name] = "../../secret.safetensors"  # stays inside
    index.write_text(json.dumps(good))
    with pytest.raises(FileNotFoundError, match=r"m/secret\.safetensors"):
        load_pretrained(tmp_path / "m")


def test_places_with_odd_names_and_links(tmp_path, monkeypatch):
    model = GPT(OWN[0], seed=0)
    for name in ("run.v1.2", "..two", "dot.", "a b", "né.猫"):
        assert model.save_pretrained(tmp_path / name) is None
        assert GPT.from_pretrained(tmp_path / name).cfg == OWN[0]
    (tmp_path / "link").symlink_to("real")  # to what is not there yet
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
    save_pretrained(GPT(OWN[2], seed=0), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert GPT.from_pretrained(tmp_path / "real").cfg == OWN[2]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        save_pretrained(model, tmp_path / "file", overwrite=True)
    (tmp_path / "here" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "in")
    for place in (".", "..", tmp_path / "here"):
        with pytest.raises(ValueError, match="current directory"):
            save_pretrained(model, place, overwrite=True)
    assert list((tmp_path / "here").rglob("*")) == [tmp_path / "here" / "in"]


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize("mask,files,place", [
    (0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_modes_follow_the_umask(mask, files, place, tmp_path):
    before = os.umask(mask)
    try:
        GPT(OWN[0], seed=0).save_pretrained(tmp_path / "m")
    finally:
        os.umask(before)
    assert (tmp_path / "m").stat().st_mode & 0o777 == place
    for file in (tmp_path / "m").iterdir():
        assert file.stat().st_mode & 0o777 == files, file


def test_what_was_there_comes_back_if_the_renaming_fails(
        tmp_path, monkeypatch):
    model = GPT(OWN[0], seed=0)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    rename = type(tmp_path).rename

    def fails(self, target):
        if self.name.startswith(".m.") and target == tmp_path / "m":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        save_pretrained(model, tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_somebody_was_faster(tmp_path):
    for name in ("new", "m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who.txt").write_text(name)
    with pytest.raises(FileExistsError, match="another process"):
        put_in_place(tmp_path / "new", tmp_path / "m", False)
    assert (tmp_path / "m" / "who.txt").read_text() == "m"
    put_in_place(tmp_path / "new", tmp_path / "m", True)
    assert (tmp_path / "m" / "who.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_writers_at_once(tmp_path):
    """Replace one directory from four threads; the last one wins whole."""
    models = [GPT(GPTConfig(50, 24, 32, i, 4), seed=i) for i in range(1, 5)]

    def write(model):
        for _ in range(10):
            save_pretrained(model, tmp_path / "m", overwrite=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, models))  # raises what they raise
    last = GPT.from_pretrained(tmp_path / "m")
    winner = models[last.cfg.n_layers - 1]
    assert all(torch.equal(p, last.get_parameter(name))
               for name, p in winner.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_a_place_that_cannot_be_written():
    """Run as nobody if we are root, whom modes do not hold."""
    save = ("import os, sys; from minillm.pretrained import save_pretrained;"
            "from minillm.transformer import GPT, GPTConfig;"
            "model = GPT(GPTConfig(50, 24, 32, 1, 4), seed=0);"
            "os.geteuid() or os.seteuid(65534);"
            "[print(name) for name in sys.argv[1:] if not refused(name)]")
    save = ("def refused(name):\n"
            "    try: save_pretrained(model, name, overwrite=True)\n"
            "    except PermissionError: return True\n") + save
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        closed = Path(place) / "closed"
        GPT(OWN[0], seed=0).save_pretrained(closed / "m")
        closed.chmod(0o555)
        try:
            done = subprocess.run(
                [sys.executable, "-c", save, closed / "m", closed / "new"],
                capture_output=True, text=True, timeout=120)
            assert (done.stdout, done.stderr) == ("", "")
            assert [p.name for p in closed.iterdir()] == ["m"]
            assert GPT.from_pretrained(closed / "m").cfg == OWN[0]
        finally:
            closed.chmod(0o755)


def test_a_tokenizer_that_is_not_the_models(tmp_path):
    tokenizer = train_bpe("some text " * 50, 260)
    with pytest.raises(ValueError, match="vocab_size=50"):
        GPT(OWN[0], seed=0).save_pretrained(tmp_path / "m", tokenizer)


def test_the_real_gpt2_where_its_weights_are(tmp_path):
    """Runs where the hub's cache holds them; the suite has no network."""
    hub = pytest.importorskip("huggingface_hub")
    try:
        path = hub.snapshot_download("gpt2", local_files_only=True)
    except Exception:
        pytest.skip("the weights of gpt2 are not in the hub's cache")
    ours = GPT.from_pretrained(path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(path).eval()
    assert ours.cfg == GPTConfig.preset("gpt2")
    assert_equal_models(ours, theirs)
