"""Causal language models: fine-tuning on texts or answers, and evaluation by named protocols.

Papers: HiRA (ICLR 2025), PERA (arXiv 2604.11841) and AuroRA (arXiv 2505.18738) all adapt LLaMA-like models here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torchmetrics import MeanMetric

from pera_lightning.data.batching import IGNORE, label_positions
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.injection.inject import injection_of
from pera_lightning.pretrained import load_tokenizer
from pera_lightning.tasks.causal_lm.evaluator import Answering
from pera_lightning.tasks.causal_lm.loss import summed_loss
from pera_lightning.tasks.causal_lm.networks import check_causal, check_packing, load_network
from pera_lightning.training.module import DTYPES, release_heads
from pera_lightning.training.normalised_loss import StepMeanModule
from pera_lightning.training.transformers_models import check_extremes, forward_arguments, recompute_activations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pera_lightning.tasks.causal_lm.questions import Questions


class CausalLMModule(StepMeanModule):
    """Trains adapters of a causal language model of transformers.

    Training and validation batches are dicts of int64 tensors (B, T): ``input_ids``, ``labels`` (-100: no label) and,
    where there are any, ``attention_mask`` and ``position_ids``. The loss of an optimizer step is the sum over its
    labelled tokens, divided by their number over all ranks and accumulated batches. Logged: `train/loss` (of the
    batch), `val/loss`, `val/perplexity`, `val/token_accuracy`. Test batches are `Questions`: they are answered and
    scored by the protocol of the data module, see `Answering`.

    Args:
        model_name: hub id or folder.
        attn_implementation: "sdpa", "eager", "flash_attention_2" …; by default transformers' choice.
        activation_checkpointing: computes the activations of each block again in the backward instead of keeping them.
        compile: compiles the network, after the injection.
        revision: branch, tag or commit of the hub's repository.
    """

    counted = "step_tokens"

    def __init__(
        self,
        model_name: str,
        lr: float = 1e-4,
        base_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        attn_implementation: str | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        revision: str | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(lr=lr, base_dtype=base_dtype, **shared)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._answering = Answering(self)

    # --- the network ---

    def build_network(self, weights: bool = True) -> nn.Module:
        h = self.hparams
        return load_network(
            h["model_name"],
            dtype=DTYPES[h["base_dtype"]],
            attn_implementation=h["attn_implementation"],
            revision=h["revision"],
            weights=weights,
        )

    def configure_model(self) -> None:
        if self.model is not None:
            return
        super().configure_model()
        self.metrics = nn.ModuleDict({"loss": MeanMetric(), "token_accuracy": MeanMetric()})

    def finish_network(self) -> None:
        self._check_tied_head()
        if self.hparams["activation_checkpointing"]:
            recompute_activations(self.model)  # type: ignore[arg-type]
        if self.hparams["compile"]:
            self.model.compile()

    def _check_tied_head(self) -> None:
        """A head that is trained in float32 cannot share its weight with embeddings in low precision."""
        mark, head = injection_of(self.model), self.model.get_output_embeddings()
        trained = mark is not None and any(self.model.get_submodule(p) is head for p in mark.trained_modules)
        tied = head is not None and head.weight is self.model.get_input_embeddings().weight
        if trained and tied and self.hparams["base_dtype"] != "float32":
            raise ConfigurationError(
                "the head shares its weight with the embeddings, and trained it is float32: set base_dtype=float32, or "
                "leave the head out of trainable"
            )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, for the data module."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.hparams["model_name"], self.hparams["revision"])
        return self._tokenizer

    def forward(self, batch: dict[str, Tensor], positions: Tensor | None = None) -> Tensor:
        """Logits (B, K, V) at `positions` (K,) of the sequences, or at all of them.

        Args:
            batch: without cache, so that packed sequences stay apart.
            positions: where logits are wanted.
        """
        known = forward_arguments(self.model)  # type: ignore[arg-type]
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: batch[name] for name in names if name in batch and name in known}
        if positions is not None and "logits_to_keep" in known:
            return self.model(**inputs, logits_to_keep=positions, use_cache=False).logits  # type: ignore[misc]
        logits = self.model(**inputs, use_cache=False).logits  # type: ignore[misc]
        return logits if positions is None else logits[:, positions]

    # --- training and validation ---

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        self.trained_with = data.protocol() if hasattr(data, "protocol") else None
        self._check_network()
        if getattr(data, "batching", None) == "packed":
            check_packing(self.model)  # type: ignore[arg-type]

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":  # not within a fit
            self._check_network()

    def _check_network(self) -> None:
        check_causal(self.model)  # type: ignore[arg-type]
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "extremes") and self.trainer.state.fn in ("fit", "validate"):
            check_extremes(self.model, *data.extremes())  # type: ignore[arg-type]

    def _shared_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss, logits (N, V) and targets (N,) of the positions that need logits."""
        positions = label_positions(batch["labels"])  # (K,)
        logits = self(batch, positions).flatten(0, 1)  # (B K, V)
        targets = batch["labels"][:, positions + 1].flatten()  # (B K,)
        return summed_loss(logits, targets), logits, targets

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        summed, _, targets = self._shared_step(batch)
        return self.step_loss(summed, (targets != IGNORE).sum(), batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        summed, logits, targets = self._shared_step(batch)
        labelled = targets != IGNORE
        count = int(labelled.sum())
        if count:
            right = (logits.argmax(-1) == targets)[labelled].float().mean()
            self.metrics["loss"].update(summed / count, weight=count)
            self.metrics["token_accuracy"].update(right, weight=count)

    def on_validation_epoch_end(self) -> None:
        loss, accuracy = (self.metrics[name].compute() for name in ("loss", "token_accuracy"))
        for metric in self.metrics.values():
            metric.reset()
        values = {"val/loss": loss, "val/perplexity": loss.exp(), "val/token_accuracy": accuracy}
        # The metrics are of all ranks already; without sync_dist Lightning warns.
        self.log_dict(values, prog_bar=True, sync_dist=True)

    # --- merging and export ---

    def outputs_and_loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (N, V) of the labelled tokens, and their mean loss."""
        summed, logits, targets = self._shared_step(batch)
        labelled = targets != IGNORE
        return logits[labelled], summed / labelled.sum()

    def write_network(self, folder: Path, data: Any = None, class_names: Sequence[str] | None = None) -> list[str]:
        from pera_lightning.export.transformers import write_transformers

        notes = []
        if heads := release_heads(self.model, DTYPES[self.hparams["base_dtype"]]):  # type: ignore[arg-type]
            notes.append(f"{listed(heads)} was trained in float32 and is {self.hparams['base_dtype']}, as the base is")
        name = getattr(data, "tokenizer_name", None)
        try:
            tokenizer = self.tokenizer if name is None else load_tokenizer(name)
        except ConfigurationError as error:
            tokenizer = None
            notes.append(f"no tokenizer was written: {error}")
        return notes + write_transformers(self.model, folder, tokenizer)  # type: ignore[arg-type]

    def how_to_load(self, folder: Path) -> str:
        return f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"

    # --- test and prediction ---

    def answered(self) -> frozenset[str]:
        """Ids of the test rows that an interrupted evaluation has answers for; called by the data module."""
        return self._answering.answered()

    def on_test_start(self) -> None:
        self._check_network()
        self._answering.start("test")

    def test_step(self, batch: Questions, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._answering.step(batch)

    def on_test_epoch_end(self) -> None:
        self._answering.finish()

    def on_predict_start(self) -> None:
        self._check_network()
        self._answering.start("predict")

    def predict_step(self, batch: Questions, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """The records of a batch: id, output, prediction and the rest, as in the files."""
        return self._answering.step(batch)

    def on_predict_end(self) -> None:
        self._answering.finish()
