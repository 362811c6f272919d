"""Persona dialogue (ConvAI2, self persona): the next utterance, compared with the one that a person wrote.

All metrics are percentages, 0 to 100. BLEU and ROUGE-L need nothing but their libraries; METEOR and BERTScore need
data or a model that have to be fetched once, and are functions of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.pretrained import NO_CUSTOM_CODE, load_tokenizer, loading
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.protocols import prompts
from pera_lightning.tasks.causal_lm.protocols.base import Decoding, Protocol, register


def render(persona: Sequence[str], history: Sequence[tuple[str, str]], partner: str) -> str:
    """Writes a dialogue as an instruction. The wording is ours: neither HiRA nor PERA states theirs.

    Args:
        persona: sentences that describe the speaker.
        history: earlier turns, oldest first, each (what the partner said, what the speaker answered).
        partner: what the partner said last.

    Raises:
        DataError: without a persona, or with nothing to answer.
    """
    if not persona or not partner.strip():
        what = "a last utterance of the partner" if persona else "a persona"
        raise DataError(f"a dialogue lacks {what}; give both, or leave the dialogue out")
    lines = ["Continue the dialogue with one reply that fits your persona.", "", "Your persona:"]
    lines += [f"- {sentence}" for sentence in persona]
    lines += ["", "Dialogue:"]
    for theirs, ours in history:
        lines += [f"Partner: {theirs}", f"You: {ours}"]
    return "\n".join([*lines, f"Partner: {partner}"])


def extract(text: str, example: Example) -> str | None:
    """The first line of a generated text, or None if it is empty."""
    return text.partition("\n")[0].strip() or None


def never(prediction: str | None, example: Example) -> bool:
    """False: no reply is the right one; a dialogue is measured by its metrics."""
    return False


def check_example(example: Example) -> None:
    """Raises `DataError` if there is no reply to compare with."""
    if not example.answer.strip():
        raise DataError(
            f"example {example.id} of {example.set}: its answer is empty; give the reply that the model should make"
        )


def _texts(predictions: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Replies, the empty text for one that was not found, and what they should be."""
    if not predictions:
        raise DataError("there are no predictions to summarise: the test set is empty")
    return [one["prediction"] or "" for one in predictions], [one["answer"] for one in predictions]


def bleu_and_rouge(predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Corpus BLEU of sacrebleu and the mean ROUGE-L F of rouge_score (no stemming), both 0 to 100.

    Args:
        predictions: those of one set; one not found counts as an empty reply.

    Returns:
        ``bleu``, ``rouge_l`` and ``not_found`` (share of the examples, 0 to 1).
    """
    # Here, since naming a protocol must not cost the import of these libraries.
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    replies, references = _texts(predictions)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, replies, strict=True)]
    return {
        # ConvAI2 is written tokenised, of which sacrebleu warns unless forced; the score is the same.
        "bleu": sacrebleu.corpus_bleu(replies, [references], force=True).score,
        "rouge_l": 100 * sum(rouge) / len(rouge),
        "not_found": sum(one["prediction"] is None for one in predictions) / len(predictions),
    }


def meteor(predictions: Sequence[Mapping[str, Any]]) -> float:
    """Mean METEOR of nltk, 0 to 100; words are split at spaces, as ConvAI2 is written.

    Raises:
        ConfigurationError: if nltk or its WordNet files are missing.
    """
    replies, references = _texts(predictions)
    try:
        from nltk.translate.meteor_score import single_meteor_score

        scores = [single_meteor_score(r.split(), p.split()) for r, p in zip(references, replies, strict=True)]
    except (ImportError, LookupError):
        raise ConfigurationError(
            "METEOR needs nltk and its WordNet files: `pip install nltk`, then `python -m nltk.downloader wordnet`, or "
            "set NLTK_DATA to a folder that has corpora/wordnet"
        ) from None
    return 100 * sum(scores) / len(scores)


def bertscore(predictions: Sequence[Mapping[str, Any]], model: str) -> float:
    """Mean BERTScore F1 of torchmetrics from a model's last layer, without rescaling, 0 to 100.

    Args:
        predictions: those of one set.
        model: folder or hub id of an encoder with its tokenizer, such as ``"roberta-large"``.

    Raises:
        ConfigurationError: if the model cannot be loaded.
    """
    from torchmetrics.functional.text.bert import bert_score
    from transformers import AutoConfig

    with loading(model, "BERTScore model"):
        # First without a question: torchmetrics leaves it to transformers' default, which asks to run custom code.
        AutoConfig.from_pretrained(model, **NO_CUSTOM_CODE)
        load_tokenizer(model)
        scores = bert_score(*_texts(predictions), model_name_or_path=model)
    return 100 * float(scores["f1"].mean())


def summary(
    predictions: Sequence[Mapping[str, Any]], *, with_meteor: bool = False, bertscore_model: str | None = None
) -> dict[str, float]:
    """`bleu_and_rouge`, and on request `meteor` and `bertscore`, which need files of their own."""
    measured = bleu_and_rouge(predictions)
    if with_meteor:
        measured["meteor"] = meteor(predictions)
    if bertscore_model is not None:
        measured["bertscore"] = bertscore(predictions, bertscore_model)
    return measured


SELF_PERSONA = register(
    Protocol(
        name="self_persona",
        task="dialogue",
        origin=(
            "HiRA's template, with BOS and EOS, and loss on the answer; 4 beams, length penalty 0.9 and no repeated "
            "4-gram, as in its script; sacreBLEU and ROUGE-L. Ours, not in the paper: how persona and turns are "
            "written, 512 tokens an example, at most 64 new tokens, the first line as the reply."
        ),
        **prompts.HIRA_FORM,
        decoding=Decoding(max_new_tokens=64, num_beams=4, length_penalty=0.9, no_repeat_ngram_size=4),
        extract=extract,
        is_correct=never,
        check=check_example,
        summarise=summary,
        main_metric="bleu",
    )
)
