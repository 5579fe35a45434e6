"""The tree of a search against the search itself."""

import pytest
import torch

from lora_gpt2.decoding.config import DecodingSettings, Dialect, Strategy
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.decoding.tree import Node, decode_with_tree
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel

END, CONTEXT = 12, [1, 2, 3]


@pytest.fixture
def model() -> GPT2LMModel:
    torch.manual_seed(0)
    return GPT2LMModel(GPT2Config(13, 48, 48, 16, 2, 2, initializer_range=0.8)).double().eval()


def path(nodes: list[Node], number: int | None) -> list[Node]:
    found = []
    while number is not None:
        found.append(nodes[number])
        number = nodes[number].parent
    return found[::-1]


@pytest.mark.parametrize(
    "settings",
    [
        DecodingSettings(beam_size=4, n_best=4, eval_len=16),
        DecodingSettings(beam_size=4, n_best=4, eval_len=16, dialect=Dialect.hf),
        DecodingSettings(beam_size=4, n_best=4, eval_len=16, beam_groups=2),
        DecodingSettings(beam_size=4, n_best=4, eval_len=16, strategy=Strategy.sample),
        DecodingSettings(beam_size=1, eval_len=16),
    ],
)
def test_each_output_is_a_path_and_so_is_what_was_given_up(model, settings):
    outputs, nodes = decode_with_tree(model, CONTEXT, settings, [END])
    assert outputs == decode(model, [CONTEXT], settings, [END])[0]
    ends = {node.output: path(nodes, number) for number, node in enumerate(nodes) if node.output is not None}
    for rank, output in enumerate(outputs):
        assert [node.token for node in ends[rank]] == output.tokens
        assert [node.log_prob for node in ends[rank]] == pytest.approx(output.log_probs)
    assert all(node.parent is None or node.parent < number for number, node in enumerate(nodes))
    kept = {id(node) for nodes in ends.values() for node in nodes}
    assert (len(kept) < len(nodes)) == (settings.beam_size > 1 and settings.strategy is Strategy.beam)
    by_depth = [len(path(nodes, number)) for number in range(len(nodes))]
    most = settings.beam_size * (2 if settings.dialect is Dialect.hf else 1)
    assert max(by_depth.count(depth) for depth in set(by_depth)) <= most, "no more than there are beams"


def test_the_log_probabilities_are_the_models(model):
    settings = DecodingSettings(beam_size=3, n_best=3, eval_len=6, no_repeat_ngram_size=0)
    _, nodes = decode_with_tree(model, CONTEXT, settings, [END])
    for number in range(len(nodes)):
        *before, last = path(nodes, number)
        said = [*CONTEXT, *(node.token for node in before)]
        with torch.no_grad():
            log_probs = model(torch.tensor([said]))[0][0, -1].log_softmax(-1)
        assert last.log_prob == pytest.approx(float(log_probs[last.token]), abs=1e-5)


def test_it_gives_up_when_the_time_is_over(model):
    with pytest.raises(TimeoutError):
        decode_with_tree(model, CONTEXT, DecodingSettings(eval_len=16), [END], seconds=0)
