"""The dialogue protocol: its prompt, the reply in a text, and its metrics against the libraries themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import nltk
import pytest
import sacrebleu
from nltk.translate import meteor_score
from rouge_score.rouge_scorer import RougeScorer

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.protocols import Decoding, protocol
from pera_lightning.tasks.causal_lm.protocols.dialogue import bertscore, meteor, render

SELF_PERSONA = protocol("dialogue", "self_persona")
INSTRUCTION = (
    "Continue the dialogue with one reply that fits your persona.\n"
    "\n"
    "Your persona:\n"
    "- i have two dogs.\n"
    "- i like trains.\n"
    "\n"
    "Dialogue:\n"
    "Partner: hi !\n"
    "You: hello .\n"
    "Partner: any pets ?"
)
REFERENCES = [
    "i have two dogs and they love trains .",
    "no , i never go there at all .",
    "what do you do for a living ?",
]
PREDICTIONS = ["i have two dogs and a cat .", None, "what do you do for fun ?"]


def records(predictions: list[str | None], references: list[str]) -> list[dict[str, object]]:
    return [{"prediction": p, "answer": r} for p, r in zip(predictions, references, strict=True)]


RECORDS = records(PREDICTIONS, REFERENCES)


def test_a_dialogue_as_an_instruction() -> None:
    history = [("hi !", "hello .")]
    assert render(["i have two dogs.", "i like trains."], history, "any pets ?") == INSTRUCTION
    assert render(["i ski."], [], "hi !") == (
        "Continue the dialogue with one reply that fits your persona.\n"
        "\n"
        "Your persona:\n"
        "- i ski.\n"
        "\n"
        "Dialogue:\n"
        "Partner: hi !"
    )


@pytest.mark.parametrize(
    ("persona", "partner", "lacks"), [([], "hi !", "a persona"), (["i ski."], " ", "a last utterance")]
)
def test_a_dialogue_without_persona_or_question(persona: list[str], partner: str, lacks: str) -> None:
    with pytest.raises(DataError, match=f"a dialogue lacks {lacks}"):
        render(persona, [], partner)


def test_the_prompt_and_the_choices() -> None:
    row = Example("1", "convai2", INSTRUCTION, "", "two dogs .", "two dogs .")
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        "\n"
        "### Instruction:\n"
        "Continue the dialogue with one reply that fits your persona.\n"
        "\n"
        "Your persona:\n"
        "- i have two dogs.\n"
        "- i like trains.\n"
        "\n"
        "Dialogue:\n"
        "Partner: hi !\n"
        "You: hello .\n"
        "Partner: any pets ?\n"
        "\n"
        "### Response:\n"
    )
    assert SELF_PERSONA.training_prompt(row) == SELF_PERSONA.evaluation_prompt(row) == expected
    assert SELF_PERSONA.response(row) == "two dogs ."
    assert SELF_PERSONA.options(row) == ()
    assert (SELF_PERSONA.loss_on, SELF_PERSONA.bos, SELF_PERSONA.max_length) == ("answer", "always", 512)
    assert SELF_PERSONA.decoding == Decoding(max_new_tokens=64, num_beams=4, length_penalty=0.9, no_repeat_ngram_size=4)
    assert SELF_PERSONA.main_metric == "bleu"
    assert "Ours" in SELF_PERSONA.origin
    assert not SELF_PERSONA.is_correct("two dogs .", row)


@pytest.mark.parametrize(
    ("text", "found"),
    [(" two dogs . ", "two dogs ."), ("yes .\nPartner: no .", "yes ."), ("\nlate", None), ("  ", None), ("", None)],
)
def test_the_reply_is_the_first_line(text: str, found: str | None) -> None:
    assert SELF_PERSONA.extract(text, Example("1", "convai2", "", "", "", "x")) == found


def test_a_example_without_a_reply() -> None:
    with pytest.raises(DataError, match="example 9 of convai2: its answer is empty"):
        SELF_PERSONA.check(Example("9", "convai2", "hi", "", "", " "))
    SELF_PERSONA.check(Example("9", "convai2", "hi", "", "", "yes"))


def test_bleu_and_rouge_are_those_of_the_libraries() -> None:
    """With the empty text for a reply that was not found."""
    said = ["i have two dogs and a cat .", "", "what do you do for fun ?"]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score(target, text)["rougeL"].fmeasure for target, text in zip(REFERENCES, said, strict=True)]
    summary = SELF_PERSONA.summarise(RECORDS)
    assert summary == {
        "bleu": pytest.approx(sacrebleu.corpus_bleu(said, [REFERENCES]).score),
        "rouge_l": pytest.approx(100 * sum(rouge) / 3),
        "not_found": pytest.approx(1 / 3),
    }
    assert 0 < summary["bleu"] < 100
    assert 0 < summary["rouge_l"] < 100


def test_rouge_by_hand() -> None:
    """Longest common subsequence 3 of 4 and of 6 words: F = 2*3 / (4 + 6). A stemmer would match dog and dogs too."""
    summary = SELF_PERSONA.summarise(records(["i have two dog"], ["i have got two dogs today"]))
    assert summary["rouge_l"] == pytest.approx(60.0)


def test_equal_replies_are_a_hundred(caplog: pytest.LogCaptureFixture) -> None:
    """And nothing is said of tokenised text, in which ConvAI2 is written: sacrebleu warns from 100 lines on."""
    texts = ["i have two dogs .", "no , i never go there ."] * 60
    summary = SELF_PERSONA.summarise(records(list(texts), texts))
    assert summary["bleu"] == pytest.approx(100.0)
    assert summary["rouge_l"] == pytest.approx(100.0)
    assert not caplog.records


def test_no_predictions() -> None:
    with pytest.raises(DataError, match="no predictions to summarise"):
        SELF_PERSONA.summarise([])


def test_meteor_without_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.translate.meteor_score", None)
    with pytest.raises(ConfigurationError, match="METEOR needs nltk and its WordNet files: `pip install nltk`"):
        meteor(RECORDS)


def test_meteor_without_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ConfigurationError, match=r"python -m nltk\.downloader wordnet") as caught:
        meteor(records(["a cat"], ["the dog"]))
    assert "\n" not in str(caught.value)


def test_meteor_is_the_mean_over_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """WordNet is a download, so what stands in for nltk's function shows what it is given."""
    seen = []

    def score(reference: list[str], hypothesis: list[str]) -> float:
        seen.append((reference, hypothesis))
        return 0.5 if hypothesis else 0.0

    monkeypatch.setattr(meteor_score, "single_meteor_score", score)
    assert meteor(records(["a cat .", None], ["the dog", "no"])) == pytest.approx(25.0)
    assert seen == [(["the", "dog"], ["a", "cat", "."]), (["no"], [])]


def test_bertscore_of_a_folder(tmp_path: Path) -> None:
    """A tiny random encoder: equal texts are a hundred, others are not."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "i", "have", "two", "dogs", "cats", "no"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path)
    assert bertscore(records(["i have two dogs"], ["i have two dogs"]), str(tmp_path)) == pytest.approx(100, abs=0.01)
    assert bertscore(records(["no cats"], ["i have two dogs"]), str(tmp_path)) < 99.9


def test_bertscore_without_its_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"BERTScore model .*: there is no such folder") as caught:
        bertscore(RECORDS, str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
