"""Causal language models: fine-tuning on texts or answers, and evaluation by named protocols.

Papers: HiRA (ICLR 2025), PERA (arXiv 2604.11841) and AuroRA (arXiv 2505.18738) all adapt LLaMA-like models here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torchmetrics import MeanMetric

from pera_lightning.data import batching
from pera_lightning.data.batching import IGNORE, label_positions
from pera_lightning.errors import ConfigurationError
from pera_lightning.injection.inject import injection_of
from pera_lightning.tasks.causal_lm.data import TextDataModule
from pera_lightning.tasks.causal_lm.evaluator import Evaluator
from pera_lightning.tasks.causal_lm.loss import summed_loss
from pera_lightning.tasks.causal_lm.networks import check_causal, check_packing, load_network
from pera_lightning.training.transformers_models import context_length, forward_arguments
from pera_lightning.training.transformers_module import TransformersModule

if TYPE_CHECKING:
    from pera_lightning.tasks.causal_lm.questions import Questions


class CausalLMModule(TransformersModule):
    """Trains adapters of a causal language model of transformers.

    Training and validation batches are dicts of int64 tensors (B, T): ``input_ids``, ``labels`` (-100: no label) and
    maybe ``attention_mask`` and ``position_ids``. The loss of an optimizer step is token-normalised: the sum over its
    labelled tokens, divided by their number over all ranks and accumulated batches. Logged: `train/loss` (of the
    batch), `val/loss`, `val/perplexity`, `val/token_accuracy`. Test batches are `Questions`: they are answered and
    scored by the protocol of the data module, see `Evaluator`.

    Its arguments are those of the two bases, with other defaults of some.
    """

    counted = "step_tokens"
    selection_metric = ("val/loss", "min")

    def __init__(
        self,
        model_name: str,
        lr: float = 1e-4,
        base_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        **shared: Any,
    ) -> None:
        super().__init__(model_name, lr=lr, base_dtype=base_dtype, **shared)
        self._evaluator: Evaluator | None = None

    # --- the network ---

    def build_network(self, weights: bool = True) -> nn.Module:
        return load_network(self.hparams["model_name"], **self.loading(weights))

    def configure_model(self) -> None:
        if self.model is not None:
            return
        super().configure_model()
        self.metrics = nn.ModuleDict({"loss": MeanMetric(), "token_accuracy": MeanMetric()})

    def finish_network(self) -> None:
        # A head that is trained in float32 cannot share its weight with embeddings in low precision.
        mark, head = injection_of(self.model), self.model.get_output_embeddings()
        trained = mark is not None and any(self.model.get_submodule(p) is head for p in mark.trained_modules)
        tied = head is not None and head.weight is self.model.get_input_embeddings().weight
        if trained and tied and self.hparams["base_dtype"] != "float32":
            raise ConfigurationError(
                "the head shares its weight with the embeddings, and trained it is float32: set base_dtype=float32, or "
                "leave the head out of trainable"
            )
        super().finish_network()

    def forward(self, batch: dict[str, Tensor], positions: Tensor | None = None) -> Tensor:
        """Logits (B, K, V) at `positions` (K,) of the sequences, or at all of them."""
        known = forward_arguments(self.model)  # type: ignore[arg-type]
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: batch[name] for name in names if name in batch and name in known}
        options = {"use_cache": False}  # so that packed sequences stay apart
        if positions is not None and "logits_to_keep" in known:
            return self.model(**inputs, **options, logits_to_keep=positions).logits  # type: ignore[misc]
        logits = self.model(**inputs, **options).logits  # type: ignore[misc]
        return logits if positions is None else logits[:, positions]

    # --- training and validation ---

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._check_network()
        if self._data.get("packed"):
            check_packing(self.model)  # type: ignore[arg-type]

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":  # not within a fit
            self._check_network()

    def _check_network(self) -> None:
        check_causal(self.model)  # type: ignore[arg-type]
        if self.trainer.state.fn in ("fit", "validate"):  # a test leaves the ends of longer prompts
            self.check_extremes()

    def _shared_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss, logits (N, V) and targets (N,) of the positions that need logits."""
        # The token at t + 1 is predicted at t; examples end together, so that their labels share few positions.
        positions = label_positions(batch["labels"])  # (K,)
        logits = self(batch, positions).flatten(0, 1)  # (B K, V)
        targets = batch["labels"][:, positions + 1].flatten()  # (B K,)
        return summed_loss(logits, targets), logits, targets

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        summed, _, targets = self._shared_step(batch)
        # Not the mean of the batch: a token counts the same in whichever batch of the step it lies.
        return self.normalised_loss(summed, (targets != IGNORE).sum(), batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        summed, logits, targets = self._shared_step(batch)
        labelled = targets != IGNORE  # (N,)
        count = int(labelled.sum())
        if count:
            right = (logits.argmax(-1) == targets)[labelled].float().mean()  # share of the labelled tokens
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

    def how_to_load(self, folder: Path) -> str:
        return f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"

    # --- test and prediction ---

    def _start(self, kind: str) -> None:
        self._check_network()
        self._evaluator = Evaluator(self, self._data, kind)
        self._evaluator.start()

    def on_test_start(self) -> None:
        self._start("test")

    def test_step(self, batch: Questions, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluator.step(batch)  # type: ignore[union-attr]

    def on_test_epoch_end(self) -> None:
        self._evaluator.finish()  # type: ignore[union-attr]

    def on_predict_start(self) -> None:
        self._start("predict")

    def predict_step(self, batch: Questions, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """The predictions of a batch: id, output, prediction and the rest, as in the files."""
        return self._evaluator.step(batch)  # type: ignore[union-attr]

    def on_predict_end(self) -> None:
        self._evaluator.finish()  # type: ignore[union-attr]

    # --- memory ---

    def example_batch(self, data: Any, answer_length: int | None = None) -> tuple[dict[str, Tensor], str]:
        """Examples as long as the data's limit and the model's context allow, all but the first with a padding token.

        Padding in any example costs an attention mask.

        Args:
            data: data module, for the size of its batches.
            answer_length: labelled tokens at each example's end, where the protocol trains on answers; by default as
                many as it lets the model generate, and all where it generates nothing.
        """
        if not isinstance(data, TextDataModule):
            return super().example_batch(data)
        protocol, size = data.evaluation, data.batch_size
        length = min(data.max_length, context_length(self.model) or data.max_length)  # type: ignore[arg-type]
        start = 0
        if protocol.loss_on == "answer":
            generated = length if protocol.decoding is None else protocol.decoding.max_new_tokens
            start = max(length - (answer_length or generated), 0)
        elif answer_length is not None:
            raise ConfigurationError(
                f"answer_length={answer_length}: protocol {protocol.name} has labels on all tokens"
            )
        # The ids are never read; lengths and labels decide what is computed.
        full, packed = {"input_ids": [0] * length, "start": start}, data.batching == "packed"
        if packed:
            batch = batching.collate_packed([full] * size)
        else:
            short = {"input_ids": [0] * (length - 1), "start": max(start - 1, 0)}
            batch = batching.collate_padded([full, *[short] * (size - 1)], pad_id=0)
        if size == 1:  # nothing to tell apart; transformers would find that out from values
            batch = {name: batch[name] for name in ("input_ids", "labels")}
        # Labels keep their values, which decide where logits are computed.
        batch = {name: value if name == "labels" else value.to("meta") for name, value in batch.items()}
        where = f"on the last {length - start} tokens of each" if start else "on all tokens"
        return batch, f"{size} examples of {length:,} tokens{', packed' if packed else ''}, labels {where}"
