"""Validation, test and prediction of DreamBooth: images of prompts and seeds, written, shown and measured.

A batch is a dict: ``prompt``, a list of text, ``seed`` (B,) int64 and ``name``, a list of file stems. Examples with
seed -1 fill up where processes share a set.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from pera_lightning.adapters.aurora import static_inference
from pera_lightning.errors import ConfigurationError
from pera_lightning.injection.inject import injection_of
from pera_lightning.tasks.dreambooth.generate import ImageGenerator
from pera_lightning.tasks.dreambooth.image_folder import (
    FOLDER,
    GRID,
    GeneratedImage,
    GeneratedImages,
    read_image,
    save_image,
    unlist_images,
    write_images,
)
from pera_lightning.tasks.dreambooth.image_grid import check_shape, labelled_grid, useful_side
from pera_lightning.tasks.dreambooth.prompts import FILLER
from pera_lightning.training import results
from pera_lightning.training.distributed import all_gather_object, merge_shards
from pera_lightning.training.normalised_loss import NormalisedLossModule

if TYPE_CHECKING:
    from PIL import Image

    from pera_lightning.tasks.dreambooth.similarity import Similarity

FOLDERS = {"validate": "validation", "test": "test_images", "predict": FOLDER}
DYNAMIC, STATIC = "", "_static"  # a dynamic AuroRA is tested twice; the ends of its folders' names


class StageImages:
    """The images of a stage in their folder: each is written when it is generated, the list when all are there."""

    def __init__(self, folder: Path, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.made: list[tuple[str, GeneratedImage]] = []  # of this process, in the order of its examples
        self.grid: Image.Image | None = None  # from `finish` on, unless there are too many images
        self._earlier: list[Path] | None = None

    def unlist(self) -> None:
        """Unlists the images of an earlier stage, once; one rank calls it when the first new image is there."""
        if self._earlier is None:
            self._earlier = unlist_images(self.folder) if self.writes else []

    def add(self, name: str, prompt: str, seed: int, image: Image.Image) -> GeneratedImage:
        """Keeps an image."""
        generated = GeneratedImage(f"{name}.png", prompt, seed)
        self.made.append((name, generated))
        if self.writes:
            save_image(image, self.folder / generated.file)
        return generated

    def remove_earlier(self, kept: Sequence[GeneratedImage] = ()) -> None:
        """Deletes the images of an earlier stage that no new one replaced."""
        for path in {*(self._earlier or ())} - {self.folder / one.file for one in kept}:
            path.unlink(missing_ok=True)

    def finish(self, generated: GeneratedImages, title: str = "") -> None:
        """Writes the list of all processes' images and their grid: a row for each prompt, a column for each seed."""
        # Only now may images of an earlier stage go: another rank may have written a new one under the same name.
        self.remove_earlier(generated.images)
        write_images(self.folder, generated)
        files = {(one.prompt, one.seed): self.folder / one.file for one in generated.images}
        prompts, seeds = list(dict.fromkeys(prompt for prompt, _ in files)), sorted({seed for _, seed in files})
        try:
            check_shape(len(prompts), len(seeds))
        except ConfigurationError:  # more than a grid shows: the images alone
            return
        cells = {pair: read_image(file, useful_side(len(files))) for pair, file in files.items()}  # of all processes
        rows = [[cells.get((prompt, seed)) for seed in seeds] for prompt in prompts]
        self.grid = labelled_grid(rows, prompts, [f"seed {seed}" for seed in seeds], title)
        save_image(self.grid, self.folder / GRID)


class ImageStagesModule(NormalisedLossModule):
    """Base of `DreamBoothModule` with its validation, test and prediction; subclasses have what is annotated here."""

    generator: ImageGenerator
    trained_steps: int
    _about_data: Mapping[str, Any] = MappingProxyType({})
    _similarity: Similarity | None = None

    def agree(self) -> None:
        self._about_data = self.data_description()

    # --- hooks of Lightning ---

    def on_validation_epoch_start(self) -> None:
        self._start_images("validate")

    def on_test_start(self) -> None:
        metrics = {name: self.hparams[name] for name in ("dino", "clip")}
        if any(metrics.values()) and not self.trainer.fast_dev_run:
            if "reference_images" not in self._about_data:
                raise ConfigurationError("the data module has no reference_images to compare with: set dino, clip null")
            if self._similarity is None:  # before the images, which take long
                from pera_lightning.tasks.dreambooth.similarity import Similarity

                self._similarity = Similarity(**metrics, device=self.device)
        self._start_images("test")

    def on_predict_start(self) -> None:
        self._start_images("predict")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._generate(batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._generate(batch)
        with static_inference(self) as acts:
            if acts:
                self._generate(batch, STATIC)  # the same prompts and seeds

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Returns ``{"file", "prompt", "seed"}`` of each image."""
        return [asdict(image) for image in self._generate(batch)]  # as dicts, which Lightning walks through

    def on_validation_epoch_end(self) -> None:
        """Shows the grid of the images in the loggers too."""
        self._finish_images(f"step {self.trained_steps}")
        grid = self._images[DYNAMIC].grid
        for logger in self.loggers if grid is not None else ():
            if hasattr(logger, "log_image"):  # W&B
                logger.log_image("val/images", [grid], step=self.trained_steps)
            elif hasattr(logger.experiment, "add_image"):  # TensorBoard
                logger.experiment.add_image("val/images", np.asarray(grid), self.trained_steps, dataformats="HWC")

    def on_predict_end(self) -> None:
        if made := self._finish_images():
            print(f"{len(made)} images and their grid: {self._images[DYNAMIC].folder}", flush=True)

    def on_test_epoch_end(self) -> None:
        """Measures the images against the subject's photographs and their prompts, and writes `results.json`."""
        self.release_vae()
        if self.trainer.fast_dev_run:
            return
        metrics: dict[str, float] = {}  # means, by stage and metric
        each: dict[str, dict[str, dict[str, float]]] = {}  # by stage and file, of all processes
        inference = results.inference_stages(self)
        variants = dict(zip(inference, (DYNAMIC, STATIC), strict=False))  # one or both
        for stage, variant in variants.items():
            # Each process measures its own images; means are over those of all.
            own = self._images[variant]
            scores = self._scores(own)
            measured = [(name, image, score) for (name, image), score in zip(own.made, scores, strict=True)]
            everywhere = merge_shards(all_gather_object(measured))  # in the order of the examples
            each[stage] = {image.file: score for _, image, score in everywhere}
            for metric in everywhere[0][2] if everywhere else ():
                metrics[f"{stage}/{metric}"] = float(np.mean([score[metric] for *_, score in everywhere]))
            if self.trainer.is_global_zero and everywhere:
                own.finish(self._listed([image for _, image, _ in everywhere]))
        if STATIC not in variants.values():
            self._images[STATIC].remove_earlier()  # of an AuroRA that was tested in this place
        self.log_dict(metrics, sync_dist=True)  # every rank has them; without it Lightning warns
        protocol = {
            **results.about(self, "dreambooth"),
            "sampling": self.generator.sampling(),
            **{name: self.hparams[name] for name in ("dino", "clip")},
            "data": self._about_data.get("protocol"),
        }
        facts = {"n": len(each["test"]), "inference": inference, "images": each}
        results.record(self, metrics, protocol=protocol, seconds=time.perf_counter() - self._started, **facts)

    # --- what they share ---

    def release_vae(self) -> int:
        """Frees the VAE unless the next training batches need it; returns its bytes."""
        needed = self.trainer.state.fn == "fit" and not self._about_data.get("cached", False)
        return self.generator.encoders.release(vae=not needed, text=False)

    def _start_images(self, stage: str) -> None:
        trainer = self.trainer
        prompts = self._about_data.get("prompts", {})
        self.generator.embed_beforehand(prompts.get("validation" if stage == "validate" else "test", ()))
        self._acted, self._started = False, time.perf_counter()
        # Once and on every rank: Lightning broadcasts `log_dir`, and a rank may have no image in a step.
        root = Path(trainer.log_dir or trainer.default_root_dir)
        name = FOLDERS[stage] if stage == "validate" else results.output_name(trainer, root, FOLDERS[stage])
        step = f"step_{self.trained_steps:06d}" if stage == "validate" else ""  # so that folders sort by step
        writes = not (trainer.fast_dev_run or trainer.sanity_checking)
        self._images = {end: StageImages(root / f"{name}{end}" / step, writes) for end in (DYNAMIC, STATIC)}

    def _generate(self, batch: Mapping[str, Any], variant: str = DYNAMIC) -> list[GeneratedImage]:
        """Generates the images of a batch and keeps them."""
        examples = list(zip(batch["name"], batch["prompt"], batch["seed"].tolist(), strict=True))
        # Under FSDP2 all processes compute alike, fillers too, since each holds a shard of every layer. And a process
        # with nothing but fillers computes one, since the network has to run where layers are watched.
        if self._acted and not self.generator.is_sharded:
            examples = [example for example in examples if example[2] != FILLER]
        self._acted = True
        if not examples:
            return []
        _, prompts, seeds = zip(*examples, strict=True)  # names are for those that are kept
        images = self.generator.generate(prompts, [max(seed, 0) for seed in seeds])  # a filler has no seed
        if self.trainer.is_global_zero:  # not before there is a new image: a stage that fails leaves the earlier ones
            for one in self._images.values():
                one.unlist()
        kept = [(example, image) for example, image in zip(examples, images, strict=True) if example[2] != FILLER]
        return [self._images[variant].add(*example, image) for example, image in kept]

    def _listed(self, images: Sequence[GeneratedImage]) -> GeneratedImages:
        injection = injection_of(self.model)  # type: ignore[arg-type]
        method = None if injection is None else injection.method.spec()
        name, sampling = self.hparams["model_name"], self.generator.sampling()
        return GeneratedImages(name, method, self.trained_steps, sampling, tuple(images))

    def _finish_images(self, title: str = "") -> list[GeneratedImage]:
        """Lists the images of all processes, on the first, and returns them there."""
        self.release_vae()
        images = self._images[DYNAMIC]
        made = [image for _, image in merge_shards(all_gather_object(images.made))]  # a collective call
        if not made or not images.writes or not self.trainer.is_global_zero:
            return []
        images.finish(self._listed(made), title)
        return made

    def _scores(self, own: StageImages) -> list[dict[str, float]]:
        """Measures how like the subject's photographs, and its prompt, each image of this process is."""
        if not own.made or self._similarity is None:
            return [{} for _ in own.made]
        images = [read_image(own.folder / image.file) for _, image in own.made]
        references = self._about_data["reference_images"]()
        return self._similarity.scores(images, [image.prompt for _, image in own.made], references)["images"]
