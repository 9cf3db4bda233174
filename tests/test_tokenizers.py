"""Laws of scripts/train_tokenizers.py: the vocabulary of T5 that mini reads."""

import sys
from pathlib import Path

import pytest
from transformers import T5Tokenizer

from vcloze_jax.config import MINI
from vcloze_jax.data.graph import HELD_OUT_COMPOSITIONS, HELD_OUT_TASKS, NODE_PHRASES, TRAIN
from vcloze_jax.data.graphemoji import open_fill, open_tasks, read_nodes
from vcloze_jax.data.sources import draw_group
from vcloze_jax.inputs import prompts
from vcloze_jax.storage.textreader import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import train_tokenizers  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """T5's, trained and read again as textreader reads it."""
    folder = tmp_path_factory.mktemp("tokenizer_2")
    sentences = train_tokenizers.corpus(
        sorted(set(read_nodes("train")[0])), train_tokenizers.random.Random(0)
    )
    train_tokenizers.train_t5(sentences, MINI.t5.vocab, folder)
    return load_tokenizer(T5Tokenizer, folder, MINI.t5.vocab)


def count(tokenizer, text):
    return len(tokenizer(text, verbose=False)["input_ids"])


def test_sentences_of_training_are_short(tokenizer):
    """No prompt that training draws has more tokens than are read."""
    tasks = open_tasks("", MINI.recipe)
    for source in (tasks, tasks.held_out(), open_fill("", MINI.recipe)):
        for number in range(50):
            for example in draw_group(source, 0, number, 8):
                assert count(tokenizer, example.prompt) <= train_tokenizers.T5_LENGTH, (
                    example.prompt
                )


def test_sentences_of_every_task_are_short(tokenizer):
    """Layout and task in every wording, and the sentence of a name of four tokens, fit."""
    for task in (*TRAIN, *HELD_OUT_TASKS, *HELD_OUT_COMPOSITIONS):
        phrases = [max(NODE_PHRASES[node], key=len) for node in (*task.conditions, task.target)]
        for template in range(10):
            layout = prompts.layout_prompt(3, task.columns, template)
            sentence = prompts.task_prompt(phrases, template)
            content = prompts.CONTENT_PREFIXES[template] + "man in suit"
            prompt = prompts.join(layout, sentence, content)
            assert count(tokenizer, prompt) <= train_tokenizers.T5_LENGTH, prompt


def test_a_piece_may_span_words(tokenizer):
    """A stretch of a template is one token; spaces come back, and no English text is unknown."""
    first, *_ = tokenizer.tokenize(prompts.layout_prompt(2, 2))
    assert first == "▁A␣grid␣layout␣with"
    text = "A fox, “Zoë's”, in the rain: 100% wet!"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
    spelled = "".join(tokenizer.convert_ids_to_tokens(ids[:-1]))
    assert spelled == train_tokenizers.START + text.replace(" ", train_tokenizers.SPACE)
