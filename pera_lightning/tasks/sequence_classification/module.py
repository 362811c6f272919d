"""Classification of sentences and pairs with any encoder of transformers; written for GLUE.

Papers: PERA (arXiv 2604.11841) and AuroRA (arXiv 2505.18738) adapt RoBERTa here, query and value, and train the head.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from pera_lightning.adapters.aurora import static_inference
from pera_lightning.data import batching
from pera_lightning.data.batching import IGNORE
from pera_lightning.errors import CheckpointError, ConfigurationError, DataError, listed
from pera_lightning.tasks.sequence_classification.data import GLUEDataModule
from pera_lightning.tasks.sequence_classification.loss import balanced_weights, check_weights, example_losses
from pera_lightning.tasks.sequence_classification.metrics import Scores, decided, default_metrics
from pera_lightning.tasks.sequence_classification.networks import (
    check_trained,
    load_network,
    start_from,
    trained_labels,
)
from pera_lightning.tasks.sequence_classification.submission import submission
from pera_lightning.training import results
from pera_lightning.training.predictions import write_predictions
from pera_lightning.training.transformers_models import context_length, forward_arguments
from pera_lightning.training.transformers_module import TransformersModule
from pera_lightning.validation import check_in_range, check_positive_int

_STARTED = "started_from"


class SequenceClassificationModule(TransformersModule):
    """Trains adapters and a new head of an encoder on sentences, or pairs of them, with a label each.

    Batches are dicts: ``input_ids`` and ``attention_mask`` (B, T), ``token_type_ids`` if the tokenizer makes them,
    ``labels`` (B,), int64 classes or, if `num_labels` is 1, float values to predict; at predict ``ids`` too, a list of
    text. Examples labelled -100, which fill up the shards of several processes, are measured nowhere. The loss is
    cross-entropy, or the squared error of a regression, normalised over the optimizer step: one mean over its examples,
    of all ranks and accumulated batches.

    Logged: `train/loss` (of the batch), `val/loss`, the data module's `metrics` as `val/accuracy`, `val/f1`,
    `val/matthews`, `val/pearson` or `val/spearman`, and `val/metric`, the one that selects; the same at test. Further
    sets of the data, such as MNLI's mismatched one, are `val_mismatched/…`. An AuroRA whose inference is dynamic is
    tested twice: `test/…` dynamic (the paper's AuroRA-D), `test_static/…` static (the paper's AuroRA).

    Args:
        model_name: hub id or folder of an encoder; its head is made anew.
        num_labels: number of classes, 1 for a regression; by default the data module's.
        head_dropout: probability of the dropout before the classifier, by default the model's.
        class_weights: weight of each class in the training loss. "balanced" counts the data's training examples
            (n / (C nₖ), whose mean over them is 1).
        mnli_checkpoint: checkpoint or adapter folder of a run with the same method and base, whose adapters training
            starts from, with a new head; for MRPC, RTE and STS-B, as in LoRA's scripts.
    """

    counted = "step_examples"
    asks = ("num_labels", "class_names", "metrics", "selection", "test_sets", "task", "class_counts", "extremes")
    selection_metric = ("val/metric", "max")
    classes_argument = "num_labels"

    def __init__(
        self,
        model_name: str,
        num_labels: int | None = None,
        head_dropout: float | None = None,
        class_weights: Literal["balanced"] | list[float] | None = None,
        mnli_checkpoint: str | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(model_name, **shared)
        if num_labels is not None:
            check_positive_int(num_labels, "num_labels")
        if head_dropout is not None:
            check_in_range(head_dropout, "head_dropout", ge=0, lt=1)
        check_weights(class_weights, num_labels)
        self.register_buffer("class_weights", None, persistent=False)
        self.scores = nn.ModuleDict()
        self.started_from: dict[str, Any] | None = None  # path and task
        self._random: frozenset[str] = frozenset()
        self._started = 0.0
        self._predicted: dict[int, list[tuple[str, float]]] = {}

    # --- the network ---

    def build_network(self, weights: bool = True) -> nn.Module:
        h = self.hparams
        if h["num_labels"] is None:
            raise ConfigurationError(
                "num_labels is not given, and no data module with num_labels is attached: give it, 1 for a regression"
            )
        options = {"num_labels": h["num_labels"], "head_dropout": h["head_dropout"], **self.loading(weights)}
        network, self._random = load_network(h["model_name"], **options)
        return network

    def agree(self) -> None:
        """Takes the number of labels from the data, and what they are measured and written by."""
        super().agree()
        self.agree_on("num_labels", self._data.get("num_labels"))
        check_weights(self.hparams["class_weights"], self.hparams["num_labels"])

    def finish_network(self) -> None:
        if self.adapter_injection is not None:
            check_trained(self.model, self._random)  # type: ignore[arg-type]
        super().finish_network()

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, num_labels); of a regression its value (B, 1)."""
        config, known = self.model.config.get_text_config(), forward_arguments(self.model)  # type: ignore
        ids, mask = batch["input_ids"], batch["attention_mask"]
        # The model's own padding token: by it decoders find where a text ends, and the tokenizer may fill with another.
        inputs = {"input_ids": ids.masked_fill(mask == 0, config.pad_token_id), "attention_mask": mask}
        # RoBERTa has one type, for the first sentence and the second.
        if "token_type_ids" in batch and "token_type_ids" in known and getattr(config, "type_vocab_size", 2) > 1:
            inputs["token_type_ids"] = batch["token_type_ids"]
        cache = {"use_cache": False} if "use_cache" in known else {}
        return self.model(**inputs, **cache).logits  # type: ignore[misc]

    # --- training ---

    def on_fit_start(self) -> None:
        super().on_fit_start()
        path, weights = self.hparams["mnli_checkpoint"], self.hparams["class_weights"]
        # A checkpoint to go on from comes in its place.
        if path is not None and self.trainer.ckpt_path is None and not Path(path).exists():
            raise CheckpointError(f"mnli_checkpoint={path} does not exist; give a checkpoint or an adapter folder")
        self.check_extremes()
        if weights == "balanced":
            weights = balanced_weights(self._data.get("class_counts"), self._data.get("class_names", ()))
        self.class_weights = None if weights is None else torch.as_tensor(weights).float().to(self.device)

    def on_train_start(self) -> None:
        # Not before, since only now it is known with every strategy whether a checkpoint was loaded, which comes first.
        path = self.hparams["mnli_checkpoint"]
        if path is not None and self.started_from is None and self.trainer.ckpt_path is None:
            task = start_from(self.model, path)  # type: ignore[arg-type]
            if task not in (None, "mnli"):
                rank_zero_warn(f"mnli_checkpoint={path} was trained on {task}, and not on mnli")
            self.started_from = {"path": path, "task": task}

    def _shared_step(self, batch: Mapping[str, Any], weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (B,), 0 without a label, outputs (B, num_labels) in float32, labels (B,)."""
        outputs, labels = self(batch).float(), batch["labels"]
        return example_losses(outputs, labels, weights), outputs, labels

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        losses, _, labels = self._shared_step(batch, self.class_weights)
        return self.normalised_loss(losses.sum(), (labels != IGNORE).sum(), batch_idx)

    # --- validation and test ---

    def _names_of_sets(self, count: int) -> list[str]:
        """What is put behind a stage's name, for so many sets: nothing for the first."""
        names = list(self._data.get("test_sets", ()))  # [""], or MNLI's two
        names += [str(k) for k in range(len(names), count)]
        return ["", *(f"_{name}" for name in names[1:count])]

    def _begin(self, stages: Sequence[str], count: int) -> None:
        """Makes the scores of each stage and set, empty."""
        labels = self.hparams["num_labels"]
        names = self._data.get("metrics") or default_metrics(labels)
        selection = self._data.get("selection") or names[0]
        # Anew for each run: which metrics there are is known from the data, and nothing of an earlier run is left.
        sets = [f"{stage}{name}" for stage in stages for name in self._names_of_sets(count)]
        self.scores = nn.ModuleDict({name: Scores(names, selection, labels) for name in sets}).to(self.device)

    def _update(self, stage: str, batch: Mapping[str, Any], index: int) -> None:
        losses, outputs, labels = self._shared_step(batch)
        name, known = self._names_of_sets(index + 1)[index], labels != IGNORE
        self.scores[f"{stage}{name}"].update(outputs[known], labels[known], losses[known])

    def _computed(self) -> dict[str, Tensor]:
        values = {f"{s}/{k}": v for s, scores in self.scores.items() for k, v in scores.compute().items()}
        # They are of all ranks already; without sync_dist Lightning warns.
        self.log_dict(values, prog_bar=True, sync_dist=True)
        return values

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":  # not within a fit
            self.check_extremes()
        self._begin(["val"], len(self.trainer.num_val_batches))

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._update("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._computed()

    def on_test_start(self) -> None:
        self.check_extremes()
        self._begin(list(results.inference_stages(self)), len(self.trainer.num_test_batches))
        self._started = time.perf_counter()

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._update("test", batch, dataloader_idx)
        # AuroRA infers dynamic or static: a dynamic one is measured both ways, on the same batch.
        with static_inference(self) as dynamic:
            if dynamic:
                self._update("test_static", batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        n = {name: scores.n() for name, scores in self.scores.items()}  # labelled examples, of all processes
        if not all(n.values()):
            none = listed(name for name, count in n.items() if not count)
            raise DataError(f"no example of {none} has a label to test by; predict them")
        values = self._computed()
        seconds = time.perf_counter() - self._started
        protocol = {
            **results.about(self, "sequence_classification"),
            "num_labels": self.hparams["num_labels"],
            "selection": next(iter(self.scores.values())).selection,
            "mnli_checkpoint": self.started_from,
            "data": results.scored(self._data.get("protocol"), self.trained_with),
            "training": self.trained_with,
        }
        facts = {"protocol": protocol, "n": n, "seconds": seconds, "inference": results.inference_stages(self)}
        results.record(self, {name: value.item() for name, value in values.items()}, **facts)

    # --- prediction ---

    def on_predict_start(self) -> None:
        self.check_extremes()
        self._predicted = {k: [] for k in range(len(self.trainer.num_predict_batches))}

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Outputs and what they decide: ``{"ids", "outputs" (B, num_labels), "predictions" (B,)}``."""
        outputs = self(batch).float()
        predictions = decided(outputs)
        # Loaders of somebody else give no ids: then the batch, and the place in it.
        prefix = f"{self.global_rank}_" if self.trainer.world_size > 1 else ""
        ids = batch.get("ids") or [f"{prefix}{batch_idx}_{k}" for k in range(len(outputs))]
        self._predicted[dataloader_idx] += zip(ids, predictions.tolist(), strict=True)
        return {"ids": ids, "outputs": outputs, "predictions": predictions}

    def on_predict_end(self) -> None:
        """Writes a file for each set as GLUE's leaderboard takes it."""
        task = self._data.get("task")
        written = getattr(task, "written", str)  # as a label, or as the name of a class
        names = [*getattr(task, "submission_files", ())]  # of the leaderboard; further sets get names of ours
        names += [f"predictions{name}" for name in self._names_of_sets(len(self._predicted))[len(names) :]]
        files = {f"{name}.tsv": own for name, own in zip(names, self._predicted.values(), strict=False)}
        write_predictions(self.trainer, files, lambda own: submission((name, written(value)) for name, value in own))

    # --- merging and export ---

    def settle(self, state: Mapping[str, Tensor]) -> None:
        """Takes the number of labels from the trained head if it is not given."""
        if self.hparams["num_labels"] is None:
            count = trained_labels(self.hparams["model_name"], self.hparams["revision"], state)
            if count is None:
                raise ConfigurationError("no trained head tells how many labels there are: give num_labels")
            self.hparams["num_labels"] = count

    def outputs_and_loss(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Outputs (N, num_labels) of the labelled examples, and their mean loss."""
        losses, outputs, labels = self._shared_step(batch)
        known = labels != IGNORE
        return outputs[known], losses[known].mean()

    def how_to_load(self, folder: Path) -> str:
        return f"transformers.AutoModelForSequenceClassification.from_pretrained({str(folder)!r})"

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STARTED] = self.started_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.started_from = checkpoint.get(_STARTED)

    # --- memory ---

    def example_batch(self, data: Any) -> tuple[dict[str, Tensor], str]:
        """Examples as long as the data's limit and the model's positions allow, all but the first with padding."""
        if not isinstance(data, GLUEDataModule):
            return super().example_batch(data)
        length = min(data.max_length, context_length(self.model) or data.max_length)  # type: ignore[arg-type]
        # One example of full length; the others have a padding token, which makes the mask needed.
        example = {"input_ids": [0] * length, "label": 0.0 if data.task.regression else 0}
        short = {**example, "input_ids": [0] * (length - 1)}
        batch = batching.collate_classified([example, *[short] * (data.batch_size - 1)], pad_id=0)
        # Labels keep their values, which decide what counts.
        batch = {name: value if name == "labels" else value.to("meta") for name, value in batch.items()}
        return batch, f"{data.batch_size} examples of {length:,} tokens"
