"""Image features on disk: made by an encoder batch by batch, memory-mapped, taken up again where a run was ended."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from pathalign.artefacts import fingerprint, write_atomically
from pathalign.augment import orient
from pathalign.images import content_id, to_pixel_values
from pathalign.progress import Progress

CPU_BATCH_SIZE, ACCELERATOR_BATCH_SIZE = 16, 256  # larger ones cost a CPU twice the time, in page faults
SAVE_EVERY_ROWS = 1024


def network_id(network: nn.Module) -> str:
    """Hash of all weights and buffers, and of the `spec` of an encoder of `load_encoder`: one name may get others."""
    digest = hashlib.sha256(repr(getattr(network, "spec", None)).encode())
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FeatureStore:
    """Makes encoder features and keeps them in a folder, so that an interrupted evaluation makes hardly any twice.

    Features are kept by the encoder's name, weights and input, and by the images: what changes one of them makes new
    ones.
    """

    def __init__(self, encoder: nn.Module, encoder_name: str, folder: Path, device: torch.device):
        self.encoder = encoder.to(device).eval()
        self.identity, self.folder, self.device = [encoder_name, network_id(self.encoder)], folder, device
        self.batch_size = CPU_BATCH_SIZE if device.type == "cpu" else ACCELERATOR_BATCH_SIZE
        folder.mkdir(parents=True, exist_ok=True)

    def features(self, images: Tensor, description: str, orientations: int = 1) -> np.ndarray:
        """Features of images, memory-mapped and read-only.

        Args:
            images: Shape `(n, 3, height, width)`, uint8.
            description: What the progress bar calls them.
            orientations: How many of the eight flips and quarter turns of `pathalign.augment.orient` are taken.

        Returns:
            Shape `(orientations * n, d)`, float32; rows n to 2 n - 1 belong to orientation 1, and so on.
        """
        name = fingerprint([*self.identity, len(images), orientations, content_id(images)])
        path = self.folder / f"features-{name}.npy"
        with FileLock(path.with_suffix(".lock")):  # evaluations at the same time may share a folder
            if not path.is_file():
                self._make(path, images, description, orientations)
        return np.load(path, mmap_mode="r")

    @torch.no_grad()
    def _make(self, path: Path, images: Tensor, description: str, orientations: int) -> None:
        unfinished, progress_file = path.with_suffix(".partial"), path.with_suffix(".rows")
        total = orientations * len(images)
        done = int(progress_file.read_text()) if progress_file.is_file() and unfinished.is_file() else 0
        store = np.lib.format.open_memmap(unfinished, mode="r+") if done else None
        saved = done
        with Progress(f"features of {description}", total, done, unit="image") as progress:
            while done < total:
                orientation, first = divmod(done, len(images))
                batch = orient(images[first : first + self.batch_size], orientation)
                features = self.encoder(to_pixel_values(batch).to(self.device)).float().cpu().numpy()
                if store is None:
                    shape = (total, features.shape[1])
                    store = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
                store[done : done + len(features)] = features
                done += len(features)
                progress.update(len(features))
                if done - saved >= SAVE_EVERY_ROWS:
                    store.flush()
                    write_atomically(progress_file, str(done))
                    saved = done
        assert store is not None
        store.flush()
        unfinished.replace(path)
        progress_file.unlink(missing_ok=True)
