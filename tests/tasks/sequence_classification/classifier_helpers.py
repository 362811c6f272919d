"""Folders with very small encoders, sentences of random tokens with a label each, and short runs."""

from types import SimpleNamespace

import torch
import transformers
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from pera_lightning import AdapterInjection
from pera_lightning.adapters import LoRA
from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.tasks.sequence_classification.module import SequenceClassificationModule

VOCABULARY, LONGEST = 40, 24
QV = ["query", "value"]

# Of each kind the class that is saved, what of its size is called otherwise, targets and head.
KINDS = {
    "bert": ("BertModel", {}, QV, ["classifier"]),
    "roberta": ("RobertaForMaskedLM", {"type_vocab_size": 1, "pad_token_id": 1}, QV, ["classifier"]),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        ["q_lin", "v_lin"],
        ["pre_classifier", "classifier"],
    ),
    "electra": ("ElectraForPreTraining", {"embedding_size": 16}, QV, ["classifier"]),
    "debertav2": (
        "DebertaV2Model",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
        ["query_proj", "value_proj"],
        ["pooler", "classifier"],
    ),
    "albert": ("AlbertModel", {"embedding_size": 16}, QV, ["classifier"]),
    "modernbert": (
        "ModernBertForMaskedLM",
        {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        ["Wqkv"],
        ["classifier"],
    ),
    "llama": ("LlamaForCausalLM", {"pad_token_id": 0, "num_key_value_heads": 2}, ["q_proj", "v_proj"], ["score"]),
}


def save_tiny(folder, kind="bert", *, seed=0, saved=None, **options):
    """Saves a model of 2 blocks and width 16, as its own class or as `saved`; returns the folder as text."""
    torch.manual_seed(seed)
    name, own, _, _ = KINDS[kind]
    shape = {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST + (kind == "roberta") * 2}
    usual = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "distilbert":
        usual = {}
    # Large weights: a freshly initialised model is nearly indifferent, and mistakes would not show.
    shape = {**shape, **usual, "initializer_range": 0.3, **own, **options}
    cls = getattr(transformers, saved or name)
    cls(cls.config_class(**shape)).save_pretrained(folder)
    return str(folder)


def sentences(count, classes=2, seed=0, longest=12, types=False):
    """Examples of 3 to `longest` random tokens; labels are classes, or floats of 0 to 5 where `classes` is 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for k in range(count):
        length = int(torch.randint(3, longest + 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        label = torch.rand((), generator=generator).item() * 5 if classes == 1 else k * 7 // 3 % classes
        rows.append({"input_ids": ids, "label": label, "id": str(k)})
        if types:
            rows[-1]["token_type_ids"] = [0] * 2 + [1] * (length - 2)
    return rows


def collate(rows, pad_id=0):
    """Padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values, fill):
        return torch.tensor([[*own, *[fill] * (longest - len(own))] for own in values])

    batch = {
        "input_ids": padded([row["input_ids"] for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": torch.tensor([row["label"] for row in rows]),
        "ids": [row["id"] for row in rows],
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0)
    return batch


def without_label(row):
    return {**row, "label": type(row["label"])(-100)}


class Sentences(LightningDataModule):
    """A data module as the module takes them; `sets` are lists of examples, for validation, test and predict alike."""

    def __init__(
        self, sets, train=None, *, classes=2, metrics=None, batch_size=4, names=("",), task=None, shuffle=False
    ):
        super().__init__()
        self.sets, self.train = sets, train or sets[0]
        self.num_labels, self.batch_size, self.shuffle = classes, batch_size, shuffle
        self.test_sets = list(names)
        self.task = task
        self.class_names = [f"class {chr(97 + k)}" for k in range(classes)] if classes > 1 else []
        if metrics:
            self.metrics, self.selection = metrics, metrics[0]

    def protocol(self):
        return {"name": "of the tests", "sizes": [len(rows) for rows in self.sets]}

    @property
    def class_counts(self):
        labels = [row["label"] for row in self.train]
        return None if self.num_labels == 1 else [labels.count(k) for k in range(self.num_labels)]

    @property
    def extremes(self):
        rows = [row["input_ids"] for part in (*self.sets, self.train) for row in part]
        return max(map(len, rows)), max(map(max, rows))

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=self.shuffle, collate_fn=collate)

    def _evaluated(self):
        return [
            DataLoader(
                **padded_shard(rows, self.trainer, without_label), batch_size=self.batch_size, collate_fn=collate
            )
            for rows in self.sets
        ]

    val_dataloader = test_dataloader = predict_dataloader = _evaluated


def module(folder, **options):
    return SequenceClassificationModule(**{"model_name": str(folder), "lr": 0.01, **options})


def make_trainer(folder, method=None, callbacks=(), targets=QV, trainable=("classifier",), **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "default_root_dir": folder}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    first = AdapterInjection(method or LoRA(rank=2), list(targets), list(trainable))
    options = {"devices": 1, **defaults, **quiet, **options}
    return Trainer(accelerator="cpu", callbacks=[first, *callbacks], **options)


def fit(folder, network, data, *, seed=0, ckpt=None, **options):
    """Fits and returns the trainer."""
    seed_everything(seed, verbose=False)
    trainer = make_trainer(folder, **options)
    trainer.fit(network, datamodule=data, ckpt_path=ckpt)
    return trainer


def fitted(folder, path, data, method=None, **options):
    """A module after a fit of its own, and the checkpoint."""
    keeper = ModelCheckpoint(folder, filename="end")
    network = module(path, **options)
    fit(folder, network, data, method=method, callbacks=[keeper], enable_checkpointing=True)
    return network, folder / "end.ckpt"


def csv_logger(folder):
    return CSVLogger(folder, name="", version="")


def built(folder, method=None, targets=QV, trainable=("classifier",), random=True, **options):
    """A module with its network, in eval mode; `random`: with random adapters and head."""
    network = module(folder, **{"num_labels": 2, **options})
    network.adapter_injection = AdapterInjection(method or LoRA(rank=2), list(targets), list(trainable)).injector()
    network.configure_model()
    if random:
        randomise(network)
    return network.eval()


def randomise(network, std=0.3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(network.named_parameters()):
        if parameter.requires_grad:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)


def trained(network):
    return {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}


@torch.no_grad()
def outputs(network, rows):
    """Example after example, without any padding, (N, C) in float64."""
    network.eval()
    return torch.cat([network(collate([row])) for row in rows]).double()


def task_of(name="rte", files=("RTE",), written=None):
    """What a task says of a submission."""
    return SimpleNamespace(name=name, submission_files=files, written=written or str)
