"""What the tests of GLUE's data share: a tokenizer of bytes that makes pairs, small files, a module around it."""

import csv
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pera_lightning.tasks.sequence_classification.data import GLUEDataModule
from tests.tasks.causal_lm.text_helpers import CountingTokenizer, attached

SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
PAD, CLS, SEP = 0, 1, 2


def pair_tokenizer(types=True, pad_type_id=0):
    """A token a byte, [CLS] first and [SEP] behind each text; with token types or without."""
    words = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    tokenizer = CountingTokenizer(tokenizer_object=backend, model_input_names=names, **SPECIAL)
    tokenizer._pad_token_type_id = pad_type_id
    return tokenizer


def pairs(count, **fields):
    """Examples of RTE whose first text says their number; their lengths differ."""
    return [
        {
            "sentence1": f"{k:03d}{'?' * (7 * k % 23)}",
            "sentence2": "!" * (1 + 5 * k % 7),
            "label": k % 2,
            "idx": k,
            **fields,
        }
        for k in range(count)
    ]


def write(path, rows):
    """Writes rows as the file's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def glue(folder, stage="fit", tokenizer=None, trainer=None, task="rte", **options):
    """The data module in a run, set up."""
    where = {} if task in (None, "custom") else {"folder": str(folder)}
    data = GLUEDataModule(task, **{**where, "batch_size": 4, "cache_dir": str(folder / "cache"), **options})
    attached(data, tokenizer or pair_tokenizer(), fn=stage, **(trainer or {}))
    data.setup(stage)
    return data


def numbers(loader):
    """The number in the text of every labelled example, in order."""
    found, tokenizer = [], pair_tokenizer()
    for batch in loader:
        for ids, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            found += [int(text[:3])] if label != -100 else []
    return found
