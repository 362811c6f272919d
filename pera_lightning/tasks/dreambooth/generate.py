"""The images that a DreamBooth module makes: of validation, test and prediction, and of the class.

A batch is a dict: ``prompt``, a list of text, ``seed`` (B,) int64 and ``name``, a list of file stems. Rows with seed -1
fill up where processes share a set. An image depends on its prompt, its seed and the network, not on the batch or the
number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pera_lightning.adapters.aurora import static_inference
from pera_lightning.data.distributed_sampler import merge_shards
from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.injection.inject import injection_of
from pera_lightning.tasks.dreambooth.image_grid import (
    FOLDER,
    GRID,
    MOST_PIXELS,
    GeneratedImage,
    GeneratedImages,
    check_shape,
    labelled_grid,
    read_picture,
    save_images,
    save_picture,
    to_pictures,
    unlist_images,
    write_images,
)
from pera_lightning.tasks.dreambooth.latent_cache import together
from pera_lightning.tasks.dreambooth.pipeline_files import FACTOR
from pera_lightning.tasks.dreambooth.prompts import FILLER
from pera_lightning.tasks.dreambooth.sampling import sample, sampler
from pera_lightning.training import results
from pera_lightning.training.distributed import all_gather_object
from pera_lightning.training.fsdp2 import data_parallel_mesh

if TYPE_CHECKING:
    from PIL import Image

    from pera_lightning.tasks.dreambooth.module import DreamBoothModule

FOLDERS = {"validate": "validation", "test": "test_images", "predict": FOLDER}
_STATIC = "_static"  # of a dynamic AuroRA, which is tested twice


class Pictures:
    """Makes images with a module's network as it is, and writes them into the run's folder.

    Args:
        module: whose settings say how images are sampled.
    """

    def __init__(self, module: DreamBoothModule) -> None:
        self.module = module
        self._similarity: Any = None
        self._begin("validate")

    def _begin(self, stage: str) -> None:
        self._stage = stage
        self._acted = False
        self._root = Path()
        self._started = time.perf_counter()
        # By variant: images of an earlier one in its place, from when the first new one is made.
        self._earlier: dict[str, list[Path]] = {}
        # By variant, in the order they were made: name, what it is, and at validation the picture.
        self._made: dict[str, list[tuple[str, GeneratedImage, Image.Image | None]]] = {}

    def start(self, stage: str) -> None:
        """Begins a stage, "validate", "test" or "predict", whose images replace those of an earlier one.

        Raises:
            ConfigurationError: where it could not be finished.
        """
        self._begin(stage)
        self.check()
        trainer, chosen = self.module.trainer, self._metrics()
        measured = stage == "test" and any(chosen.values()) and not trainer.fast_dev_run
        if measured and not hasattr(self.module.data, "reference_images"):
            raise ConfigurationError("the data module has no reference_images to compare with: set dino and clip null")
        if measured and self._similarity is None:  # before the images, which take long
            from pera_lightning.tasks.dreambooth.similarity import Similarity

            self._similarity = Similarity(**chosen, device=self.module.device)
        self.module.know_prompts("validation" if stage == "validate" else "test")
        # Once and on every rank: Lightning broadcasts it, and a rank may have no image in a step.
        self._root = Path(trainer.log_dir or trainer.default_root_dir)

    # --- making ---

    def check(self) -> None:
        """Refuses settings by which no image can be made, before anything takes long.

        Raises:
            ConfigurationError: for too many steps, or what is unknown of the noise schedule.
        """
        settings, encoders = self.module.hparams, self.module.encoders
        sampler(encoders, settings["sampling_steps"], self.module.schedule[1])

    def size(self) -> tuple[int, int]:
        """Height and width of images in pixels: the data's, else what the network was made for."""
        side = self.module.model.unet.config.sample_size * FACTOR  # type: ignore[union-attr]
        return getattr(self.module.data, "size", None) or (side, side)

    def sampling(self) -> dict[str, Any]:
        """How images are made, as primitives."""
        height, width = self.size()
        settings = self.module.hparams
        how = {"steps": settings["sampling_steps"], "guidance_scale": settings["guidance_scale"]}
        return {"height": height, "width": width, **how, "prediction_type": self.module.schedule[1]}

    def make(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """An image for each prompt and seed."""
        module = self.module
        embeddings = module.embeddings if module.hparams["adapt_text_encoders"] else None
        what = {"prompts": prompts, "seeds": seeds, "device": module.device, "embeddings": embeddings}
        return to_pictures(sample(module.model, module.encoders, **what, **self.sampling()))  # type: ignore[arg-type]

    def step(self, batch: Mapping[str, Any]) -> list[GeneratedImage]:
        """Makes the images of a batch and, at test and predict, writes them."""
        rows = list(zip(batch["name"], batch["prompt"], batch["seed"].tolist(), strict=True))
        # Under FSDP2 all processes compute alike, for fillers too, since each holds a part of every layer. And a
        # process with nothing but fillers computes one, since the network has to run where layers are watched.
        if self._acted and data_parallel_mesh(self.module) is None:
            rows = [row for row in rows if row[2] != FILLER]
        self._acted = True
        found: list[GeneratedImage] = []
        variants: list[tuple[str, Any]] = [("", nullcontext(True))]
        if self._stage == "test":
            variants.append((_STATIC, static_inference(self.module)))
        for variant, inference in variants:
            with inference as acts:
                if acts and rows:
                    images = self.make([row[1] for row in rows], [max(row[2], 0) for row in rows])
                    found += self._keep(variant, rows, images)
        return found

    def _keep(
        self, variant: str, rows: Sequence[tuple[str, str, int]], images: Sequence[Image.Image]
    ) -> list[GeneratedImage]:
        kept = []
        held = self._stage == "validate"
        if not held and self.module.trainer.is_global_zero and not self._earlier:
            self._unlist()
        for (name, prompt, seed), image in zip(rows, images, strict=True):
            if seed == FILLER:
                continue
            kept.append(GeneratedImage(f"{name}.png", prompt, seed))
            self._made.setdefault(variant, []).append((name, kept[-1], image if held else None))
            if not held and not self.module.trainer.fast_dev_run:
                save_images([image], [name], self.folder(variant))
        return kept

    def _unlist(self) -> None:
        if not self.module.trainer.fast_dev_run:
            self._earlier = {variant: unlist_images(self.folder(variant)) for variant in ("", _STATIC)}

    def folder(self, variant: str = "") -> Path:
        """Where this stage's images lie, of a validation those of its step."""
        step = f"step_{self.module.trained_steps:06d}" if self._stage == "validate" else ""
        return self._root / f"{FOLDERS[self._stage]}{variant}" / step

    # --- validation ---

    def finish_validation(self) -> None:
        """Writes the images and their grid, into ``validation/step_NNNNNN`` and TensorBoard."""
        module, trainer = self.module, self.module.trainer
        module.release_encoders()
        made = merge_shards(all_gather_object(self._made.pop("", [])))
        if not made or not trainer.is_global_zero or trainer.sanity_checking:
            return
        grid = grid_of(((what, picture) for _, what, picture in made), f"step {module.trained_steps}")
        if not trainer.fast_dev_run:
            self._unlist()
            save_images([picture for *_, picture in made], [name for name, *_ in made], self.folder())
            self._list([what for _, what, _ in made], "", grid)
        for logger in module.loggers:
            if grid is None:
                continue
            if hasattr(logger, "log_image"):  # W&B
                logger.log_image("val/images", [grid], step=module.trained_steps)
            elif hasattr(logger.experiment, "add_image"):  # TensorBoard
                logger.experiment.add_image("val/images", np.asarray(grid), module.trained_steps, dataformats="HWC")

    # --- prediction ---

    def finish_predict(self) -> None:
        """Writes the list of the images, and their grid, beside them."""
        self.module.release_encoders()
        made = merge_shards(all_gather_object(self._made.pop("", [])))
        if not self.module.trainer.fast_dev_run and self.module.trainer.is_global_zero and made:
            self._write([what for _, what, _ in made])
            print(f"{len(made)} images and their grid: {self.folder()}", flush=True)

    def _write(self, made: Sequence[GeneratedImage], variant: str = "") -> None:
        most = 2 * MOST_PIXELS // len(made)  # of an image, in a grid of all of them
        pictures = ((one, read_picture(self.folder(variant) / one.file, most)) for one in made)
        self._list(made, variant, grid_of(pictures))

    def _list(self, made: Sequence[GeneratedImage], variant: str, grid: Image.Image | None) -> None:
        folder = self.folder(variant)
        for path in {*self._earlier.pop(variant, [])} - {folder / one.file for one in made}:
            path.unlink(missing_ok=True)
        mark = injection_of(self.module.model)  # type: ignore[arg-type]
        method = None if mark is None else mark.method.spec()
        steps = self.module.trained_steps
        generated = GeneratedImages(self.module.hparams["model_name"], method, steps, self.sampling(), tuple(made))
        write_images(folder, generated)
        if grid is not None:
            save_picture(grid, folder / GRID)

    # --- test ---

    def finish_test(self) -> None:
        """Measures the images against the subject's photographs and their prompts, and writes `results.json`."""
        module, trainer = self.module, self.module.trainer
        module.release_encoders()
        if trainer.fast_dev_run:
            return
        scores: dict[str, float] = {}
        each: dict[str, dict[str, dict[str, float]]] = {}
        inference = results.inference_rows(module)
        for stage, variant in zip(inference, ("", _STATIC), strict=False):
            own = self._made.pop(variant, [])
            measured = self._scores([what for _, what, _ in own], self.folder(variant))
            rows = merge_shards(
                all_gather_object([(*made[:2], score) for made, score in zip(own, measured, strict=True)])
            )
            each[stage] = {what.file: score for _, what, score in rows}
            for metric in rows[0][2] if rows else ():
                scores[f"{stage}/{metric}"] = float(np.mean([score[metric] for *_, score in rows]))
            if trainer.is_global_zero and rows:
                self._write([what for _, what, _ in rows], variant)
        for path in (one for earlier in self._earlier.values() for one in earlier):  # of an AuroRA in this place
            path.unlink(missing_ok=True)
        module.log_dict(scores, sync_dist=True)  # every rank has them; without it Lightning warns
        seconds, folder = time.perf_counter() - self._started, trainer.log_dir
        if trainer.is_global_zero and folder is not None:
            data = module.data
            protocol = {
                **results.about(module, "dreambooth"),
                "sampling": self.sampling(),
                **self._metrics(),
                "data": data.protocol() if hasattr(data, "protocol") else None,
            }
            facts = {"n": len(each["test"]), "seconds": seconds, "inference": inference, "images": each}
            path = results.write(Path(folder), results.collect(module, scores, protocol=protocol, **facts))
            print(f"Results: {path}", flush=True)

    def _metrics(self) -> dict[str, str | None]:
        return {name: self.module.hparams[name] for name in ("dino", "clip")}

    def _scores(self, made: Sequence[GeneratedImage], folder: Path) -> list[dict[str, float]]:
        """Of each image its similarity to the subject's photographs, and to its prompt."""
        data = self.module.data
        if not made or self._similarity is None:
            return [{} for _ in made]
        pictures = [read_picture(folder / one.file) for one in made]
        return self._similarity.scores(pictures, [one.prompt for one in made], data.reference_images())["images"]

    # --- class images ---

    def make_class_images(self, data: Any) -> None:
        """Makes the class images that the data module lacks, and hands them over one by one.

        Image number n is made with seed n, by the network before its training.

        Raises:
            DataError: where some are missing and the network is trained already.
        """
        module, trainer = self.module, self.module.trainer
        made_by = {name: module.hparams[name] for name in ("model_name", "revision", "variant", "vae", "base_dtype")}
        trained = trainer.ckpt_path is not None or module.trained_steps
        if trained and (missing := data.class_images_missing()):
            raise DataError(
                f"{len(missing)} of {data.num_class_images} class images are missing in {data.class_folder}, and a "
                "network that is trained already cannot make them: start the fit without --ckpt_path, or give another "
                "class_folder with images of your own"
            )
        missing = data.class_images_missing({**made_by, **self.sampling()})
        if not missing:
            return
        if trainer.is_global_zero:
            print(f"Class images: {len(missing)} of {data.num_class_images} are made, by the base", flush=True)
        module.know_prompts("class")
        alike = data_parallel_mesh(module) is not None  # then all processes compute each, and one writes

        def make() -> None:
            for number in missing if alike else missing[trainer.global_rank :: trainer.world_size]:
                image = self.make([data.class_prompt], [number])[0]
                if not alike or trainer.is_global_zero:
                    data.add_class_image(number, image)

        together(make)


def grid_of(images: Iterable[tuple[GeneratedImage, Image.Image]], title: str = "") -> Image.Image | None:
    """A labelled grid, a row for each prompt, a column for each seed; None where there are more than can be seen."""
    cells = {(one.prompt, one.seed): image for one, image in images}
    prompts = list(dict.fromkeys(prompt for prompt, _ in cells))
    seeds = sorted({seed for _, seed in cells})
    try:
        check_shape(len(prompts), len(seeds))
    except ConfigurationError:
        return None
    rows = [[cells.get((prompt, seed)) for seed in seeds] for prompt in prompts]
    return labelled_grid(rows, prompts, [f"seed {seed}" for seed in seeds], title)
