"""Image classification with any timm network; written for frozen ViTs, as in the AuroRA paper."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import ConfusionMatrix, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from pera_lightning.adapters.aurora import static_inference
from pera_lightning.data.batching import IGNORE
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.injection.new_layers import modules_of
from pera_lightning.tasks.image_classification import transforms
from pera_lightning.tasks.image_classification.data import ImageDataModule
from pera_lightning.tasks.image_classification.networks import create
from pera_lightning.training import results
from pera_lightning.training.module import AdapterModule
from pera_lightning.training.precision import DTYPES
from pera_lightning.training.predictions import write_predictions
from pera_lightning.training.training_data import class_names_in
from pera_lightning.validation import check_in_range, check_positive_int


class ImageClassificationModule(AdapterModule):
    """Trains adapters and a new head of an image classifier.

    Batches are ``(images (B, 3, H, W), labels (B,))``, at predict ``(images, labels, ids)``. Images labelled -100,
    which fill up the shards of several processes, are measured nowhere. Logged: `train/loss`, `val/loss`,
    `val/accuracy`, `val/accuracy_top5` (from six classes up), the same at test, with the accuracy of each class as
    `test_class/NAME` and the confusion matrix as an image in TensorBoard. An AuroRA whose inference is dynamic is
    tested twice: `test/accuracy` dynamic (the paper's AuroRA-D), `test_static/accuracy` static (the paper's AuroRA).

    Args:
        model_name: a timm name, ``hf-hub:org/name``, a timm folder, or ``asset:vit_digits``.
        pretrained: loads the weights; otherwise they are random.
        num_classes: number of outputs of the new head; by default the data module's classes.
        image_size: height and width in pixels, by default the model's own.
        label_smoothing: label smoothing of the training loss, in [0, 1).
    """

    asks = ("num_classes", "class_names")
    selection_metric = ("val/accuracy", "max")
    classes_argument = "num_classes"

    def __init__(
        self,
        model_name: str = "vit_base_patch16_224.orig_in21k",
        pretrained: bool = True,
        num_classes: int | None = None,
        image_size: int | None = None,
        label_smoothing: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        check_in_range(label_smoothing, "label_smoothing", ge=0, lt=1)
        for name in ("num_classes", "image_size"):
            if self.hparams[name] is not None:
                check_positive_int(self.hparams[name], name)
        self.class_names: list[str] | None = None  # by label, where the data have them
        self._data_config: dict[str, Any] | None = None
        self._new: set[str] = set()  # names of the parameters that no file gave
        self._started = 0.0
        self._predicted: list[tuple[str, str, float, str]] = []

    # --- the network ---

    def agree(self) -> None:
        """Takes number and names of the classes from the data."""
        data = self.data_description()
        names = class_names_in(data) or self.trained_class_names() or []
        self.class_names = names or None
        self.agree_on("num_classes", data.get("num_classes") or len(names) or None)

    def data_requirements(self) -> dict[str, Any]:
        return {"data_config": self.data_config, "class_names": self.trained_class_names()}

    def build_network(self, weights: bool = True) -> nn.Module:
        network = self._create(pretrained=weights and self.hparams["pretrained"])
        # Always a new head: weights for another task with as many classes must not survive.
        loaded = set(network.parameters())  # kept until the end: the id of a freed head may come again
        network.reset_classifier(self.hparams["num_classes"])
        self._new = {name for name, p in network.named_parameters() if p not in loaded}
        return network.to(DTYPES[self.hparams["base_dtype"]])

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.agree()
        if self.hparams["num_classes"] is None:
            raise ConfigurationError("num_classes is not given, and no data module with num_classes is there: give it")
        super().configure_model()
        count = self.hparams["num_classes"]
        accuracy = {"accuracy": MulticlassAccuracy(count, average="micro")}
        if count > 5:
            accuracy["accuracy_top5"] = MulticlassAccuracy(count, average="micro", top_k=5)
        # Updated one by one, so no compute groups: accuracy and loss take different arguments.
        metrics = MetricCollection({**accuracy, "loss": MeanMetric()}, compute_groups=False)
        per_class = {
            "accuracy_per_class": MulticlassAccuracy(count, average="none"),
            "confusion": ConfusionMatrix(task="multiclass", num_classes=count),
        }
        self.metrics = nn.ModuleDict({"val": metrics.clone(prefix="val/")})
        for stage in ("test", "test_static"):
            self.metrics[stage] = metrics.clone(prefix=f"{stage}/")
            self.metrics[f"{stage}_classes"] = MetricCollection(per_class, compute_groups=False).clone()

    def _create(self, pretrained: bool) -> nn.Module:
        return create(self.hparams["model_name"], pretrained=pretrained, image_size=self.hparams["image_size"])

    @property
    def data_config(self) -> dict[str, Any]:
        """What images the network expects, as timm says it: input_size, mean, std, interpolation, crop_pct."""
        if self._data_config is None:
            import timm

            with torch.device("meta"):  # no weights, no memory
                network = self._create(pretrained=False)
            config = timm.data.resolve_model_data_config(network)
            if self.hparams["image_size"] is not None:
                config["input_size"] = (3, self.hparams["image_size"], self.hparams["image_size"])
            self._data_config = config
        return self._data_config

    def finish_network(self) -> None:
        if self.adapter_injection is None:
            return
        # Distilled networks, and those with an auxiliary loss, have two heads.
        if idle := {n for n in self._new if not self.model.get_parameter(n).requires_grad}:  # type: ignore[union-attr]
            heads = ", ".join(modules_of(self.model, self._new))  # type: ignore[arg-type]
            raise ConfigurationError(
                f"{listed(modules_of(self.model, idle))} of {self.hparams['model_name']} is new and random and would "  # type: ignore[arg-type]
                f"stay so: give trainable=[{heads}]"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, classes)."""
        try:
            return self.model(images.to(DTYPES[self.hparams["base_dtype"]]))  # type: ignore[misc]
        except AssertionError as error:
            if not str(error).startswith("Input "):  # how timm refuses a size
                raise
            size = "x".join(map(str, images.shape[-2:]))
            raise ConfigurationError(f"images of {size} pixels: {error}; set the model's image_size to it") from error

    # --- training and evaluation ---

    def _shared_step(self, batch: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits (B, classes) in float32, labels (B,)."""
        images, labels = batch[0], batch[1]
        logits = self(images).float()  # metrics and loss in float32
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits, labels

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _, labels = self._shared_step(batch, self.hparams["label_smoothing"])  # smoothed in training only
        self.check_loss(loss, batch_idx)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def _update(self, stage: str, batch: Any) -> None:
        loss, logits, labels = self._shared_step(batch)
        known = labels != IGNORE  # others fill up a shard; cross-entropy leaves them out by itself
        if count := int(known.sum()):  # else the loss, a mean over nothing, is not a number
            for name, metric in self.metrics[stage].items(keep_base=True, copy_state=False):
                metric.update(loss, weight=count) if name == "loss" else metric.update(logits[known], labels[known])
            if f"{stage}_classes" in self.metrics:
                self.metrics[f"{stage}_classes"].update(logits[known], labels[known])
        self.log_dict(self.metrics[stage], on_epoch=True, prog_bar=stage == "val", batch_size=len(labels))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._update("val", batch)

    def on_test_start(self) -> None:
        self._started = time.perf_counter()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._update("test", batch)
        # AuroRA infers dynamic or static: a dynamic one is measured both ways, on the same batch.
        with static_inference(self) as dynamic:
            if dynamic:
                self._update("test_static", batch)

    def on_test_epoch_end(self) -> None:
        inference = results.inference_stages(self)  # the same on all ranks, also on one that had padding only
        names = self.class_names or [str(k) for k in range(self.hparams["num_classes"])]
        per_class: dict[str, dict[str, float]] = {}  # by stage and class
        # The confusion matrix counts each image once, so its sum is n.
        for stage in inference:
            values = self.metrics[f"{stage}_classes"].compute()
            per_class[stage] = dict(zip(names, values["accuracy_per_class"].tolist(), strict=True))
            n = int(values["confusion"].sum())  # of all processes
            self._draw(f"{stage}/confusion", values["confusion"], names)
            for logger in self.loggers:
                logger.log_metrics({f"{stage}_class/{k}": v for k, v in per_class[stage].items()}, self.global_step)
            self.metrics[f"{stage}_classes"].reset()  # Lightning resets only what is logged
        seconds = time.perf_counter() - self._started
        scores = {k: v.item() for s in inference for k, v in self.metrics[s].compute().items()}
        protocol = {**results.about(self, "image_classification"), "data": self.data_description().get("protocol")}
        facts = {"n": n, "seconds": seconds, "accuracy_per_class": per_class, "inference": inference}
        results.record(self, scores, protocol=protocol, **facts)

    def _draw(self, title: str, matrix: Tensor, names: list[str]) -> None:
        from lightning.pytorch.loggers import TensorBoardLogger

        from pera_lightning.tasks.image_classification.plotting import confusion_figure

        boards = [lg for lg in self.loggers if isinstance(lg, TensorBoardLogger)]
        if boards and self.trainer.is_global_zero:
            figure = confusion_figure(matrix.cpu(), names, title)
            for board in boards:
                board.experiment.add_figure(title, figure, global_step=self.global_step)

    # --- merging and export ---

    def settle(self, state: Mapping[str, Tensor]) -> None:
        """Takes the number of classes from the trained head if it is not given."""
        if self.hparams["num_classes"] is not None:
            return
        # timm says what the head is called; its rows are the classes.
        with torch.device("meta"):
            heads = self._create(pretrained=False).pretrained_cfg["classifier"]
        head = heads if isinstance(heads, str) else heads[0]  # distilled networks have two
        if f"{head}.weight" not in state:
            raise ConfigurationError(f"without a trained {head} the number of classes is not known: give num_classes")
        self.hparams["num_classes"] = len(state[f"{head}.weight"])

    def outputs_and_loss(self, network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits (B, classes), and their mean loss."""
        loss, logits, _ = self._shared_step(batch)
        return logits, loss

    def write_network(self, folder: Path, data: Any = None, class_names: Sequence[str] | None = None) -> list[str]:
        from pera_lightning.export.timm import as_data_config, write_timm

        # As the images of these data were seen; without data as the network's own were.
        is_ours = isinstance(data, ImageDataModule)
        config = as_data_config(asdict(data.preprocessing())) if is_ours else self.data_config
        return write_timm(self.model, folder, config, class_names)  # type: ignore[arg-type]

    def how_to_load(self, folder: Path) -> str:
        return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"

    # --- prediction ---

    def on_predict_start(self) -> None:
        self._predicted = []

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Label index and probability of each image: ``{"id", "label", "probability"}``."""
        probability, label = self(batch[0]).float().softmax(-1).max(-1)
        prefix = f"{self.global_rank}_" if self.trainer.world_size > 1 else ""
        ids = list(batch[2]) if len(batch) > 2 else [f"{prefix}{batch_idx}_{k}" for k in range(len(label))]
        known = batch[1] if len(batch) > 1 else torch.full_like(label, -1)
        names = ([self._name(k) for k in of.tolist()] for of in (label, known))
        self._predicted += zip(ids, next(names), probability.tolist(), next(names), strict=True)
        return {"id": ids, "label": label, "probability": probability}

    def _name(self, label: int) -> str:
        """The name of a class by its label; nothing for an unknown one."""
        return "" if label < 0 else self.class_names[label] if self.class_names else str(label)

    def on_predict_end(self) -> None:
        write_predictions(self.trainer, {"predictions.csv": self._predicted}, as_csv)

    # --- memory ---

    def example_batch(self, data: Any) -> tuple[tuple[Tensor, Tensor], str]:
        if not isinstance(data, ImageDataModule):
            return super().example_batch(data)
        size = transforms.resolve(data.transform, data.given, self.data_config).size
        images = torch.empty(data.batch_size, 3, *size, device="meta")
        labels = torch.empty(data.batch_size, dtype=torch.int64, device="meta")
        return (images, labels), f"{data.batch_size} images of {size[0]}x{size[1]} pixels"

    def training_loss(self, batch: Any) -> Tensor:
        return self._shared_step(batch, self.hparams["label_smoothing"])[0]


def as_csv(predicted: Sequence[tuple[str, str, float, str]]) -> str:
    """The text of `predictions.csv` for ids, labels, probabilities and known labels."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "label", "probability", "known_label"))
    writer.writerows((name, label, f"{probability:.6f}", known) for name, label, probability, known in predicted)
    return text.getvalue()
