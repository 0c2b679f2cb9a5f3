"""What each site gets of the global weights: all of the store, or the layers that it shares.

Rules:

- The store (`global.safetensors`, and with `wire: half` or `int8` its `difference.safetensors`) is what the journal
  speaks of. A view is made of it when it is asked for, and made again where it is missing: the same store gives the
  same bytes.
- A site that shares the whole store under the same names gets the store itself: with one network nothing is copied.
- Sites with the same network have one view between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from federation import files, weights
from federation.weights import TensorFile
from orchestrator.aggregation.shared_layers import SharedLayers
from orchestrator.journal import Journal


class Views:
    """The views of one study.

    Parameters
    ----------
    journal : Journal
        Knows where the stores lie.
    layers : SharedLayers
        Who shares what.
    """

    def __init__(self, journal: Journal, layers: SharedLayers) -> None:
        self._journal, self._layers = journal, layers
        whole = {key: key for key in layers.specs}
        self._suffix = {
            site: "" if names == whole else f"-{files.sha256_json(dict(names))[:12]}"
            for site, names in layers.names.items()
        }
        self._digests: dict[Path, str] = {}

    def begin(self, fold: str, first: Mapping[str, Path]) -> str:
        """Write the store that a fold begins with; returns its digest.

        Parameters
        ----------
        first : Mapping[str, Path]
            For each site the first weights of its network. A tensor is taken from the first site, by name, that
            shares it: averaging the random numbers of several networks would shrink them.
        """
        layers = self._layers
        opened = {path: TensorFile(path) for path in set(first.values())}

        def read(key: str) -> weights.Tensor:
            site = layers.holders(key)[0]
            return opened[first[site]].read(layers.names[site][key])

        return weights.write_tensors(self._journal.global_file(fold, 0), layers.specs, read)

    def names(self, site: str) -> Mapping[str, str] | None:
        """For each key that a site shares the tensor's name there; None: the whole store, under the same names."""
        return self._layers.names[site] if self._suffix[site] else None

    def weights(self, fold: str, number: int, site: str) -> Path:
        """The weights after a round, float32, as a site knows them."""
        return self._view(self._journal.global_file(fold, number), site)

    def difference(self, fold: str, number: int, site: str) -> tuple[Path, str] | None:
        """The same as a difference to the round before, and its SHA-256; None where there is none."""
        store = self._journal.round_folder(fold, number) / "difference.safetensors"
        if not store.exists():
            return None
        path = self._view(store, site)
        return path, self._sha256(path)

    def digest(self, fold: str, number: int, site: str) -> str | None:
        """SHA-256 of `weights`; None when the store is gone or was never there."""
        if number < 0 or not self._journal.global_file(fold, number).exists():
            return None
        return self._sha256(self.weights(fold, number, site))

    def _sha256(self, path: Path) -> str:
        """Of a file that is never changed; read once, however many sites get it."""
        if path not in self._digests:
            self._digests = {old: digest for old, digest in self._digests.items() if old.exists()}
            self._digests[path] = files.sha256_of(path)
        return self._digests[path]

    def _view(self, store: Path, site: str) -> Path:
        if not self._suffix[site]:
            return store
        path = store.with_name(f"{store.stem}{self._suffix[site]}.safetensors")
        if not path.exists():
            names = {name: key for key, name in self._layers.names[site].items()}
            weights.select(store, names, path)
        return path
