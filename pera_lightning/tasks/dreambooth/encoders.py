"""What Stable Diffusion XL has beside the trained network: the VAE and frozen text encoders.

Each image and each prompt is computed alone: the result does not depend on what else is in the batch, and the memory
needed, which the VAE in float32 decides, is that of one image.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pera_lightning.tasks.dreambooth.networks import load_text_encoders
from pera_lightning.tasks.dreambooth.pipeline_files import INDEX, check_size, identity, read
from pera_lightning.tasks.dreambooth.tokenization import load_tokenizers, prompt_embeddings, tokenise
from pera_lightning.tasks.dreambooth.vae import load_vae, shift_and_scale

_TEXT_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class Encoders:
    """The VAE and both text encoders of a pipeline, frozen, loaded when they are needed and on the device asked for.

    Not an `nn.Module`: what is here is neither trained, sharded, saved nor counted.

    Args:
        name: hub id, or folder.
        vae: another VAE, by hub id or folder, such as ``madebyollin/sdxl-vae-fp16-fix``. It runs in `dtype`; SDXL's
            own overflows in float16 and runs in float32.
        dtype: type that the text encoders run in.
        revision: branch, tag or commit of the hub's repository `name`.
        variant: variant of its weights' files, such as "fp16".
    """

    def __init__(
        self,
        name: str,
        *,
        vae: str | None = None,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        self.name, self.dtype, self.revision, self.variant = name, dtype, revision, variant
        # Where the VAE is: in a folder of the pipeline, or in `vae` itself, which has revisions of its own.
        self._vae_place = (name, "vae") if vae is None else (vae, "")
        own = {"dtype": torch.float32, "revision": revision, "variant": variant}
        self._vae_options = own if vae is None else {"dtype": dtype, "revision": None, "variant": None}
        self._vae: Any = None
        self._text: list[nn.Module] | None = None
        self._tokenizers: Any = None
        self._prompts: dict[str, tuple[Tensor, Tensor]] = {}  # embeddings, on the CPU

    # --- images ---

    def latents(self, pixels: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Encodes images into the normal distribution of their latents, scaled as the UNet takes them.

        Args:
            pixels: (B, 3, H, W) in [-1, 1]; height and width are multiples of 8.
            device: where it is computed.

        Returns:
            Mean and standard deviation, (B, 4, H/8, W/8) in float32 on the device; see `shift_and_scale`.
        """
        check_size(*pixels.shape[-2:])
        with _plain(device):
            vae = self._load_vae(device)
            shift, scale = shift_and_scale(vae, device)
            means, stds = [], []
            for image in pixels.split(1):
                found = vae.encode(image.to(device, vae.dtype)).latent_dist  # (1, 4, H/8, W/8)
                # The distribution, not a sample of it: the training draws anew in each step.
                means.append((found.mean.float() - shift) * scale)
                stds.append(found.std.float() * scale)
            return torch.cat(means), torch.cat(stds)

    def decode(self, latents: Tensor, device: torch.device | str) -> Tensor:
        """Decodes latents (B, 4, h, w), as the UNet takes them, into images (B, 3, 8h, 8w) in [0, 1], float32."""
        with _plain(device):
            vae = self._load_vae(device)
            shift, scale = shift_and_scale(vae, device)
            images = []
            for one in latents.split(1):
                plain = (one.to(device, torch.float32) / scale + shift).to(vae.dtype)
                images.append((vae.decode(plain, return_dict=False)[0].float() * 0.5 + 0.5).clamp(0, 1))  # of [-1, 1]
            return torch.cat(images)

    def _load_vae(self, device: torch.device | str) -> Any:
        if self._vae is None:
            self._vae = load_vae(*self._vae_place, **self._vae_options)
        return self._vae.to(device)

    def write_vae(self, folder: Path) -> None:
        """Writes the VAE, in place of one that is there."""
        from pera_lightning.export.pipeline_files import without_path

        shutil.rmtree(folder, ignore_errors=True)  # its weights may be spread over other files
        self._load_vae("cpu").save_pretrained(folder)  # in its own dtype
        without_path(folder / "config.json")  # the folder that it was loaded from
        self.release(text=False)

    # --- text ---

    def prompts(self, prompts: Sequence[str], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Embeds prompts: (B, 77, D) and pooled (B, P), in the encoders' dtype; each is kept in CPU memory."""
        with _plain(device):
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._prompts:
                    made = prompt_embeddings(self._load_text(device), self.token_ids([prompt]))
                    self._prompts[prompt] = made[0].cpu(), made[1].cpu()  # small: they outlive the encoders
            found = [self._prompts[prompt] for prompt in prompts]
            embeds, pooled = (torch.cat(each).to(device) for each in zip(*found, strict=True))  # one a prompt
            return embeds, pooled

    def _load_text(self, device: torch.device | str) -> list[nn.Module]:  # the first and the second
        if self._text is None:  # or released: a prompt that was not known loads them again
            found = load_text_encoders(self.name, dtype=self.dtype, revision=self.revision, variant=self.variant)
            self._text = [encoder.requires_grad_(False) for encoder in found]
        return [encoder.to(device) for encoder in self._text]

    def token_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Gives token ids (B, 77) of prompts for either text encoder, on the CPU; see `tokenise`."""
        if self._tokenizers is None:
            self._tokenizers = load_tokenizers(self.name, self.revision)
        return tokenise(self._tokenizers, prompts)

    def unconditional(self, embed: Callable[[list[str]], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Gives what guidance leads away from: embeddings of the empty prompt, or zeros if the pipeline says so."""
        embeds, pooled = embed([""])
        if read(self.name, INDEX, self.revision).get("force_zeros_for_empty_prompt", True):
            return torch.zeros_like(embeds), torch.zeros_like(pooled)  # as SDXL's own does
        return embeds, pooled

    # --- what is held, and what it is ---

    def release(self, vae: bool = True, text: bool = True) -> int:
        """Frees the networks' memory and returns its bytes; embeddings of prompts that were seen stay known."""
        before = self.held()
        if vae:
            self._vae = None
        if text:
            self._text = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # so that other processes on the device have it
        return before - self.held()

    def held(self) -> int:
        """Counts the bytes of the networks that are loaded."""
        networks = [network for network in (self._vae, *(self._text or ())) if network is not None]
        tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
        return sum(tensor.nbytes for tensor in tensors)

    def settings(self) -> dict[str, dict[str, str | None]]:
        """Gives what latents of "images" and embeddings of "prompts" depend on, as primitives: for keys of caches."""
        (name, part), options = self._vae_place, self._vae_options
        of_vae = identity(name, f"{part}/config.json".lstrip("/"), [part], options["revision"])
        of_text = identity(self.name, INDEX, _TEXT_FOLDERS, self.revision)
        image = {"vae": name, "files": of_vae, "dtype": _word(options["dtype"]), "variant": options["variant"]}
        text = {"model": self.name, "files": of_text, "dtype": _word(self.dtype), "variant": self.variant}
        return {"images": image, "prompts": text}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _plain(device: torch.device | str) -> Iterator[None]:
    """Without gradients and autocast; its tensors may be used in training later, as inference mode's cannot be."""
    off = torch.autocast(torch.device(device).type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), off:
        yield
