"""GPT-2 against transformers' GPT2LMHeadModel, loss and accuracies against their literal formulas."""

import math

import pytest
import torch
import transformers

from lora_gpt2 import GPT2Config, GPT2LMModel
from lora_gpt2.model.loss import row_accuracy

V, T = 97, 64


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def ours(theirs):
    model = GPT2LMModel(GPT2Config(V, T, T, 32, 3, 4)).eval()
    model.load_weight(theirs.state_dict())
    return model


@pytest.fixture
def ids():
    return torch.randint(0, V, (3, 20), generator=torch.Generator().manual_seed(2))


def test_logits_equal_transformers(ours, theirs, ids):
    assert torch.allclose(ours(ids)[0], theirs(ids).logits, atol=1e-5)


def test_cached_logits_equal_transformers(ours, theirs, ids):
    first, past = ours(ids[:, :9])
    second, _ = ours(ids[:, 9:], past=past)
    assert torch.allclose(torch.cat((first, second), dim=1), theirs(ids).logits, atol=1e-5)


def test_len_past_continues_rows_of_different_lengths(ours, theirs, ids):
    lengths = torch.tensor([4, 9, 7])
    _, past = ours(ids[:, :9])
    table = [torch.cat((layer, torch.zeros(2, 3, 4, 5, 8)), dim=3) for layer in past]
    logits, _ = ours(ids[torch.arange(3), lengths][:, None], past=table, len_past=lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = theirs(ids[row : row + 1, : length + 1]).logits[0, -1]
        assert torch.allclose(logits[row, 0], expected, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.00005, 0.1, 0.5])
def test_loss_and_accuracies_equal_their_literal_formulas(ours, ids, smoothing):
    labels = torch.randint(0, V, ids.shape, generator=torch.Generator().manual_seed(3))
    labels[0, :7] = ours(ids)[0][0, :7].argmax(dim=-1)  # row 0 is right as far as it counts
    labels[1, 2] = ours(ids)[0][1, 2].argmax()  # row 1 starts right
    mask = torch.zeros(ids.shape)
    mask[0, 3:7] = mask[1, 2:9] = mask[2, 5:] = 1
    logits, loss, first, every = ours(
        ids, lm_labels=labels, lm_mask=mask, label_smooth=smoothing, is_report_accuracy=True
    )
    total = weight = 0.0
    for b in range(3):
        for t in range(20):
            values = logits[b, t].tolist()
            log_z = math.log(sum(math.exp(value) for value in values))
            log_p = [value - log_z for value in values]
            nll, uniform = -log_p[labels[b, t]], -sum(log_p) / V
            e = smoothing if smoothing >= 1e-4 else 0.0
            total += mask[b, t].item() * ((1 - e) * nll + e * uniform)
            weight += mask[b, t].item()
    assert loss.item() == pytest.approx(total / (weight + 1e-4), rel=1e-5)
    assert first.tolist() == [1, 1, 0]
    assert every.tolist() == [1, 0, 0]
    counts = mask.bool()
    assert ours.completion_loss(ids, labels, counts, smoothing).item() == pytest.approx(loss.item(), rel=1e-5)
    report = ours.completion_report(ids, labels, counts)
    plain = ours(ids, lm_labels=labels, lm_mask=mask)[1] * (weight + 1e-4)
    assert report.loss_sum.item() == pytest.approx(plain.item(), rel=1e-5)
    assert report.accuracy.first.tolist() == [1, 1, 0]
    assert report.accuracy.all.tolist() == [1, 0, 0]
    assert report.tokens == 26
    assert report.hit_sum == ((logits.argmax(-1) == labels) * mask).sum()


def test_the_first_token_of_a_completion_alone_counts_as_first():
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    hits = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    accuracy = row_accuracy(hits, mask)
    assert accuracy.first.tolist() == [1, 0, 1, 0]
    assert accuracy.all.tolist() == [0, 0, 1, 1]


def test_an_input_beyond_n_ctx_is_refused(ours):
    with pytest.raises(ValueError, match="65 tokens are more than n_ctx 64"):
        ours(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.transformer.", "_orig_mod.transformer."])
def test_published_key_forms_load(theirs, ids, prefix):
    model = GPT2LMModel(GPT2Config(V, T, T, 32, 3, 4, lora_attn_dim=2)).eval()
    bare = theirs.transformer.state_dict()
    endings = {"weight": "g" if prefix else "weight", "bias": "b" if prefix else "bias"}
    renamed = {}
    for key, value in bare.items():
        stem, _, ending = key.rpartition(".")
        renamed[f"{prefix}{stem}.{endings[ending]}" if "ln_" in key else prefix + key] = value
    model.load_weight({"model_state_dict": renamed})
    assert torch.allclose(model(ids)[0], theirs(ids).logits, atol=1e-5)


def test_a_state_dict_that_does_not_fit_is_listed_and_nothing_is_loaded(ours, theirs):
    before = {name: value.clone() for name, value in ours.weights().items()}
    wrong = theirs.state_dict()
    del wrong["transformer.ln_f.bias"]
    wrong["transformer.h.0.attn.c_attn.weight"] = torch.zeros(3, 3)
    wrong["transformer.h.7.ln_1.weight"] = torch.zeros(32)
    with pytest.raises(ValueError, match=r"1 missing \(transformer.ln_f.bias\); 1 unexpected .* 1 misshapen"):
        ours.load_weight(wrong)
    assert all(torch.equal(before[name], value) for name, value in ours.weights().items())


def test_one_seed_gives_one_base_whatever_the_rank():
    bases = []
    for rank in (0, 4, 8):
        torch.manual_seed(5)
        bases.append(GPT2LMModel(GPT2Config(V, T, T, 32, 2, 4, lora_attn_dim=rank)))
    names = bases[0].weights()
    assert all(torch.equal(names[n], model.weights()[n]) for model in bases for n in names)


def test_fresh_weights_are_normal_and_smaller_where_they_feed_the_residual_stream():
    torch.manual_seed(0)
    weights = GPT2LMModel(GPT2Config(V, T, T, 64, 8, 4)).weights()
    for name, std in {
        "attn.c_attn": 0.02,
        "mlp.c_fc": 0.02,
        "attn.c_proj": 0.005,
        "mlp.c_proj": 0.005,
    }.items():
        drawn = torch.stack([weights[f"transformer.h.{i}.{name}.weight"] for i in range(8)])
        assert drawn.std().item() == pytest.approx(std, rel=0.02)
        assert drawn.mean().item() == pytest.approx(0, abs=std / 50)


@pytest.mark.parametrize(
    ("card", "count"), [((768, 12, 12), 147_456), ((1024, 24, 16), 393_216), ((1280, 36, 20), 737_280)]
)
def test_trainable_parameters_equal_the_papers(card, count):
    width, layers, heads = card
    with torch.device("meta"):
        model = GPT2LMModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads, lora_attn_dim=4))
    model.train_only_lora()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_dropout_changes_training_and_not_evaluation(ids):
    plain = GPT2LMModel(GPT2Config(V, T, T, 32, 2, 4))
    dropped = GPT2LMModel(GPT2Config(V, T, T, 32, 2, 4, fix_dropout=0.3))
    dropped.load_weight(plain.weights())
    assert torch.equal(plain.eval()(ids)[0], dropped.eval()(ids)[0])
    assert not torch.allclose(plain.train()(ids)[0], dropped.train()(ids)[0])
