"""Adapters and models in other programs' files, against these programs."""

import json

import loralib
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_gpt2 import GPT2Config, GPT2LMModel
from lora_gpt2.errors import UserError
from lora_gpt2.model.keys import is_lora
from lora_gpt2.weights.exchange import peft as peft_files
from lora_gpt2.weights.exchange import reference
from lora_gpt2.weights.exchange import transformers as transformers_files
from lora_gpt2.weights.store import plain_update

SIZES = {"n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
IDS = torch.randint(0, 29, (2, 11), generator=torch.Generator().manual_seed(0))
TARGETS = [
    ["q", "v"],
    ["k"],
    ["q", "k", "v"],
    ["c_attn"],
    ["v", "c_proj", "mlp_c_fc", "mlp_c_proj"],
    ["mlp_c_fc"],
]
VARIANTS = {
    "plain": {},
    "rslora": {"lora_rslora": True},
    "dora": {"lora_dora": True},
    "pissa": {"lora_init": "pissa"},
    "olora+rslora": {"lora_init": "olora", "lora_rslora": True},
    "lora_only": {"lora_bias": "lora_only"},
    "all biases": {"lora_bias": "all"},
    "patterns": {"lora_rank_pattern": {"h.0.*": 3, "h.1.*": 0}, "lora_alpha_pattern": {"h.2.*": 5}},
}


def build(targets, **variant) -> GPT2LMModel:
    """A model with an update that is not zero."""
    torch.manual_seed(1)
    config = GPT2Config(29, n_ctx=32, **SIZES, initializer_range=0.2, lora_attn_dim=2, lora_attn_alpha=7,
                        lora_targets=targets, **variant)  # fmt: skip
    model = GPT2LMModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return out.logits if hasattr(out, "logits") else out[0]


def their_base(model: GPT2LMModel) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(**transformers_files.config_json(model.config, 0))
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.transformer.load_state_dict(
        {k.removeprefix("transformer."): v for k, v in model.weights().items() if not is_lora(k)},
        strict=False,
    )
    return theirs


def our_base(model: GPT2LMModel) -> GPT2LMModel:
    base = GPT2LMModel(GPT2Config(29, n_ctx=32, **SIZES)).eval()
    base.load_weight({k: v for k, v in model.weights().items() if not is_lora(k)})
    return base


def adapted(base: GPT2LMModel, config: GPT2Config, tensors) -> GPT2LMModel:
    model = GPT2LMModel(config).eval()
    model.load_weight({**base.weights(), **tensors})
    return model


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_peft_gives_our_logits_and_what_it_holds_comes_back(tmp_path, targets, variant):
    model = build(targets, **variant)
    peft_files.write(tmp_path, model, "base")
    theirs = PeftModel.from_pretrained(their_base(model), tmp_path).eval()
    assert not torch.allclose(logits(their_base(model)), logits(model), atol=1e-2)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)

    config, tensors = peft_files.read(tmp_path, our_base(model))
    plain, update = plain_update(model)
    assert config.lora_targets == plain.lora_targets
    again = adapted(our_base(model), config, tensors)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    for name, value in plain_update(again)[1].items():
        torch.testing.assert_close(value, update[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["attn.c_proj", "mlp.c_fc"], "use_rslora": True},
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "rank_pattern": {"h.1.attn.c_attn": 5}},
        {"target_modules": ["c_fc"], "alpha_pattern": {"h.0.mlp.c_fc": 3}, "layers_to_transform": [0, 2]},
        {"target_modules": ["c_attn"], "bias": "all"},
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(tmp_path, settings):
    torch.manual_seed(4)
    base = build(["q"])
    peft = get_peft_model(
        their_base(base), LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=True, **settings)
    ).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or (settings.get("bias") and name.endswith("bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    peft.save_pretrained(tmp_path)
    config, tensors = peft_files.read(tmp_path, our_base(base))
    assert config.lora_targets[0] in ("c_attn", "c_proj", "mlp_c_fc")
    ours = adapted(our_base(base), config, tensors)
    torch.testing.assert_close(logits(ours), logits(peft), atol=1e-5, rtol=1e-5)


def loralib_gpt2(model: GPT2LMModel) -> nn.Module:
    """transformers' GPT-2 with loralib's layers in it, as the published scripts build theirs."""
    theirs, config = their_base(model), model.config
    for block in theirs.transformer.h:
        base = block.attn.c_attn
        block.attn.c_attn = loralib.MergedLinear(
            16, 48, r=config.lora_attn_dim, lora_alpha=config.lora_attn_alpha, fan_in_fan_out=True,
            enable_lora=[part in config.lora_targets for part in "qkv"], merge_weights=False,
        )  # fmt: skip
        block.attn.c_attn.load_state_dict(base.state_dict(), strict=False)
    return theirs.eval()


@pytest.mark.parametrize("targets", [["q", "v"], ["k"], ["q", "k", "v"]], ids="+".join)
@pytest.mark.parametrize("everything", [False, True])
def test_the_published_scripts_files_hold_the_same_model(tmp_path, targets, everything):
    model = build(targets)
    reference.write(tmp_path / "a.pt", model, everything)
    held = torch.load(tmp_path / "a.pt", weights_only=True)["model_state_dict"]
    assert len(held) == (6 if not everything else len(model.weights()) + 1)
    theirs = loralib_gpt2(model)
    named = {name.removeprefix("module."): value for name, value in held.items() if "lm_head" not in name}
    assert not theirs.load_state_dict(named, strict=False).unexpected_keys
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    base, tensors = reference.read(tmp_path / "a.pt")
    assert base.keys() == (our_base(model).weights().keys() if everything else set())
    config = reference.adapter_config(tmp_path, tensors, our_base(model).config, 7, 2, targets)
    torch.testing.assert_close(logits(adapted(our_base(model), config, tensors)), logits(model))


def test_a_file_of_loralib_is_read(tmp_path):
    model = build(["q", "v"])
    theirs = loralib_gpt2(model)
    with torch.no_grad():
        for block in theirs.transformer.h:
            block.attn.c_attn.lora_B.normal_()
    torch.save({"model_state_dict": loralib.lora_state_dict(theirs)}, tmp_path / "a.pt")
    tensors = reference.read(tmp_path / "a.pt")[1]
    config = reference.adapter_config(tmp_path, tensors, our_base(model).config, 7, None, None)
    ours = adapted(our_base(model), config, tensors)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, None), "does not say its alpha; give it: --alpha 32"),
        ((7, 3, None), "has rank 2, not 3; use --rank 2"),
        ((7, 2, ["q"]), "adapts 2 of q, k and v and does not say which; name them: --targets q,k"),
    ],
)
def test_what_the_published_file_does_not_say_is_asked_for(tmp_path, arguments, message):
    model = build(["q", "v"])
    reference.write(tmp_path / "a.pt", model)
    tensors = reference.read(tmp_path / "a.pt")[1]
    with pytest.raises(UserError, match=message):
        reference.adapter_config(tmp_path / "a.pt", tensors, our_base(model).config, *arguments)


@pytest.mark.parametrize(
    "variant",
    [{"lora_dora": True}, {"lora_bias": "all"}, {"lora_rank_pattern": {"h.0.*": 3}}, {"bias": False}],
)
def test_what_the_published_scripts_cannot_compute_is_not_written(tmp_path, variant):
    for targets in (["q"], ["c_attn"], ["c_proj"]):
        if variant or targets != ["q"]:
            with pytest.raises(UserError, match="know one rank and alpha on q, k and v alone"):
                reference.write(tmp_path / "a.pt", build(targets, **variant))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_weights_are_the_merged_model(bias):
    model = build(["q", "v", "mlp_c_proj"], lora_dora=True, bias=bias, vocab_multiple=64)
    expected = logits(model)
    model.merge()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**transformers_files.config_json(model.config, 0))
    ).eval()
    missing, unexpected = theirs.load_state_dict(transformers_files.weights(model), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fault", ["no folder", "another kind", "cut short", "foreign layer", "foreign tensor"]
)
def test_a_peft_folder_that_does_not_fit_is_refused(tmp_path, fault):
    model = build(["q", "v"])
    peft_files.write(tmp_path, model, "base")
    weights, base = tmp_path / "adapter_model.safetensors", our_base(model)
    match fault:
        case "no folder":
            (tmp_path / "adapter_config.json").unlink()
            message = "adapter_config.json: there is no such file"
        case "another kind":
            (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
            message = "describes no LoRA adapter"
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-9])
            message = "is not a whole safetensors file"
        case "foreign layer":
            base = GPT2LMModel(GPT2Config(29, n_ctx=32, **{**SIZES, "n_layer": 2}))
            message = "adapts h.2.attn.c_attn, which is no layer"
        case _:
            held = load_file(weights)
            save_file({**held, "base_model.model.lm_head.weight": torch.zeros(2)}, weights)
            message = "holds base_model.model.lm_head.weight, which has no place"
    with pytest.raises(UserError, match=message):
        peft_files.read(tmp_path, base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa has changed the base"),
        ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens, which has no counterpart"),
        ({"modules_to_save": ["wte"]}, "sets modules_to_save"),
        ({"r": 9}, "says rank 9 and alpha"),
        ({"lora_alpha": float("nan")}, "and alpha nan"),
        ({"lora_alpha": "x"}, "lora_alpha that cannot be read"),
        ({"lora_dropout": 2}, "settings that do not fit: lora_dropout must be in"),
        ({"lora_alpha": 10**400}, "lora_alpha that cannot be read"),
        ({"alpha_pattern": {"h.(": 3}}, "lora_alpha that cannot be read"),
        ({"alpha_pattern": {r"(\w|\w\w|[\w.]+)*!": 3}}, r"lora_alpha that cannot be read .* one \(a\|b\)"),
        ({"rank_pattern": {".*.*.*.*.*.*.*.*!": 3}}, r"r that cannot be read .* is more than names"),
    ],
)
def test_what_peft_means_otherwise_is_refused(tmp_path, settings, message):
    model = build(["q"])
    peft_files.write(tmp_path, model, "base")
    path = tmp_path / peft_files.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(UserError, match=message):
        peft_files.read(tmp_path, our_base(model))


@pytest.mark.parametrize("part", ["lora_B.weight", "lora_magnitude_vector"])
def test_a_peft_layer_that_is_not_whole_is_refused(tmp_path, part):
    model = build(["q"], lora_dora=True)
    peft_files.write(tmp_path, model, "base")
    tensors = load_file(tmp_path / peft_files.WEIGHTS_FILE)
    del tensors[f"base_model.model.transformer.h.1.attn.c_attn.{part}"]
    save_file(tensors, tmp_path / peft_files.WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"has no lora_.* of h.1.attn.c_attn"):
        peft_files.read(tmp_path, our_base(model))


@pytest.mark.parametrize(
    "pattern",
    ["1.attn.c_attn", r"^transformer\.h\.1\.attn\.c_attn", r".*\.1\.attn.c_attn$", "h.(1|3).attn.c_attn",
     r"h\.[1-1]\.attn.c_attn"],
)  # fmt: skip
def test_a_pattern_of_peft_fits_whole_names_only(tmp_path, pattern):
    """h.1 is not h.11, and attn.c_proj is not mlp.c_proj."""
    settings = {"r": 2, "lora_alpha": 6, "alpha_pattern": {pattern: 5, "c_pro": 9}}
    peft = get_peft_model(
        their_base(build(["q"])),
        LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **settings),
    )
    peft.save_pretrained(tmp_path)
    config, _ = peft_files.read(tmp_path, our_base(build(["q"])))
    for name, lora in config.lora_layers.items():
        theirs = peft.base_model.model.transformer.get_submodule(name).scaling["default"]
        assert config.scaling(lora) == theirs == (2.5 if name == "h.1.attn.c_attn" else 3)


def test_doras_gradients_are_pefts(tmp_path):
    """The norm is a constant to the gradient, in both."""
    model = build(["c_attn"], lora_dora=True)
    peft_files.write(tmp_path, model, "base")
    theirs = PeftModel.from_pretrained(their_base(model), tmp_path, is_trainable=True).eval()
    model.train_only_lora()
    model(IDS, lm_labels=IDS)[1].backward()
    nn.functional.cross_entropy(theirs(IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    stem = "base_model.model.transformer.h.1.attn.c_attn"
    named = dict(theirs.named_parameters())
    layer = model.transformer.h[1].attn.c_attn
    pairs = {
        "lora_A.default.weight": layer.lora_A,
        "lora_B.default.weight": layer.lora_B,
        "lora_magnitude_vector.default.weight": layer.lora_magnitude,
    }
    for name, own in pairs.items():
        torch.testing.assert_close(own.grad, named[f"{stem}.{name}"].grad, atol=1e-6, rtol=1e-4)
